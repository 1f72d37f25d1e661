"""Measure drafting beside plain decoding: `jetspec bench`, and this for Python.

from jetspec_hf.benchmark import BenchmarkOptions, read_prompts, run_benchmark
options = BenchmarkOptions(methods=["plain", "lookup", "auto"])
prompt_sets = read_prompts(["examples/prompts/gsm8k.jsonl"])
report = run_benchmark(target, head, tokenizer, prompt_sets, options, output_dir="runs/bench")
report["all"]["methods"]["auto"]["ratio"]
"""

from .benchmark_folder import check_results_folder, read_measurements
from .benchmark_options import BenchmarkOptions
from .benchmark_prompts import read_prompts
from .benchmark_run import run_benchmark
from .measurement import Measurement
from .method import Method

__all__ = [
    "BenchmarkOptions",
    "Measurement",
    "Method",
    "check_results_folder",
    "read_measurements",
    "read_prompts",
    "run_benchmark",
]
