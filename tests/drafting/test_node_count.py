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

from jetspec_hf.drafting.node_count import SIZES, NodeCount, node_count_of
from jetspec_hf.drafting.round_costs import PLAIN, Choice
from jetspec_hf.pair import DecodingPair

# Seconds of a round: plain, drafted by the head, for each node, and for verifying more than one token at all.
Machine = tuple[float, float, float, float]
MACHINES: dict[str, Machine] = {
    "steep": (1.0, 1.7, 0.02, 0.2),
    "flat": (1.0, 1.2, 0.0005, 0.0),
    "slow_head": (1.0, 3.0, 0.01, 0.1),
    "processor": (1.0, 2.3, 0.05, 0.8),
}
# In which part of the text there are grafts, and the probability of each token of one given those before it.
Grafts = list[tuple[float, float]]
NUM_TOKENS = 200  # after which a text begins anew


class World:
    """Rounds that cost what a machine takes, with trees whose best nodes are accepted as a text allows.

    The head gives its k-th best node the probability `share / k`; the text accepts it with `kindness` times that. Nodes
    of grafts are among them in a tree with the head, whose own are of use where no graft is right, or alone. A text has
    grafts in some stretches and none in others.
    """

    def __init__(
        self, machine: Machine, kindness: float, share: float = 0.7, grafts: Grafts | None = None, honesty: float = 1.0
    ) -> None:
        self.machine, self.kindness, self.share = machine, kindness, share
        self.honesty = honesty  # as kindness, of grafts
        left = 1 - sum(part for part, _ in grafts or [])
        self.stretches: list[tuple[float, list[float]]] = [(part, chain(certainty)) for part, certainty in grafts or []]
        self.stretches.append((left, []))
        self.random = random.Random(0)
        self.place = 0.0  # in tokens from the start
        self.tokens, self.time = 0.0, 0.0  # expected of what was chosen so far

    def seconds(self, choice: Choice) -> float:
        plain, drafted, node, several = self.machine
        fixed = drafted if choice.runs_head else plain + several
        return fixed + node * choice.num_nodes if choice.num_nodes else plain

    def nodes(self, choice: Choice, grafts: list[float]) -> list[tuple[float, float]]:
        """What a tree promises of each node, falling, and the truth."""
        nodes = [(p, self.honesty * p) for p in grafts]
        if choice.runs_head:
            left = self.share * (1 - self.honesty * max(grafts, default=0.0))
            nodes += [(left / k, self.kindness * left / k) for k in range(1, choice.num_nodes + 1)]
        return sorted(nodes, reverse=True)[: choice.num_nodes]

    def speed(self, choice: Choice) -> float:
        """Tokens per second in the long run, of always the same; plain rounds where there are no grafts to draft."""
        seconds = 0.0  # for a token
        for part, grafts in self.stretches:
            here = choice if choice.runs_head or grafts else PLAIN
            seconds += part * self.seconds(here) / self.expected(here, grafts)
        return 1 / seconds

    def expected(self, choice: Choice, grafts: list[float]) -> float:
        """Tokens of a round."""
        return 1 + sum(truth for _, truth in self.nodes(choice, grafts))

    def found(self) -> list[float]:
        """The grafts at this place."""
        place = self.place % NUM_TOKENS / NUM_TOKENS
        for part, grafts in self.stretches:
            place -= part
            if place < 0:
                return grafts
        return []

    def run(self, count: NodeCount, num_rounds: int) -> Counter[Choice]:
        """How often each is chosen."""
        chosen: Counter[Choice] = Counter()
        for _ in range(num_rounds):
            grafts = self.found()
            choice = count.choose(grafts)
            chosen[choice] += 1
            nodes = self.nodes(choice, grafts)
            path = [0] + [k for k, (_, truth) in enumerate(nodes, 1) if self.random.random() < truth]
            seconds = self.seconds(choice) * self.random.uniform(1, 1.1)
            count.observe(choice, [[0.0, *(math.log(p) for p, _ in nodes)]], [path], seconds)
            expected = self.expected(choice, grafts)
            self.place += expected
            self.tokens += expected
            self.time += self.seconds(choice)
        return chosen

    def part_of_the_best(self, count: NodeCount, num_rounds: int) -> float:
        """Speed over some rounds, by that of the best of always the same."""
        tokens, seconds = self.tokens, self.time
        self.run(count, num_rounds)
        return (self.tokens - tokens) / (self.time - seconds) / max(map(self.speed, CHOICES))


CHOICES = [PLAIN, *(Choice(size, runs_head) for size in SIZES[1:] for runs_head in (True, False))]


def chain(certainty: float) -> list[float]:
    """Cumulative probabilities of a graft of 16 tokens."""
    return [certainty**k for k in range(1, 17)]


def with_head(num_nodes: int) -> Choice:
    return Choice(num_nodes, num_nodes > 0)


@pytest.mark.parametrize("kindness", [0.0, 0.3, 1.0, 1.4])
@pytest.mark.parametrize("machine", MACHINES)
def test_the_best_size_is_found_and_kept(machine: str, kindness: float) -> None:
    world, count = World(MACHINES[machine], kindness), NodeCount()
    world.run(count, 100)
    assert world.part_of_the_best(count, 1000) > 0.95


GRAFTS: dict[str, Grafts] = {
    "rare": [(0.1, 0.9)],
    "frequent": [(0.5, 0.9)],
    "unsure": [(0.8, 0.3)],
    "mixed": [(0.3, 0.4), (0.2, 0.95)],
}


@pytest.mark.parametrize("grafts", GRAFTS.values(), ids=GRAFTS)
@pytest.mark.parametrize("kindness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("machine", MACHINES)
def test_grafts_alone_are_drafted_where_they_pay_and_the_head_does_not(
    machine: str, kindness: float, grafts: Grafts
) -> None:
    world, count = World(MACHINES[machine], kindness, grafts=grafts), NodeCount()
    world.run(count, 100)
    assert world.part_of_the_best(count, 1000) > 0.93


def test_the_worlds_with_grafts_differ() -> None:
    best = [
        max(CHOICES, key=World(machine, kindness, grafts=grafts).speed)
        for machine in MACHINES.values()
        for kindness in (0.0, 0.3, 1.0)
        for grafts in GRAFTS.values()
    ]
    assert PLAIN in best
    assert len({choice for choice in best if choice.runs_head}) > 2
    assert len({choice for choice in best if not choice.runs_head}) > 2


def test_each_graft_is_worth_what_it_promises_itself() -> None:
    """Faster than always the same: the good ones are drafted long, and the bad ones not at all."""
    world, count = World(MACHINES["processor"], 0.3, grafts=GRAFTS["mixed"]), NodeCount()
    world.run(count, 100)
    assert world.part_of_the_best(count, 1000) > 1.08


@pytest.mark.parametrize("honesty", [0.0, 0.3])
def test_grafts_that_promise_too_much_are_not_believed(honesty: float) -> None:
    world, count = World(MACHINES["processor"], 0.0, grafts=GRAFTS["frequent"], honesty=honesty), NodeCount()
    world.run(count, 100)
    assert world.part_of_the_best(count, 1000) > 0.9


def test_without_grafts_nothing_is_lost() -> None:
    """None are there, then some, then none."""
    count = NodeCount()
    for grafts in ([], GRAFTS["frequent"], []):
        world = World(MACHINES["processor"], 0.0, grafts=grafts)
        world.run(count, 100)
        assert world.part_of_the_best(count, 500) > 0.93


@pytest.mark.parametrize("grafts", [[], GRAFTS["frequent"]], ids=["no_grafts", "grafts"])
@pytest.mark.parametrize("kindness", [0.0, 0.3, 1.0])
def test_a_machine_that_is_busy_at_times_misleads_nobody(kindness: float, grafts: Grafts) -> None:
    world, count = World(MACHINES["steep"], kindness, grafts=grafts), NodeCount()
    world.run(count, 100)
    best = max(map(world.speed, CHOICES))
    tokens = seconds = 0.0
    for i in range(1, 80):
        load = (1.0, 3.0, 1.5)[i % 3]
        world.machine = tuple(load * part for part in MACHINES["steep"])
        world.tokens = world.time = 0.0
        world.run(count, 7 + i % 17)
        tokens, seconds = tokens + world.tokens, seconds + world.time / load
    assert tokens / seconds / best > (0.85 if grafts else 0.95)  # the text changes, too


def test_the_worlds_differ() -> None:
    best = {max(CHOICES, key=World(machine, kind).speed) for machine in MACHINES.values() for kind in (0.0, 0.3, 1.0)}
    assert {PLAIN, with_head(127)} < best
    assert len(best) >= 4


def test_a_change_of_text_or_machine_is_noticed() -> None:
    count = NodeCount()
    for machine, kindness in [("steep", 1.0), ("steep", 0.0), ("steep", 1.0), ("flat", 1.0), ("steep", 1.0)]:
        world = World(MACHINES[machine], kindness)
        world.run(count, 300)
        assert world.part_of_the_best(count, 300) > 0.95


@pytest.mark.parametrize("grafts", [[], GRAFTS["rare"]], ids=["no_grafts", "grafts"])
def test_a_useless_head_is_tried_rarely_and_a_good_one_is_noticed_soon(grafts: Grafts) -> None:
    useless, good = (World(MACHINES["steep"], kindness, grafts=grafts) for kindness in (0.0, 1.5))
    count = NodeCount()
    useless.run(count, 150)
    chosen = useless.run(count, 640)
    assert 5 <= sum(chosen[choice] for choice in chosen if choice.runs_head) <= 14  # once in 65 rounds
    good.run(count, 150)
    chosen = good.run(count, 100)
    assert sum(chosen[choice] for choice in chosen if not choice.runs_head) <= (10 if grafts else 5)


def test_the_first_time_of_a_size_may_be_slow() -> None:
    world, count, seen = World(MACHINES["flat"], 1.0), NodeCount(), set()
    for _ in range(40):
        choice = count.choose()
        path = [0, 1, 2, 3][: 1 + choice.num_nodes]
        log_probs = [0.0] + [math.log(0.7 / k) for k in range(1, choice.num_nodes + 1)]
        count.observe(choice, [log_probs], [path], world.seconds(choice) * (1 if choice in seen else 1000))
        seen.add(choice)
    assert world.part_of_the_best(count, 1000) > 0.95


def test_a_tree_tells_what_smaller_ones_would_accept() -> None:
    """Two rounds of three accept the 2nd best node, all the 5th best, and all cost the same."""
    count = NodeCount()
    order = [4, 2, 7, 1, 6, 3, 5]  # the nodes by falling probability
    log_probs = [0.0] + [-1.0 - order.index(node) / 5 for node in range(1, 8)]
    for size in (0, 15, 63):
        count.observe(with_head(size), [[0.0]], [[0]], 1.0)
    for i in range(3000):
        count.observe(with_head(7), [log_probs], [[0, 6, 2] if i % 3 else [0, 6]], 1.0)
    speeds = count.tokens_per_second()
    assert speeds[0] == 1.0
    assert speeds[3] == pytest.approx(1 + 2 / 3, abs=0.02)
    assert speeds[7] == pytest.approx(2 + 2 / 3, abs=0.05)


def test_impossible_nodes_and_empty_trees_teach_nothing_wrong() -> None:
    count = NodeCount()
    for _ in range(200):
        choice = count.choose([0.5, 0.0])
        log_probs = [0.0] + [-math.inf] * (choice.num_nodes // 2)
        count.observe(choice, [log_probs], [[0]], 1.0 + (choice.num_nodes > 0))
    assert count.choose([0.5, 0.0]) == PLAIN
    assert all(math.isfinite(speed) for speed in count.tokens_per_second().values())


def test_threads_may_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that come and go quickly, between any two steps of another thread."""
    failures: list[Exception] = []

    def run(count: NodeCount) -> None:
        try:
            for _ in range(40):
                choice = count.choose([0.9] * 20)
                count.observe(choice, [[0.0] + [-1.0] * choice.num_nodes], [[0]], 1.0)
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


@pytest.mark.parametrize("num_accepted", [0, 6])
def test_rows_are_learned_from_together(num_accepted: int) -> None:
    """Four rows whose heads promise six likely nodes; the more of them a round verifies, the longer it takes."""
    count, chosen = NodeCount(), Counter()
    for i in range(300):
        choice = count.choose()
        log_probs = [[0.0] + [-0.05 * depth for depth in range(1, choice.num_nodes + 1)]] * 4
        path = list(range(1 + min(num_accepted, choice.num_nodes)))
        seconds = 1.0 + (0.3 + 0.01 * 4 * choice.num_nodes if choice.num_nodes else 0.0)
        count.observe(choice, log_probs, [path] * 4, seconds)
        if i > 100:
            chosen[choice.num_nodes] += 1
    ((best, times),) = chosen.most_common(1)
    assert times > 100
    assert best == (7 if num_accepted else 0)


@pytest.mark.parametrize(("num_rows", "most"), [(1, 127), (2, 127), (3, 63), (4, 63), (5, 31), (16, 15), (64, 7)])
def test_the_more_rows_the_smaller_trees(make_target: Callable, num_rows: int, most: int) -> None:
    target = make_target(num_hidden_layers=2)
    pair = DecodingPair(random_head(target), target)
    count = node_count_of(pair, SIZES, num_rows)
    assert count.sizes == tuple(size for size in SIZES if size <= most)
    assert node_count_of(pair, SIZES, num_rows) is count
    while (choice := count.choose()) in count._timed_first and count._costs.num_timed(choice) < 2:
        count.observe(choice, [[0.0] * (1 + choice.num_nodes)] * num_rows, [[0]] * num_rows, 1.0)
    assert count.choose().num_nodes in count.sizes


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
