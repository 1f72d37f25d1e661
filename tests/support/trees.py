"""Trees as sets of paths, and logits to draft them from."""

import torch
from torch import Tensor

from jetspec_hf.tree.tree import DraftTree

Paths = dict[tuple[int, ...], float]  # the tokens from the root down to a node, and its score


def paths_of(tree: DraftTree, row: int = 0) -> Paths:
    """The nodes of one row below the root, each by its tokens; fails unless they form a tree, in the order promised."""
    paths: list[tuple[int, ...]] = [()]
    parents, tokens, depths, scores = (
        part[row].tolist() for part in (tree.parents, tree.tokens, tree.depths, tree.log_probs)
    )
    assert (parents[0], depths[0], scores[0]) == (-1, 0, 0.0)
    for node in range(1, len(tree)):
        assert 0 <= parents[node] < node, "a parent comes before its child"
        assert depths[node] == depths[parents[node]] + 1
        assert depths[node] >= depths[node - 1], "nodes come by depth"
        assert scores[node] <= scores[parents[node]]
        if depths[node] == depths[node - 1]:
            assert scores[node] <= scores[node - 1], "then by falling probability"
        paths.append((*paths[parents[node]], tokens[node]))
    assert len(set(paths)) == len(tree), "siblings hold different tokens"
    return dict(zip(paths[1:], scores[1:], strict=True))


def random_logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
