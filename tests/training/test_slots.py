"""Which slots a head learns from."""

import math

import pytest
import torch

from jetspec_hf.training.slots import MarkovCodes, block_tokens, sample_anchors, select_slots, slot_weights


@pytest.mark.parametrize("num_anchors", [1, 3, 100])
def test_anchors_start_where_two_tokens_are_in_the_loss(num_anchors: int) -> None:
    loss_mask = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1]).bool()
    possible, seen = {2, 3, 6}, set()
    for seed in range(20):
        anchors = sample_anchors(loss_mask, num_anchors, torch.Generator().manual_seed(seed)).tolist()
        assert anchors == sorted(set(anchors))
        assert len(anchors) == min(num_anchors, len(possible))
        seen |= set(anchors)
    assert seen == possible
    assert len(sample_anchors(torch.tensor([0, 0, 1]).bool(), num_anchors)) == 0


@pytest.mark.parametrize("gamma", [None, 7.0])
def test_slots_weigh_nothing_past_the_loss(gamma: float | None) -> None:
    loss_mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1]]).bool()
    anchors = torch.tensor([[-1, 1, 5, 6]])
    weights = slot_weights(anchors, loss_mask, block_size=4, gamma=gamma)
    # Token 4 is outside the loss, and so is all that a block reaches through it; token 8 does not exist.
    in_loss = torch.tensor([[[0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]]]).float()
    decay = torch.tensor([1.0 if gamma is None else math.exp(-k / gamma) for k in range(3)])
    torch.testing.assert_close(weights, in_loss * decay)


def test_slots_are_those_in_the_loss_with_all_that_belongs_to_them() -> None:
    """Slot by slot; a block that reaches past the end, one through a gap in the loss, and one that is not there."""
    input_ids = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])
    loss_mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]]).bool()
    anchors = torch.tensor([[1, 4], [1, -1]])
    weights = slot_weights(anchors, loss_mask, block_size=4, gamma=2.0)
    hidden_states, last_hidden = torch.randn(2, 2, 3, 5), torch.randn(2, 6, 5)
    paths, tokens = torch.randn(2, 2, 3, 2), torch.randn(30, 2)
    slots = select_slots(input_ids, anchors, weights, hidden_states, last_hidden, MarkovCodes(paths, tokens))
    expected = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 0, 0)]  # row, block, depth
    assert len(slots.labels) == len(expected)
    assert slots.codes.tokens is tokens
    for slot, (row, block, depth) in enumerate(expected):
        place = int(anchors[row, block]) + depth
        assert slots.labels[slot] == input_ids[row, place + 1]
        assert slots.depths[slot] == depth
        assert slots.weights[slot] == pytest.approx(math.exp(-depth / 2))
        assert torch.equal(slots.hidden_states[slot], hidden_states[row, block, depth])
        assert torch.equal(slots.codes.paths[slot], paths[row, block, depth])
        assert torch.equal(slots.last_hidden[slots.places[slot]], last_hidden[row, place])


def test_tokens_of_blocks_are_those_of_the_text() -> None:
    tokens = block_tokens(torch.tensor([[10, 11, 12, 13]]), torch.tensor([[0, 2, -1]]), block_size=3)
    assert tokens.tolist() == [[[10, 11, 12], [12, 13, 13], [10, 11, 12]]]
