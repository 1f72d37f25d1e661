"""The training objective, as pure functions: where blocks start, what they see, what they should predict."""

from collections.abc import Callable
from typing import Any

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


def slot_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
        teacher_logits (`torch.FloatTensor` of shape `(slots, vocab)`): the target's for the same tokens.
        labels (`torch.LongTensor` of shape `(slots,)`): the tokens of the text, $y$.
        weights (`torch.FloatTensor` of shape `(slots,)`): $w$; see [`slot_weights`].
        kl_weight (`float`, *optional*, defaults to 1.0): $\lambda$; 1 is the forward KL alone, 0 cross-entropy alone.
        temperature (`float`, *optional*, defaults to 1.0): $T$.
    """
    loss = student_logits.new_zeros(len(labels), dtype=weights.dtype)
    if kl_weight > 0:
        student = (student_logits / temperature).log_softmax(dim=-1)
        teacher = (teacher_logits / temperature).log_softmax(dim=-1)
        divergence = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
        loss = loss + kl_weight * temperature**2 * divergence
    if kl_weight < 1:
        loss = loss + (1 - kl_weight) * torch.nn.functional.cross_entropy(student_logits, labels, reduction="none")
    return (loss * weights).sum()


def sum_in_chunks(loss_of: Callable[[Tensor, slice], Tensor], hidden_states: Tensor, chunk_size: int) -> Tensor:
    """A sum over slots, computed `chunk_size` slots at a time, with its gradient.

    What `loss_of` makes of a chunk, logits above all, is freed before the next chunk begins: the gradient of a chunk is
    taken together with its value. Nothing but `hidden_states` gets a gradient.

    Args:
        loss_of (`Callable`): `loss_of(chunk, where)` is the sum over the rows `where` of `hidden_states`.
        hidden_states (`torch.FloatTensor` of shape `(slots, hidden)`): the head's.
        chunk_size (`int`): most slots at once.
    """
    return _SumInChunks.apply(hidden_states, loss_of, chunk_size)


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, loss_of: Callable[[Tensor, slice], Tensor], chunk_size: int) -> Tensor:
        total = hidden_states.new_zeros((), dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        gradient = torch.zeros_like(hidden_states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_states), chunk_size):
            where = slice(start, min(start + chunk_size, len(hidden_states)))
            with torch.set_grad_enabled(gradient is not None):
                chunk = hidden_states[where].detach().requires_grad_(gradient is not None)
                loss = loss_of(chunk, where)
            if gradient is not None:
                (gradient[where],) = torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradients[0] * gradient, None, None
