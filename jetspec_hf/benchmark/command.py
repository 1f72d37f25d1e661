"""`jetspec bench`: load a pair, measure it, show the report."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer

from ..head.modeling_jetspec import JetSpecDraftHead
from ..ranges import check_at_least
from ..target.loading import load_target
from .folder import check_results_folder
from .options import BenchmarkOptions
from .prompts import read_prompts
from .run import run_benchmark


@dataclass(frozen=True)
class BenchArguments:
    """What to benchmark, on what, and where to write.

    Args:
        target (`str`): folder or Hub id of the target.
        head (`str`): folder or Hub id of the head.
        prompts (`list[str]`): JSON-lines files whose rows have `prompt`.
        output_dir (`str`): folder for the results.
        gguf_file (`str`, *optional*): file of the target's folder that holds it, where it is GGUF.
        dtype (`str`, *optional*, defaults to `"auto"`): number type of target and head; `auto` is the checkpoint's own.
        device (`str`, *optional*): where to run; by default the GPU if there is one.
        threads (`int`, *optional*): CPU threads; by default as torch decides.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    head: str = field(metadata={"help": "Folder or Hub id of the head."})
    prompts: list[str] = field(metadata={"help": "JSON-lines files whose rows have `prompt`."})
    output_dir: str = field(metadata={"help": "Folder for the results; a killed run goes on from there."})
    gguf_file: str | None = field(default=None, metadata={"help": "File there that holds the target, if it is GGUF."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Number type of target and head."}
    )
    device: str | None = field(default=None, metadata={"help": "Where to run; by default the GPU if there is one."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default as torch decides."})

    def __post_init__(self) -> None:
        check_at_least(self, threads=1)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"There is no `device` {self.device!r} here: {error}") from error


def run_bench(arguments: BenchArguments, options: BenchmarkOptions) -> None:
    """Run `jetspec bench`."""
    check_results_folder(arguments.output_dir)
    prompt_sets = read_prompts(arguments.prompts)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(arguments.target, arguments.gguf_file, dtype=arguments.dtype).to(device)
    head = JetSpecDraftHead.from_pretrained(arguments.head, dtype=target.dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target, gguf_file=arguments.gguf_file)
    run_benchmark(target, head, tokenizer, prompt_sets, options, output_dir=arguments.output_dir)
    report = Path(arguments.output_dir) / "report.md"
    print(report.read_text(encoding="utf-8"))
