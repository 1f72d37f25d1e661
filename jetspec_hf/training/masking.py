"""Who sees whom while the head is trained, on many blocks at once: true where a query may attend to a key."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..head.masking import is_in_sight


def training_mask(
    anchors: Tensor, position_ids: Tensor, block_size: int, *, is_causal: bool, window: int | None = None
) -> Tensor:
    """Mask for one head pass over many blocks of a row of documents, laid side by side behind the whole row.

    A block position attends to
    - context before its own anchor, in the anchor's document;
    - its own block: up to itself if causal, all of it otherwise; never another block;
    - of these, with a sliding window, only those fewer than `window` positions away.

    Args:
        anchors (`torch.LongTensor` of shape `(batch, anchors)`): where in the row the blocks start; -1 for none.
        position_ids (`torch.LongTensor` of shape `(batch, length)`): positions in the documents; 0 starts a new one.
        block_size (`int`): positions in a block, the anchor counted.
        is_causal (`bool`): whether blocks are causal.
        window (`int`, *optional*): sliding window in positions, the query counted.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, anchors * block, length + anchors * block)`.
    """
    columns = torch.arange(position_ids.shape[1], device=anchors.device)
    starts = _document_starts(anchors, position_ids)
    context = _is_before_anchor(columns, starts[:, :, None], anchors[:, :, None])  # (batch, anchors, length)
    context = context.repeat_interleave(block_size, dim=1)
    slots = torch.arange(block_size, device=anchors.device)
    if window is not None:
        queries = (anchors[:, :, None] + slots).flatten(1)
        context = context & is_in_sight(queries[:, :, None], columns, is_causal=is_causal, window=window)
    own = is_in_sight(slots[:, None], slots, is_causal=is_causal, window=window)
    blocks = torch.block_diag(*[own] * anchors.shape[1]).bool().expand(len(anchors), -1, -1)
    return torch.cat([context, blocks], dim=-1)[:, None]


def training_predicate(
    anchors: Tensor, position_ids: Tensor, block_size: int, *, is_causal: bool, window: int | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """[`training_mask`] as a question about one query and one key, which is what flex attention asks.

    Both exist since flex attention must not hold the mask, and the other implementations need all of it.

    Args:
        anchors (`torch.LongTensor` of shape `(batch, anchors)`): where in the row the blocks start; -1 for none.
        position_ids (`torch.LongTensor` of shape `(batch, length)`): positions in the documents; 0 starts a new one.
        block_size (`int`): positions in a block, the anchor counted.
        is_causal (`bool`): whether blocks are causal.
        window (`int`, *optional*): sliding window in positions, the query counted.

    Returns:
        `Callable`: from row, attention head, query and key, integer tensors without dimensions, to a truth value.
    """
    length, starts = position_ids.shape[1], _document_starts(anchors, position_ids)

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block, slot = query // block_size, query % block_size
        anchor, in_block = anchors[row, block], key - length - block * block_size
        is_context = _is_before_anchor(key, starts[row, block], anchor)
        is_own = (in_block >= 0) & (in_block < block_size)
        position = torch.where(key < length, key, anchor + in_block)
        sees = is_in_sight(anchor + slot, position, is_causal=is_causal, window=window)
        return (is_context | is_own) & sees

    return may_attend


def _document_starts(anchors: Tensor, position_ids: Tensor) -> Tensor:
    """Where in the row the document of each anchor starts, `(batch, anchors)`."""
    return anchors - position_ids.gather(1, anchors.clamp(min=0))


def _is_before_anchor(columns: Tensor, starts: Tensor, anchors: Tensor) -> Tensor:
    """Whether columns of the row are in the anchor's document and before the anchor."""
    return (columns >= starts) & (columns < anchors)
