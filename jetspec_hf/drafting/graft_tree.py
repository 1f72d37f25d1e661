"""Trees of grafts alone, for rounds in which the head does not run."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..tree.tree import DraftTree, root_tree


class GraftNode(NamedTuple):
    """A node of a tree of grafts alone."""

    log_prob: float  # cumulative
    depth: int  # 1 is right below the root
    graft: int  # its number
    token: int


def graft_nodes(
    grafts: Sequence[tuple[list[int], list[float]]], *, max_depth: int, min_log_prob: float, is_chain: bool
) -> list[GraftNode]:
    """The nodes that a tree of grafts alone may have, the likeliest first.

    No two grafts begin alike, so each is a path of its own from the root.

    Args:
        grafts (`Sequence[tuple[list[int], list[float]]]`): what [`~jetspec_hf.drafting.grafts.Grafter.find`] gives.
        max_depth (`int`): deepest node.
        min_log_prob (`float`): nodes less likely than this are left out.
        is_chain (`bool`): only nodes of the graft that begins likeliest.
    """
    nodes = []
    for graft, (tokens, log_probs) in enumerate(grafts):
        for depth, (token, total) in enumerate(zip(tokens, accumulate(log_probs), strict=True), 1):
            if depth <= max_depth and total >= min_log_prob:
                nodes.append(GraftNode(total, depth, graft, token))
    # Of two equally likely nodes the one nearer to the root goes first, so a child never outlives its parent.
    nodes.sort(key=lambda node: (-node.log_prob, node.depth))
    return [node for node in nodes if node.graft == nodes[0].graft] if is_chain else nodes


def graft_tree(anchor: Tensor, nodes: Sequence[GraftNode]) -> DraftTree:
    """The tree of some nodes, all those above them included, below an anchor of shape `(1,)`.

    As every tree, it has its nodes by depth, then by falling probability.
    """
    return graft_trees(anchor, [nodes])


def graft_trees(anchors: Tensor, rows: Sequence[Sequence[GraftNode]]) -> DraftTree:
    """[`graft_tree`] for several rows, anchors of shape `(batch,)`; impossible nodes fill up those that have fewer."""
    size = max(map(len, rows))
    if size == 0:
        return root_tree(anchors)
    columns = zip(*(_columns(nodes, size) for nodes in rows), strict=True)
    tokens, parents, depths, log_probs = (torch.tensor(column, device=anchors.device) for column in columns)
    tokens[:, 0] = anchors
    return DraftTree(tokens, parents, depths, log_probs)


def _columns(nodes: Sequence[GraftNode], size: int) -> tuple[list[int], list[int], list[int], list[float]]:
    """Tokens, parents, depths and log-probabilities of a root and `size` nodes; the root's token is to be set."""
    nodes = sorted(nodes, key=lambda node: (node.depth, -node.log_prob))
    number_of = {(node.graft, node.depth): i for i, node in enumerate(nodes, 1)}
    missing = size - len(nodes)
    return (
        [0] + [node.token for node in nodes] + [0] * missing,
        [-1] + [number_of.get((node.graft, node.depth - 1), 0) for node in nodes] + [0] * missing,
        [0] + [node.depth for node in nodes] + [1] * missing,
        [0.0] + [node.log_prob for node in nodes] + [-math.inf] * missing,
    )
