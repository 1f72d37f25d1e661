"""A picture of a training run; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_TOKENS = "eval_tokens_per_round_"


def plot_training(log: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw loss and tokens per round over steps.

    Args:
        log (`Sequence[dict]`): the `log_history` of a trainer's state.
        path (`str` or `Path`): where to, such as `training.png`.
    """
    drafts = sorted({name for entry in log for name in entry if name.startswith(_TOKENS)}, key=_size)
    figure = Figure(figsize=(10, 4) if drafts else (5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if drafts else 1, squeeze=False)[0]
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        axes[0].plot(*_curve(log, name), label=label, marker="o" if name == "eval_loss" else None, markersize=4)
    axes[0].set_ylabel("loss, nats per slot")
    axes[0].set_yscale("log")
    for name in drafts:
        nodes = name.removeprefix(_TOKENS)
        axes[1].plot(
            *_curve(log, name), label=f"{nodes} nodes" if nodes.isdecimal() else nodes, marker="o", markersize=4
        )
    for one in axes:
        one.set_xlabel("step")
        one.grid(alpha=0.3)
        one.legend(fontsize=8)
    if drafts:
        axes[1].set_ylabel("tokens per round, held out, bonus token counted")
    figure.savefig(path, dpi=120)


def _curve(log: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], float(entry[name])) for entry in log if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def _size(name: str) -> int:
    """A chain comes first, then trees by their size."""
    nodes = name.removeprefix(_TOKENS)
    return int(nodes) if nodes.isdecimal() else 0
