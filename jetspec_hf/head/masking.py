"""Who sees whom while the head drafts: boolean masks, true where a query may attend to a key."""

import torch
from torch import Tensor, nn


def block_mask(
    num_context: int,
    block_size: int,
    *,
    is_causal: bool,
    first_key: int = 0,
    window: int | None = None,
    padding_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Mask for the head's block behind its context (paper, section 3; `is_causal=False` is DFlash).

    A block position attends to
    - every context position, unless it is padding;
    - the block: up to itself if causal, all of it otherwise;
    - of these, with a sliding window, only those fewer than `window` positions away.

    Args:
        num_context (`int`): context positions before the block, including those that the cache has dropped.
        block_size (`int`): positions in the block.
        is_causal (`bool`): whether the block is causal.
        first_key (`int`): the first context position that the cache still holds.
        window (`int`, *optional*): sliding window in positions, the query counted.
        padding_mask (`torch.Tensor` of shape `(batch, num_context + block_size)`, *optional*):
            Nonzero on real positions.
        device (`torch.device`, *optional*): where to make the mask.

    Returns:
        `torch.BoolTensor` of shape `(batch or 1, 1, block_size, num_context - first_key + block_size)`, or `None` if
        every position may attend to every other.
    """
    if not is_causal and window is None and padding_mask is None:
        return None
    keys = torch.arange(first_key, num_context + block_size, device=device)
    queries = torch.arange(num_context, num_context + block_size, device=device)[:, None]
    sees = is_in_sight(queries, keys, is_causal=is_causal, window=window)
    if padding_mask is not None:
        return sees & padding_mask[:, None, None, first_key:].bool()
    return sees[None, None]


def static_block_mask(
    num_context: Tensor,
    first_slot: Tensor,
    num_slots: int,
    block_size: int,
    *,
    is_causal: bool,
    window: int | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """[`block_mask`] for a cache of fixed size: context, slots without meaning, the block, and then nothing.

    Args:
        num_context (`torch.LongTensor` of shape `()`): context positions before the block.
        first_slot (`torch.LongTensor` of shape `()`): where in the cache the block stands, not before `num_context`.
        num_slots (`int`): positions that the cache has room for.
        block_size (`int`): positions in the block.
        is_causal (`bool`): whether the block is causal.
        window (`int`, *optional*): sliding window in positions, the query counted.
        padding_mask (`torch.Tensor` of shape `(batch, num_slots)`, *optional*): nonzero where not padding.

    Returns:
        `torch.BoolTensor` of shape `(batch or 1, 1, block_size, num_slots)`.
    """
    slots = torch.arange(num_slots, device=num_context.device)
    queries = num_context + torch.arange(block_size, device=num_context.device)[:, None]
    is_context, in_block = slots < num_context, slots - first_slot
    is_real = is_context if padding_mask is None else is_context & padding_mask[:, None, None].bool()
    exists = is_real | ((in_block >= 0) & (in_block < block_size))
    keys = torch.where(is_context, slots, num_context + in_block)
    sees = exists & is_in_sight(queries, keys, is_causal=is_causal, window=window)
    return sees if padding_mask is not None else sees[None, None]


def ragged_block_mask(
    num_before: Tensor,
    num_new: Tensor,
    *,
    num_past: int,
    most_new: int,
    block_size: int,
    is_causal: bool,
    window: int | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """[`block_mask`] for rows of different lengths: what each has in the cache, what it reads now, and the blocks.

    Args:
        num_before (`torch.LongTensor` of shape `(batch,)`): context positions of each row in the cache.
        num_new (`torch.LongTensor` of shape `(batch,)`): context positions of each row that come with its block.
        num_past (`int`): positions that the cache holds of every row, with or without meaning.
        most_new (`int`): positions that come with every block, with or without meaning.
        block_size (`int`): positions in a block.
        is_causal (`bool`): whether blocks are causal.
        window (`int`, *optional*): sliding window in positions, the query counted.
        padding_mask (`torch.Tensor` of shape `(batch, positions)`, *optional*):
            Nonzero where the context of a row, in the order of the text, is not padding; as long as the longest row or
            longer.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, block_size, num_past + most_new + block_size)`.
    """
    device, num_before, num_new = num_before.device, num_before[:, None], num_new[:, None]
    past, new = torch.arange(num_past, device=device), torch.arange(most_new, device=device)
    block = num_before + num_new + torch.arange(block_size, device=device)
    # Where each key stands in its row's text, and whether it stands there at all.
    keys = torch.cat([past.expand(len(block), -1), num_before + new, block], dim=1)
    exists = torch.cat([past < num_before, new < num_new, torch.ones_like(block, dtype=torch.bool)], dim=1)
    if padding_mask is not None:
        is_real = nn.functional.pad(padding_mask.bool(), (0, block_size), value=True)
        exists = exists & is_real.gather(1, keys.clamp(max=is_real.shape[1] - 1))
    sees = exists[:, None] & is_in_sight(block[:, :, None], keys[:, None], is_causal=is_causal, window=window)
    return sees[:, None]


def is_in_sight(queries: Tensor, keys: Tensor, *, is_causal: bool, window: int | None) -> Tensor:
    """Whether a block position sees a key of its own block or of the context before it, whatever else hides that.

    Args:
        queries (`torch.LongTensor`): positions in the text.
        keys (`torch.LongTensor`): positions in the text, of a shape that goes with that of `queries`.
        is_causal (`bool`): whether it sees only what does not come after it.
        window (`int`, *optional*): whether it sees only what is fewer positions away.
    """
    sees = keys <= queries
    if not is_causal:
        sees = torch.ones_like(sees)
    return sees if window is None else sees & ((queries - keys).abs() < window)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers added to attention scores: 0, or the least finite number of `dtype`."""
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)
