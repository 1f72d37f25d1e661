"""The training objective against slow, obvious references."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from jetspec_hf.training.losses import ChunkLoss, SoftLabels, map_in_chunks, slot_losses, sum_in_chunks
from jetspec_hf.training.masking import training_mask
from jetspec_hf.training.slots import block_positions


def reference_loss(student, teacher, labels, weights, kl_weight, temperature) -> float:
    total = 0.0
    for row in range(len(labels)):
        p = (teacher[row] / temperature).softmax(0)
        q = (student[row] / temperature).softmax(0)
        kl = sum(p[i] * (p[i] / q[i]).log() for i in range(len(p)))
        ce = -student[row].softmax(0)[labels[row]].log()
        total += float(weights[row] * (kl_weight * temperature**2 * kl + (1 - kl_weight) * ce))
    return total


@pytest.fixture
def slots() -> tuple:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0], dtype=torch.float64)
    return student, teacher, torch.tensor([0, 6, 3, 3, 1]), weights


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_its_equation(slots: tuple, kl_weight: float, temperature: float) -> None:
    student, teacher, labels, weights = slots
    soft = SoftLabels.of(teacher, temperature)
    losses = slot_losses(student, soft, labels, kl_weight=kl_weight, temperature=temperature)
    assert float(losses.values @ weights) == pytest.approx(reference_loss(*slots, kl_weight, temperature), rel=1e-5)


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_what_autograd_finds(slots: tuple, kl_weight: float, temperature: float) -> None:
    student, teacher, labels, _ = slots
    before = student.clone().requires_grad_(True)
    p, log_q = (teacher / temperature).softmax(-1), (before / temperature).log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, p, reduction="sum")
    ce = torch.nn.functional.cross_entropy(before, labels, reduction="sum")
    (kl_weight * temperature**2 * kl + (1 - kl_weight) * ce).backward()
    soft = SoftLabels.of(teacher, temperature)
    losses = slot_losses(student, soft, labels, kl_weight=kl_weight, temperature=temperature)
    torch.testing.assert_close(losses.gradient, before.grad)
    assert torch.equal(student, before)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
@pytest.mark.parametrize("frozen", ["nothing", "states", "lm_head"])
def test_chunks_change_neither_value_nor_gradient(slots: tuple, chunk_size: int, frozen: str) -> None:
    _, teacher, _, weights = slots
    soft = SoftLabels.of(teacher)

    def loss_of(where: slice, states: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        p, logits = soft.probs[where], states @ lm_head.T
        return (weights[where] * torch.nn.functional.cross_entropy(logits, p, reduction="none")).sum()

    def chunk_loss_of(where: slice, states: torch.Tensor, lm_head: torch.Tensor) -> ChunkLoss:
        logits = states @ lm_head.T
        gradient = (logits.detach().softmax(-1) - soft.probs[where]) * weights[where, None]
        return ChunkLoss(loss_of(where, states.detach(), lm_head.detach()), [logits], [gradient])

    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=name != frozen)
        for name, shape in (("states", (5, 3)), ("lm_head", (7, 3)))
    ]
    loss = loss_of(slice(None), *leaves)
    (loss * 3).backward()
    copies = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    chunked = sum_in_chunks(chunk_loss_of, chunk_size, copies[:1], copies[1:])
    (chunked * 3).backward()
    torch.testing.assert_close(chunked, loss)
    for copy, leaf in zip(copies, leaves, strict=True):
        assert (copy.grad is None) == (leaf.grad is None)
        if leaf.grad is not None:
            torch.testing.assert_close(copy.grad, leaf.grad)


def test_chunks_hold_no_logits_of_other_chunks() -> None:
    alive: list = []

    def loss_of(where: slice, chunk: torch.Tensor) -> ChunkLoss:
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        logits = chunk @ torch.randn(3, 7)
        alive.append(weakref.ref(logits))
        return ChunkLoss(logits.detach().logsumexp(-1).sum(), [logits], [logits.detach().softmax(-1)])

    sum_in_chunks(loss_of, 2, [torch.randn(6, 3, requires_grad=True)]).backward()
    assert len(alive) == 3


@pytest.mark.parametrize("num_slots", [0, 1, 4, 5])
def test_what_is_measured_in_chunks_is_measured_at_once(num_slots: int) -> None:
    states, codes, shared = torch.randn(num_slots, 3), torch.randn(num_slots, 2), torch.randn(2, 7)
    sizes = []

    def measure(where: slice, state: torch.Tensor, code: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        sizes.append(len(state))
        assert torch.equal(state, states[where])
        return (code @ table).cumsum(dim=1) + state.sum(dim=1, keepdim=True)

    found = map_in_chunks(measure, 2, [states, codes], [shared])
    assert sizes == {0: [0], 1: [1], 4: [2, 2], 5: [2, 2, 1]}[num_slots]
    torch.testing.assert_close(found, measure(slice(None), states, codes, shared))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_a_block_in_training_computes_what_it_does_in_decoding(
    is_causal: bool, window: int | None, make_target, make_head
) -> None:
    target = make_target()
    layer_types = ["full_attention", "sliding_attention" if window else "full_attention"]
    sliding = {"use_sliding_window": True, "sliding_window": window, "layer_types": layer_types} if window else {}
    head = make_head(target, is_causal=is_causal, **sliding)
    block, width = head.config.block_size, len(head.config.target_layer_ids) * target.config.hidden_size
    context = torch.randn(1, 20, width)
    anchors = torch.tensor([[4, 11, 19]])
    noise = torch.randn(1, 3, block, target.config.hidden_size)
    positions = torch.cat([torch.arange(20)[None], block_positions(anchors, block).flatten(1)], dim=1)
    masks = {
        kind: training_mask(
            anchors,
            torch.arange(20)[None],
            block,
            is_causal=is_causal,
            window=window if kind == "sliding_attention" else None,
        )
        for kind in set(layer_types)
    }
    trained = head(
        noise.flatten(1, 2),
        context,
        positions,
        masks,
    ).last_hidden_state.unflatten(1, (3, block))

    cache, cached = DynamicCache(config=head.config), 0
    cache.activate_past_recording()
    for i, anchor in enumerate(anchors[0].tolist()):
        decoded = head(noise[:, i], context[:, cached:anchor], cache=cache).last_hidden_state
        cache.crop(-block)
        cached = anchor
        torch.testing.assert_close(decoded, trained[:, i], atol=1e-5, rtol=1e-5)
