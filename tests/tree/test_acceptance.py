import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jetspec_hf.tree.acceptance import Acceptance, accept, children_of, edges_of, greedy_choices
from jetspec_hf.tree.tree import DraftTree

#        10        node 0, the root
#       /  \
#      11   12      nodes 1 and 2
#     /  \    \
#    13  14    13   nodes 3, 4 and 5
TOKENS = [10, 11, 12, 13, 14, 13]
PARENTS = [-1, 0, 0, 1, 1, 2]


def make_tree(tokens: list[list[int]], parents: list[list[int]]) -> DraftTree:
    zeros = torch.zeros(len(tokens), len(tokens[0]))
    return DraftTree(torch.tensor(tokens), torch.tensor(parents), zeros.long(), zeros)


def accept_greedy(tree: DraftTree, logits: torch.Tensor) -> list[Acceptance]:
    return [accept(children, choose, lambda token: False) for children, choose in greedy_choices(tree, logits)]


def logits_choosing(*choices: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(choices), 20).float()


@pytest.fixture(params=["on a CPU", "elsewhere"])
def _place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where logits say that they are."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", request.param == "on a CPU")


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([19, 0, 0, 0, 0, 0], Acceptance([0], [19])),
        ([11, 19, 0, 0, 0, 0], Acceptance([0, 1], [11, 19])),
        ([11, 14, 0, 0, 17, 0], Acceptance([0, 1, 4], [11, 14, 17])),
        ([12, 13, 13, 1, 1, 18], Acceptance([0, 2, 5], [12, 13, 18])),
        ([13, 13, 13, 13, 13, 13], Acceptance([0], [13])),  # 13 is drafted, but not below the root
    ],
    ids=["nothing", "one", "a leaf", "the other branch", "a token of another branch"],
)
def test_greedy_acceptance_follows_the_target(choices: list[int], expected: Acceptance) -> None:
    assert accept_greedy(make_tree([TOKENS], [PARENTS]), logits_choosing(choices)) == [expected]


@pytest.mark.usefixtures("_place")
def test_each_row_of_a_batch_is_accepted_alone() -> None:
    tree = make_tree([[1, 2, 3], [1, 3, 2]], [[-1, 0, 1], [-1, 0, 0]])
    accepted = accept_greedy(tree, logits_choosing([2, 3, 4], [2, 3, 4]))
    assert accepted == [Acceptance([0, 1, 2], [2, 3, 4]), Acceptance([0, 2], [2, 4])]


def test_children_are_found_by_parent_and_token() -> None:
    children = children_of(make_tree([[0] * 6, TOKENS], [[-1] * 6, PARENTS]), row=1)
    below_root = {edge: node for edge, node in children.items() if edge[0] >= 0}
    assert below_root == {(0, 11): 1, (0, 12): 2, (1, 13): 3, (1, 14): 4, (2, 13): 5}


def test_the_edges_of_all_rows_are_those_of_each() -> None:
    tree = make_tree([[10, 11, 12, 11, 0, 0], TOKENS], [[-1, 0, 1, 0, 0, 0], PARENTS])
    assert edges_of(tree) == [children_of(tree, row) for row in range(2)]
    assert edges_of(tree)[0] == {(-1, 10): 0, (0, 11): 1, (1, 12): 2, (0, 0): 4}


@pytest.mark.usefixtures("_place")
def test_of_equal_siblings_the_first_is_followed() -> None:
    tree = make_tree([[10, 11, 12, 11]], [[-1, 0, 1, 0]])
    assert accept_greedy(tree, logits_choosing([11, 12, 7, 0])) == [Acceptance([0, 1, 2], [11, 12, 7])]


def test_a_last_token_is_emitted_and_its_node_is_not_accepted() -> None:
    children = children_of(make_tree([TOKENS], [PARENTS]), row=0)
    choices = {0: 11, 1: 14, 4: 15}
    assert accept(children, choices.__getitem__, lambda token: token == 14) == Acceptance([0, 1], [11, 14])


def test_the_target_chooses_once_for_each_emitted_token_in_order() -> None:
    calls: list[tuple[str, int]] = []

    def choose(node: int) -> int:
        calls.append(("choose at", node))
        return {0: 12, 2: 13, 5: 19}[node]

    def is_last(token: int) -> bool:
        calls.append(("is last", token))
        return False

    accept(children_of(make_tree([TOKENS], [PARENTS]), row=0), choose, is_last)
    assert calls == [
        ("choose at", 0),
        ("is last", 12),
        ("choose at", 2),
        ("is last", 13),
        ("choose at", 5),
        ("is last", 19),
    ]


@pytest.mark.parametrize("index", range(6))
def test_greedy_acceptance_agrees_with_the_reference(golden: Path, index: int) -> None:
    tensors = load_file(golden / "trees.safetensors")
    facts = json.loads((golden / "trees.json").read_text())["trees"][index]
    parts = ("token_ids", "parent_indices", "depth", "cum_logprob")
    tree = DraftTree(*(tensors[f"tree{index}.{part}"][None] for part in parts))

    (accepted,) = accept_greedy(tree, tensors[f"tree{index}.target_logits"])
    assert accepted.path == facts["accepted_path"]
    assert len(accepted.tokens) == facts["accepted_draft_tokens"] + 1
    assert accepted.tokens[:-1] == tree.tokens[0, accepted.path[1:]].tolist()
    assert accepted.tokens[-1] == facts["bonus_token"]


@pytest.mark.parametrize("rows", [(1, 5), (2, 6)], ids=["nodes", "batch"])
def test_logits_that_do_not_fit_the_tree_are_refused(rows: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"one row for every node"):
        accept_greedy(make_tree([TOKENS], [PARENTS]), torch.zeros(*rows, 20))
