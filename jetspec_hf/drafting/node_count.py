"""How many nodes to draft: what a round costs on this machine against what the text lately accepted."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..pair import DecodingPair
from ..tree.tree import DraftTree
from .expected_tokens import ExpectedTokens
from .round_costs import PLAIN, Choice, RoundCosts

SIZES = (0, 3, 7, 15, 31, 63, 127)  # nodes, the root not counted; 0 leaves out the head
STATIC_SIZES = (0, 15, 63)  # where each has to be compiled

_TIMED_FIRST = (15, 63)  # with a plain round twice each, since the first time may warm something up
_MOST_IN_ALL = 256  # nodes of all rows of a batch
_GRAFTS_TIMED_FIRST = 15  # nodes, or as many as there are; twice, too
_EXPLORE_EVERY = 16  # rounds
_MAY_BE_BEST = 0.8  # of the best speed; below, only neighbours with the head are explored
_FAIR_DOUBT = 0.5  # where grafts are surer, the head is not tried
_SHORTEST_WAIT, _LONGEST_WAIT = 8, 64  # rounds before the head is tried again


class _Option(NamedTuple):
    """A round that could come next."""

    choice: Choice
    tokens: float  # expected
    steps: float  # what it costs, by what a plain round does

    @property
    def pace(self) -> float:
        """Tokens in the time of a plain round."""
        return self.tokens / self.steps


class NodeCount:
    """Chooses for each round what has the most expected tokens per second.

    That is a tree of some number of nodes with the head, one of grafts alone, or a plain round. Where the head does not
    pay, it is left out, and tried again after 8 rounds, 16, 32, and from then on 64.

    Nothing that is chosen here can change the text.

    Args:
        sizes (`tuple[int, ...]`, *optional*): numbers to choose from, at least three, rising from 0.
    """

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        self.sizes = sizes
        known = [size for size in _TIMED_FIRST if size in sizes]
        self._timed_first = [_choice(size) for size in (*(known if len(known) > 1 else sizes[1:3]), 0)]
        self._costs, self._expected = RoundCosts(), ExpectedTokens(sizes)
        self._round = 0
        self._last_rounds: dict[Choice, int] = {}
        self._last_with_head, self._rests_until, self._wait = 0, 0, _SHORTEST_WAIT
        # What the round that was chosen last is worth without the head.
        self._without_head = _Option(PLAIN, 1.0, 1.0)
        self._doubt = 1.0

    def tokens_per_second(self) -> dict[int, float]:
        """What is expected where there are no grafts, of each number of nodes and of a plain round under 0."""
        options = [_Option(PLAIN, 1.0, 1.0), *self._with_head(1.0, 1.0)]
        return {option.choice.num_nodes: option.pace / self._costs.seconds(PLAIN) for option in options}

    def choose(self, graft_probs: Sequence[float] = ()) -> Choice:
        """What to draft in the next round.

        Args:
            graft_probs (`Sequence[float]`): cumulative probabilities of the nodes that grafts alone give, falling.
        """
        untimed = self._untimed(graft_probs)
        if untimed is not None:
            return untimed
        is_exploring = self._round % _EXPLORE_EVERY == 0
        alone = self._alone(graft_probs)
        without, doubt = _fastest(alone), self._expected.doubt(graft_probs)
        self._without_head, self._doubt = without, doubt
        with_head = self._with_head(without.tokens, doubt)
        best = without if self._round < self._rests_until else _fastest([without, *with_head])
        if best.choice.runs_head:
            return self._explored([without, *with_head], best) if is_exploring else best.choice
        is_due = self._round >= max(self._rests_until, self._last_with_head + self._wait)
        if is_due and doubt > _FAIR_DOUBT:
            return _fastest(with_head).choice
        return self._explored(alone, best) if is_exploring else best.choice

    def observe(
        self, choice: Choice, log_probs: Sequence[Sequence[float]], paths: Sequence[Sequence[int]], seconds: float
    ) -> None:
        """Learn from a round.

        Args:
            choice (`Choice`): what [`choose`] said.
            log_probs (`Sequence[Sequence[float]]`):
                Cumulative log-probability of every node of the tree of each row, the root first.
            paths (`Sequence[Sequence[int]]`): the accepted nodes of each row, the root first.
            seconds (`float`): what the round took, from the end of the last one.
        """
        self._round += 1
        self._last_rounds[choice] = self._round
        if not choice.runs_head:
            # As many nodes as there were.
            self._costs.add(Choice(self._size_of(len(log_probs[0]) - 1), runs_head=False), seconds)
            for row, path in zip(log_probs, paths, strict=True):
                self._expected.learn_alone(self._round, row, path)
            return
        self._costs.add(choice, seconds)
        for row, path in zip(log_probs, paths, strict=True):
            self._expected.learn_with_head(
                self._round, choice.num_nodes, row, path, self._without_head.tokens, self._doubt
            )
        if self._round > self._last_with_head + self._wait:
            self._judge_trial(choice, sum(map(len, paths)) / len(paths))
        self._last_with_head = self._round

    def _untimed(self, graft_probs: Sequence[float]) -> Choice | None:
        """What has to be timed before costs can be compared."""
        first = min(self._timed_first, key=self._costs.num_timed)
        if self._costs.num_timed(first) < 2:
            return first
        if graft_probs and self._costs.num_timed_grafts() < 2:
            return Choice(min(_GRAFTS_TIMED_FIRST, self._size_of(len(graft_probs))), runs_head=False)
        return None

    def _alone(self, graft_probs: Sequence[float]) -> list[_Option]:
        """A plain round, and all sizes of grafts alone."""
        return self._priced(self._expected.of_grafts(graft_probs), runs_head=False)

    def _with_head(self, tokens_without: float, doubt: float) -> list[_Option]:
        """All sizes with the head."""
        return self._priced(self._expected.with_head(tokens_without, doubt), runs_head=True)

    def _priced(self, tokens: dict[int, float], *, runs_head: bool) -> list[_Option]:
        choices = [Choice(size, runs_head) for size in tokens]
        return [_Option(choice, tokens[choice.num_nodes], self._costs.steps(choice)) for choice in choices]

    def _explored(self, options: Sequence[_Option], best: _Option) -> Choice:
        """Of those that may be best, the one not chosen for longest."""
        here = options.index(best)
        rivals = [
            option
            for i, option in enumerate(options)
            # With the head the neighbours too, whose costs may have been measured in worse times.
            if option.pace > _MAY_BE_BEST * best.pace or (best.choice.runs_head and abs(i - here) <= 1)
        ]
        return min((option.choice for option in rivals), key=lambda choice: self._last_rounds.get(choice, 0))

    def _judge_trial(self, choice: Choice, num_tokens: float) -> None:
        """Let the head rest, longer each time, unless a round of `num_tokens` was better than without it."""
        pays = num_tokens > self._without_head.pace * self._costs.steps(choice)
        self._wait = _SHORTEST_WAIT if pays else min(2 * self._wait, _LONGEST_WAIT)
        self._rests_until = self._round if pays else self._round + self._wait

    def _size_of(self, num_nodes: int) -> int:
        """The size as which a tree counts."""
        return next((size for size in self.sizes if size >= num_nodes), self.sizes[-1])


def _fastest(options: Sequence[_Option]) -> _Option:
    return max(options, key=lambda option: option.pace)


def _choice(num_nodes: int) -> Choice:
    """So many nodes with the head, or a plain round."""
    return Choice(num_nodes, runs_head=num_nodes > 0)


class FixedCount:
    """As many nodes in every round as a call asks for.

    Args:
        num_nodes (`int`): most nodes in a tree, the root not counted.
    """

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    def choose(self, find_grafts: Callable[[], Sequence[float]]) -> Choice:
        """What to draft in the next round, always the same."""
        return _choice(self._num_nodes)

    def observe(self, choice: Choice, tree: DraftTree, paths: Sequence[list[int]]) -> None:
        """There is nothing to learn."""


class TimedCount:
    """A [`NodeCount`] in one call, which tells it what rounds take.

    Args:
        count (`NodeCount`): that of the pair.
        clock (`Callable`): seconds spent in rounds so far.
    """

    def __init__(self, count: NodeCount, clock: Callable[[], float]) -> None:
        self._count, self._clock, self._before = count, clock, clock()

    def choose(self, find_grafts: Callable[[], Sequence[float]]) -> Choice:
        """What to draft in the next round; see [`NodeCount.choose`] for what is found."""
        return self._count.choose(find_grafts())

    def observe(self, choice: Choice, tree: DraftTree, paths: Sequence[list[int]]) -> None:
        """Learn from a round when the path of each row is known."""
        now = self._clock()
        log_probs = tree.log_probs.tolist() if len(tree) > 1 else [[0.0]] * len(paths)
        self._count.observe(choice, log_probs, paths, now - self._before)
        self._before = now


def node_count_of(pair: DecodingPair, sizes: tuple[int, ...] = SIZES, num_rows: int = 1) -> NodeCount:
    """What this process has learned of a pair with some sizes, where and in the number types in which it runs now.

    Batches of 3 and 4 rows share what they learn, those of 5 to 8, and so on, and the more rows, the smaller trees.
    """
    like = 1 << (num_rows - 1).bit_length()
    few = tuple(size for size in sizes if size <= 7 or size * like <= _MOST_IN_ALL)
    return pair.kept(("node count", few, like, pair.place), lambda: NodeCount(few))
