"""The numbers of a benchmark: from measurements to summaries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .measurement import Measurement
from .method import Method

_NUM_RESAMPLES = 2000


class Ratio(NamedTuple):
    """How many times as fast as plain decoding."""

    value: float  # plain seconds, summed over prompts, by the method's
    low: float  # bounds of the 95% interval
    high: float


@dataclass(frozen=True)
class Summary:
    """One method on one prompt set.

    Args:
        num_calls (`int`): calls of `generate`, each with a prompt or a batch of them.
        num_new_tokens (`int`): tokens emitted.
        seconds (`float`): all calls.
        tokens_per_second (`float`): tokens emitted in a second of whole calls, the pass over the prompt in them.
        time_to_first_token (`float`): mean seconds.
        num_forwards (`int`): forward passes of the target, prompts counted.
        num_rounds (`int`): forward passes after the one over the prompt.
        tokens_per_round (`float`, *optional*): mean tokens of a round, the bonus token counted; plain decoding has 1.
        break_even (`float`, *optional*): tokens per round at which this is as fast as plain decoding once the prompt is
            read: mean seconds of its rounds by those of plain steps on the same prompts, both after the first token.
            `None` for plain decoding itself, and where either has no rounds.
        accepted_by_depth (`list[float]`): share of rounds that accepted at least 1, 2, ... drafted tokens.
        phase_seconds (`dict[str, float]`): host time in each phase, summed over calls.
        ratio (`Ratio`, *optional*): speed over plain decoding; `None` if that was not measured.
        num_compared (`int`): prompts whose tokens should equal those of plain decoding.
        num_equal (`int`): prompts whose tokens do.
        peak_memory_bytes (`int`): the most in any call; on a CPU that of the whole process, so no method's own.
    """

    num_calls: int
    num_new_tokens: int
    seconds: float
    tokens_per_second: float
    time_to_first_token: float
    num_forwards: int
    num_rounds: int
    tokens_per_round: float | None
    break_even: float | None
    accepted_by_depth: list[float]
    phase_seconds: dict[str, float]
    ratio: Ratio | None
    num_compared: int
    num_equal: int
    peak_memory_bytes: int


def summarize(measurements: Sequence[Measurement], *, temperature: float) -> dict[str, Summary]:
    """Summarize each method.

    Args:
        measurements (`Sequence[Measurement]`): of one prompt set or several.
        temperature (`float`): at which they were taken; it says which methods should emit the tokens of plain decoding.
    """
    by_method: dict[str, list[Measurement]] = {}
    for one in measurements:
        by_method.setdefault(one.method, []).append(one)
    plain = {(one.prompts, one.index): one for one in by_method.get("plain", [])}
    return {
        method: _summarize_method(
            calls,
            [(plain[key], one) for one in calls if (key := (one.prompts, one.index)) in plain],
            is_comparable=Method.parse(method).is_comparable(temperature),
        )
        for method, calls in by_method.items()
    }


def _summarize_method(
    calls: Sequence[Measurement], pairs: Sequence[tuple[Measurement, Measurement]], *, is_comparable: bool
) -> Summary:
    """Summarize the calls of one method; `pairs` holds plain decoding of the same prompts beside them."""
    accepted = [length for one in calls for length in one.accepted_lengths]
    seconds = sum(one.seconds for one in calls)
    num_new_tokens = sum(len(one.tokens) for one in calls)
    phases = dict.fromkeys(phase for one in calls for phase in one.phase_seconds)
    return Summary(
        num_calls=len(calls),
        num_new_tokens=num_new_tokens,
        seconds=seconds,
        tokens_per_second=num_new_tokens / seconds,
        time_to_first_token=sum(one.time_to_first_token for one in calls) / len(calls),
        num_forwards=sum(one.num_forwards for one in calls),
        num_rounds=len(accepted),
        tokens_per_round=1 + sum(accepted) / len(accepted) if accepted else None,
        break_even=break_even([one for one, _ in pairs], [one for _, one in pairs]),
        accepted_by_depth=accepted_by_depth(accepted),
        phase_seconds={phase: sum(one.phase_seconds.get(phase, 0.0) for one in calls) for phase in phases},
        ratio=bootstrap_ratio([one.seconds for one, _ in pairs], [one.seconds for _, one in pairs]) if pairs else None,
        num_compared=len(pairs) if is_comparable else 0,
        num_equal=sum(one.tokens == other.tokens for one, other in pairs) if is_comparable else 0,
        peak_memory_bytes=max(one.peak_memory_bytes for one in calls),
    )


def break_even(plain: Sequence[Measurement], calls: Sequence[Measurement]) -> float | None:
    """Mean seconds of a round by those of a plain step, so the tokens per round at which drafting starts to pay.

    Args:
        plain (`Sequence[Measurement]`): plain decoding of some prompts.
        calls (`Sequence[Measurement]`): another method on the same ones.
    """
    step, one = _round_seconds(plain), _round_seconds(calls)
    is_plain = all(call.method == "plain" for call in calls)
    return None if step is None or one is None or is_plain else one / step


def _round_seconds(calls: Sequence[Measurement]) -> float | None:
    """Mean seconds of a round, the pass over the prompt left out."""
    num_rounds = sum(len(one.accepted_lengths) for one in calls)
    seconds = sum(one.seconds - one.time_to_first_token for one in calls)
    return seconds / num_rounds if num_rounds else None


def accepted_by_depth(accepted_lengths: Sequence[int]) -> list[float]:
    """Share of rounds that accepted at least 1, 2, ... drafted tokens, down to the deepest acceptance."""
    return [
        sum(length >= depth for length in accepted_lengths) / len(accepted_lengths)
        for depth in range(1, max(accepted_lengths, default=0) + 1)
    ]


def bootstrap_ratio(plain_seconds: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Summed plain time by summed time, with the 95% interval over resampled prompts.

    The draws are the same in every call, so equal measurements give equal intervals.

    Args:
        plain_seconds (`Sequence[float]`): plain decoding of each prompt.
        seconds (`Sequence[float]`): the method on the same prompts, in the same order.

    Raises:
        ValueError: if there are no prompts, or not as many of one as of the other.
    """
    if len(plain_seconds) != len(seconds) or not seconds:
        raise ValueError(f"Got {len(plain_seconds)} and {len(seconds)} times; pass one of each for every prompt.")
    pairs = torch.tensor([plain_seconds, seconds], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(seconds), (_NUM_RESAMPLES, len(seconds)), generator=generator)
    plain, other = pairs[:, drawn].sum(dim=-1)  # (resamples,) each
    low, high = (plain / other).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(sum(plain_seconds) / sum(seconds), low, high)


def round_phases(summary: dict[str, Any]) -> dict[str, float]:
    """Seconds of a mean round in each phase, and in none of them: `other`.

    The pass over the prompt is left out: it is what comes before the first token.
    """
    num_rounds = summary["num_rounds"]
    phases = {phase: total / num_rounds for phase, total in summary["phase_seconds"].items() if phase != "prefill"}
    decoding = summary["seconds"] - summary["num_calls"] * summary["time_to_first_token"]
    return phases | {"other": max(decoding / num_rounds - sum(phases.values()), 0.0)}
