"""Measure drafting beside plain decoding: `jetspec bench`, and this for Python.

from jetspec_hf.benchmark import BenchmarkOptions, read_prompts, run_benchmark
options = BenchmarkOptions(methods=["plain", "lookup", "auto"])
prompt_sets = read_prompts(["examples/prompts/gsm8k.jsonl"])
report = run_benchmark(target, head, tokenizer, prompt_sets, options, output_dir="runs/bench")
report["all"]["methods"]["auto"]["ratio"]
"""

from .folder import check_results_folder, read_measurements
from .measurement import Measurement
from .method import Method
from .options import BenchmarkOptions
from .prompts import read_prompts
from .run import run_benchmark

__all__ = [
    "BenchmarkOptions",
    "Measurement",
    "Method",
    "check_results_folder",
    "read_measurements",
    "read_prompts",
    "run_benchmark",
]
