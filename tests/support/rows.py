"""Batches of prompts of different lengths, and how what is made of them is compared."""

from typing import Any

import torch
from support.heads import HEADS, HOSTILE_HEADS, markov_head, random_head, rows_oracle_head
from torch import Tensor
from transformers import PreTrainedModel

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.upstream import CACHE, holding_layers

PAD = 0
_PADS = [0, 5, 2, 9, 0]  # before each prompt
_WIDTH = 12


def make_batch(num_rows: int, seed: int = 0, width: int = _WIDTH, vocab_size: int = 64) -> dict[str, Tensor]:
    """Random prompts, padded on the left: `input_ids` and `attention_mask`, each `(num_rows, width)`."""
    ids = torch.randint(2, vocab_size, (num_rows, width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) >= torch.tensor(_PADS[:num_rows])[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def texts_of(sequences: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Each text without the padding before it."""
    num_pads = (attention_mask == 0).sum(dim=1).tolist()
    return [row[pads:] for row, pads in zip(sequences.tolist(), num_pads, strict=True)]


def make_rows_head(
    name: str, target: PreTrainedModel, sequences: Tensor, attention_mask: Tensor, **overrides: Any
) -> JetSpecDraftHead:
    """A head by its name, for the texts that the target continues with."""
    if name == "oracle":
        return rows_oracle_head(target, texts_of(sequences, attention_mask), **overrides)
    if overrides:
        return {"random": random_head, "markov": markov_head}[name](target, **overrides)
    return (HEADS | HOSTILE_HEADS)[name](target, sequences[:1])


def assert_same_rows(ours: Any, plain: Any, num_prompt: int, pad: int = PAD) -> None:
    """All that plain decoding returned, of each row as far as its own text goes."""
    assert ours.sequences.tolist() == plain.sequences.tolist()
    num_steps, statistics = plain.sequences.shape[1] - num_prompt, ours.statistics
    num_new = [row.num_new_tokens for row in statistics.rows]
    assert max(num_new) == num_steps
    assert statistics.num_new_tokens == sum(num_new)
    for row, num in enumerate(num_new):
        assert plain.sequences[row, num_prompt + num :].eq(pad).all()
        counted = statistics.rows[row]
        assert counted.num_accepted_tokens + counted.num_rounds + 1 >= num
        assert counted.num_rounds <= max(num_steps, 1)
    for name in ("scores", "logits"):
        if plain[name] is None:
            assert ours[name] is None
            continue
        assert len(ours[name]) == len(plain[name]) == num_steps
        for step, (one, other) in enumerate(zip(ours[name], plain[name], strict=True)):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            lives = torch.tensor([step < num for num in num_new])
            torch.testing.assert_close(one[lives], other[lives], rtol=1e-3, atol=1e-3)
            assert not one[~lives].any()
    assert_same_rows_cached(ours[CACHE], plain[CACHE], [num_steps - num for num in num_new])


def assert_same_rows_cached(ours: Any, plain: Any, num_missing: list[int]) -> None:
    """Caches of the same tokens, but for those that come after the end of a row."""
    assert ours.get_seq_length() == plain.get_seq_length()
    assert [type(layer) for layer in ours.layers] == [type(layer) for layer in plain.layers]
    for one, other in zip(holding_layers(ours), holding_layers(plain), strict=True):
        assert one.get_seq_length() == other.get_seq_length()
        assert one.keys.shape == other.keys.shape
        for row, missing in enumerate(num_missing):
            end = max(one.keys.shape[2] - missing, 0)
            for states in ("keys", "values"):
                found, wanted = (getattr(layer, states)[row, :, :end] for layer in (one, other))
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
