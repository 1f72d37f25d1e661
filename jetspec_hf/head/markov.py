"""The Markov head: what the tokens of a path say about the next, added to the logits of the block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_jetspec import JetSpecConfig


class JetSpecMarkovHead(nn.Module):
    r"""Conditions a token on its own path, at low rank.

    One pass of the head gives every depth $d$ one hidden state $h_d$, whatever is drafted above. With a Markov head the
    logits of a token $v$ below a path $x_0, ..., x_{d-1}$ ($x_0$ is the anchor) are

    $$z_v = z^{LM}_v(h_d) + w_v \cdot (s_d \odot g(h_d))$$

    `markov_head_type` says what $s_d$ and $g$ are. `"vanilla"`: $s_d = A[x_{d-1}]$ and $g = 1$, as in DSpark (arXiv
    2607.05147), under the same names. The others have $g(h) = 1 + G h$; `"gated"` has the same $s_d$ and `"rnn"` a GRU,
    $s_d = GRU(A[x_{d-1}], s_{d-1})$.

    The vectors $A[x]$ and $w_v$, of `markov_rank` numbers, are looked up in tables of their own, or, with
    `tie_markov_head`, are linear in the rows of the target's embedding and LM head.
    """

    def __init__(self, config: JetSpecConfig) -> None:
        super().__init__()
        rank, hidden = config.markov_rank, config.hidden_size
        self.kind, self.is_tied = config.markov_head_type, config.tie_markov_head
        self.markov_w1: nn.Linear | nn.Embedding
        if self.is_tied:
            self.markov_w1 = nn.Linear(hidden, rank, bias=False)
            self.markov_w2 = nn.Linear(rank, hidden, bias=False)
        else:
            self.markov_w1 = nn.Embedding(config.vocab_size, rank)
            self.markov_w2 = nn.Linear(rank, config.vocab_size, bias=False)
        if self.kind != "vanilla":
            self.gate = nn.Linear(hidden, rank, bias=False)
        if self.kind == "rnn":
            self.cell = nn.GRUCell(rank, rank)

    def initialize(self, module: nn.Module) -> None:
        """Start as if there were no Markov head, $w = 0$; called for each module of the whole model."""
        if module is self.markov_w1:
            init.normal_(self.markov_w1.weight, std=self.markov_w1.weight.shape[1] ** -0.5 if self.is_tied else 1.0)
        elif module is self.markov_w2:
            init.zeros_(self.markov_w2.weight)

    @property
    def has_memory(self) -> bool:
        """Whether states depend on more than the last token of a path."""
        return self.kind == "rnn"

    def look_up(self, tokens: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """$A$ of `tokens`, `(..., rank)`.

        Args:
            tokens (`torch.LongTensor` of any shape): token ids.
            embed (`Callable`): the target's embedding.
        """
        table = self.markov_w1.weight
        if not self.is_tied:
            return self.markov_w1(tokens.to(table.device))
        embedded = embed(tokens).to(table.device, table.dtype)
        return self.markov_w1(torch.nn.functional.rms_norm(embedded, embedded.shape[-1:]))

    def advance(self, looked_up: Tensor, state: Tensor | None = None) -> Tensor:
        """The state of a path, `(..., rank)`, from its last token and the state of the path above it, if any."""
        if not self.has_memory:
            return looked_up
        before = torch.zeros_like(looked_up) if state is None else state
        return self.cell(looked_up.flatten(0, -2), before.flatten(0, -2)).view(looked_up.shape)

    def follow(self, paths: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The states after each token of `paths`, `(..., length)`: `(..., length, rank)`."""
        states: list[Tensor] = []
        for looked_up in self.look_up(paths, embed).unbind(dim=-2):
            states.append(self.advance(looked_up, states[-1] if states else None))
        return torch.stack(states, dim=-2)

    def context_codes(self, states: Tensor, hidden_states: Tensor) -> Tensor:
        r"""$s \odot g(h)$, `(..., rank)`, from states of paths and the head's hidden states, `(..., hidden)`."""
        return states if self.kind == "vanilla" else states * (1 + self.gate(hidden_states))

    def token_codes(self, lm_head: nn.Linear, tokens: Tensor | None = None) -> Tensor:
        """$w$ of `tokens`, `(..., rank)`, or of the whole vocabulary, `(vocab, rank)`."""
        table: Tensor = self.markov_w2.weight
        weight: Tensor = lm_head.weight if self.is_tied else table
        rows = weight if tokens is None else nn.functional.embedding(tokens.to(weight.device), weight)
        return rows.to(table.device, table.dtype) @ table if self.is_tied else rows
