"""The training objective, as pure functions: where blocks start, what they see, what they should predict."""

import torch
from torch import Tensor


def sample_anchors(loss_mask: Tensor, num_anchors: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw the positions at which draft blocks start, without replacement.

    A position can be an anchor if it and the next one are in the loss, as in decoding, where the anchor is the
    target's own token.

    Args:
        loss_mask (`torch.BoolTensor` of shape `(batch, length)`): true on the tokens to learn from.
        num_anchors (`int`): most anchors in a row.
        generator (`torch.Generator`, *optional*): source of randomness.

    Returns:
        `torch.LongTensor` of shape `(batch, anchors)`, rising in each row; -1 fills rows that have fewer.
    """
    can_start = loss_mask[:, :-1] & loss_mask[:, 1:]
    noise = torch.rand(can_start.shape, generator=generator, device=loss_mask.device)
    noise, positions = noise.masked_fill(~can_start, -1.0).topk(min(num_anchors, can_start.shape[1]), dim=1)
    return positions.masked_fill(noise < 0, -1).sort(dim=1).values


def block_positions(anchors: Tensor, block_size: int) -> Tensor:
    """The positions of every block, `(batch, anchors, block)`; those of an absent anchor start at 0."""
    return anchors.clamp(min=0)[:, :, None] + torch.arange(block_size, device=anchors.device)


def slot_weights(anchors: Tensor, loss_mask: Tensor, block_size: int, gamma: float | None = None) -> Tensor:
    """The weight of each predicted slot, `(batch, anchors, block - 1)`.

    Slot `k` (from 1) of a block with anchor `a` predicts the token at `a + k`. It weighs `exp(-(k - 1) / gamma)`, or 1
    without `gamma` (the paper's default), and 0 where that token, or one between, is not in the loss.
    """
    length = loss_mask.shape[1]
    positions = block_positions(anchors, block_size)[:, :, 1:]
    in_loss = loss_mask.gather(1, positions.clamp(max=length - 1).flatten(1)).view(positions.shape)
    is_real = in_loss & (positions < length) & (anchors >= 0)[:, :, None]
    weights = is_real.long().cumprod(dim=-1).float()
    if gamma is not None:
        weights = weights * torch.exp(-torch.arange(block_size - 1, device=weights.device) / gamma)
    return weights


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Distil the target's distribution into the head (paper, section 4).

    $$L = T^2 \frac{\sum_i w_i \, KL(p_i \| q_i)}{\sum_i w_i},\quad p_i = softmax(z_i^{target} / T),\;
    q_i = softmax(z_i^{head} / T)$$

    Args:
        student_logits (`torch.FloatTensor` of shape `(slots, vocab)`): the head's.
        teacher_logits (`torch.FloatTensor` of shape `(slots, vocab)`): the target's for the same tokens.
        weights (`torch.FloatTensor` of shape `(slots,)`): see [`slot_weights`].
        temperature (`float`, *optional*, defaults to 1.0): `T`.
    """
    student = (student_logits.float() / temperature).log_softmax(dim=-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(dim=-1)
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * (divergence * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
