"""Proposals: which tokens the head would put below a node, and how likely it finds them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .markov import JetSpecMarkovHead
from .tree import Children, Propose


class DepthProposals:
    """One distribution for each depth, whatever the path (paper, section 3).

    Args:
        logits (`torch.FloatTensor` of shape `(batch, depths, vocab)`): the head's.
        num_candidates (`int`): tokens proposed at each depth.
        temperatures (`torch.FloatTensor` of shape `(depths,)`, *optional*): what logits are divided by.
    """

    def __init__(self, logits: Tensor, num_candidates: int, temperatures: Tensor | None = None) -> None:
        logits = _soften(logits, temperatures)
        best, self._tokens = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
        self._log_probs = best - logits.logsumexp(dim=-1, keepdim=True)

    def __call__(self, depth: int, tokens: Tensor, above: Tensor) -> Children:
        """As [`~jetspec_hf.tree.build_tree`] asks."""
        return self._log_probs[:, None, depth - 1], self._tokens[:, None, depth - 1]


class PathProposals:
    """One distribution for each path: the depth's likeliest tokens, scored anew below every node.

    The candidates of a depth are its likeliest tokens without the Markov head. What that adds to their logits is exact;
    the other tokens share the rest of the depth's probability as if it added nothing to theirs, which spares a pass
    over the vocabulary for every node.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, depths, vocab)`): the head's, without the Markov head.
        hidden_states (`torch.FloatTensor` of shape `(batch, depths, hidden)`): the head's, on its device.
        markov_head (`JetSpecMarkovHead`): what knows of paths.
        embed (`Callable`): the target's embedding.
        lm_head (`nn.Linear`): the target's LM head.
        num_candidates (`int`): tokens proposed at each depth.
        temperatures (`torch.FloatTensor` of shape `(depths,)`, *optional*): what logits are divided by.
    """

    def __init__(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        markov_head: JetSpecMarkovHead,
        embed: Callable[[Tensor], Tensor],
        lm_head: nn.Linear,
        num_candidates: int,
        temperatures: Tensor | None = None,
    ) -> None:
        logits = _soften(logits, temperatures)
        self._logits, self._tokens = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
        everything = logits.logsumexp(dim=-1, keepdim=True)
        left = -torch.expm1(self._logits.logsumexp(dim=-1, keepdim=True) - everything)
        self._rest = everything + left.clamp(min=0).log()  # (batch, depths, 1)
        self._hidden_states = hidden_states
        self._markov_head = markov_head
        self._embed = embed
        # (batch, depths, candidates, rank)
        codes = markov_head.token_codes(lm_head, self._tokens).to(logits.device, logits.dtype)
        self._token_codes = codes if temperatures is None else codes / temperatures[:, None, None]
        self._states: Tensor | None = None  # of the nodes of the last depth, (batch, nodes, width)

    def __call__(self, depth: int, tokens: Tensor, above: Tensor) -> Children:
        """As [`~jetspec_hf.tree.build_tree`] asks."""
        states = self._states
        if states is not None:
            states = states.gather(1, above.to(states.device)[:, :, None].expand(-1, -1, states.shape[2]))
        self._states = self._markov_head.advance(self._markov_head.look_up(tokens, self._embed), states)
        here = depth - 1
        codes = self._markov_head.context_codes(self._states, self._hidden_states[:, here, None])
        codes = codes.to(self._logits.device, self._logits.dtype)
        logits = self._logits[:, here, None] + codes @ self._token_codes[:, here].transpose(1, 2)
        log_total = torch.logaddexp(logits.logsumexp(dim=-1, keepdim=True), self._rest[:, here, None])
        return logits - log_total, self._tokens[:, None, here]


def _soften(logits: Tensor, temperatures: Tensor | None) -> Tensor:
    return logits if temperatures is None else logits / temperatures[:, None]


def likeliest(propose: Propose, branching: int) -> Propose:
    """Propose only the `branching` best children of each node."""

    def choose(depth: int, tokens: Tensor, above: Tensor) -> Children:
        log_probs, children = propose(depth, tokens, above)
        best, which = log_probs.topk(min(branching, log_probs.shape[2]), dim=2)
        return best, children.expand_as(log_probs).gather(2, which)

    return choose
