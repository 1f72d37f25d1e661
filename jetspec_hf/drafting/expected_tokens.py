"""How many tokens a round is likely to emit: what its nodes promise, and what such promises were worth of late."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

_TEXT_MEMORY = 15 / 16  # weight of the past, for each round, in how sure the head is of this text
_SCORE_MEMORY = 63 / 64  # the same in how far scores can be believed
_NUM_PRIOR = 1.0  # promised tokens that a prior counts as much as
_NUM_GRAFT_PRIOR = 4.0  # the same for grafts, whose scores have been learned from this text
_LEAST_DOUBT = 0.2


@dataclass
class _Band:
    """The nodes that one size has and the next smaller one has not: how many of them a round accepts."""

    last_round: int = 0
    num_rounds: float = 0.0  # that drafted these nodes, older ones counting less
    recently_promised: float = 0.0  # tokens in these rounds, by their scores
    promised: float = 0.0  # the same over a longer time
    accepted: float = 0.0  # of those

    def learn(self, now: int, promised: float, accepted: int) -> None:
        """Take in round `now`."""
        text, score = _TEXT_MEMORY ** (now - self.last_round), _SCORE_MEMORY ** (now - self.last_round)
        self.last_round = now
        self.num_rounds = text * self.num_rounds + 1
        self.recently_promised = text * self.recently_promised + promised
        self.promised = score * self.promised + promised
        self.accepted = score * self.accepted + accepted

    def mean(self, unknown: float) -> float:
        """Tokens promised in a round of late, `unknown` before there was one."""
        return self.recently_promised / self.num_rounds if self.num_rounds else unknown

    def trust(self, prior: float, weight: float = _NUM_PRIOR) -> float:
        """What the scores' promises were worth, `prior` before anything was seen; a head may be confidently wrong."""
        return (self.accepted + weight * prior) / (self.promised + weight)


class ExpectedTokens:
    """Expects tokens of a round for each number of nodes, with the head and of grafts alone.

    Trees are nested: the best `n` nodes of a tree are the tree of `n` nodes. So a round of one size tells what every
    smaller one would have accepted.

    What grafts promise is known before a round. What the head adds to that is not: it is what it added of late, the
    more, the less likely it is that a graft is right.

    Args:
        sizes (`Sequence[int]`): numbers of nodes, rising from 0.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._bands = [_Band() for _ in sizes[1:]]  # of rounds with the head
        self._without, self._doubts = _Band(), _Band()  # in the same rounds, what was known without it
        self._grafts = _Band()  # of rounds of grafts alone

    def of_grafts(self, graft_probs: Sequence[float]) -> dict[int, float]:
        """Tokens of trees of grafts alone, of as many sizes as they can fill; of a plain round under 0.

        Args:
            graft_probs (`Sequence[float]`): cumulative probabilities of the nodes of grafts, falling.
        """
        trust, promised = self._grafts.trust(1.0, _NUM_GRAFT_PRIOR), [0.0, *accumulate(graft_probs)]
        return {0: 1.0} | {
            size: 1 + trust * promised[min(size, len(graft_probs))]
            for low, size in pairwise(self._sizes)
            if low < len(graft_probs)
        }

    def doubt(self, graft_probs: Sequence[float]) -> float:
        """How likely it is that no graft is right, of which there are at most two. Never sure."""
        return max(_LEAST_DOUBT, 1 - self._grafts.trust(1.0, _NUM_GRAFT_PRIOR) * max(graft_probs, default=0.0))

    def with_head(self, tokens_without: float, doubt: float) -> dict[int, float]:
        """Tokens of trees with the head, of all sizes.

        Args:
            tokens_without (`float`): what the best round without it would emit now.
            doubt (`float`): how likely it is now that no graft is right.
        """
        expected, promised, trust = 1.0, 0.0, 1.0
        without, part = self._without.mean(unknown=1.0), doubt / self._doubts.mean(unknown=1.0)
        tokens = {}
        for band, size in zip(self._bands, self._sizes[1:], strict=True):
            # Nodes never drafted promise half of what the likelier ones before them do.
            promised = band.mean(unknown=promised / 2)
            trust = band.trust(prior=trust)
            expected += trust * promised
            tokens[size] = tokens_without + part * max(0.0, expected - without)
        return tokens

    def learn_alone(self, now: int, log_probs: Sequence[float], path: Sequence[int]) -> None:
        """Take in round `now`, one without the head; the others as [`learn_with_head`] takes them."""
        self._grafts.learn(now, sum(map(math.exp, log_probs[1:])), len(path) - 1)

    def learn_with_head(
        self,
        now: int,
        num_nodes: int,
        log_probs: Sequence[float],
        path: Sequence[int],
        tokens_without: float,
        doubt: float,
    ) -> None:
        """Take in a round.

        Args:
            now (`int`): its number.
            num_nodes (`int`): the size that was asked for.
            log_probs (`Sequence[float]`): cumulative log-probability of every node of the tree, the root first.
            path (`Sequence[int]`): the accepted nodes, the root first.
            tokens_without (`float`): as [`with_head`] takes it.
            doubt (`float`): the same.
        """
        nodes = sorted(range(1, len(log_probs)), key=log_probs.__getitem__, reverse=True)
        accepted = set(path)
        for band, (low, high) in zip(self._bands, pairwise(self._sizes), strict=True):
            if high <= num_nodes:
                promised = sum(math.exp(log_probs[node]) for node in nodes[low:high])
                band.learn(now, promised, len(accepted.intersection(nodes[low:high])))
        self._grafts.learn(now, 0.0, 0)  # forgets
        self._without.learn(now, tokens_without, 0)
        self._doubts.learn(now, doubt, 0)
