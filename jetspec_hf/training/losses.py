"""The training objective, as pure functions, and how to go through many slots a chunk at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SoftLabels(NamedTuple):
    """The target's distributions, softened, at some places of a text."""

    probs: Tensor  # (places, vocab)
    entropy: Tensor  # (places,), in nats

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0) -> "SoftLabels":
        """From logits, `(places, vocab)`."""
        log_probs = _log_softmax(logits, temperature)
        probs = log_probs.exp()
        return cls(probs, -torch.linalg.vecdot(probs, log_probs))

    def at(self, places: Tensor) -> "SoftLabels":
        """Those of each slot, where `places`, `(slots,)`, says which are its."""
        return SoftLabels(self.probs[places], self.entropy[places])


class SlotLosses(NamedTuple):
    """What slots lose, and where that pulls."""

    values: Tensor  # (slots,)
    gradient: Tensor  # (slots, vocab), of each value with respect to the logits of its slot


@torch.no_grad()
def slot_losses(
    student_logits: Tensor,
    teacher: SoftLabels | None,
    labels: Tensor,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
) -> SlotLosses:
    r"""The loss of each slot (paper, section 4), with its gradient written out, which spares passes over logits.

    $$L = \lambda T^2 KL(p \| q_T) - (1 - \lambda) \log q_y,\quad p = softmax(z^{target} / T),\; q_T = softmax(z / T)$$

    $$\partial L / \partial z = \lambda T (q_T - p) + (1 - \lambda) (q - 1_y),\quad q = q_1$$

    Args:
        student_logits (`torch.FloatTensor` of shape `(slots, vocab)`): the head's, $z$.
        teacher (`SoftLabels` of `slots` places, *optional*): the target's for the same tokens, $p$; needed for the KL.
        labels (`torch.LongTensor` of shape `(slots,)`): the tokens of the text, $y$.
        kl_weight (`float`, *optional*, defaults to 1.0): $\lambda$; 1 is the forward KL alone, 0 cross-entropy alone.
        temperature (`float`, *optional*, defaults to 1.0): $T$.
    """
    parts = []
    if kl_weight > 0 and teacher is not None:
        divergence = _divergences(student_logits, teacher, temperature)
        parts.append((kl_weight * temperature**2, kl_weight * temperature, divergence))
    if kl_weight < 1:
        parts.append((1 - kl_weight, 1 - kl_weight, _surprisals(student_logits, labels)))
    (scale, slope, (values, gradient)), *rest = parts
    values = values * scale
    if slope != 1:
        gradient.mul_(slope)
    for scale, slope, more in rest:
        values += scale * more.values
        gradient.add_(more.gradient, alpha=slope)
    return SlotLosses(values, gradient)


def _divergences(logits: Tensor, teacher: SoftLabels, temperature: float) -> SlotLosses:
    """The forward KL of softened logits, whose gradient is with respect to those."""
    log_probs = _log_softmax(logits, temperature)
    values = -torch.linalg.vecdot(teacher.probs, log_probs) - teacher.entropy
    return SlotLosses(values, log_probs.exp_().sub_(teacher.probs))


def _surprisals(logits: Tensor, labels: Tensor) -> SlotLosses:
    """The cross-entropy."""
    log_probs = logits.log_softmax(dim=-1)
    values = -log_probs.gather(1, labels[:, None])[:, 0]
    gradient = log_probs.exp_()
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1))
    return SlotLosses(values, gradient)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)


class ChunkLoss(NamedTuple):
    """The loss of a chunk of slots, and the beginning of its gradient."""

    value: Tensor
    outputs: list[Tensor]  # what was computed from the chunk, logits above all
    gradients: list[Tensor]  # of the loss with respect to each of them


def sum_in_chunks(
    loss_of: Callable[..., ChunkLoss], chunk_size: int, slots: Sequence[Tensor], shared: Sequence[Tensor] = ()
) -> Tensor:
    """A sum over slots, computed `chunk_size` slots at a time, with its gradient.

    What `loss_of` makes of a chunk, logits above all, is freed before the next chunk begins: the gradient of a chunk is
    taken together with its value. Nothing but `slots` and `shared` gets a gradient.

    Args:
        loss_of (`Callable`):
            `loss_of(where, *chunks, *shared)` is the [`ChunkLoss`] of the rows `where` of `slots`.
        chunk_size (`int`): most slots at once.
        slots (`Sequence[torch.FloatTensor]` of shape `(slots, ...)`): taken apart, such as hidden states.
        shared (`Sequence[torch.FloatTensor]`): passed whole to every chunk, such as weights.
    """
    tensors = [*slots, *shared]
    if not torch.is_grad_enabled():
        tensors = [one.detach() for one in tensors]
    return _SumInChunks.apply(loss_of, chunk_size, len(slots), *tensors)


@torch.no_grad()
def map_in_chunks(
    measure: Callable[..., Tensor], chunk_size: int, slots: Sequence[Tensor], shared: Sequence[Tensor] = ()
) -> Tensor:
    """What `measure` finds at every slot, `(slots, ...)`, computed `chunk_size` slots at a time, without a gradient.

    See [`sum_in_chunks`] for the arguments; `measure` gives a row for each slot of a chunk.
    """
    # Where there is no slot, an empty chunk says what a row looks like.
    starts = range(0, max(len(slots[0]), 1), chunk_size)
    chunks = [slice(start, min(start + chunk_size, len(slots[0]))) for start in starts]
    return torch.cat([measure(where, *(one[where] for one in slots), *shared) for where in chunks])


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_of: Callable[..., ChunkLoss], chunk_size: int, num_sliced: int, *tensors: Tensor
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[3:]
        gradients = [torch.zeros_like(one) if needed else None for one, needed in zip(tensors, needs_grad, strict=True)]
        slots = tensors[0]
        total = slots.new_zeros((), dtype=torch.promote_types(slots.dtype, torch.float32))
        for start in range(0, len(slots), chunk_size):
            where = slice(start, min(start + chunk_size, len(slots)))
            pieces = [where if i < num_sliced else slice(None) for i in range(len(tensors))]
            parts = [
                one[piece].detach().requires_grad_(needed)
                for one, piece, needed in zip(tensors, pieces, needs_grad, strict=True)
            ]
            value, found = _loss_and_gradients(loss_of, where, parts)
            for gradient, piece in zip(gradients, pieces, strict=True):
                if gradient is not None:
                    gradient[piece] += next(found)
            total += value
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        return None, None, None, *(None if one is None else scale * one for one in ctx.saved_tensors)


def _loss_and_gradients(
    loss_of: Callable[..., ChunkLoss], where: slice, parts: list[Tensor]
) -> tuple[Tensor, Iterator[Tensor]]:
    """The loss of a chunk, and its gradient with respect to those parts that need one; its logits end here."""
    wanted = [part for part in parts if part.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        loss = loss_of(where, *parts)
    if not wanted:
        return loss.value, iter(())
    pairs = zip(loss.outputs, loss.gradients, strict=True)
    outputs, gradients = zip(*((output, gradient) for output, gradient in pairs if output.requires_grad), strict=True)
    return loss.value, iter(torch.autograd.grad(outputs, wanted, gradients))
