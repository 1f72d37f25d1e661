import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from jetspec_hf.training.masking import training_mask, training_predicate


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("is_causal", [True, False])
def test_training_mask_says_who_sees_whom(is_causal: bool, window: int | None) -> None:
    anchors, block = torch.tensor([[2, 5], [-1, 4]]), 3
    documents = [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2]]
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 0]])
    length = position_ids.shape[1]
    mask = training_mask(anchors, position_ids, block, is_causal=is_causal, window=window)
    assert mask.shape == (2, 1, 2 * block, length + 2 * block)
    for row, query, key in itertools.product(range(2), range(2 * block), range(length + 2 * block)):
        (of, slot), anchor = divmod(query, block), int(anchors[row, query // block])
        if key < length:
            expected = 0 <= key < anchor and documents[row][key] == documents[row][anchor]
            back = anchor + slot - key
        else:
            expected = (key - length) // block == of and (not is_causal or key - length <= query)
            back = abs(query - (key - length))
        assert bool(mask[row, 0, query, key]) == (expected and (window is None or back < window))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    block=st.integers(1, 4),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 8),
)
def test_the_predicate_is_the_training_mask(
    documents: list[int], seed: int, block: int, is_causal: bool, window: int | None
) -> None:
    rows = [torch.cat([torch.arange(length) for length in some]) for some in (documents, documents[::-1])]
    position_ids = torch.stack(rows)
    length = position_ids.shape[1]
    anchors = torch.randint(-1, length, (2, 3), generator=torch.Generator().manual_seed(seed))
    options = {"is_causal": is_causal, "window": window}
    predicate = training_predicate(anchors, position_ids, block, **options)
    made = create_mask(predicate, 2, 1, 3 * block, length + 3 * block, device="cpu")
    assert torch.equal(made, training_mask(anchors, position_ids, block, **options))
