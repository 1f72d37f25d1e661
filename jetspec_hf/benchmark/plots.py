"""Pictures of a benchmark; needs matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .method import Method
from .summary import round_phases

_METHOD_COLOURS = {"plain": "0.4", "lookup": "tab:orange", "dflash": "tab:red", "chain": "tab:purple"}


def save_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the report holds: `nodes.png`, `phases.png`, `acceptance.png`.

    Args:
        report (`dict`): the content of `report.json`; its schema is in [`~jetspec_hf.benchmark.folder`].
        folder (`Path`): where to, must exist.

    Returns:
        `list[Path]`: the files written; a picture without anything to show is left out.
    """
    figures = {"nodes": _draw_nodes(report), "phases": _draw_phases(report), "acceptance": _draw_acceptance(report)}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _caption(report: dict[str, Any]) -> str:
    environment, temperature = report["environment"], report["options"]["temperature"]
    return (
        f"{environment['gpu'] or environment['cpu']}, {environment['dtype']}, CPU threads: {environment['threads']}, "
        f"batch size 1, {f'temperature {temperature}' if temperature else 'greedy'}"
    )


def _make_figure(report: dict[str, Any], width: float) -> Figure:
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    figure.supxlabel(_caption(report), fontsize=7, color="0.4")
    return figure


def _draw_nodes(report: dict[str, Any]) -> Figure | None:
    """Ratio, and tokens per round with the break-even, against the number of nodes; a line for each prompt set."""
    counts = sorted(nodes for name in report["all"]["methods"] if (nodes := Method.parse(name).num_nodes))
    if not counts:
        return None
    figure = _make_figure(report, 10)
    left, right = figure.subplots(1, 2)
    for name, prompt_set in report["prompt_sets"].items():
        trees = [prompt_set["methods"][Method("tree", nodes).name] for nodes in counts]
        _plot_ratios(left, counts, [tree["ratio"] for tree in trees], name)
        # NaN leaves a gap.
        reached, needed = ([tree[key] or float("nan") for tree in trees] for key in ("tokens_per_round", "break_even"))
        (line,) = right.plot(counts, reached, marker="o", label=name)
        right.plot(counts, needed, linestyle=":", color=line.get_color())
    left.axhline(1, color=_METHOD_COLOURS["plain"], linestyle="--", label="plain")
    left.set_ylabel("speed over plain generate (95% interval)")
    right.set_ylabel("tokens per round, bonus token counted (dotted: break-even)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(nodes) for nodes in counts])
        axes.minorticks_off()
        axes.set_xlabel("most nodes in a tree, the root not counted")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _plot_ratios(axes: Axes, counts: list[int], ratios: list[dict[str, float] | None], name: str) -> None:
    """One line with its intervals; nothing where plain decoding was not measured."""
    known = [(nodes, ratio) for nodes, ratio in zip(counts, ratios, strict=True) if ratio is not None]
    if known:
        values = [ratio["value"] for _, ratio in known]
        # Few prompts can leave the value outside its interval by a rounding error.
        below = [max(ratio["value"] - ratio["low"], 0) for _, ratio in known]
        above = [max(ratio["high"] - ratio["value"], 0) for _, ratio in known]
        axes.errorbar([nodes for nodes, _ in known], values, [below, above], marker="o", capsize=3, label=name)


def _draw_phases(report: dict[str, Any]) -> Figure | None:
    """Milliseconds of a round, stacked by phase, for each method over all prompts."""
    bars = {
        method: round_phases(summary) for method, summary in report["all"]["methods"].items() if summary["num_rounds"]
    }
    if not bars:
        return None
    # In the order of the first method that tells its phases; what no phase covers comes last, in grey.
    phases = list(dict.fromkeys(phase for bar in bars.values() for phase in bar if phase != "other"))
    colours: dict[str, Any] = {phase: f"C{i}" for i, phase in enumerate(phases)} | {"other": "0.75"}
    figure = _make_figure(report, 2.5 + 1.1 * len(bars))
    axes = figure.subplots()
    tops = [0.0] * len(bars)
    for phase, colour in colours.items():
        heights = [1000 * bar.get(phase, 0.0) for bar in bars.values()]
        axes.bar(list(bars), heights, bottom=tops, width=0.6, color=colour, label=phase)
        tops = [top + height for top, height in zip(tops, heights, strict=True)]
    for i, top in enumerate(tops):
        axes.text(i, top, f"{top:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set_ylabel("milliseconds per round, host time")
    axes.margins(y=0.1)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_acceptance(report: dict[str, Any]) -> Figure | None:
    """Share of rounds that accepted at least so many tokens, for each method over all prompts."""
    curves = {
        method: summary["accepted_by_depth"]
        for method, summary in report["all"]["methods"].items()
        if summary["accepted_by_depth"]
    }
    if not curves:
        return None
    figure = _make_figure(report, 6.5)
    axes = figure.subplots()
    trees = [method for method in curves if method not in _METHOD_COLOURS]
    # From dark to light, short of a yellow that is hard to see.
    shades = {method: colormaps["viridis"](i / (len(trees) + 1)) for i, method in enumerate(trees)}
    for method, shares in curves.items():
        colour = _METHOD_COLOURS.get(method) or shades[method]
        axes.plot(range(len(shares) + 1), [1.0, *shares], marker="o", markersize=4, color=colour, label=method)
    axes.set_xlabel("depth, in drafted tokens (bonus token not counted)")
    axes.set_ylabel("share of rounds that accepted at least so many")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
