"""The report of a benchmark, and the same as a page to read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .measurement import Measurement
from .options import BenchmarkOptions
from .summary import Summary, round_phases, summarize


def make_report(
    measurements: Sequence[Measurement],
    prompts: Mapping[str, Sequence[str]],
    options: BenchmarkOptions,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The content of `report.json`, methods in the order of the options.

    Args:
        measurements (`Sequence[Measurement]`): all.
        prompts (`Mapping[str, Sequence[str]]`): name of each prompt set -> its prompts.
        options (`BenchmarkOptions`): what was asked for.
        settings (`dict`): the content of `options.json`.
    """
    order = sorted(measurements, key=lambda one: options.methods.index(one.method))

    def summary_of(names: Sequence[str]) -> dict[str, Any]:
        chosen = [one for one in order if one.prompts in names]
        summaries = summarize(chosen, temperature=options.temperature)
        return {"num_prompts": sum(len(prompts[name]) for name in names), "methods": to_json(summaries)}

    return settings | {
        "peak_memory_bytes": max(one.peak_memory_bytes for one in measurements),
        "prompt_sets": {name: summary_of([name]) for name in prompts},
        "all": summary_of(list(prompts)),
    }


def to_json(summaries: dict[str, Summary]) -> dict[str, Any]:
    """Summaries as plain dictionaries, ratios by the names of their parts."""
    return {
        method: asdict(summary) | {"ratio": summary.ratio._asdict() if summary.ratio else None}
        for method, summary in summaries.items()
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page: what was run where, then a table for each prompt set.

    Args:
        report (`dict`): the content of `report.json`; its schema is in [`~jetspec_hf.benchmark.folder`].
    """
    sets = report["prompt_sets"] | ({"All sets": report["all"]} if len(report["prompt_sets"]) > 1 else {})
    shows_memory = report["environment"]["gpu"] is not None
    parts = ["# Benchmark", _setting(report), _LEGEND]
    for name, one in sets.items():
        rows = {method: _row(summary, shows_memory=shows_memory) for method, summary in one["methods"].items()}
        parts += [f"## {name}, {one['num_prompts']} prompts", _table(rows)]
    rounds = _round_rows(report["all"]["methods"])
    if rounds:
        parts += ["## Milliseconds of a round, all prompts", _ROUND_LEGEND, _table(rounds)]
    return "\n\n".join(parts) + "\n"


_LEGEND = """\
Ratio: time of plain `generate` by time of the method, whole calls summed over prompts, with the 95% interval over
resampled prompts. Tokens per round count the bonus token; plain decoding has 1. The pass over the prompt is not a
round. Breaks even at: the tokens per round at which a method is as fast as plain decoding, from this run's own times:
mean seconds of its rounds by those of a plain step, the time to the first token left out. Equal: answers with the
tokens of plain `generate`, of those that should have them; a batch counts as one answer."""

_ROUND_LEGEND = """\
Host time. A GPU works on while the host goes ahead, and is waited for in `accept`. `processors`: those of `generate`,
where there are any. `other`: what no phase covers, such as streaming. The pass over the prompt is left out."""


def _setting(report: dict[str, Any]) -> str:
    environment, options = report["environment"], report["options"]
    temperature = options["temperature"]
    lines = {
        "date": report["date"],
        "target": f"{report['target']['name']}, {report['target']['num_parameters']:,} parameters",
        "head": f"{report['head']['name']}, {report['head']['num_parameters']:,} parameters",
        "hardware": f"{environment['gpu'] or environment['cpu']}, {environment['cores']} CPU cores",
        "run": f"{environment['dtype']} on {environment['device']}, CPU threads: {environment['threads']}, "
        f"batch size {environment['batch_size']}",
        "versions": f"jetspec_hf {environment['jetspec_hf']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}",
        "decoding": f"{f'sampled at temperature {temperature}' if temperature else 'greedy'}, "
        f"at most {options['max_new_tokens']} new tokens",
        "peak memory": f"{report['peak_memory_bytes'] / 2**20:.0f} MiB, all methods",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _table(rows: dict[str, dict[str, str]]) -> str:
    """One row for each method, all with the same columns."""
    columns = list(next(iter(rows.values())))
    lines = [["method", *columns], ["---"] + ["---:"] * len(columns)]
    lines += [[method, *row.values()] for method, row in rows.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _round_rows(methods: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The time of a mean round by phase, for the methods that tell their phases."""
    rounds = {
        method: round_phases(summary)
        for method, summary in methods.items()
        if summary["num_rounds"] and summary["phase_seconds"]
    }
    phases = [*dict.fromkeys(phase for one in rounds.values() for phase in one if phase != "other"), "other"]
    return {
        method: {phase: f"{1000 * one.get(phase, 0.0):.2f}" for phase in phases}
        | {"sum": f"{1000 * sum(one.values()):.2f}"}
        for method, one in rounds.items()
    }


def _row(summary: dict[str, Any], *, shows_memory: bool) -> dict[str, str]:
    ratio, tokens_per_round = summary["ratio"], summary["tokens_per_round"]
    shares = summary["accepted_by_depth"]
    return {
        "ratio to plain": "-" if ratio is None else f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        "tokens/s": f"{summary['tokens_per_second']:.1f}",
        "tokens per round": "-" if tokens_per_round is None else f"{tokens_per_round:.2f}",
        "breaks even at": "-" if summary["break_even"] is None else f"{summary['break_even']:.2f}",
        "first token, ms": f"{summary['time_to_first_token'] * 1000:.1f}",
        **{
            f"accepted ≥ {depth}": f"{shares[depth - 1]:.0%}" if depth <= len(shares) else "-" for depth in (1, 2, 4, 8)
        },
        "equal": f"{summary['num_equal']} of {summary['num_compared']}" if summary["num_compared"] else "-",
        **({"peak memory, MiB": f"{summary['peak_memory_bytes'] / 2**20:.0f}"} if shows_memory else {}),
    }
