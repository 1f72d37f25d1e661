"""Grafts: what followed the same words when they last occurred, as further branches of the tree."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tree import Children, Propose

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
        max_length (`int`): longest graft in tokens.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._text: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # where the token after a pair stands, oldest first
        self._scores = MatchScores()
        self._found: list[Graft] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in newly committed tokens, and learn from them what the last grafts were worth."""
        for graft in self._found[:1]:
            self._scores.learn(graft, tokens)
        self._found = []
        for token in tokens:
            if len(self._text) > 1:
                places = self._places.setdefault((self._text[-2], self._text[-1]), [])
                places.append(len(self._text))
                del places[:-_MOST_PLACES]
            self._text.append(token)

    def find(self) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probabilities of the grafts for the next round, the longest match first."""
        places = self._places.get((self._text[-2], self._text[-1]), []) if len(self._text) > 1 else []
        grafts: dict[int, Graft] = {}  # by first token
        for place in sorted(places, key=lambda place: (self._match_length(place), place), reverse=True):
            grafts.setdefault(self._text[place], Graft(self._from(place), self._match_length(place)))
        self._found = list(grafts.values())[:MOST_GRAFTS]
        return [self._cut(graft) for graft in self._found]

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
    """Tokens and log-probabilities of grafts as tensors, each `(grafts, length)`, padded with -1 and -inf.

    Args:
        grafts (`Sequence[tuple[list[int], list[float]]]`): what [`Grafter.find`] gives.
        device (`torch.device`): where to put them.
        shape (`tuple[int, int]`, *optional*):
            Number and length to pad to, none smaller than those of `grafts`; by default just these, of at least one.
    """
    num_grafts, length = shape or (len(grafts), max(len(tokens) for tokens, _ in grafts))
    tokens = [one + [-1] * (length - len(one)) for one, _ in grafts]
    log_probs = [one + [-math.inf] * (length - len(one)) for _, one in grafts]
    missing = num_grafts - len(grafts)
    return (
        torch.tensor(tokens + [[-1] * length] * missing, device=device),
        torch.tensor(log_probs + [[-math.inf] * length] * missing, device=device),
    )


class GraftedProposals:
    """The head's proposals with the grafts' among them; where both say the same, the better score holds.

    Args:
        proposals (`Callable`): the head's; see [`~jetspec_hf.tree.build_tree`].
        max_depth (`int`): depth to which the head proposes.
        tokens (`torch.LongTensor` of shape `(grafts, length)`): on the device of the head's proposals, padded with -1.
        log_probs (`torch.FloatTensor` of shape `(grafts, length)`):
            Of each token given those before it, padded with -inf; see [`stack_grafts`].
    """

    def __init__(self, proposals: Propose, max_depth: int, tokens: Tensor, log_probs: Tensor) -> None:
        self._proposals = proposals
        self._max_depth = max_depth
        self._tokens, self._log_probs = tokens, log_probs
        self._on_graft: Tensor | None = None  # which nodes of the last depth each graft runs through
        self.max_depth = max(max_depth, tokens.shape[1])

    def __call__(self, depth: int, tokens: Tensor, above: Tensor) -> Children:
        """As [`~jetspec_hf.tree.build_tree`] asks."""
        num_grafts, longest = self._tokens.shape
        if self._on_graft is None:
            on_graft = torch.ones(*tokens.shape, num_grafts, dtype=torch.bool, device=tokens.device)
        else:
            on_graft = self._on_graft.gather(1, above[:, :, None].expand(-1, -1, num_grafts))
            on_graft &= tokens[:, :, None] == self._tokens[:, min(depth - 2, longest - 1)]
        self._on_graft = on_graft  # (batch, nodes, grafts)
        here = min(depth - 1, longest - 1)
        wanted = self._tokens[:, here].expand_as(on_graft)
        scores = torch.where(on_graft & (depth <= longest), self._log_probs[:, here], -math.inf)
        # A second graft that says the same as the first adds nothing.
        repeats = (wanted[..., :, None] == wanted[..., None, :]).tril(-1) & on_graft[..., None, :]
        scores = scores.masked_fill(repeats.any(-1), -math.inf)
        # A tree with room to spare holds impossible children, too, and the target needs a token that it knows.
        tokens_of_grafts = wanted.clamp(min=0)
        if depth > self._max_depth:
            return scores, tokens_of_grafts
        log_probs, children = self._proposals(depth, tokens, above)
        children = children.expand(-1, tokens.shape[1], -1)
        is_same = children[..., :, None] == wanted[..., None, :]  # (batch, nodes, children, grafts)
        better = torch.where(is_same, scores[..., None, :], -math.inf).amax(-1)
        scores = scores.masked_fill(is_same.any(-2), -math.inf)
        return torch.cat([torch.maximum(log_probs, better), scores], -1), torch.cat([children, tokens_of_grafts], -1)
