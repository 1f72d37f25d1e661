"""Attention masks, boolean: true where a query may attend to a key."""

from collections.abc import Callable

import torch
from torch import Tensor


def ancestor_mask(parents: Tensor) -> Tensor:
    """Who lies on whose path: a node attends to itself and to every node above it.

    Args:
        parents (`torch.LongTensor` of shape `(batch, nodes)`):
            The node above each node, -1 at the root; every parent before its children.

    Returns:
        `torch.BoolTensor` of shape `(batch, nodes, nodes)`: row = query, column = key.
    """
    nodes = parents.shape[1]
    # With P[node, parent] = 1 this is I + P + P^2 + ... = (I - P)^-1, a triangular inverse, since parents come first.
    # Whatever stands on the diagonal counts as 1: there the root's parent may be the root.
    links = parents.new_zeros(*parents.shape, nodes, dtype=torch.float32)
    links = links.scatter(2, parents.clamp(min=0)[:, :, None], -1.0)
    ones = torch.eye(nodes, dtype=links.dtype, device=links.device).expand_as(links)
    return torch.linalg.solve_triangular(links, ones, upper=False, unitriangular=True).bool()


def tree_mask(
    ancestors: Tensor,
    depths: Tensor,
    *,
    num_past: int,
    first_key: int = 0,
    window: int | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Mask for one target forward over all nodes of a tree, behind a cache (paper, section 3).

    A node attends to
    - every committed token that is cached, unless it is padding;
    - itself and its ancestors;
    - of these, with a sliding window, only those fewer than `window` positions back. Positions follow the depth, not
      the slot, since siblings share one.

    Args:
        ancestors (`torch.BoolTensor` of shape `(batch, nodes, nodes)`): what [`ancestor_mask`] returns.
        depths (`torch.LongTensor` of shape `(batch, nodes)`): steps below the root.
        num_past (`int`): committed tokens before the root, including those that the cache has dropped.
        first_key (`int`): the first committed token that the cache still holds.
        window (`int`, *optional*): sliding window in tokens, the query counted.
        padding_mask (`torch.Tensor` of shape `(batch, num_past)`, *optional*): nonzero on real committed tokens.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, nodes, num_past - first_key + nodes)`.
    """
    slots = torch.arange(first_key, num_past, device=depths.device)
    padding_mask = None if padding_mask is None else padding_mask[:, first_key:]
    past, ancestors = _seen_by_nodes(slots, num_past, ancestors, depths, window, padding_mask)
    return torch.cat([past, ancestors], dim=-1)[:, None]


def static_tree_mask(
    ancestors: Tensor,
    depths: Tensor,
    *,
    num_past: Tensor,
    num_slots: int,
    window: int | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """[`tree_mask`] for a cache of fixed size: the nodes stand right behind the committed tokens, and then nothing.

    Args:
        ancestors (`torch.BoolTensor` of shape `(batch, nodes, nodes)`): what [`ancestor_mask`] returns.
        depths (`torch.LongTensor` of shape `(batch, nodes)`): steps below the root.
        num_past (`torch.LongTensor` of shape `()`): committed tokens before the root.
        num_slots (`int`): tokens that the cache has room for.
        window (`int`, *optional*): sliding window in tokens, the query counted.
        padding_mask (`torch.Tensor` of shape `(batch, num_slots)`, *optional*): nonzero where not padding.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, nodes, num_slots)`.
    """
    slots = torch.arange(num_slots, device=depths.device)
    past, ancestors = _seen_by_nodes(slots, num_past, ancestors, depths, window, padding_mask)
    nodes, last = slots - num_past, depths.shape[1] - 1
    within = ((nodes >= 0) & (nodes <= last)) & ancestors.index_select(2, nodes.clamp(0, last))
    return (past | within)[:, None]


def _seen_by_nodes(
    slots: Tensor,
    num_past: int | Tensor,
    ancestors: Tensor,
    depths: Tensor,
    window: int | None,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What each node attends to of the committed tokens at `slots`, and of the tree."""
    past = (slots < num_past).expand(*depths.shape, -1)
    if window is not None:
        past = past & (num_past + depths[:, :, None] - slots < window)
        ancestors = ancestors & (depths[:, :, None] - depths[:, None, :] < window)
    if padding_mask is not None:
        past = past & padding_mask[:, None].bool()
    return past, ancestors


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
    mask = torch.ones(block_size, len(keys), dtype=torch.bool, device=device)
    if is_causal:
        mask = mask & (keys <= queries)
    if window is not None:
        mask = mask & ((queries - keys).abs() < window)
    if padding_mask is not None:
        return mask & padding_mask[:, None, None, first_key:].bool()
    return mask[None, None]


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
    queries = torch.arange(block_size, device=num_context.device)[:, None]
    keys = slots - first_slot  # within the block
    context = slots < num_context
    within = (keys >= 0) & (keys <= queries if is_causal else keys < block_size)
    if window is not None:
        context = context & (num_context + queries - slots < window)
        within = within & ((queries - keys).abs() < window)
    if padding_mask is not None:
        context = context & padding_mask[:, None, None].bool()
    batch = 1 if padding_mask is None else padding_mask.shape[0]
    return (context | within).expand(batch, 1, block_size, num_slots)


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
    batch, num_anchors = anchors.shape
    columns = torch.arange(position_ids.shape[1], device=anchors.device)
    first = anchors - position_ids.gather(1, anchors.clamp(min=0))  # where the anchor's document starts
    context = (columns >= first[:, :, None]) & (columns < anchors[:, :, None])  # (batch, anchors, length)
    context = context.repeat_interleave(block_size, dim=1)
    slots = torch.arange(block_size, device=anchors.device)
    within = slots <= slots[:, None] if is_causal else torch.ones_like(slots <= slots[:, None])
    if window is not None:
        queries = (anchors[:, :, None] + slots).flatten(1)
        context = context & (queries[:, :, None] - columns < window)
        within = within & ((slots[:, None] - slots).abs() < window)
    blocks = torch.block_diag(*[within] * num_anchors).bool().expand(batch, -1, -1)
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
    length = position_ids.shape[1]
    first = anchors - position_ids.gather(1, anchors.clamp(min=0))  # where the anchor's document starts

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block, slot = query // block_size, query % block_size
        anchor, key_slot = anchors[row, block], key - length - block * block_size
        context = (key >= first[row, block]) & (key < anchor)
        within = (key_slot >= 0) & (key_slot <= slot if is_causal else key_slot < block_size)
        if window is not None:
            context = context & (anchor + slot - key < window)
            within = within & ((slot - key_slot).abs() < window)
        return context | within

    return may_attend


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers added to attention scores: 0, or the least finite number of `dtype`."""
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)
