import itertools

import pytest
import torch
from torch import Tensor

from jetspec_hf.head.masking import as_bias, block_mask, ragged_block_mask, static_block_mask

NUM_PAST = 5
PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("first_key", [0, 2])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_block_mask_agrees_with_its_words(is_causal: bool, window: int | None, first_key: int, is_padded: bool) -> None:
    num_context, block_size = 4, 3
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    mask = block_mask(
        num_context,
        block_size,
        is_causal=is_causal,
        first_key=first_key,
        window=window,
        padding_mask=padding if is_padded else None,
    )
    if not is_causal and window is None and not is_padded:
        assert mask is None
        return
    assert mask.shape == (2 if is_padded else 1, 1, block_size, num_context - first_key + block_size)
    for row, slot, key in itertools.product(*(range(n) for n in (mask.shape[0], block_size, mask.shape[3]))):
        query_position, key_position = num_context + slot, first_key + key
        may = not is_padded or bool(padding[row, key_position])
        if is_causal:
            may = may and key_position <= query_position
        if window is not None:
            may = may and abs(query_position - key_position) < window
        assert mask[row, 0, slot, key] == may, (row, slot, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_is_zero_where_attention_is_allowed_and_the_least_number_elsewhere(dtype: torch.dtype) -> None:
    bias = as_bias(torch.tensor([[True, False], [False, True]]), dtype)
    least = torch.finfo(dtype).min
    assert bias.dtype == dtype
    assert bias.tolist() == [[0.0, least], [least, 0.0]]


NUM_SLOTS = 16


def in_slots(mask: Tensor, columns: list[int]) -> Tensor:
    """The same mask with its keys at `columns` of a cache of fixed size."""
    whole = torch.zeros(*mask.shape[:-1], NUM_SLOTS, dtype=torch.bool)
    whole[..., columns] = mask
    return whole


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("num_empty", [0, 2])
def test_a_static_block_mask_shows_what_a_block_mask_shows(
    window: int | None, is_causal: bool, is_padded: bool, num_empty: int
) -> None:
    options = {"is_causal": is_causal, "window": window}
    padding = torch.nn.functional.pad(PADDING, (0, 4), value=1) if is_padded else None
    mask = block_mask(NUM_PAST, 4, **options, padding_mask=padding)
    if mask is None:
        mask = torch.ones(1, 1, 4, NUM_PAST + 4, dtype=torch.bool)
    if is_padded:
        padding = torch.nn.functional.pad(PADDING, (0, NUM_SLOTS - NUM_PAST), value=1)
    first_slot = torch.tensor(NUM_PAST + num_empty)
    static = static_block_mask(torch.tensor(NUM_PAST), first_slot, NUM_SLOTS, 4, **options, padding_mask=padding)
    columns = [*range(NUM_PAST), *range(NUM_PAST + num_empty, NUM_PAST + num_empty + 4)]
    assert static.tolist() == in_slots(mask, columns).tolist()


BEFORE, NEW = [5, 3, 0], [2, 4, 1]  # of each row, in the cache and with the block


@pytest.mark.parametrize("num_more", [0, 2])  # positions without meaning behind the longest row
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_a_ragged_block_mask_shows_each_row_what_a_block_mask_shows_it_alone(
    window: int | None, is_causal: bool, is_padded: bool, num_more: int
) -> None:
    options = {"is_causal": is_causal, "window": window}
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    num_past, most_new = max(BEFORE) + num_more, max(NEW) + num_more
    mask = ragged_block_mask(
        torch.tensor(BEFORE),
        torch.tensor(NEW),
        num_past=num_past,
        most_new=most_new,
        block_size=4,
        **options,
        padding_mask=padding if is_padded else None,
    )
    assert mask.shape == (3, 1, 4, num_past + most_new + 4)
    for row, (before, new) in enumerate(zip(BEFORE, NEW, strict=True)):
        alone = torch.nn.functional.pad(padding[row, None, : before + new], (0, 4), value=1)
        expected = block_mask(before + new, 4, **options, padding_mask=alone if is_padded else None)
        if expected is None:
            expected = torch.ones(1, 1, 4, before + new + 4, dtype=torch.bool)
        places = [*range(before), *range(num_past, num_past + new)]
        columns = [*places, *range(num_past + most_new, num_past + most_new + 4)]
        whole = torch.zeros(1, 4, mask.shape[3], dtype=torch.bool)
        whole[..., columns] = expected[0]
        assert mask[row].tolist() == whole.tolist()
