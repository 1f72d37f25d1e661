"""The training objective, as pure functions, and how to go through many slots a chunk at a time."""

from collections.abc import Callable, Sequence
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
        log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)
        probs = log_probs.exp()
        return cls(probs, -(probs * log_probs).sum(dim=-1))

    def at(self, places: Tensor) -> "SoftLabels":
        """Those of each slot, where `places`, `(slots,)`, says which are its."""
        return SoftLabels(self.probs[places], self.entropy[places])


def slot_loss(
    student_logits: Tensor,
    teacher: SoftLabels | None,
    labels: Tensor,
    weights: Tensor,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""The weighted sum of the slots' losses (paper, section 4).

    $$L = \sum_i w_i \left[ \lambda T^2 KL(p_i \| q_i) - (1 - \lambda) \log softmax(z_i)_{y_i} \right],\quad
    p_i = softmax(z^{target}_i / T),\; q_i = softmax(z_i / T)$$

    Args:
        student_logits (`torch.FloatTensor` of shape `(slots, vocab)`): the head's, $z$.
        teacher (`SoftLabels` of `slots` places, *optional*): the target's for the same tokens, $p$; needed for the KL.
        labels (`torch.LongTensor` of shape `(slots,)`): the tokens of the text, $y$.
        weights (`torch.FloatTensor` of shape `(slots,)`): $w$; see [`slot_weights`].
        kl_weight (`float`, *optional*, defaults to 1.0): $\lambda$; 1 is the forward KL alone, 0 cross-entropy alone.
        temperature (`float`, *optional*, defaults to 1.0): $T$.
    """
    loss = torch.zeros_like(weights)
    if kl_weight > 0 and teacher is not None:
        softened = student_logits if temperature == 1 else student_logits / temperature
        cross_entropy = torch.nn.functional.cross_entropy(softened, teacher.probs, reduction="none")
        loss = loss + kl_weight * temperature**2 * (cross_entropy - teacher.entropy)
    if kl_weight < 1:
        loss = loss + (1 - kl_weight) * torch.nn.functional.cross_entropy(student_logits, labels, reduction="none")
    return (loss * weights).sum()


def sum_in_chunks(
    loss_of: Callable[..., Tensor], chunk_size: int, slots: Sequence[Tensor], shared: Sequence[Tensor] = ()
) -> Tensor:
    """A sum over slots, computed `chunk_size` slots at a time, with its gradient.

    What `loss_of` makes of a chunk, logits above all, is freed before the next chunk begins: the gradient of a chunk is
    taken together with its value. Nothing but `slots` and `shared` gets a gradient.

    Args:
        loss_of (`Callable`): `loss_of(where, *chunks, *shared)` is the sum over the rows `where` of `slots`.
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
    def forward(ctx: Any, loss_of: Callable[..., Tensor], chunk_size: int, num_sliced: int, *tensors: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[3:]
        gradients = [torch.zeros_like(one) if needed else None for one, needed in zip(tensors, needs_grad, strict=True)]
        slots = tensors[0]
        total = slots.new_zeros((), dtype=torch.promote_types(slots.dtype, torch.float32))
        for start in range(0, len(slots), chunk_size):
            where = slice(start, min(start + chunk_size, len(slots)))
            pieces = [where if i < num_sliced else slice(None) for i in range(len(tensors))]
            with torch.set_grad_enabled(any(needs_grad)):
                parts = [
                    one[piece].detach().requires_grad_(needed)
                    for one, piece, needed in zip(tensors, pieces, needs_grad, strict=True)
                ]
                loss = loss_of(where, *parts)
            if any(needs_grad):
                wanted = [part for part in parts if part.requires_grad]
                found = iter(torch.autograd.grad(loss, wanted))
                for gradient, piece in zip(gradients, pieces, strict=True):
                    if gradient is not None:
                        gradient[piece] += next(found)
            total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        return None, None, None, *(None if one is None else scale * one for one in ctx.saved_tensors)
