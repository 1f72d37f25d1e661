"""What rounds are expected to emit."""

import math

import pytest

from jetspec_hf.drafting.expected_tokens import ExpectedTokens

SIZES = (0, 3, 7, 15)


def test_grafts_are_worth_what_they_promise_until_they_are_wrong() -> None:
    expected = ExpectedTokens(SIZES)
    assert expected.of_grafts([]) == {0: 1.0}
    assert expected.of_grafts([0.5, 0.25]) == pytest.approx({0: 1.0, 3: 1.75})
    assert expected.of_grafts([0.5, 0.25, 0.25, 0.2]) == pytest.approx({0: 1.0, 3: 2.0, 7: 2.2})
    assert expected.doubt([0.5, 0.25]) == pytest.approx(0.5)
    assert expected.doubt([]) == 1.0
    for now in range(20):
        expected.learn_alone(now, [0.0, math.log(0.5), math.log(0.5)], [0])
    assert expected.of_grafts([0.5])[3] < 1.15
    for now in range(20, 400):
        expected.learn_with_head(now, 3, [0.0], [0], 1.0, 1.0)
    assert expected.of_grafts([0.5])[3] > 1.45, "long ago"


def test_the_head_adds_to_grafts_what_they_may_lack() -> None:
    expected = ExpectedTokens(SIZES)
    log_probs = [0.0] + [math.log(0.5)] * 3
    for now in range(600):  # right each time, beside rounds of 1.5 tokens whose grafts are as often wrong
        expected.learn_with_head(now, 3, log_probs, [0, 1] if now % 2 else [0, 1, 2], 1.5, 0.5)
    assert expected.with_head(1.5, 0.5)[3] == pytest.approx(2.5, abs=0.02)
    assert expected.with_head(1.0, 1.0)[3] == pytest.approx(3.0, abs=0.04)
    assert expected.with_head(9.0, 0.25)[3] == pytest.approx(9.5, abs=0.02)
    tokens = expected.with_head(1.5, 0.5)
    assert tokens[3] < tokens[7] < tokens[15], "never drafted, half as good as those before"


def test_a_head_that_adds_nothing_is_not_worse_than_none() -> None:
    expected = ExpectedTokens(SIZES)
    for now in range(100):
        expected.learn_with_head(now, 15, [0.0] + [math.log(0.1)] * 15, [0], 4.0, 0.3)
    assert expected.with_head(4.0, 0.3) == {3: 4.0, 7: 4.0, 15: 4.0}
