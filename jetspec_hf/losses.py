"""The training objective, as pure functions: where blocks start, what they see, what they should predict."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def sample_anchors(loss_mask: Tensor, num_anchors: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw the positions at which draft blocks start, without replacement.

    A position can be an anchor if it and the next one are in the loss, as in decoding, where the anchor is the
    target's own token.

    Args:
        loss_mask (`torch.BoolTensor` of shape `(length,)`): true on the tokens to learn from.
        num_anchors (`int`): most anchors.
        generator (`torch.Generator`, *optional*): source of randomness.

    Returns:
        `torch.LongTensor` of shape `(anchors,)`, rising.
    """
    can_start = (loss_mask[:-1] & loss_mask[1:]).nonzero().flatten()
    drawn = torch.randperm(len(can_start), generator=generator, device=loss_mask.device)[:num_anchors]
    return can_start[drawn].sort().values


def block_positions(anchors: Tensor, block_size: int) -> Tensor:
    """The positions of every block, `(batch, anchors, block)`; those of an absent anchor, -1, start at 0."""
    return anchors.clamp(min=0)[:, :, None] + torch.arange(block_size, device=anchors.device)


def slot_weights(anchors: Tensor, loss_mask: Tensor, block_size: int, gamma: float | None = None) -> Tensor:
    r"""The weight of each predicted slot, `(batch, anchors, block - 1)`.

    Slot $k \ge 1$ of a block with anchor $a$ predicts the token at $a + k$. It weighs

    $$w_k = \exp(-(k - 1) / \gamma)$$

    or 1 without `gamma` (the paper's default), and 0 where that token, or one before it in the block, is not in the
    loss, or the anchor is absent.
    """
    length = loss_mask.shape[1]
    positions = block_positions(anchors, block_size)[:, :, 1:]
    in_loss = loss_mask.gather(1, positions.clamp(max=length - 1).flatten(1)).view(positions.shape)
    is_real = in_loss & (positions < length) & (anchors >= 0)[:, :, None]
    weights = is_real.long().cumprod(dim=-1).float()
    if gamma is not None:
        weights = weights * torch.exp(-torch.arange(block_size - 1, device=weights.device) / gamma)
    return weights


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
