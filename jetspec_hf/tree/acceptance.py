"""Acceptance: how far the target agrees with a draft tree."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .tree import DraftTree


class Acceptance(NamedTuple):
    """The part of a draft tree that the target agrees with."""

    path: list[int]  # accepted nodes, root first
    tokens: list[int]  # emitted tokens: those of the path below the root, then the bonus token


def accept(
    children: dict[tuple[int, int], int], choose: Callable[[int], int], is_last: Callable[[int], bool]
) -> Acceptance:
    """Follow the target's own choices down the tree until no child holds them.

    The emitted tokens are exactly those that the target alone would emit, whatever the head proposed, because each is
    chosen from the target's logits after the true prefix. A last token is emitted but its node is not accepted, so
    that the newest token is never in the cache.

    Args:
        children (`dict[tuple[int, int], int]`): the node below a node that holds a token.
        choose (`Callable[[int], int]`): the target's next token at a node; called once for each token, in order.
        is_last (`Callable[[int], bool]`): whether decoding ends with this token; called once for each, after `choose`.
    """
    path, tokens = [0], []
    while True:
        token = choose(path[-1])
        tokens.append(token)
        child = children.get((path[-1], token))
        if is_last(token) or child is None:
            return Acceptance(path, tokens)
        path.append(child)


def children_of(tree: DraftTree, row: int) -> dict[tuple[int, int], int]:
    """Look up the node below a node of row `row` of the batch that holds a token. Waits for the device."""
    return _children(*torch.stack((tree.parents[row], tree.tokens[row])).tolist())


def edges_of(tree: DraftTree) -> list[dict[tuple[int, int], int]]:
    """[`children_of`] for every row, waiting for the device once."""
    return [_children(*edges) for edges in torch.stack((tree.parents, tree.tokens), dim=1).tolist()]


def _children(parents: list[int], tokens: list[int]) -> dict[tuple[int, int], int]:
    edges = enumerate(zip(parents, tokens, strict=True))
    # The first of equals: a tree with room to spare may hold a token again, as an impossible one.
    return {edge: node for node, edge in reversed(list(edges))}


def greedy_choices(
    tree: DraftTree, target_logits: Tensor
) -> list[tuple[dict[tuple[int, int], int], Callable[[int], int]]]:
    """What [`accept`] needs to follow the target's most likely token (paper, section 2), for each row of the batch.

    Waits for the device once.

    Args:
        tree (`DraftTree`): the drafted tokens.
        target_logits (`torch.FloatTensor` of shape `(batch, nodes, vocab)`): the target's logits at each node.

    Raises:
        ValueError: if `target_logits` does not have one row for every node.
    """
    if target_logits.shape[:2] != tree.tokens.shape:
        raise ValueError(
            f"`target_logits` has rows for {tuple(target_logits.shape[:2])} (batch, nodes) and the tree has "
            f"{tuple(tree.tokens.shape)}; pass one row for every node."
        )
    if target_logits.is_cpu:  # nothing to wait for, and most nodes are never asked
        edges = torch.stack((tree.parents, tree.tokens), dim=1).tolist()
        return [(_children(*edge), partial(_choose, logits)) for edge, logits in zip(edges, target_logits, strict=True)]
    choices = target_logits.argmax(dim=-1).to(tree.tokens.device)
    rows = torch.stack((tree.parents, tree.tokens, choices), dim=1).tolist()
    return [(_children(parents, tokens), chosen.__getitem__) for parents, tokens, chosen in rows]


def _choose(logits: Tensor, node: int) -> int:
    return int(logits[node].max(dim=0).indices)  # like argmax, the first of equals, and faster
