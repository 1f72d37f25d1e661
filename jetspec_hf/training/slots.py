"""Slots: where the blocks of a text start in training, and which of their positions a head learns from."""

from typing import NamedTuple

import torch
from torch import Tensor


class MarkovCodes(NamedTuple):
    """What a Markov head adds to logits, as two factors."""

    paths: Tensor  # (slots, rank), of the path above each slot
    tokens: Tensor  # (vocab, rank)


class Slots(NamedTuple):
    """The slots of a batch that are in the loss, by row, block and depth: what the head says there, and is to say."""

    hidden_states: Tensor  # (slots, hidden), the head's
    codes: MarkovCodes | None
    labels: Tensor  # (slots,), the tokens of the text
    weights: Tensor  # (slots,), see `slot_weights`
    depths: Tensor  # (slots,), 0 right below the anchor
    places: Tensor  # (slots,), which of `last_hidden` predicts the label; overlapping blocks share it
    last_hidden: Tensor  # (batch * length, hidden), the target's


def select_slots(
    input_ids: Tensor,
    anchors: Tensor,
    weights: Tensor,
    hidden_states: Tensor,
    last_hidden: Tensor,
    codes: MarkovCodes | None = None,
) -> Slots:
    """The slots whose weight is above 0.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the texts.
        anchors (`torch.LongTensor` of shape `(batch, anchors)`): where the blocks start; -1 for none.
        weights (`torch.FloatTensor` of shape `(batch, anchors, block - 1)`): see [`slot_weights`].
        hidden_states (`torch.FloatTensor` of shape `(batch, anchors, block - 1, hidden)`): the head's.
        last_hidden (`torch.FloatTensor` of shape `(batch, length, hidden)`): the target's.
        codes (`MarkovCodes`, *optional*): those of the paths of shape `(batch, anchors, block - 1, rank)`.
    """
    is_active, length = weights > 0, input_ids.shape[1]
    rows, _, depths = is_active.nonzero().unbind(dim=1)
    block_size = weights.shape[2] + 1
    positions = block_positions(anchors, block_size).clamp(max=length - 1)
    return Slots(
        hidden_states=hidden_states[is_active],
        codes=None if codes is None else codes._replace(paths=codes.paths[is_active]),
        labels=block_tokens(input_ids, anchors, block_size)[:, :, 1:][is_active],
        weights=weights[is_active],
        depths=depths,
        places=rows * length + positions[:, :, :-1][is_active],  # the state before a token predicts it
        last_hidden=last_hidden.flatten(0, 1),
    )


def block_tokens(input_ids: Tensor, anchors: Tensor, block_size: int) -> Tensor:
    """The text's tokens in every block, `(batch, anchors, block)`; past its end its last."""
    positions = block_positions(anchors, block_size).clamp(max=input_ids.shape[1] - 1)
    return input_ids.gather(1, positions.flatten(1)).view(positions.shape)


def sample_anchors(loss_mask: Tensor, num_anchors: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw the positions at which draft blocks start, without replacement.

    A position can be an anchor if it and the next one are in the loss, as in decoding, where the anchor is the
    target's own token.

    Args:
        loss_mask (`torch.BoolTensor` of shape `(length,)`): true on the tokens to learn from.
        num_anchors (`int`): most anchors.
        generator (`torch.Generator`, *optional*): source of randomness.

    Returns:
        `torch.LongTensor` of shape `(anchors,)`, rising.
    """
    can_start = (loss_mask[:-1] & loss_mask[1:]).nonzero().flatten()
    drawn = torch.randperm(len(can_start), generator=generator, device=loss_mask.device)[:num_anchors]
    return can_start[drawn].sort().values


def block_positions(anchors: Tensor, block_size: int) -> Tensor:
    """The positions of every block, `(batch, anchors, block)`; those of an absent anchor, -1, start at 0."""
    return anchors.clamp(min=0)[:, :, None] + torch.arange(block_size, device=anchors.device)


def slot_weights(anchors: Tensor, loss_mask: Tensor, block_size: int, gamma: float | None = None) -> Tensor:
    r"""The weight of each predicted slot, `(batch, anchors, block - 1)`.

    Slot $k \ge 1$ of a block with anchor $a$ predicts the token at $a + k$. It weighs

    $$w_k = \exp(-(k - 1) / \gamma)$$

    or 1 without `gamma` (the paper's default), and 0 where that token, or one before it in the block, is not in the
    loss, or the anchor is absent.
    """
    length = loss_mask.shape[1]
    positions = block_positions(anchors, block_size)[:, :, 1:]
    in_loss = loss_mask.gather(1, positions.clamp(max=length - 1).flatten(1)).view(positions.shape)
    is_real = in_loss & (positions < length) & (anchors >= 0)[:, :, None]
    weights = is_real.long().cumprod(dim=-1).float()
    if gamma is not None:
        weights = weights * torch.exp(-torch.arange(block_size - 1, device=weights.device) / gamma)
    return weights
