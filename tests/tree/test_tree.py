import heapq
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.trees import Paths, paths_of, random_logits
from torch import Tensor

from jetspec_hf.tree.tree import build_tree

ANCHOR = 3


class Table:
    """Proposals written out: a row of log-probabilities `(batch, depths, rows, choices)` for each choice above.

    A single row is for all of them. The root's row is the first.
    """

    def __init__(self, tokens: Tensor, log_probs: Tensor) -> None:
        self.tokens, self.log_probs = tokens, log_probs

    def __call__(self, depth: int, choices: Tensor, above: Tensor) -> Tensor:
        rows = self.log_probs[:, depth - 1]
        return rows if rows.shape[1] == 1 else rows[torch.arange(len(rows))[:, None], choices]


def slow_best_first(proposals: Table, num_nodes: int, max_depth: int, min_log_prob: float = -math.inf) -> Paths:
    """Pop the likeliest open node; open its next sibling and its first child; until `num_nodes` are popped."""
    heap: list[tuple[float, tuple[int, ...], float, int]] = []

    def open_child(path: tuple[int, ...], score: float, rank: int) -> None:
        if len(path) < max_depth and rank < proposals.tokens.shape[2]:
            log_probs = proposals(len(path) + 1, torch.tensor([path[-1:] or (0,)]), torch.tensor([[0]]))
            best, choices = log_probs[0, 0].sort(descending=True)
            child_score = (torch.tensor(score) + best[rank]).item()  # in float32, as `build_tree` adds
            heapq.heappush(heap, (-child_score, (*path, int(choices[rank])), score, rank))

    found: Paths = {}
    open_child((), 0.0, 0)
    while heap and len(found) < num_nodes and -heap[0][0] >= min_log_prob:
        negative, path, parent_score, rank = heapq.heappop(heap)
        found[tuple(int(proposals.tokens[0, i, choice]) for i, choice in enumerate(path))] = -negative
        open_child(path[:-1], parent_score, rank + 1)
        open_child(path, -negative, 0)
    return found


def assert_same_nodes(got: Paths, expected: Paths) -> None:
    assert sorted(got.values()) == sorted(expected.values())
    # Which of several equally likely last nodes is taken is not promised.
    least = min(expected.values(), default=-math.inf)
    assert {path for path, score in got.items() if score > least} == {
        path for path, score in expected.items() if score > least
    }


def by_depth(logits: Tensor) -> Table:
    """Proposals from logits `(batch, depths, vocab)`, whatever the parent."""
    log_probs, tokens = logits.log_softmax(-1).sort(dim=-1, descending=True)
    return Table(tokens, log_probs[:, :, None])


def by_parent(logits: Tensor) -> Table:
    """Proposals from logits `(batch, depths, parent token, vocab)`; the first parent's are the root's."""
    batch, depths, vocab, _ = logits.shape
    tokens = torch.stack([torch.randperm(vocab, generator=torch.Generator().manual_seed(i)) for i in range(depths)])
    rows = [torch.arange(vocab), *tokens[:-1]]  # what stands above each depth
    log_probs = [logits[:, i].log_softmax(-1)[:, rows[i]][:, :, tokens[i]] for i in range(depths)]
    return Table(tokens.expand(batch, -1, -1), torch.stack(log_probs, dim=1))


def anchors(batch: int = 1) -> Tensor:
    return torch.full((batch,), ANCHOR)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    depths=st.integers(1, 6),
    vocab=st.integers(4, 9),
    num_nodes=st.integers(1, 40),
    threshold=st.sampled_from([0.0, 0.001, 0.05, 0.5]),
)
def test_tree_holds_the_best_first_nodes(seed: int, depths: int, vocab: int, num_nodes: int, threshold: float) -> None:
    propose = by_depth(random_logits(seed, 1, depths, vocab))
    limits = {
        "num_nodes": num_nodes,
        "max_depth": depths,
        "min_log_prob": math.log(threshold) if threshold else -math.inf,
    }
    tree = build_tree(anchors(), propose, **limits)
    assert_same_nodes(paths_of(tree), slow_best_first(propose, **limits))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    depths=st.integers(1, 5),
    vocab=st.integers(4, 8),
    num_nodes=st.integers(1, 40),
)
def test_tree_holds_the_best_first_nodes_where_children_depend_on_their_parent(
    seed: int, depths: int, vocab: int, num_nodes: int
) -> None:
    propose = by_parent(random_logits(seed, 1, depths, vocab, vocab))
    tree = build_tree(anchors(), propose, num_nodes=num_nodes, max_depth=depths)
    assert_same_nodes(paths_of(tree), slow_best_first(propose, num_nodes, depths))


@pytest.mark.parametrize("make_propose", [by_depth, by_parent])
def test_a_chain_is_the_likeliest_token_below_the_likeliest(make_propose: Callable[[Tensor], Table]) -> None:
    propose = make_propose(random_logits(9, 1, *((3, 6) if make_propose is by_depth else (3, 6, 6))))
    tree = build_tree(anchors(), propose, num_nodes=40, max_depth=3, is_chain=True)
    choice, path = 0, []
    for log_probs in propose.log_probs[0]:
        choice = int(log_probs[min(choice, len(log_probs) - 1)].argmax())
        path.append(int(propose.tokens[0, len(path), choice]))
    assert tree.tokens.tolist() == [[ANCHOR, *path]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2]]


def test_proposals_are_told_where_nodes_hang() -> None:
    told = []

    class Told(Table):
        def __call__(self, depth: int, choices: Tensor, above: Tensor) -> Tensor:
            told.append((depth, choices.tolist(), above.tolist()))
            return super().__call__(depth, choices, above)

    log_probs = torch.tensor([[-3.0, -9.0, -1.0]] * 3).expand(1, 3, 3, 3).clone()
    log_probs[0, 1, 0, 1] = -0.1
    build_tree(anchors(), Told(torch.arange(3).expand(1, 3, 3), log_probs), num_nodes=2, max_depth=3)
    assert told == [(1, [[0]], [[0]]), (2, [[2, 0]], [[0, 0]]), (3, [[2, 1]], [[0, 1]])]


@pytest.mark.parametrize("make_propose", [by_depth, by_parent])
def test_each_row_of_a_batch_gets_the_tree_it_would_get_alone(make_propose: Callable[[Tensor], Table]) -> None:
    shape = (4, 6) if make_propose is by_depth else (4, 6, 6)
    logits = random_logits(5, 2, *shape)
    roots = torch.tensor([1, 4])
    together = build_tree(roots, make_propose(logits), num_nodes=12, max_depth=4)
    for row in range(2):
        alone = build_tree(roots[row, None], make_propose(logits[row, None]), num_nodes=12, max_depth=4)
        assert paths_of(together, row) == paths_of(alone)
        assert together.tokens[row, 0] == roots[row]


def test_a_small_tree_written_by_hand() -> None:
    # Depth 1: token 7 with 0.6, token 8 with 0.4. Depth 2: token 5 with 0.9, token 6 with 0.1.
    log_probs = torch.tensor([[0.6, 0.4], [0.9, 0.1]]).log()
    tokens = torch.tensor([[7, 8], [5, 6]])

    tree = build_tree(anchors(), Table(tokens[None], log_probs[None, :, None]), num_nodes=4, max_depth=2)
    assert tree.tokens.tolist() == [[ANCHOR, 7, 8, 5, 5]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 2]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    torch.testing.assert_close(tree.log_probs.exp(), torch.tensor([[1, 0.6, 0.4, 0.54, 0.36]]))


@pytest.mark.parametrize("num_nodes", [0, -1])
def test_no_nodes_gives_the_root_alone_without_asking_for_children(num_nodes: int) -> None:
    class Refusing(Table):
        def __call__(self, depth: int, choices: Tensor, above: Tensor) -> Tensor:
            raise AssertionError("no children are needed")

    nothing = Refusing(torch.zeros(2, 5, 3, dtype=torch.long), torch.zeros(2, 5, 1, 3))
    for limits in ({"num_nodes": num_nodes, "max_depth": 5}, {"num_nodes": 5, "max_depth": num_nodes}):
        tree = build_tree(torch.tensor([4, 9]), nothing, **limits)
        assert tree.tokens.tolist() == [[4], [9]]
        assert tree.parents.tolist() == [[-1], [-1]]


def test_one_node_is_the_likeliest_token() -> None:
    logits = random_logits(1, 1, 3, 9)
    tree = build_tree(anchors(), by_depth(logits), num_nodes=1, max_depth=3)
    assert tree.tokens.tolist() == [[ANCHOR, logits[0, 0].argmax()]]


def test_a_budget_beyond_all_prefixes_takes_every_prefix() -> None:
    tree = build_tree(anchors(), by_depth(random_logits(2, 1, 3, 4)), num_nodes=10_000, max_depth=3)
    assert len(paths_of(tree)) == 4 + 4**2 + 4**3


def test_max_depth_of_one_gives_the_best_children_of_the_root() -> None:
    logits = random_logits(3, 1, 4, 20)
    tree = build_tree(anchors(), by_depth(logits), num_nodes=6, max_depth=1)
    assert tree.tokens[0, 1:].tolist() == logits[0, 0].topk(6).indices.tolist()
    assert tree.parents[0, 1:].tolist() == [0] * 6


def test_threshold_drops_exactly_the_less_likely_nodes() -> None:
    propose = by_depth(random_logits(4, 1, 5, 8))
    everything = paths_of(build_tree(anchors(), propose, num_nodes=60, max_depth=5))
    threshold = sorted(everything.values())[25]  # a node exactly as likely as the threshold stays
    kept = paths_of(build_tree(anchors(), propose, num_nodes=60, max_depth=5, min_log_prob=threshold))
    assert kept == {path: score for path, score in everything.items() if score >= threshold}
    assert 0 < len(kept) < len(everything)


def test_threshold_that_no_node_reaches_leaves_the_root() -> None:
    tree = build_tree(anchors(), by_depth(torch.zeros(1, 3, 8)), num_nodes=9, max_depth=3, min_log_prob=math.log(0.5))
    assert len(tree) == 1


def test_threshold_keeps_in_every_row_all_that_the_row_would_keep_alone() -> None:
    sharp, flat = random_logits(6, 1, 4, 6, scale=9.0), torch.zeros(1, 4, 6)
    limits = {"num_nodes": 20, "max_depth": 4, "min_log_prob": math.log(0.1)}
    together = build_tree(anchors(2), by_depth(torch.cat([flat, sharp])), **limits)
    for row, logits in enumerate((flat, sharp)):
        alone = paths_of(build_tree(anchors(), by_depth(logits), **limits))
        assert alone.items() <= paths_of(together, row).items()


def test_impossible_tokens_come_last() -> None:
    logits = random_logits(8, 1, 3, 6)
    logits[0, :, 1::2] = -math.inf  # only tokens 0, 2, 4 are possible
    propose = by_depth(logits)
    tree = build_tree(anchors(), propose, num_nodes=3 + 9 + 27, max_depth=3)
    assert set(paths_of(tree)) == set(slow_best_first(propose, 39, 3))
    assert not (tree.tokens[0, 1:] % 2).any()


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 9, 30])
def test_a_certain_child_never_outlives_its_parent(num_nodes: int) -> None:
    # Log-probability 0: parent and child are equally likely, all the way down.
    propose = Table(torch.arange(3).expand(1, 8, 3), torch.tensor([0.0, -1.0, -2.0]).expand(1, 8, 1, 3))
    limits = {"num_nodes": num_nodes, "max_depth": 8}
    tree = build_tree(anchors(), propose, **limits)
    assert len(paths_of(tree)) == num_nodes
    assert (0,) in paths_of(tree)
    assert sum(tree.log_probs[0].tolist()) == sum(slow_best_first(propose, **limits).values())


def test_equally_likely_children_everywhere_give_a_full_tree() -> None:
    tree = build_tree(anchors(), by_depth(torch.zeros(1, 4, 5)), num_nodes=17, max_depth=4)
    paths = paths_of(tree)
    assert len(paths) == 17
    assert sum(len(path) == 1 for path in paths) == 5


@pytest.mark.parametrize("index", range(6))
def test_no_worse_than_the_tree_of_the_reference(golden: Path, index: int) -> None:
    tensors = load_file(golden / "trees.safetensors")
    facts = json.loads((golden / "trees.json").read_text())["trees"][index]
    scores = tensors[f"tree{index}.cum_logprob"]
    ours = build_tree(
        torch.tensor([facts["root_token"]]),
        by_depth(tensors[f"tree{index}.draft_logits"]),
        num_nodes=facts["num_nodes"] - 1,  # the reference counts the root
        max_depth=facts["depth"],
    )
    assert len(paths_of(ours)) == facts["num_nodes"] - 1
    assert ours.log_probs.exp().sum() >= scores.exp().sum() - 1e-5
