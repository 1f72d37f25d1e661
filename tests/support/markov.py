"""Markov heads: their kinds, and what they add, straight from the equation."""

import torch
from torch import Tensor

from jetspec_hf.head.markov import JetSpecMarkovHead

KINDS = ["vanilla", "gated", "rnn"]


def addition(markov: JetSpecMarkovHead, target: torch.nn.Module, path: list[int], hidden: Tensor) -> Tensor:
    """What the Markov head adds to the logits below a path, `(vocab,)`, number by number."""
    w1, w2 = markov.markov_w1.weight, markov.markov_w2.weight
    if markov.is_tied:
        rows = target.get_input_embeddings().weight
        rows = rows / (rows.square().mean(-1, keepdim=True) + torch.finfo(rows.dtype).eps).sqrt()
        w1, w2 = rows @ w1.T, target.lm_head.weight @ w2
    if markov.kind == "rnn":
        state = torch.zeros(1, 5)
        for token in path:
            state = markov.cell(w1[token][None], state)
        state = state[0]
    else:
        state = w1[path[-1]]
    gate = 1 if markov.kind == "vanilla" else 1 + markov.gate.weight @ hidden
    return w2 @ (state * gate)
