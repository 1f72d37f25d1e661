"""Measure all methods in one process, prompt by prompt, each prompt starting with another method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..pair import DecodingPair
from .folder import RESULTS, add_measurement, claim, read_measurements, write_report
from .measurement import Measurement, Runner
from .method import Method
from .options import BenchmarkOptions
from .report import make_report
from .setting import describe


def run_benchmark(
    target: PreTrainedModel,
    head: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_sets: Mapping[str, Sequence[str]],
    options: BenchmarkOptions,
    *,
    output_dir: str | Path,
) -> dict[str, Any]:
    """Measure every method on every prompt, and write the files that [`~jetspec_hf.benchmark.folder`] describes.

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
    settings = claim(folder, describe(target, head, prompts, options))
    results = folder / RESULTS
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
    batches = {name: _in_batches(rows, options.batch_size) for name, rows in prompts.items()}
    measurements += _measure_missing(runner, options.methods, batches, measurements, results)
    report = make_report(measurements, prompts, options, settings)
    write_report(report, folder)
    return report


def _in_batches(prompts: Sequence[str], batch_size: int) -> list[Sequence[str]]:
    return [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]


def _measure_missing(
    runner: Runner,
    methods: list[str],
    prompts: Mapping[str, Sequence[Sequence[str]]],
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
    by_name = {name: Method.parse(name) for name in methods}
    for method in dict.fromkeys(method for *_, method in missing):
        name, index, _ = missing[0]
        runner.measure(prompts[name][index], name, index, by_name[method])  # warm-up
    measured = []
    with tqdm(total=len(tasks), initial=len(is_done)) as progress:
        for name, index, method in missing:
            progress.set_description(f"{name} {method}")
            measured.append(runner.measure(prompts[name][index], name, index, by_name[method]))
            add_measurement(measured[-1], results)
            progress.update()
    return measured
