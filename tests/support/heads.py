"""Heads to decode with: an untrained one, one that knows the answer, and ones that no training would give."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.modeling_outputs import BaseModelOutput

from jetspec_hf import JetSpecConfig, JetSpecDraftHead

# What transformers calls gradient checkpointing: renamed in 5.23.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)

# From the embeddings and the positions of blocks, `(batch, block, hidden)` and `(batch, block)`, the head's hidden
# states.
Script = Callable[[Tensor, Tensor], Tensor]


class ScriptedHead(JetSpecDraftHead):
    """Runs like any head, then says what its script says."""

    script: Script

    def forward(self, noise_embeds: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutput:
        output = super().forward(noise_embeds, *args, **kwargs)
        block_positions = kwargs["position_ids"][:, -noise_embeds.shape[1] :]
        output.last_hidden_state = self.script(noise_embeds, block_positions)
        return output


def head_config(target: PreTrainedModel, **overrides: Any) -> JetSpecConfig:
    fields = {
        "mask_token_id": target.config.get_text_config().vocab_size - 1,
        "num_hidden_layers": 2,
        "block_size": 6,
        "num_assistant_tokens": 24,
        "initializer_range": 0.3,
    }
    return JetSpecConfig.for_target(target.config, **(fields | overrides))


def random_head(target: PreTrainedModel, *, seed: int = 1, **overrides: Any) -> JetSpecDraftHead:
    set_seed(seed)
    return JetSpecDraftHead(head_config(target, **overrides)).to(target.dtype).eval()


def markov_head(target: PreTrainedModel, **overrides: Any) -> JetSpecDraftHead:
    """An untrained one whose branches go their own ways."""
    head = random_head(target, markov_rank=8, **overrides)
    torch.nn.init.normal_(head.markov_head.markov_w2.weight)
    return head


def scripted_head(target: PreTrainedModel, script: Script, **overrides: Any) -> ScriptedHead:
    set_seed(1)
    head = ScriptedHead(head_config(target, **overrides)).to(target.dtype).eval()
    head.script = script
    return head


def oracle_head(target: PreTrainedModel, continuation: Tensor, **overrides: Any) -> ScriptedHead:
    """Drafts a known text: at every position, the token that `continuation`, `(1, tokens)`, holds there.

    Positions are those of `position_ids`, so the text comes without padding. Past its end comes its last token.
    """
    tokens = continuation[0].tolist()
    states = {token: hidden_state_of(target, token) for token in sorted(set(tokens))}

    def script(noise_embeds: Tensor, positions: Tensor) -> Tensor:
        wanted = [tokens[min(position, len(tokens) - 1)] for position in positions[0].tolist()]
        return torch.stack([states[token] for token in wanted])[None].to(noise_embeds.dtype)

    return scripted_head(target, script, **overrides)


def rows_oracle_head(target: PreTrainedModel, texts: list[list[int]], **overrides: Any) -> ScriptedHead:
    """An [`oracle_head`] for several texts, without padding, whose rows may leave the batch: known by their anchors."""
    states = {token: hidden_state_of(target, token) for token in sorted(set().union(*texts))}
    embeddings = target.get_input_embeddings()(torch.arange(target.config.get_text_config().vocab_size)).detach()

    def holds(text: list[int], position: int, anchor: int) -> bool:
        return position < len(text) and text[position] == anchor

    def script(noise_embeds: Tensor, positions: Tensor) -> Tensor:
        distances = (noise_embeds[:, :1] - embeddings).abs().sum(dim=-1)  # (batch, vocab)
        places = list(zip(positions[:, 0].tolist(), distances.argmin(dim=-1).tolist(), strict=True))
        rows_in_order = itertools.combinations(texts, len(places))
        fitting = (rows for rows in rows_in_order if all(map(holds, rows, *zip(*places, strict=True))))
        going = next(fitting, texts[: len(places)])  # none where a row has run ahead of a text that is cut
        wanted = [
            torch.stack([states[text[min(position, len(text) - 1)]] for position in row])
            for text, row in zip(going, positions.tolist(), strict=True)
        ]
        return torch.stack(wanted).to(noise_embeds.dtype)

    return scripted_head(target, script, **overrides)


def constant_head(target: PreTrainedModel, token: int, **overrides: Any) -> ScriptedHead:
    """Drafts the same token everywhere."""
    state = hidden_state_of(target, token)
    return scripted_head(target, lambda embeds, positions: state.to(embeds.dtype).expand(embeds.shape), **overrides)


def filled_head(target: PreTrainedModel, value: float, **overrides: Any) -> ScriptedHead:
    """Returns one number everywhere, such as NaN."""
    return scripted_head(target, lambda embeds, positions: torch.full_like(embeds, value), **overrides)


def echo_head(target: PreTrainedModel, **overrides: Any) -> ScriptedHead:
    """Drafts the anchor again and again."""
    embeddings = target.get_input_embeddings()(torch.arange(target.config.get_text_config().vocab_size)).detach()

    def script(noise_embeds: Tensor, positions: Tensor) -> Tensor:
        anchors = (noise_embeds[:, :1] - embeddings).abs().sum(dim=-1).argmin(dim=-1).tolist()
        states = torch.stack([hidden_state_of(target, anchor) for anchor in anchors])
        return states.to(noise_embeds.dtype)[:, None].expand(noise_embeds.shape)

    return scripted_head(target, script, **overrides)


@torch.no_grad()
def hidden_state_of(target: PreTrainedModel, token: int) -> Tensor:
    """A hidden state, `(hidden,)`, that the target's LM head turns into `token`, with a logit of 20."""
    weight = target.get_output_embeddings().weight.float()
    state = weight[token].clone()
    for _ in range(1000):  # a perceptron: move towards the token and away from its rival
        logits = weight @ state
        rivals = logits.clone()
        rivals[token] = -torch.inf
        if logits[token] > 0 and rivals.max() < logits[token] / 2:
            break
        state = state + weight[token] - weight[rivals.argmax()]
    assert int((weight @ state).argmax()) == token
    return state * 20 / (weight[token] @ state)


# How to make each head for a target and the text that it continues with, `(1, tokens)`.
HEADS: dict[str, Callable[[PreTrainedModel, Tensor], JetSpecDraftHead]] = {
    "random": lambda target, text: random_head(target),
    "markov": lambda target, text: markov_head(target),
    "oracle": oracle_head,
}
HOSTILE_HEADS: dict[str, Callable[[PreTrainedModel, Tensor], JetSpecDraftHead]] = {
    "nan": lambda target, text: filled_head(target, torch.nan),
    "infinite": lambda target, text: filled_head(target, torch.inf),
    "minus_infinite": lambda target, text: filled_head(target, -torch.inf),
    "constant": lambda target, text: constant_head(target, 7),
    "last_token": lambda target, text: constant_head(target, int(text[0, -1])),
    "echo": lambda target, text: echo_head(target),
}
