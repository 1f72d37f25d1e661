"""The command `jetspec`."""

import importlib
import json
import sys
import typing
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import HfArgumentParser


class Command(NamedTuple):
    """One `jetspec <command>`. Its module is imported when it is called, since some need an optional package."""

    summary: str  # one line of `jetspec --help`
    module: str
    function: str  # each of its parameters is a dataclass, whose fields are options
    extra: str  # what to install for it


COMMANDS = {
    "bench": Command(
        "measure drafting beside plain decoding, prompt lookup and the stock chain",
        "benchmark_command",
        "run_bench",
        "bench",
    ),
    "regenerate": Command("write the target's own answers to train on", "training_commands", "run_regenerate", "train"),
    "extract": Command(
        "store a target's hidden states to train without it", "training_commands", "run_extract", "train"
    ),
    "train": Command("train a head for a target", "training_commands", "run_train", "train"),
    "evaluate": Command("count the tokens per round that a head gives", "training_commands", "run_evaluate", "train"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments (`list[str]`, *optional*): the command and its options; by default those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    listed = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
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
    try:
        run = getattr(importlib.import_module(f".{command.module}", __package__), command.function)
    except ModuleNotFoundError as error:
        parser.error(f"`jetspec {name}` needs {error.name}; run `pip install jetspec_hf[{command.extra}]`.")
    dataclasses = [kind for parameter, kind in typing.get_type_hints(run).items() if parameter != "return"]
    options = HfArgumentParser(
        dataclasses,
        prog=f"jetspec {name}",
        usage=f"jetspec {name} [config.yaml] [--option value ...]",
        description=command.summary,
    )
    try:
        parsed = options.parse_args_into_dataclasses(_with_config(arguments[1:]), look_for_args_file=False)
    except ValueError as error:
        options.error(str(error))
    run(*parsed)


def _with_config(arguments: list[str]) -> list[str]:
    """Put the options of a leading YAML file before those of the command line, which win."""
    if not arguments or not arguments[0].endswith((".yaml", ".yml")):
        return arguments
    config: dict[str, Any] = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8")) or {}
    words = []
    for name, value in config.items():
        if isinstance(value, dict):
            words += [f"--{name}", json.dumps(value)]
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words + arguments[1:]
