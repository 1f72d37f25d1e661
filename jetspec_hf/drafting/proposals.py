"""Proposals: which tokens the head would put below a node, and how likely it finds them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..head.markov import JetSpecMarkovHead


def pick_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows of `rows`, `(batch, rows, width)`, by their `numbers`, `(batch, picked)`: `(batch, picked, width)`."""
    return rows.gather(1, numbers.to(rows.device)[:, :, None].expand(-1, -1, rows.shape[2]))


class DepthProposals:
    """One distribution for each depth, whatever the path (paper, section 3).

    Args:
        logits (`torch.FloatTensor` of shape `(batch, depths, vocab)`): the head's.
        num_candidates (`int`): tokens proposed at each depth.
        temperatures (`torch.FloatTensor` of shape `(depths,)`, *optional*): what logits are divided by.
    """

    def __init__(self, logits: Tensor, num_candidates: int, temperatures: Tensor | None = None) -> None:
        logits = _soften(logits, temperatures)
        best, self.tokens = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
        log_probs = best - logits.logsumexp(dim=-1, keepdim=True)
        self.table = _without_nan(log_probs)[:, :, None]  # as that of `PathProposals`

    def __call__(self, depth: int, choices: Tensor, above: Tensor) -> Tensor:
        """As [`~jetspec_hf.tree.tree.Proposals`] says."""
        return self.table[:, depth - 1]


class PathProposals:
    """One distribution for each path: the depth's likeliest tokens, scored anew below every node.

    The candidates of a depth are its likeliest tokens without the Markov head. What that adds to their logits is exact;
    the other tokens share the rest of the depth's probability as if it added nothing to theirs, which spares a pass
    over the vocabulary for every node.

    Where the Markov head knows of a path no more than its last token, all depths are scored at once: `table`, of shape
    `(batch, depths, tokens above, candidates)`, has a row for each token of the depth above, at the first depth for the
    anchor.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, depths, vocab)`): the head's, without the Markov head.
        hidden_states (`torch.FloatTensor` of shape `(batch, depths, hidden)`): the head's, on its device.
        anchor (`torch.LongTensor` of shape `(batch,)`): the token of the root.
        markov_head (`JetSpecMarkovHead`): what knows of paths.
        embed (`Callable`): the target's embedding.
        lm_head (`nn.Linear`): the target's LM head.
        num_candidates (`int`): tokens proposed at each depth.
        temperatures (`torch.FloatTensor` of shape `(depths,)`, *optional*): what logits are divided by.
        grafts (`torch.LongTensor` of shape `(batch, grafts, length)`, *optional*):
            Tokens that nodes may hold too, and whose choices are numbered before the candidates; see
            [`~jetspec_hf.drafting.grafts.GraftedProposals`].
    """

    def __init__(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        anchor: Tensor,
        markov_head: JetSpecMarkovHead,
        embed: Callable[[Tensor], Tensor],
        lm_head: nn.Linear,
        num_candidates: int,
        temperatures: Tensor | None = None,
        grafts: Tensor | None = None,
    ) -> None:
        logits = _soften(logits, temperatures)
        self._logits, self.tokens = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
        everything = logits.logsumexp(dim=-1, keepdim=True)
        left = -torch.expm1(self._logits.logsumexp(dim=-1, keepdim=True) - everything)
        self._rest = everything + left.clamp(min=0).log()  # (batch, depths, 1)
        self._hidden_states = hidden_states
        self._markov_head = markov_head
        # (batch, depths, candidates, rank)
        codes = markov_head.token_codes(lm_head, self.tokens).to(logits.device, logits.dtype)
        self._token_codes = codes if temperatures is None else codes / temperatures[:, None, None]
        # (batch, depths, tokens above, width)
        self._looked_up = markov_head.look_up(_tokens_above(anchor, self.tokens, grafts), embed)
        self._states: Tensor | None = None  # of the nodes of the last depth, (batch, nodes, width)
        self.table = None if markov_head.has_memory else self._score(self._looked_up, slice(None))

    def __call__(self, depth: int, choices: Tensor, above: Tensor) -> Tensor:
        """As [`~jetspec_hf.tree.tree.Proposals`] says."""
        if self.table is not None:
            return pick_rows(self.table[:, depth - 1], choices)
        before = None if self._states is None else pick_rows(self._states, above)
        self._states = self._markov_head.advance(pick_rows(self._looked_up[:, depth - 1], choices), before)
        return self._score(self._states[:, None], slice(depth - 1, depth))[:, 0]

    def _score(self, states: Tensor, depths: slice) -> Tensor:
        """Log-probabilities of the candidates of some depths below states, `(batch, depths, nodes, width)`."""
        codes = self._markov_head.context_codes(states, self._hidden_states[:, depths, None])
        codes = codes.to(self._logits.device, self._logits.dtype)
        logits = self._logits[:, depths, None] + codes @ self._token_codes[:, depths].transpose(2, 3)
        log_total = torch.logaddexp(logits.logsumexp(dim=-1, keepdim=True), self._rest[:, depths, None])
        return _without_nan(logits - log_total)


def _tokens_above(anchor: Tensor, tokens: Tensor, grafts: Tensor | None) -> Tensor:
    """What nodes above each depth may hold, `(batch, depths, grafts + candidates)`; the anchor above the first."""
    num_depths = tokens.shape[1]
    if grafts is not None:
        grafts = nn.functional.pad(grafts.clamp(min=0), (0, num_depths))[:, :, :num_depths]
        tokens = torch.cat([grafts.transpose(1, 2), tokens], dim=2)
    return torch.cat([anchor[:, None, None].expand_as(tokens[:, :1]), tokens[:, :-1]], dim=1)


def _soften(logits: Tensor, temperatures: Tensor | None) -> Tensor:
    return logits if temperatures is None else logits / temperatures[:, None]


def _without_nan(log_probs: Tensor) -> Tensor:
    """A NaN counts as impossible; in place."""
    return log_probs.nan_to_num_(nan=-math.inf, neginf=-math.inf)
