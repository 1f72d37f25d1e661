"""The numbers in the report of a benchmark."""

import pytest
import torch

from jetspec_hf.benchmark.measurement import Measurement
from jetspec_hf.benchmark.report import to_json
from jetspec_hf.benchmark.summary import accepted_by_depth, bootstrap_ratio, round_phases, summarize


def made(index: int, method: str, seconds: float, tokens: list[int], accepted: list[int]) -> Measurement:
    """Two tokens of prompt, first token after a tenth of the time, half of the rest spent drafting."""
    return Measurement(
        prompts="set",
        index=index,
        method=method,
        num_prompt_tokens=2,
        tokens=tokens,
        seconds=seconds,
        time_to_first_token=seconds / 10,
        num_forwards=1 + len(accepted),
        accepted_lengths=accepted,
        phase_seconds={"draft": seconds / 2} if method.startswith("tree") else {},
        peak_memory_bytes=int(seconds),
    )


def test_summaries_agree_with_numbers_worked_out_by_hand() -> None:
    measurements = [
        made(0, "plain", 4.0, [1, 2, 3, 4, 5], [0, 0, 0, 0]),
        made(1, "plain", 8.0, [6, 7, 8], [0, 0]),
        made(0, "tree-3", 1.0, [1, 2, 3, 4, 5], [3]),
        made(1, "tree-3", 2.0, [6, 7, 9], [0, 0]),
        made(0, "dflash", 6.0, [1, 2, 3, 4, 5], [1, 1]),
        made(1, "dflash", 6.0, [6, 7, 8], [1]),
    ]
    summaries = summarize(measurements, temperature=1.0)
    assert list(summaries) == ["plain", "tree-3", "dflash"]

    tree = summaries["tree-3"]
    assert (tree.num_calls, tree.num_new_tokens, tree.num_forwards, tree.num_rounds) == (2, 8, 5, 3)
    assert tree.seconds == 3.0
    assert tree.tokens_per_second == pytest.approx(8 / 3)
    assert tree.time_to_first_token == pytest.approx(0.15)
    assert tree.tokens_per_round == pytest.approx(2.0)  # 4 + 1 + 1 tokens in 3 rounds
    # 2.7 s after the first tokens in 3 rounds, by 10.8 s in 6 plain steps.
    assert tree.break_even == pytest.approx(0.9 / 1.8)
    assert tree.accepted_by_depth == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert tree.phase_seconds == {"draft": 1.5}
    assert tree.ratio is not None
    assert tree.ratio.value == pytest.approx(4.0)  # 12 s by 3 s
    assert (tree.num_equal, tree.num_compared) == (1, 2)
    assert tree.peak_memory_bytes == 2

    assert summaries["plain"].tokens_per_round == 1.0
    assert summaries["plain"].break_even is None
    assert summaries["dflash"].break_even == pytest.approx(10.8 / 3 / 1.8)
    assert summaries["plain"].accepted_by_depth == []
    assert summaries["plain"].ratio == (1.0, 1.0, 1.0)
    assert (summaries["dflash"].num_equal, summaries["dflash"].num_compared) == (0, 0)
    assert to_json(summaries)["tree-3"]["ratio"]["value"] == pytest.approx(4.0)


def test_without_plain_decoding_there_is_nothing_to_compare_with() -> None:
    summary = summarize([made(0, "tree-3", 1.0, [1], [])], temperature=0.0)["tree-3"]
    assert summary.ratio is None
    assert summary.num_compared == 0
    assert summary.tokens_per_round is summary.break_even is None


def test_who_reaches_the_break_even_is_as_fast_as_plain_decoding() -> None:
    plain = [made(0, "plain", 10.0, [1] * 11, [0] * 10), made(1, "plain", 99.0, [1] * 11, [0] * 10)]
    tree = made(0, "tree-3", 10.0, [1] * 11, [1] * 5)  # 2 tokens in each round, and as long
    summary = summarize([*plain, tree], temperature=1.0)["tree-3"]
    assert summary.break_even == pytest.approx(summary.tokens_per_round)
    none = made(0, "tree-3", 10.0, [1], [])  # ended with its first token
    assert summarize([*plain, none], temperature=0.0)["tree-3"].break_even is None


def test_depths_count_the_rounds_that_got_so_far() -> None:
    assert accepted_by_depth([0, 1, 3, 1]) == [0.75, 0.25, 0.25]
    assert accepted_by_depth([]) == accepted_by_depth([0, 0]) == []


def test_the_interval_holds_the_ratio_and_is_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(3)
    plain = (torch.rand(20, generator=generator) + 1).tolist()
    other = (torch.rand(20, generator=generator) + 0.2).tolist()
    ratio = bootstrap_ratio(plain, other)
    assert ratio.value == pytest.approx(sum(plain) / sum(other))
    assert ratio.low < ratio.value < ratio.high
    torch.manual_seed(7)
    assert bootstrap_ratio(plain, other) == ratio


def test_a_steady_ratio_has_no_width() -> None:
    assert bootstrap_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize(("plain", "other"), [([], []), ([1.0], [1.0, 2.0])])
def test_times_without_a_partner_are_refused(plain: list[float], other: list[float]) -> None:
    with pytest.raises(ValueError, match="for every prompt"):
        bootstrap_ratio(plain, other)


def test_a_round_is_split_into_phases_and_the_rest() -> None:
    measured = made(0, "tree-3", 4.0, [1, 2, 3], [0, 0])
    (summary,) = to_json(summarize([measured], temperature=0.0)).values()
    # 4 s less 0.4 s to the first token, in two rounds.
    assert round_phases(summary) == pytest.approx({"draft": 1.0, "other": 0.8})
