"""What rounds cost, measured or reckoned from others."""

import pytest

from jetspec_hf.drafting.round_costs import PLAIN, Choice, RoundCosts


def with_head(num_nodes: int) -> Choice:
    return Choice(num_nodes, runs_head=num_nodes > 0)


def alone(num_nodes: int) -> Choice:
    return Choice(num_nodes, runs_head=False)


def test_costs_never_measured_lie_on_a_line_with_others() -> None:
    costs = RoundCosts()
    for num_nodes, seconds in [(0, 1.0), (15, 50.0), (15, 4.0), (63, 9.0), (63, 8.8), (63, 30.0)]:
        costs.add(with_head(num_nodes), seconds)
    assert [costs.seconds(with_head(size)) for size in (0, 15, 63)] == [
        1.0,
        4.0,
        9.0,
    ]  # the middle one, or the lower of two
    assert costs.seconds(with_head(31)) == pytest.approx(4 + 5 / 3)
    assert costs.seconds(with_head(7)) == pytest.approx(4 - 5 / 6)
    assert costs.seconds(with_head(127)) == pytest.approx(9 + 20 / 3)
    costs.add(with_head(31), 4.0)
    assert costs.seconds(with_head(7)) == 4.0
    assert costs.seconds(with_head(127)) == pytest.approx(9 + 10)


def test_one_size_tells_the_pace_of_all() -> None:
    costs = RoundCosts()
    for num_nodes in [0, 15, 63] * 2 + [15] * 50:
        costs.add(with_head(num_nodes), 1.0 + num_nodes)
    for _ in range(8):
        costs.add(with_head(15), 3 * 16.0)
    assert [costs.seconds(with_head(size)) for size in (0, 15, 63)] == [3.0, 48.0, 192.0]
    costs.add(with_head(63), 3 * 64.0)
    assert costs.seconds(with_head(63)) == 192.0


def test_costs_that_change_by_themselves_are_noticed() -> None:
    costs = RoundCosts()
    for num_nodes in [0, 15, 63] * 20:
        costs.add(with_head(num_nodes), 1.0 + num_nodes)
    for num_nodes in [15, 15, 63] * 8:
        costs.add(with_head(num_nodes), 16.0)
    assert costs.seconds(with_head(63)) / costs.seconds(with_head(15)) == pytest.approx(1.0)
    assert costs.num_timed(with_head(15)) == 8


def test_grafts_alone_cost_as_much_more_for_a_node_as_with_the_head() -> None:
    costs = RoundCosts()
    for choice, seconds in [(PLAIN, 1.0), (with_head(15), 4.0), (with_head(63), 8.8), (alone(15), 2.5)]:
        costs.add(choice, seconds)
    assert costs.num_timed_grafts() == 1
    assert costs.seconds(alone(15)) == 2.5
    assert costs.seconds(alone(31)) == pytest.approx(2.5 + 1.6)
    assert costs.seconds(alone(3)) == pytest.approx(2.5 - 1.2)
    costs.add(alone(31), 2.6)
    assert costs.seconds(alone(63)) == pytest.approx(2.6 + 3.2)
    costs.add(with_head(3), 1.0)
    assert costs.seconds(alone(3)) == 1.0, "never less than a plain round"
