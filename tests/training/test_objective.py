"""Loss and measures at the same slots, against all logits at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

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


def reference_logits(slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
    """Without and with the Markov head."""
    plain = unembed(slots.hidden_states)
    return plain, plain if slots.codes is None else plain + slots.codes.paths @ slots.codes.tokens.T


def reference_loss(slots: Slots, kl_weight: float, temperature: float, plain_loss_weight: float) -> torch.Tensor:
    """As autograd takes it, all logits at once."""
    p = (unembed(slots.last_hidden)[slots.places] / temperature).softmax(-1)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        kl = kl_div((logits / temperature).log_softmax(-1), p, reduction="none").sum(dim=-1)
        ce = cross_entropy(logits, slots.labels, reduction="none")
        return (slots.weights * (kl_weight * temperature**2 * kl + (1 - kl_weight) * ce)).sum()

    plain, logits = reference_logits(slots)
    return loss(logits) if slots.codes is None else loss(logits) + plain_loss_weight * loss(plain)


@pytest.mark.parametrize("is_markov", [False, True])
@pytest.mark.parametrize("num_slots", [0, 1, 9])
def test_chunks_change_neither_loss_nor_measures(num_slots: int, is_markov: bool) -> None:
    slots = make_slots(num_slots, is_markov)
    logits = reference_logits(slots)[1]
    expected = reference_loss(slots, kl_weight=0.6, temperature=1.5, plain_loss_weight=0.3)
    temperatures = [0.5, 1.0, 2.0]
    for chunk_size in (2, 100):
        objective = Objective(unembed, chunk_size, kl_weight=0.6, temperature=1.5, plain_loss_weight=0.3)
        torch.testing.assert_close(objective.sum_losses(slots), expected)
        assert torch.equal(objective.are_correct(slots), logits.argmax(dim=-1) == slots.labels)
        surprisals = objective.surprisals(slots, temperatures)
        assert surprisals.shape == (num_slots, 3)
        for row, label in enumerate(slots.labels.tolist()):
            for column, temperature in enumerate(temperatures):
                found = -(logits[row] / temperature).log_softmax(dim=-1)[label]
                assert float(surprisals[row, column]) == pytest.approx(float(found), rel=1e-5)


@pytest.mark.parametrize("is_markov", [False, True])
@pytest.mark.parametrize("options", [(1.0, 1.0, 1.0), (0.6, 1.5, 0.3), (0.0, 1.0, 0.5), (1.0, 2.0, 0.0)], ids=str)
def test_gradients_are_those_of_autograd(options: tuple[float, float, float], is_markov: bool) -> None:
    slots = make_slots(9, is_markov)
    learning = [slots.hidden_states, *(slots.codes or ())]
    for tensor in learning:
        tensor.requires_grad_(True)
    expected = torch.autograd.grad(reference_loss(slots, *options), learning)
    for chunk_size in (2, 100):
        kl_weight, temperature, plain_loss_weight = options
        objective = Objective(unembed, chunk_size, kl_weight, temperature, plain_loss_weight)
        found = torch.autograd.grad(objective.sum_losses(slots), learning)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_markov_head_can_learn_alone() -> None:
    slots = make_slots(9, is_markov=True)
    learning = [codes.requires_grad_(True) for codes in slots.codes]
    expected = torch.autograd.grad(reference_loss(slots, 1.0, 1.0, 1.0), learning)
    found = torch.autograd.grad(Objective(unembed, 4).sum_losses(slots), learning)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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
