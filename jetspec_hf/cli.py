"""The command `jetspec`."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from .benchmark import BenchmarkOptions, read_prompts, run_benchmark
from .modeling_jetspec import JetSpecDraftHead


class Command(NamedTuple):
    """One `jetspec <command>`."""

    summary: str  # one line of `jetspec --help`
    dataclasses: tuple[type, ...]  # their fields are the command's options
    run: Callable[..., None]  # takes one instance of each


@dataclass(frozen=True)
class BenchArguments:
    """What to benchmark, on what, and where to write.

    Args:
        target (`str`): folder or Hub id of the target.
        head (`str`): folder or Hub id of the head.
        prompts (`list[str]`): JSON-lines files whose rows have `prompt`.
        output_dir (`str`): folder for the results.
        dtype (`str`, *optional*, defaults to `"auto"`): number type of target and head; `auto` is the checkpoint's own.
        device (`str`, *optional*): where to run; by default the GPU if there is one.
        threads (`int`, *optional*): CPU threads; by default as torch decides.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    head: str = field(metadata={"help": "Folder or Hub id of the head."})
    prompts: list[str] = field(metadata={"help": "JSON-lines files whose rows have `prompt`."})
    output_dir: str = field(metadata={"help": "Folder for the results; a killed run goes on from there."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Number type of target and head."}
    )
    device: str | None = field(default=None, metadata={"help": "Where to run; by default the GPU if there is one."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default as torch decides."})


def bench(arguments: BenchArguments, options: BenchmarkOptions) -> None:
    """Run `jetspec bench`."""
    prompt_sets = read_prompts(arguments.prompts)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=arguments.dtype).to(device)
    head = JetSpecDraftHead.from_pretrained(arguments.head, dtype=target.dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    run_benchmark(target, head, tokenizer, prompt_sets, options, output_dir=arguments.output_dir)
    report = Path(arguments.output_dir) / "report.md"
    print(report.read_text(encoding="utf-8"))


COMMANDS = {
    "bench": Command(
        "measure drafting beside plain decoding, prompt lookup and the stock chain",
        (BenchArguments, BenchmarkOptions),
        bench,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments (`list[str]`, *optional*): the command and its options; by default those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    listed = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        "jetspec",
        description=f"commands:\n{listed}",
        epilog="`jetspec <command> --help` lists the options of a command.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS))
    # Only the first word: the rest is the command's.
    name = parser.parse_args(arguments[:1]).command
    command = COMMANDS[name]
    options = HfArgumentParser(command.dataclasses, prog=f"jetspec {name}", description=command.summary)
    try:
        parsed = options.parse_args_into_dataclasses(arguments[1:], look_for_args_file=False)
    except ValueError as error:
        options.error(str(error))
    command.run(*parsed)
