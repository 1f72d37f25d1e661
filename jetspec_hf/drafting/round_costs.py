"""What rounds cost here, by what they draft."""

from itertools import pairwise
from statistics import median_low
from typing import NamedTuple

_NUM_TIMES = 8  # of the newest rounds, the middle one counts


class Choice(NamedTuple):
    """What a round drafts."""

    num_nodes: int  # most nodes in the tree, the root not counted
    runs_head: bool  # else the tree has grafts alone; with no nodes the target decodes plainly


PLAIN = Choice(0, runs_head=False)


class RoundCosts:
    """Seconds of a round of each kind. Those never timed are reckoned from others.

    A busy machine and a long text slow down all of them. So that one tried long ago can be compared with one tried now,
    costs are counted at a pace that all rounds tell: their seconds by what their kind costs at pace 1.
    """

    def __init__(self) -> None:
        self._costs: dict[Choice, list[float]] = {}  # at pace 1
        self._paces = [1.0] * _NUM_TIMES

    def add(self, choice: Choice, seconds: float) -> None:
        """Take in one round."""
        costs, seconds = self._costs.get(choice, []), max(seconds, 1e-9)
        # New ones each time: other threads may be reading the old ones.
        if len(costs) > 1:
            self._paces = [*self._paces[1:], seconds / median_low(costs)]
        newest = [*costs[1 - _NUM_TIMES :], seconds / median_low(self._paces)]
        self._costs = self._costs | {choice: newest}

    def num_timed(self, choice: Choice) -> int:
        """How many rounds of a kind are remembered."""
        return len(self._costs.get(choice, []))

    def num_timed_grafts(self) -> int:
        """How many rounds of grafts alone are remembered."""
        return sum(self.num_timed(choice) for choice in self._costs if choice != PLAIN and not choice.runs_head)

    def seconds(self, choice: Choice) -> float:
        """What a round is likely to cost.

        Needs a plain round, drafted ones of two sizes, and for those of grafts alone one of these.
        """
        return self._at_pace_1(choice) * median_low(self._paces)

    def steps(self, choice: Choice) -> float:
        """The same by what a plain round costs."""
        return self._at_pace_1(choice) / self._at_pace_1(PLAIN)

    def _at_pace_1(self, choice: Choice) -> float:
        if choice in self._costs:
            return median_low(self._costs[choice])
        # The head is in every drafted round and not in a plain one, so plain rounds tell nothing here.
        size, kind = choice.num_nodes, choice.runs_head
        timed = sorted(other.num_nodes for other in self._costs if other.runs_head == kind and other != PLAIN)
        if choice.runs_head:
            low, high = min(pairwise(timed), key=lambda pair: abs(pair[0] + pair[1] - 2 * size))
            slope = max(0.0, (self._with_head(high) - self._with_head(low)) / (high - low))
            cost = self._with_head(low) + slope * (size - low)
        else:
            near = min(timed, key=lambda other: abs(other - size))
            cost = self._at_pace_1(Choice(near, runs_head=False)) + self._with_head(size) - self._with_head(near)
        return max(self._at_pace_1(PLAIN), cost)

    def _with_head(self, num_nodes: int) -> float:
        return self._at_pace_1(Choice(num_nodes, runs_head=True))
