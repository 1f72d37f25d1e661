"""Trees of grafts alone."""

import math

import pytest
import torch
from support.trees import paths_of

from jetspec_hf.drafting.graft_tree import graft_nodes, graft_tree, graft_trees

ANCHOR = torch.tensor([9])
GRAFTS = {
    "none": [],
    "one": [([1, 4, 2, 5, 5, 1], [-0.1] * 6)],
    "two": [([1, 4, 4], [-0.2, -0.1, -3.0]), ([2, 4, 4, 4, 4], [-0.5] * 5)],
    "alike": [([1, 1], [-0.5, -0.5]), ([2, 2], [-0.5, -0.5])],
}


def paths_along(grafts: list, max_depth: int, min_log_prob: float) -> dict[tuple[int, ...], float]:
    """All that a tree may hold: each beginning of each graft, and its score."""
    paths = {
        tuple(tokens[:depth]): sum(log_probs[:depth])
        for tokens, log_probs in grafts
        for depth in range(1, min(len(tokens), max_depth) + 1)
    }
    return {path: score for path, score in paths.items() if score >= min_log_prob}


@pytest.mark.parametrize("num_nodes", [0, 1, 3, 5, 30])
@pytest.mark.parametrize("max_depth", [-1, 0, 2, 99])
@pytest.mark.parametrize("min_log_prob", [-math.inf, -0.45])
@pytest.mark.parametrize("grafts", GRAFTS.values(), ids=GRAFTS)
def test_the_tree_holds_the_likeliest(grafts: list, min_log_prob: float, max_depth: int, num_nodes: int) -> None:
    nodes = graft_nodes(grafts, max_depth=max_depth, min_log_prob=min_log_prob, is_chain=False)
    every = paths_along(grafts, max_depth, min_log_prob)
    assert [node.log_prob for node in nodes] == pytest.approx(sorted(every.values(), reverse=True))
    tree = graft_tree(ANCHOR, nodes[:num_nodes])
    found = paths_of(tree)
    assert len(tree) == 1 + len(found) == 1 + min(num_nodes, len(every))
    assert sum(found.values()) == pytest.approx(sum(sorted(every.values(), reverse=True)[:num_nodes]), abs=1e-5)
    assert found == pytest.approx({path: every[path] for path in found}, abs=1e-5)
    order = list(zip(tree.depths[0].tolist(), (-tree.log_probs[0]).tolist(), strict=True))
    assert order == sorted(order)
    assert (tree.parents[0] < torch.arange(len(tree))).all()
    assert tree.tokens[0, 0] == ANCHOR[0]


@pytest.mark.parametrize("grafts", GRAFTS.values(), ids=GRAFTS)
def test_a_chain_has_no_branches(grafts: list) -> None:
    tree = graft_tree(ANCHOR, graft_nodes(grafts, max_depth=99, min_log_prob=-math.inf, is_chain=True))
    assert tree.parents[0].tolist() == list(range(-1, len(tree) - 1))
    assert tree.tokens[0, 1:].tolist() == (grafts[0][0] if grafts else [])


@pytest.mark.parametrize("num_nodes", [0, 2, 30])
def test_each_row_has_its_own_tree_and_impossible_nodes_fill_it_up(num_nodes: int) -> None:
    rows = [
        graft_nodes(grafts, max_depth=99, min_log_prob=-math.inf, is_chain=False)[:num_nodes]
        for grafts in GRAFTS.values()
    ]
    anchors = torch.arange(20, 20 + len(rows))
    trees = graft_trees(anchors, rows)
    assert len(trees) == 1 + max(map(len, rows))
    for row, nodes in enumerate(rows):
        alone = graft_tree(anchors[row, None], nodes)
        for name in ("tokens", "parents", "depths", "log_probs"):
            assert getattr(trees, name)[row, : len(alone)].tolist() == getattr(alone, name)[0].tolist()
        filled = slice(len(alone), None)
        assert (trees.log_probs[row, filled] == -math.inf).all()
        assert (trees.parents[row, filled] == 0).all()
        assert (trees.depths[row, filled] == 1).all()
