"""Who sees whom while the target scores a tree: boolean masks, true where a query may attend to a key."""

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
    lengths: Tensor | None = None,
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
        lengths (`torch.LongTensor` of shape `(batch,)`, *optional*):
            Committed tokens of each row, where some have fewer than `num_past`; behind them is nothing to see.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, nodes, num_past - first_key + nodes)`.
    """
    past = torch.arange(first_key, num_past, device=depths.device).expand(len(depths), -1)
    is_real = torch.ones_like(past, dtype=torch.bool) if padding_mask is None else padding_mask[:, first_key:].bool()
    if lengths is not None:
        is_real = is_real & (past < lengths[:, None])
    sees = torch.cat([is_real[:, None].expand(-1, depths.shape[1], -1), ancestors], dim=2)
    if window is not None:
        queries = depths + (num_past if lengths is None else lengths[:, None])
        sees = sees & _is_near(queries, torch.cat([past, queries], dim=1), window)
    return sees[:, None]


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
    slots, last = torch.arange(num_slots, device=depths.device), depths.shape[1] - 1
    is_past, nodes = slots < num_past, slots - num_past
    is_real = is_past if padding_mask is None else is_past & padding_mask[:, None].bool()
    is_node, nodes = (nodes >= 0) & (nodes <= last), nodes.clamp(0, last)
    sees = is_real | (is_node & ancestors.index_select(2, nodes))
    if window is not None:
        queries = num_past + depths
        sees = sees & _is_near(queries, torch.where(is_past, slots, queries.index_select(1, nodes)), window)
    return sees[:, None]


def _is_near(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Whether keys are fewer than `window` positions back, `(batch, queries, keys)`, from both positions."""
    return queries[:, :, None] - keys[:, None] < window
