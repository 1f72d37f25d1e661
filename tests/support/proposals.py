"""Proposals, and the scores that they should give."""

import torch
from support.markov import addition
from torch import Tensor

from jetspec_hf.drafting.proposals import PathProposals

ANCHOR = 3


def path_proposals(setting: tuple, num_candidates: int, *rest: Tensor | None) -> PathProposals:
    markov, target, hidden_states, logits = setting
    modules = (markov, target.get_input_embeddings(), target.lm_head)
    return PathProposals(logits, hidden_states, torch.tensor([ANCHOR]), *modules, num_candidates, *rest)


def path_log_prob(setting: tuple, path: tuple[int, ...], num_candidates: int) -> float:
    """The log-probability of the last token of a path below the anchor, given those before it."""
    markov, target, hidden_states, logits = setting
    here = len(path) - 1
    plain = logits[0, here]
    added = addition(markov, target, [ANCHOR, *path[:-1]], hidden_states[0, here])
    is_candidate = torch.zeros(len(plain), dtype=torch.bool).index_fill(0, plain.topk(num_candidates).indices, True)
    scores = plain + torch.where(is_candidate, added, 0)
    return float(scores.log_softmax(-1)[path[-1]]) if is_candidate[path[-1]] else -torch.inf
