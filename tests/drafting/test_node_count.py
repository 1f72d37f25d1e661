"""The number of nodes follows what rounds cost and what texts accept."""

import gc
import math
import random
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support.heads import random_head

from jetspec_hf.drafting.node_count import SIZES, NodeCount, RoundCosts, node_count_of
from jetspec_hf.pair import DecodingPair

# Seconds of a round: plain, drafted, and for each node.
Machine = tuple[float, float, float]
MACHINES: dict[str, Machine] = {"steep": (1.0, 1.7, 0.02), "flat": (1.0, 1.2, 0.0005), "slow_head": (1.0, 3.0, 0.01)}


class World:
    """Rounds that cost what a machine takes, with trees whose best nodes are accepted as a text allows.

    The head gives its k-th best node the probability `share / k`; the text accepts it with `kindness` times that.
    """

    def __init__(self, machine: Machine, kindness: float, share: float = 0.7) -> None:
        self.machine, self.kindness, self.share = machine, kindness, share
        self.random = random.Random(0)

    def seconds(self, num_nodes: int) -> float:
        plain, drafted, node = self.machine
        return drafted + node * num_nodes if num_nodes else plain

    def speed(self, num_nodes: int) -> float:
        """Tokens per second in the long run."""
        return (1 + self.kindness * sum(self.share / k for k in range(1, num_nodes + 1))) / self.seconds(num_nodes)

    def run(self, count: NodeCount, num_rounds: int) -> Counter[int]:
        """How often each size is chosen."""
        chosen: Counter[int] = Counter()
        for _ in range(num_rounds):
            num_nodes = count.choose()
            chosen[num_nodes] += 1
            probabilities = [self.share / k for k in range(1, num_nodes + 1)]
            path = [0] + [k for k, p in enumerate(probabilities, 1) if self.random.random() < self.kindness * p]
            seconds = self.seconds(num_nodes) * self.random.uniform(1, 1.1)
            count.observe(num_nodes, [0.0, *map(math.log, probabilities)], path, seconds)
        return chosen

    def part_of_the_best(self, chosen: Counter[int]) -> float:
        """Speed over these rounds, by that of the best fixed size."""
        tokens = sum(rounds * self.speed(size) * self.seconds(size) for size, rounds in chosen.items())
        seconds = sum(rounds * self.seconds(size) for size, rounds in chosen.items())
        return tokens / seconds / max(map(self.speed, SIZES))


@pytest.mark.parametrize("kindness", [0.0, 0.3, 1.0, 1.4])
@pytest.mark.parametrize("machine", MACHINES)
def test_the_best_size_is_found_and_kept(machine: str, kindness: float) -> None:
    world, count = World(MACHINES[machine], kindness), NodeCount()
    world.run(count, 100)
    assert world.part_of_the_best(world.run(count, 1000)) > 0.95


@pytest.mark.parametrize("kindness", [0.0, 0.3, 1.0])
def test_a_machine_that_is_busy_at_times_misleads_nobody(kindness: float) -> None:
    world, count = World(MACHINES["steep"], kindness), NodeCount()
    world.run(count, 100)
    chosen: Counter[int] = Counter()
    plain, drafted, node = MACHINES["steep"]
    for i in range(1, 80):
        load = (1.0, 3.0, 1.5)[i % 3]
        world.machine = (load * plain, load * drafted, load * node)
        chosen += world.run(count, 7 + i % 17)
    world.machine = MACHINES["steep"]
    assert world.part_of_the_best(chosen) > 0.95


def test_the_worlds_differ() -> None:
    best = {max(SIZES, key=World(machine, kind).speed) for machine in MACHINES.values() for kind in (0.0, 0.3, 1.0)}
    assert {0, 127} < best
    assert len(best) >= 4


def test_a_change_of_text_or_machine_is_noticed() -> None:
    count = NodeCount()
    for machine, kindness in [("steep", 1.0), ("steep", 0.0), ("steep", 1.0), ("flat", 1.0), ("steep", 1.0)]:
        world = World(MACHINES[machine], kindness)
        world.run(count, 300)
        assert world.part_of_the_best(world.run(count, 300)) > 0.95


def test_a_useless_head_is_tried_rarely_and_a_good_one_is_noticed_soon() -> None:
    useless, good, count = World(MACHINES["steep"], 0.0), World(MACHINES["steep"], 1.0), NodeCount()
    useless.run(count, 100)
    chosen = useless.run(count, 640)
    assert 5 <= 640 - chosen[0] <= 14  # once in 65 rounds
    good.run(count, 150)
    assert good.run(count, 100)[0] <= 5


def test_the_first_time_of_a_size_may_be_slow() -> None:
    world, count, seen = World(MACHINES["flat"], 1.0), NodeCount(), set()
    for _ in range(40):
        size = count.choose()
        path = [0, 1, 2, 3][: 1 + size]
        log_probs = [0.0] + [math.log(0.7 / k) for k in range(1, size + 1)]
        count.observe(size, log_probs, path, world.seconds(size) * (1 if size in seen else 1000))
        seen.add(size)
    assert world.part_of_the_best(world.run(count, 1000)) > 0.95


def test_costs_never_measured_lie_on_a_line_with_others() -> None:
    costs = RoundCosts()
    for num_nodes, seconds in [(0, 1.0), (15, 50.0), (15, 4.0), (63, 9.0), (63, 8.8), (63, 30.0)]:
        costs.add(num_nodes, seconds)
    assert [costs.seconds(size) for size in (0, 15, 63)] == [1.0, 4.0, 9.0]  # the middle one, or the lower of two
    assert costs.seconds(31) == pytest.approx(4 + 5 / 3)
    assert costs.seconds(7) == pytest.approx(4 - 5 / 6)
    assert costs.seconds(127) == pytest.approx(9 + 20 / 3)
    costs.add(31, 4.0)
    assert costs.seconds(7) == 4.0
    assert costs.seconds(127) == pytest.approx(9 + 10)


def test_one_size_tells_the_pace_of_all() -> None:
    costs = RoundCosts()
    for num_nodes in [0, 15, 63] * 2 + [15] * 50:
        costs.add(num_nodes, 1.0 + num_nodes)
    for _ in range(8):
        costs.add(15, 3 * 16.0)
    assert [costs.seconds(size) for size in (0, 15, 63)] == [3.0, 48.0, 192.0]
    costs.add(63, 3 * 64.0)
    assert costs.seconds(63) == 192.0


def test_costs_that_change_by_themselves_are_noticed() -> None:
    costs = RoundCosts()
    for num_nodes in [0, 15, 63] * 20:
        costs.add(num_nodes, 1.0 + num_nodes)
    for num_nodes in [15, 15, 63] * 8:
        costs.add(num_nodes, 16.0)
    assert costs.seconds(63) / costs.seconds(15) == pytest.approx(1.0)
    assert costs.num_timed(15) == 8


def test_a_tree_tells_what_smaller_ones_would_accept() -> None:
    """Two rounds of three accept the 2nd best node, all the 5th best, and all cost the same."""
    count = NodeCount()
    order = [4, 2, 7, 1, 6, 3, 5]  # the nodes by falling probability
    log_probs = [0.0] + [-1.0 - order.index(node) / 5 for node in range(1, 8)]
    for size in (0, 15, 63):
        count.observe(size, [0.0], [0], 1.0)
    for i in range(3000):
        count.observe(7, log_probs, [0, 6, 2] if i % 3 else [0, 6], 1.0)
    speeds = count.tokens_per_second()
    assert speeds[0] == 1.0
    assert speeds[3] == pytest.approx(1 + 2 / 3, abs=0.02)
    assert speeds[7] == pytest.approx(2 + 2 / 3, abs=0.05)


def test_impossible_nodes_and_empty_trees_teach_nothing_wrong() -> None:
    count = NodeCount()
    for _ in range(200):
        size = count.choose()
        count.observe(size, [0.0] + [-math.inf] * (size // 2), [0], 1.0 + (size > 0))
    assert count.choose() == 0
    assert all(math.isfinite(speed) for speed in count.tokens_per_second().values())


def test_threads_may_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that come and go quickly, between any two steps of another thread."""
    failures: list[Exception] = []

    def run(count: NodeCount) -> None:
        try:
            for _ in range(40):
                size = count.choose()
                count.observe(size, [0.0] + [-1.0] * size, [0], 1.0)
        except Exception as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    try:
        for _ in range(100):
            count = NodeCount()
            threads = [threading.Thread(target=run, args=(count,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failures == []


def test_a_pair_keeps_what_it_learned_and_no_longer_than_it_lives(make_target: Callable) -> None:
    target, other = make_target(num_hidden_layers=2), make_target(num_hidden_layers=2)
    head = random_head(target)
    count = node_count_of(DecodingPair(head, target))
    assert node_count_of(DecodingPair(head, target)) is count
    assert node_count_of(DecodingPair(head, other)) is not count
    assert node_count_of(DecodingPair(random_head(target), target)) is not count
    assert node_count_of(DecodingPair(head, target.to(torch.bfloat16))) is not count
    alive = weakref.ref(count)
    del count, head
    gc.collect()
    assert alive() is None
