"""The command `jetspec`."""

import difflib
import importlib
import json
import logging
import sys
import typing
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainingArguments
from transformers.debug_utils import DebugOption

# What wrong words, files, data and models end in. Any other error is ours, and shows where it is.
_ERRORS_OF_USERS = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    SafetensorError,
    StrictDataclassError,
    torch.OutOfMemoryError,
)

# The options of `TrainingArguments` that `--help` shows; it has a hundred more.
_USUAL = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "resume_from_checkpoint",
    "seed",
    "bf16",
    "use_cpu",
    "report_to",
}


class Command(NamedTuple):
    """One `jetspec <command>`. Its module is imported when it is called, since some need an optional package."""

    summary: str  # one line of `jetspec --help`
    module: str
    function: str  # each of its parameters is a dataclass, whose fields are options
    extra: str  # what to install for it


COMMANDS = {
    "bench": Command(
        "measure drafting beside plain decoding, prompt lookup and the stock chain",
        "benchmark.command",
        "run_bench",
        "bench",
    ),
    "regenerate": Command("write the target's own answers to train on", "training.commands", "run_regenerate", "train"),
    "extract": Command(
        "store a target's hidden states to train without it", "training.commands", "run_extract", "train"
    ),
    "train": Command("train a head for a target", "training.commands", "run_train", "train"),
    "evaluate": Command("count the tokens per round that a head gives", "training.commands", "run_evaluate", "train"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; what its user can mend ends in one line, and with `--debug` in a traceback.

    Args:
        arguments (`list[str]`, *optional*): the command and its options; by default those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    is_debugging = _take_debug(arguments)
    try:
        with _messages_shown():
            _run(arguments)
    except _ERRORS_OF_USERS as error:
        if is_debugging:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"jetspec: error: {said}")


@contextmanager
def _messages_shown() -> Iterator[None]:
    """Show on stderr what the package logs; stdout is for results."""
    logger, handler = logging.getLogger(__package__), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _take_debug(arguments: list[str]) -> bool:
    """Take `--debug` off the line, unless it is that of `TrainingArguments`, which has a value."""
    values = tuple(option.value for option in DebugOption)
    for i, word in enumerate(arguments):
        if word == "--debug" and not "".join(arguments[i + 1 : i + 2]).startswith(values):
            del arguments[i]
            return True
    return False


def _run(arguments: list[str]) -> None:
    listed = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        "jetspec",
        description=f"commands:\n{listed}",
        epilog="`jetspec <command> --help` lists the options of a command; `--debug` shows where an error comes from.",
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
    wants_all = "--help_all" in arguments
    if not wants_all:
        _show_few(options, [kind for kind in dataclasses if issubclass(kind, TrainingArguments)])
    try:
        words = ["--help"] if wants_all else _with_config(arguments[1:], options)
        parsed = options.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ValueError as error:
        options.error(" ".join(str(error).split()))
    run(*parsed)


def _show_few(options: ArgumentParser, kinds: list[type[TrainingArguments]]) -> None:
    """Leave out of `--help` what is in the documentation of transformers, but for what nearly every run needs."""
    inherited = set(TrainingArguments.__dataclass_fields__) - _USUAL
    for kind in kinds:
        options.epilog = "All options of transformers' TrainingArguments work, too; `--help_all` lists them."
        for action in options._actions:
            if action.dest in inherited - set(vars(kind)["__annotations__"]):
                action.help = SUPPRESS


def _with_config(arguments: list[str], options: ArgumentParser) -> list[str]:
    """Put the options of a leading YAML file before those of the command line, which win."""
    if not arguments or not arguments[0].endswith((".yaml", ".yml")):
        return arguments
    known = options._option_string_actions  # `argparse` itself would take the beginning of a name for the whole
    words = []
    for name, value in _read_config(arguments[0]).items():
        if f"--{name}" not in known:
            near = difflib.get_close_matches(str(name), [one[2:] for one in known], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`--help` lists those that there are."
            raise ValueError(f"{arguments[0]} has an unknown option {name!r}; {hint}")
        if isinstance(value, list) and known[f"--{name}"].nargs is None:
            raise ValueError(f"{arguments[0]} has a list for {name!r}, which takes one value; got {value}.")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words + arguments[1:]


def _read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file."""
    try:
        config = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML in UTF-8: {error}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {config!r:.40}; it must hold a line `option: value` for each option.")
    return config
