"""Measure drafting beside plain decoding: `jetspec bench`, and [`run_benchmark`] for Python.

All methods run in one process, prompt by prompt, each prompt starting with another method. The output folder holds

- `options.json`: what was asked for and where it runs, written at the start.
- `results.jsonl`: one [`~jetspec_hf.measurement.Measurement`] a line, written as soon as it is taken. A run that was
  killed goes on from here.
- `report.json`: written at the end,

      date             when the run began, UTC
      target, head     name (at most two parts of a path) and num_parameters
      options          the fields of `BenchmarkOptions`
      environment      cpu, cores, gpu, device, dtype, threads, batch_size, torch, transformers, jetspec_hf
      prompts          name of each prompt set -> num_prompts, sha256 of them
      peak_memory_bytes  the most of all methods
      prompt_sets      name of each prompt set -> num_prompts, methods: name -> fields of `Summary`,
                       `ratio` as value, low, high
      all              the same over all sets together

- `report.md`: the same as tables.
- `nodes.png`, `phases.png`, `acceptance.png`: where matplotlib is installed.
"""

import hashlib
import importlib.util
import json
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .json_lines import read_rows
from .measurement import METHODS, Measurement, Runner, num_nodes
from .pair import DecodingPair
from .records import check_same, read_own_rows, read_record, write_whole
from .report import summarize, to_json, to_markdown
from .version import __version__

_RECORD, _RESULTS = "options.json", "results.jsonl"
_COLUMNS = {field.name for field in fields(Measurement)}
_SETTINGS = ("target", "head", "options", "environment", "prompts")
_REPORTS = ("report.json", "report.md", "nodes.png", "phases.png", "acceptance.png")


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured.

    Args:
        methods (`list[str]`, *optional*):
            `plain`: `generate` alone. `lookup`: prompt lookup of 10 tokens. `dflash`: transformers' own chain with the
            head. `chain`: our loop, the head alone drafting its likeliest tokens, one for each depth. `auto`: trees of
            as many nodes as are fastest, found while decoding. `tree-N`: trees of at most N nodes, the root not
            counted. `tree`: trees as the head asks for.
        num_prompts (`int`, *optional*, defaults to 20): most prompts of each set, from its start.
        max_new_tokens (`int`, *optional*, defaults to 256): longest answer in tokens.
        temperature (`float`, *optional*, defaults to 0.0): 0 decodes greedily; above, no other warper is set.
        seed (`int`, *optional*, defaults to 0): sampling the i-th prompt of a set starts from `seed + i`.
        compile (`bool`, *optional*, defaults to `False`): give plain decoding, chain and trees static caches, and
            compile them, on a CPU too. `lookup` and `dflash` take none.

    Raises:
        ValueError: if a method is unknown or listed twice, or a number is too small.
    """

    methods: list[str] = field(
        default_factory=lambda: ["plain", "lookup", "dflash", "chain", "auto", "tree-15", "tree-31", "tree-63"],
        metadata={
            "help": "plain, lookup, dflash (transformers' chain), chain (ours), auto for trees of as many nodes as are "
            "fastest, tree-N for trees of at most N nodes, tree for the head's own number."
        },
    )
    num_prompts: int = field(default=20, metadata={"help": "Most prompts of each file, from its start."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily, more samples."})
    seed: int = field(default=0, metadata={"help": "Sampling the i-th prompt of a file starts from seed + i."})
    compile: bool = field(
        default=False,
        metadata={"help": "Compile plain, chain and trees, with static caches; lookup, dflash take none."},
    )

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS and num_nodes(method) is None]
        if unknown or not self.methods:
            raise ValueError(
                f"There is no method {', '.join(unknown) or 'given'}; "
                f"choose from {', '.join(METHODS)}, and tree-N with a number of nodes, such as tree-63."
            )
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"A method is listed twice in {' '.join(self.methods)}; name each once.")
        if self.num_prompts < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                "`num_prompts` and `max_new_tokens` must be at least 1 and `temperature` at least 0; "
                f"got {self.num_prompts}, {self.max_new_tokens} and {self.temperature}."
            )

    @property
    def comparable_methods(self) -> list[str]:
        """The methods that emit the tokens of plain decoding: when sampling, those that draw as it does."""
        if self.temperature == 0:
            return self.methods
        return [method for method in self.methods if method in ("plain", "chain", "auto") or method.startswith("tree")]


def read_prompts(paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """Read prompt sets from JSON-lines files whose rows have `prompt`.

    Returns:
        `dict[str, list[str]]`: file name without ending -> its prompts.

    Raises:
        ValueError: if a file holds no row or a row that is no JSON object with words as its `prompt`, or if two files
            have the same name.
    """
    sets: dict[str, list[str]] = {}
    for path in map(Path, paths):
        if path.stem in sets:
            raise ValueError(f"Two prompt files are named {path.stem!r}; rename one, since tables go by file name.")
        form = 'every line must look like {"prompt": "What is 17 * 24?"}.'
        sets[path.stem] = []
        for number, row in read_rows(path):
            prompt = row.get("prompt")
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"Row {number} of {str(path)!r} has the `prompt` {json.dumps(prompt)}; {form}")
            sets[path.stem].append(prompt)
        if not sets[path.stem]:
            raise ValueError(f"{str(path)!r} is empty; {form}")
    return sets


def check_results_folder(folder: str | Path) -> None:
    """Refuse a folder that [`run_benchmark`] would not write to, before anything is loaded.

    Raises:
        ValueError: if it holds a file that a benchmark would write over and did not make.
    """
    _read_settings(Path(folder))
    read_own_rows(Path(folder) / _RESULTS, _COLUMNS)


def run_benchmark(
    target: PreTrainedModel,
    head: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_sets: Mapping[str, Sequence[str]],
    options: BenchmarkOptions,
    *,
    output_dir: str | Path,
) -> dict[str, Any]:
    """Measure every method on every prompt, and write the files that the module describes.

    Called again with the same folder and options, it measures only what is missing.

    Args:
        target (`PreTrainedModel`): the target.
        head (`JetSpecDraftHead`): the head.
        tokenizer (`PreTrainedTokenizerBase`): the target's; prompts become user turns under its chat template.
        prompt_sets (`Mapping[str, Sequence[str]]`): name of each set -> its prompts.
        options (`BenchmarkOptions`): what to measure.
        output_dir (`str` or `Path`): folder for results, made if missing.

    Returns:
        `dict`: the content of `report.json`.

    Raises:
        ValueError: if there are no prompts, head and target do not fit, or the folder holds a benchmark with other
            options, models, prompts, hardware or versions, or files of the same names that are none.
    """
    prompts = {name: list(rows[: options.num_prompts]) for name, rows in prompt_sets.items()}
    if not prompts or not all(prompts.values()):
        raise ValueError(
            f"Each prompt set needs a prompt; got { ({name: len(rows) for name, rows in prompts.items()}) }."
        )
    DecodingPair(head, target)  # or say why not
    folder = Path(output_dir)
    settings = _claim(folder, _describe(target, head, prompts, options))
    results = folder / _RESULTS
    measurements = read_measurements(results)
    runner = Runner(
        target,
        head,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    if options.compile:
        runner.compile([prompt for rows in prompts.values() for prompt in rows])
    measurements += _measure_missing(runner, options.methods, prompts, measurements, results)
    report = _make_report(measurements, prompts, options, settings)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    _save_plots(report, folder)
    return report


def read_measurements(path: Path) -> list[Measurement]:
    """Read `results.jsonl`, and cut off a line that was being written when its run was killed.

    Raises:
        ValueError: if a line is no measurement; then nothing is cut off.
    """
    rows, num_bytes = read_own_rows(path, _COLUMNS)
    if path.exists():
        os.truncate(path, num_bytes)
    return [Measurement(**row) for row in rows]


def _measure_missing(
    runner: Runner,
    methods: list[str],
    prompts: Mapping[str, Sequence[str]],
    done: Sequence[Measurement],
    results: Path,
) -> list[Measurement]:
    """Take the measurements that are not done yet, each written out at once."""
    is_done = {(one.prompts, one.index, one.method) for one in done}
    tasks = [
        (name, index, method)
        for name, rows in prompts.items()
        for index in range(len(rows))
        for method in methods[index % len(methods) :] + methods[: index % len(methods)]
    ]
    missing = [task for task in tasks if task not in is_done]
    for method in dict.fromkeys(method for *_, method in missing):
        name, index, _ = missing[0]
        runner.measure(prompts[name][index], name, index, method)  # warm-up
    measured = []
    with results.open("a", encoding="utf-8") as file, tqdm(total=len(tasks), initial=len(is_done)) as progress:
        for name, index, method in missing:
            progress.set_description(f"{name} {method}")
            measured.append(runner.measure(prompts[name][index], name, index, method))
            file.write(json.dumps(asdict(measured[-1])) + "\n")
            file.flush()
            progress.update()
    return measured


def _describe(
    target: PreTrainedModel, head: PreTrainedModel, prompts: Mapping[str, Sequence[str]], options: BenchmarkOptions
) -> dict[str, Any]:
    """All that must be the same for measurements to belong together."""
    return {
        "target": _describe_model(target),
        "head": _describe_model(head),
        "options": asdict(options),
        "environment": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else None,
            "device": target.device.type,
            "dtype": str(target.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": 1,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "jetspec_hf": __version__,
        },
        "prompts": {
            name: {"num_prompts": len(rows), "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
            for name, rows in prompts.items()
        },
    }


def _describe_model(model: PreTrainedModel) -> dict[str, Any]:
    # Two parts make a Hub id, and of a local folder no more than is needed to know it again.
    return {"name": "/".join(Path(model.name_or_path).parts[-2:]), "num_parameters": model.num_parameters()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """What the folder is for; `None` if nothing is there."""
    return read_record(folder / _RECORD, _SETTINGS, [folder / name for name in (_RESULTS, *_REPORTS)])


def _claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write down what the folder is for, or check that it is for the same; the settings with the date of the start."""
    held = _read_settings(folder)
    if held is None:
        held = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")} | settings
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _RECORD, (json.dumps(held, indent=2) + "\n").encode())
    there, now = (
        {f"{part} {name}": value for part in _SETTINGS for name, value in parts[part].items()}
        for parts in (held, settings)
    )
    check_same(there, now, folder)
    return held


def _make_report(
    measurements: Sequence[Measurement],
    prompts: Mapping[str, Sequence[str]],
    options: BenchmarkOptions,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The content of `report.json`, methods in the order of the options."""
    order = sorted(measurements, key=lambda one: options.methods.index(one.method))

    def summary_of(names: Sequence[str]) -> dict[str, Any]:
        chosen = [one for one in order if one.prompts in names]
        summaries = summarize(chosen, comparable=options.comparable_methods)
        return {"num_prompts": sum(len(prompts[name]) for name in names), "methods": to_json(summaries)}

    return settings | {
        "peak_memory_bytes": max(one.peak_memory_bytes for one in measurements),
        "prompt_sets": {name: summary_of([name]) for name in prompts},
        "all": summary_of(list(prompts)),
    }


def _save_plots(report: dict[str, Any], folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn(
            "The report was written without pictures; `pip install jetspec_hf[bench]` brings what draws them.",
            stacklevel=3,
        )
        return
    from .plots import save_plots  # needs matplotlib, which is optional

    save_plots(report, folder)
