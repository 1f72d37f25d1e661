"""How many nodes to draft: what a round costs on this machine against what the text lately accepted."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low

from ..pair import DecodingPair
from ..tree.tree import DraftTree

SIZES = (0, 3, 7, 15, 31, 63, 127)  # nodes, the root not counted; 0 decodes plainly
STATIC_SIZES = (0, 15, 63)  # where each has to be compiled

_TIMED_FIRST = (15, 63, 0)  # twice each, since the first time may warm something up
_NUM_TIMES = 8  # of the newest rounds, the middle one counts
_TEXT_MEMORY = 15 / 16  # weight of the past, for each round, in how sure the head is of this text
_HEAD_MEMORY = 63 / 64  # the same in how far its scores can be believed
_NUM_PRIOR = 1.0  # promised tokens that a prior counts as much as
_EXPLORE_EVERY = 16  # rounds
_MAY_BE_BEST = 0.8  # of the best speed; below, only neighbours are explored
_SHORTEST_WAIT, _LONGEST_WAIT = 8, 64  # plain tokens before the head is tried again


class RoundCosts:
    """Seconds of a round for each number of nodes. Sizes never timed lie on a line with those that were.

    A busy machine and a long text slow down all sizes. So that one tried long ago can be compared with one tried now,
    costs are counted at a pace that all rounds tell: their seconds by what their size costs at pace 1.
    """

    def __init__(self) -> None:
        self._costs: dict[int, list[float]] = {}  # at pace 1
        self._paces = [1.0] * _NUM_TIMES

    def add(self, num_nodes: int, seconds: float) -> None:
        """Take in one round."""
        costs, seconds = self._costs.get(num_nodes, []), max(seconds, 1e-9)
        # New ones each time: other threads may be reading the old ones.
        if len(costs) > 1:
            self._paces = [*self._paces[1:], seconds / median_low(costs)]
        newest = [*costs[1 - _NUM_TIMES :], seconds / median_low(self._paces)]
        self._costs = self._costs | {num_nodes: newest}

    def num_timed(self, num_nodes: int) -> int:
        """How many rounds of a size are remembered."""
        return len(self._costs.get(num_nodes, []))

    def seconds(self, num_nodes: int) -> float:
        """What a round is likely to cost. Needs a plain round and drafted ones of two sizes."""
        if num_nodes in self._costs:
            return median_low(self._costs[num_nodes]) * median_low(self._paces)
        # The head is in every drafted round and not in a plain one.
        timed = sorted(size for size in self._costs if size > 0)
        low, high = min(pairwise(timed), key=lambda pair: abs(pair[0] + pair[1] - 2 * num_nodes))
        slope = max(0.0, (self.seconds(high) - self.seconds(low)) / (high - low))
        return max(self.seconds(0), self.seconds(low) + slope * (num_nodes - low))


@dataclass
class _Band:
    """The nodes that one size has and the next smaller one has not: how many of them a round accepts."""

    last_round: int = 0
    num_rounds: float = 0.0  # that drafted these nodes, older ones counting less
    recently_promised: float = 0.0  # tokens in these rounds, by the head's scores
    promised: float = 0.0  # the same over a longer time
    accepted: float = 0.0  # of those

    def learn(self, now: int, promised: float, accepted: int) -> None:
        """Take in round `now`."""
        text, head = _TEXT_MEMORY ** (now - self.last_round), _HEAD_MEMORY ** (now - self.last_round)
        self.last_round = now
        self.num_rounds = text * self.num_rounds + 1
        self.recently_promised = text * self.recently_promised + promised
        self.promised = head * self.promised + promised
        self.accepted = head * self.accepted + accepted

    def trust(self, prior: float) -> float:
        """What the scores' promises were worth, `prior` before anything was seen; a head may be confidently wrong."""
        return (self.accepted + _NUM_PRIOR * prior) / (self.promised + _NUM_PRIOR)


class NodeCount:
    """Chooses for each round the number of nodes with the most expected tokens per second, down to none.

    Trees are nested: the best `n` nodes of a tree are the tree of `n` nodes. So a round of one size tells what every
    smaller one would have accepted. Where drafting does not pay, the target decodes plainly, and the head is tried
    again after 8 tokens, 16, 32, and from then on 64.

    Nothing that is chosen here can change the text.

    Args:
        sizes (`tuple[int, ...]`, *optional*): numbers to choose from, rising from 0, 15 and 63 among them.
    """

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        self.sizes = sizes
        self._costs = RoundCosts()
        self._bands = [_Band() for _ in sizes[1:]]
        self._last_rounds = dict.fromkeys(sizes, 0)
        self._round = 0
        self._is_plain = False
        self._wait, self._plain_until = _SHORTEST_WAIT, 0

    def tokens_per_second(self) -> dict[int, float]:
        """What is expected of each size."""
        speeds = {0: 1 / self._costs.seconds(0)}
        expected, promised, trust = 1.0, 0.0, 1.0
        for band, size in zip(self._bands, self.sizes[1:], strict=True):
            # Nodes never drafted promise half of what the likelier ones before them do.
            promised = band.recently_promised / band.num_rounds if band.num_rounds else promised / 2
            trust = band.trust(prior=trust)
            expected += trust * promised
            speeds[size] = expected / self._costs.seconds(size)
        return speeds

    def choose(self) -> int:
        """The most nodes to draft in the next round, the root not counted."""
        size = min(_TIMED_FIRST, key=self._costs.num_timed)
        if self._costs.num_timed(size) < 2:
            return size
        if self._is_plain and self._round < self._plain_until:
            return 0
        speeds = self.tokens_per_second()
        best = max(self.sizes, key=speeds.__getitem__)
        if best == 0 and self._is_plain:
            return max(self.sizes[1:], key=speeds.__getitem__)
        if best == 0:
            self._plain_until = self._round + self._wait
        elif self._round % _EXPLORE_EVERY == 0:
            here = self.sizes.index(best)
            # Its neighbours too, whose costs may have been measured in worse times.
            rivals = [
                size
                for i, size in enumerate(self.sizes)
                if abs(i - here) <= 1 or speeds[size] > _MAY_BE_BEST * speeds[best]
            ]
            return min(rivals, key=self._last_rounds.__getitem__)
        self._is_plain = best == 0
        return best

    def observe(self, num_nodes: int, log_probs: Sequence[float], path: Sequence[int], seconds: float) -> None:
        """Learn from a round.

        Args:
            num_nodes (`int`): what [`choose`] said.
            log_probs (`Sequence[float]`): cumulative log-probability of every node of the tree, the root first.
            path (`Sequence[int]`): the accepted nodes, the root first.
            seconds (`float`): what the round took, from the end of the last one.
        """
        self._round += 1
        self._last_rounds[num_nodes] = self._round
        self._costs.add(num_nodes, seconds)
        if num_nodes == 0:
            return
        nodes = sorted(range(1, len(log_probs)), key=log_probs.__getitem__, reverse=True)
        accepted = set(path)
        for band, (low, high) in zip(self._bands, pairwise(self.sizes), strict=True):
            if high <= num_nodes:
                promised = sum(math.exp(log_probs[node]) for node in nodes[low:high])
                band.learn(self._round, promised, len(accepted.intersection(nodes[low:high])))
        if self._is_plain:
            pays = len(path) * self._costs.seconds(0) > self._costs.seconds(num_nodes)
            self._wait = _SHORTEST_WAIT if pays else min(2 * self._wait, _LONGEST_WAIT)
            self._plain_until = self._round if pays else self._round + self._wait


class FixedCount:
    """As many nodes in every round as a call asks for.

    Args:
        num_nodes (`int`): most nodes in a tree, the root not counted.
    """

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    def choose(self) -> int:
        """The most nodes to draft in the next round."""
        return self._num_nodes

    def observe(self, num_nodes: int, tree: DraftTree, path: list[int]) -> None:
        """There is nothing to learn."""


class TimedCount:
    """A [`NodeCount`] in one call, which tells it what rounds take.

    Args:
        count (`NodeCount`): that of the pair.
        clock (`Callable`): seconds spent in rounds so far.
    """

    def __init__(self, count: NodeCount, clock: Callable[[], float]) -> None:
        self._count, self._clock, self._before = count, clock, clock()

    def choose(self) -> int:
        """The most nodes to draft in the next round."""
        return self._count.choose()

    def observe(self, num_nodes: int, tree: DraftTree, path: list[int]) -> None:
        """Learn from a round when its path is known."""
        now = self._clock()
        log_probs = tree.log_probs[0].tolist() if len(tree) > 1 else [0.0]
        self._count.observe(num_nodes, log_probs, path, now - self._before)
        self._before = now


def node_count_of(pair: DecodingPair, sizes: tuple[int, ...] = SIZES) -> NodeCount:
    """What this process has learned of a pair with some sizes, where and in the number types in which it runs now."""
    return pair.kept(("node count", sizes, pair.place), lambda: NodeCount(sizes))
