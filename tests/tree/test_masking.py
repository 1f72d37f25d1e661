import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jetspec_hf.tree.masking import ancestor_mask, static_tree_mask, tree_mask


def nodes_above(parents: list[int], node: int) -> set[int]:
    """The node and all nodes from it up to the root."""
    found = set()
    while node >= 0:
        found.add(node)
        node = parents[node]
    return found


def depths_of(parents: list[int]) -> list[int]:
    return [len(nodes_above(parents, node)) - 1 for node in range(len(parents))]


random_parents = st.integers(0, 25).flatmap(
    lambda below: st.tuples(*(st.integers(0, node) for node in range(below))).map(lambda p: [-1, *p])
)


def assert_ancestors(parents: list[int], mask: Tensor) -> None:
    for node in range(len(parents)):
        assert set(mask[node].nonzero().flatten().tolist()) == nodes_above(parents, node)


@pytest.mark.parametrize(
    "parents",
    [[-1], [-1, 0, 1, 2], [-1, 0, 1, 2, 3], [-1, 0, 0, 1, 1, 4]],
    ids=["root", "chain of four", "chain of five", "branching"],
)
def test_ancestor_mask_agrees_with_walking_up(parents: list[int]) -> None:
    assert_ancestors(parents, ancestor_mask(torch.tensor([parents]))[0])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(parents=random_parents)
def test_ancestor_mask_of_any_tree_agrees_with_walking_up(parents: list[int]) -> None:
    assert_ancestors(parents, ancestor_mask(torch.tensor([parents]))[0])


def test_ancestor_mask_treats_the_rows_of_a_batch_apart() -> None:
    rows = [[-1, 0, 1, 2], [-1, 0, 0, 2]]
    mask = ancestor_mask(torch.tensor(rows))
    for row, parents in enumerate(rows):
        assert_ancestors(parents, mask[row])


PARENTS = [[-1, 0, 0, 1, 3, 2], [-1, 0, 1, 2, 3, 4]]
NUM_PAST = 5
PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("first_key", [0, 3, NUM_PAST])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 20])
def test_tree_mask_agrees_with_its_words(window: int | None, first_key: int, is_padded: bool) -> None:
    parents = torch.tensor(PARENTS)
    depths = [depths_of(row) for row in PARENTS]
    mask = tree_mask(
        ancestor_mask(parents),
        torch.tensor(depths),
        num_past=NUM_PAST,
        first_key=first_key,
        window=window,
        padding_mask=PADDING if is_padded else None,
    )
    num_cached, num_nodes = NUM_PAST - first_key, parents.shape[1]
    assert mask.shape == (2, 1, num_nodes, num_cached + num_nodes)
    for row, query, key in itertools.product(range(2), range(num_nodes), range(num_cached + num_nodes)):
        if key < num_cached:
            position = first_key + key
            may = not is_padded or bool(PADDING[row, position])
        else:
            node = key - num_cached
            position = NUM_PAST + depths[row][node]
            may = node in nodes_above(PARENTS[row], query)
        back = NUM_PAST + depths[row][query] - position
        assert mask[row, 0, query, key] == (may and (window is None or back < window)), (row, query, key)


NUM_SLOTS = 16


def in_slots(mask: Tensor, columns: list[int]) -> Tensor:
    """The same mask with its keys at `columns` of a cache of fixed size."""
    whole = torch.zeros(*mask.shape[:-1], NUM_SLOTS, dtype=torch.bool)
    whole[..., columns] = mask
    return whole


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 20])
def test_a_static_tree_mask_shows_what_a_tree_mask_shows(window: int | None, is_padded: bool) -> None:
    parents = torch.tensor(PARENTS)
    ancestors, depths = ancestor_mask(parents), torch.tensor([depths_of(row) for row in PARENTS])
    padding = PADDING if is_padded else None
    mask = tree_mask(ancestors, depths, num_past=NUM_PAST, window=window, padding_mask=padding)
    if is_padded:
        padding = torch.nn.functional.pad(padding, (0, NUM_SLOTS - NUM_PAST), value=1)
    options = {"num_slots": NUM_SLOTS, "window": window, "padding_mask": padding}
    static = static_tree_mask(ancestors, depths, num_past=torch.tensor(NUM_PAST), **options)
    assert static.tolist() == in_slots(mask, list(range(NUM_PAST + parents.shape[1]))).tolist()


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("first_key", [0, 2])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 20])
def test_a_shorter_row_sees_what_it_sees_alone(window: int | None, first_key: int, is_padded: bool) -> None:
    parents, lengths = torch.tensor(PARENTS), [3, 5]
    ancestors, depths = ancestor_mask(parents), torch.tensor([depths_of(row) for row in PARENTS])
    options = {"first_key": first_key, "window": window}
    mask = tree_mask(
        ancestors,
        depths,
        num_past=NUM_PAST,
        **options,
        padding_mask=PADDING if is_padded else None,
        lengths=torch.tensor(lengths),
    )
    assert mask.shape == (2, 1, 6, NUM_PAST - first_key + 6)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        padding = PADDING[one, :length] if is_padded else None
        alone = tree_mask(ancestors[one], depths[one], num_past=length, **options, padding_mask=padding)
        gap = torch.zeros(1, 6, NUM_PAST - length, dtype=torch.bool)
        whole = torch.cat([alone[0, ..., : length - first_key], gap, alone[0, ..., length - first_key :]], dim=2)
        assert mask[row].tolist() == whole.tolist()
