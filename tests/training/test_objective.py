"""Loss and measures at the same slots, against all logits at once."""

import pytest
import torch

from jetspec_hf.training.losses import SoftLabels, slot_loss
from jetspec_hf.training.objective import Objective
from jetspec_hf.training.slots import MarkovCodes, Slots

LM_HEAD = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))


def unembed(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states @ LM_HEAD.T


def make_slots(num_slots: int, is_markov: bool) -> Slots:
    return Slots(
        hidden_states=torch.randn(num_slots, 5),
        codes=MarkovCodes(torch.randn(num_slots, 2), torch.randn(30, 2)) if is_markov else None,
        labels=torch.randint(30, (num_slots,)),
        weights=torch.rand(num_slots),
        depths=torch.arange(num_slots) % 3,
        places=torch.randint(4, (num_slots,)),  # fewer than slots, so that some are shared
        last_hidden=torch.randn(4, 5),
    )


@pytest.mark.parametrize("is_markov", [False, True])
@pytest.mark.parametrize("num_slots", [0, 1, 9])
def test_chunks_change_neither_loss_nor_measures(num_slots: int, is_markov: bool) -> None:
    slots = make_slots(num_slots, is_markov)
    plain = unembed(slots.hidden_states)
    logits = plain + slots.codes.paths @ slots.codes.tokens.T if is_markov else plain
    teacher = SoftLabels.of(unembed(slots.last_hidden), 1.5).at(slots.places)
    expected = [
        slot_loss(one, teacher, slots.labels, slots.weights, kl_weight=0.6, temperature=1.5) for one in (logits, plain)
    ]
    temperatures = [0.5, 1.0, 2.0]
    for chunk_size in (2, 100):
        objective = Objective(unembed, chunk_size, kl_weight=0.6, temperature=1.5, plain_loss_weight=0.3)
        total = expected[0] + 0.3 * expected[1] if is_markov else expected[0]
        torch.testing.assert_close(objective.sum_losses(slots), total)
        assert torch.equal(objective.are_correct(slots), logits.argmax(dim=-1) == slots.labels)
        surprisals = objective.surprisals(slots, temperatures)
        assert surprisals.shape == (num_slots, 3)
        for row, label in enumerate(slots.labels.tolist()):
            for column, temperature in enumerate(temperatures):
                found = -(logits[row] / temperature).log_softmax(dim=-1)[label]
                assert float(surprisals[row, column]) == pytest.approx(float(found), rel=1e-5)


def test_head_and_markov_head_learn_and_nothing_else() -> None:
    slots = make_slots(9, is_markov=True)
    learning = [slots.hidden_states, slots.codes.paths, slots.codes.tokens]
    for tensor in (*learning, slots.last_hidden):
        tensor.requires_grad_(True)
    objective = Objective(unembed, 4)
    assert not objective.surprisals(slots, [1.0]).requires_grad
    objective.sum_losses(slots).backward()
    assert all(tensor.grad.any() for tensor in learning)
    assert slots.last_hidden.grad is None
