"""Grafts: what followed the same words when they last occurred, as further branches of the tree."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .proposals import DepthProposals, PathProposals, pick_rows

MOST_GRAFTS = 2
_MOST_PLACES = 8  # occurrences of the last two tokens that are compared
_LONGEST_MATCH = 8  # in tokens; longer ones count as this long
_LEAST_PROBABILITY = 0.01  # a graft is cut where it becomes less likely than this
_MEMORY = 0.98  # weight of the past each time something is learned


class Graft(NamedTuple):
    """What may follow the text, because it did so before."""

    tokens: list[int]
    match_length: int  # tokens before it that are the same as then


class MatchScores:
    """How often a match of a given length was lately followed by the right token.

    Starts from a guess worth a few observations. A longer match is a better one: the token after a right token is
    scored as a match that is one longer.
    """

    def __init__(self) -> None:
        guesses = {length: 1 - 1 / length for length in range(2, _LONGEST_MATCH + 1)}
        self._hits = {length: 4 * guess for length, guess in guesses.items()}
        self._tries = dict.fromkeys(guesses, 4.0)

    def log_probs(self, graft: Graft) -> list[float]:
        """The log-probability of each token of a graft, given those before it."""
        lengths = (min(graft.match_length + i, _LONGEST_MATCH) for i in range(len(graft.tokens)))
        return [math.log(self._hits[length] / self._tries[length]) for length in lengths]

    def learn(self, graft: Graft, emitted: Sequence[int]) -> None:
        """Compare a graft with what the target said in its place."""
        for i, (ours, true) in enumerate(zip(graft.tokens, emitted, strict=False)):
            length = min(graft.match_length + i, _LONGEST_MATCH)
            # Never certain, and never impossible.
            self._hits[length] = _MEMORY * self._hits[length] + (0.99 if ours == true else 0.01)
            self._tries[length] = _MEMORY * self._tries[length] + 1
            if ours != true:
                break


class Grafter:
    """Finds grafts for one text, and learns how good they are.

    The index holds where each pair of tokens occurred last, and grows with the text; nothing is searched again.

    Args:
        max_length (`int`): longest graft in tokens; with 0 there are none, and no text is kept.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._text: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # where the token after a pair stands, oldest first
        self._scores = MatchScores()
        # At the end of the text, once asked for.
        self._found: list[Graft] | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in newly committed tokens, and learn from them what the last grafts were worth."""
        if self._max_length == 0:
            return
        for graft in (self._found or [])[:1]:
            self._scores.learn(graft, tokens)
        self._found = None
        for token in tokens:
            if len(self._text) > 1:
                places = self._places.setdefault((self._text[-2], self._text[-1]), [])
                places.append(len(self._text))
                del places[:-_MOST_PLACES]
            self._text.append(token)

    def find(self) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probabilities of the grafts for the next round, the longest match first."""
        if self._found is None:
            self._found = self._search()
        return [self._cut(graft) for graft in self._found]

    def _search(self) -> list[Graft]:
        places = self._places.get((self._text[-2], self._text[-1]), []) if len(self._text) > 1 else []
        grafts: dict[int, Graft] = {}  # by first token
        for place in sorted(places, key=lambda place: (self._match_length(place), place), reverse=True):
            grafts.setdefault(self._text[place], Graft(self._from(place), self._match_length(place)))
        return list(grafts.values())[:MOST_GRAFTS]

    def _from(self, place: int) -> list[int]:
        """The text from `place`, and past its end the same again, as in a text that repeats itself."""
        tokens = self._text[place : place + self._max_length]
        while len(tokens) < self._max_length:
            tokens.append(tokens[place + len(tokens) - len(self._text)])
        return tokens

    def _match_length(self, place: int) -> int:
        """How many tokens before `place` are those that the text ends with."""
        length = 2
        while length < min(_LONGEST_MATCH, place) and self._text[place - 1 - length] == self._text[-1 - length]:
            length += 1
        return length

    def _cut(self, graft: Graft) -> tuple[list[int], list[float]]:
        log_probs, total = self._scores.log_probs(graft), 0.0
        for end, log_prob in enumerate(log_probs):
            total += log_prob
            if total < math.log(_LEAST_PROBABILITY):
                return graft.tokens[:end], log_probs[:end]
        return graft.tokens, log_probs


def stack_grafts(
    grafts: Sequence[tuple[list[int], list[float]]], device: torch.device, shape: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of grafts as tensors, each `(1, grafts, length)`, padded with -1 and -inf.

    Args:
        grafts (`Sequence[tuple[list[int], list[float]]]`): what [`Grafter.find`] gives.
        device (`torch.device`): where to put them.
        shape (`tuple[int, int]`, *optional*):
            Number and length to pad to, none smaller than those of `grafts`; by default just these, of at least one.
    """
    return stack_rows_of_grafts([grafts], device, shape)


def stack_rows_of_grafts(
    rows: Sequence[Sequence[tuple[list[int], list[float]]]],
    device: torch.device,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """[`stack_grafts`] for several texts, at least one of which has a graft: each `(batch, grafts, length)`."""
    num_grafts, length = shape or (max(map(len, rows)), max(len(tokens) for row in rows for tokens, _ in row))
    nothing: tuple[list[int], list[float]] = ([], [])
    filled = [[*row, *[nothing] * (num_grafts - len(row))] for row in rows]
    tokens = [[one + [-1] * (length - len(one)) for one, _ in row] for row in filled]
    log_probs = [[one + [-math.inf] * (length - len(one)) for _, one in row] for row in filled]
    return torch.tensor(tokens, device=device), torch.tensor(log_probs, device=device)


class GraftedProposals:
    """The head's proposals with the grafts' among them; where both say the same, the better score holds.

    At each depth the choices are the grafts, numbered as they are, then the head's. A node that holds a graft's choice
    lies on the graft from the root down.

    Args:
        proposals (`DepthProposals` or `PathProposals`): the head's; the latter know the tokens of the grafts.
        tokens (`torch.LongTensor` of shape `(batch, grafts, length)`):
            On the device of the head's proposals, padded with -1. No two of a row begin alike.
        log_probs (`torch.FloatTensor` of shape `(batch, grafts, length)`):
            Of each token given those before it, padded with -inf; see [`stack_grafts`].
    """

    def __init__(self, proposals: DepthProposals | PathProposals, tokens: Tensor, log_probs: Tensor) -> None:
        self._proposals = proposals
        self._block_depth = proposals.tokens.shape[1]
        _, num_grafts, length = tokens.shape
        missing = max(0, self._block_depth - length)
        tokens = nn.functional.pad(tokens, (0, missing), value=-1).transpose(1, 2)  # (batch, depths, grafts)
        self._log_probs = nn.functional.pad(log_probs, (0, missing), value=-math.inf).transpose(1, 2)
        # A tree with room to spare holds impossible nodes, too, and the target needs a token that it knows.
        candidates = nn.functional.pad(proposals.tokens, (0, 0, 0, tokens.shape[1] - self._block_depth))
        self.tokens = torch.cat([tokens.clamp(min=0), candidates], dim=2)
        self._grafts = torch.arange(num_grafts, device=tokens.device)
        # Which choice says the same as each graft, (batch, depths, grafts): the head's, or else only its own.
        is_same = proposals.tokens[:, :, None] == tokens[:, : self._block_depth, :, None]
        is_proposed, which = is_same.max(dim=-1)
        self._same = torch.where(is_proposed, num_grafts + which, self._grafts)
        self._table: Tensor | None = None
        if proposals.table is not None:
            # Rows: the grafts, then the head's own choices, which may share one row. The root lies on all grafts.
            rows = max(num_grafts + 1, proposals.table.shape[2])
            is_on = torch.eye(rows, num_grafts, dtype=torch.bool, device=tokens.device).repeat(self._block_depth, 1, 1)
            is_on[0] = True
            self._table = self._graft(proposals.table.expand(-1, -1, rows, -1), is_on, slice(0, self._block_depth))

    def __call__(self, depth: int, choices: Tensor, above: Tensor) -> Tensor:
        """As [`~jetspec_hf.tree.tree.Proposals`] says."""
        here = slice(depth - 1, depth)
        if depth > self._block_depth:
            return torch.where(self._is_on(choices), self._log_probs[:, here], -math.inf)
        if self._table is not None:
            return pick_rows(self._table[:, depth - 1], choices.clamp(max=self._table.shape[2] - 1))
        is_on = self._is_on(choices) if depth > 1 else torch.ones_like(self._is_on(choices))
        return self._graft(self._proposals(depth, choices, above)[:, None], is_on[:, None], here)[:, 0]

    def _is_on(self, choices: Tensor) -> Tensor:
        """Whether nodes below the root lie on each graft, `(batch, nodes, grafts)`."""
        return choices[:, :, None] == self._grafts

    def _graft(self, log_probs: Tensor, is_on: Tensor, depths: slice) -> Tensor:
        """The head's scores below nodes, `(batch, depths, nodes, candidates)`, with those of the grafts before them."""
        num_grafts = len(self._grafts)
        log_probs = nn.functional.pad(log_probs, (num_grafts, 0), value=-math.inf)
        same = self._same[:, depths, None].expand(-1, -1, log_probs.shape[2], -1)
        better = torch.maximum(log_probs.gather(3, same), self._log_probs[:, depths, None])
        log_probs = log_probs.scatter_reduce(3, same, torch.where(is_on, -math.inf, math.inf).expand_as(same), "amin")
        log_probs[..., :num_grafts] = torch.where(is_on, better, -math.inf)
        return log_probs
