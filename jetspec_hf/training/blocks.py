"""Many blocks of a text in one pass of the head, as in training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

from ..head.masking import as_bias
from ..upstream import attention_of
from .masking import training_mask, training_predicate


def draft_blocks(
    head: nn.Module,
    config: PreTrainedConfig,
    embed: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    position_ids: Tensor,
    context: Tensor,
    anchors: Tensor,
) -> Tensor:
    """Hidden states of the slots of all blocks, `(batch, anchors, block - 1, hidden)`.

    Each is what the head gives when it decodes from that anchor.

    Args:
        head (`nn.Module`): the head, in whatever wraps it for training.
        config (`JetSpecConfig`): the head's.
        embed (`Callable`): the target's embedding.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the texts.
        position_ids (`torch.LongTensor` of shape `(batch, length)`): positions within each document of a row.
        context (`torch.FloatTensor` of shape `(batch, length, taps * hidden)`): the target's hidden states.
        anchors (`torch.LongTensor` of shape `(batch, anchors)`): where the blocks start; -1 for none.
    """
    (rows, num_anchors), block_size = anchors.shape, config.block_size
    tokens = anchors.new_full((rows, num_anchors, block_size), config.mask_token_id)
    tokens[:, :, 0] = input_ids.gather(1, anchors.clamp(min=0))
    first = position_ids.gather(1, anchors.clamp(min=0))
    positions = (first[:, :, None] + torch.arange(block_size, device=anchors.device)).flatten(1)
    hidden_states = head(
        noise_embeds=embed(tokens.flatten(1)).to(context.device, context.dtype),
        context_hidden_states=context,
        position_ids=torch.cat([position_ids, positions], dim=1),
        attention_mask=_masks(config, anchors, position_ids, context.dtype),
    ).last_hidden_state
    return hidden_states.unflatten(1, (num_anchors, block_size))[:, :, 1:]


def _masks(
    config: PreTrainedConfig, anchors: Tensor, position_ids: Tensor, dtype: torch.dtype
) -> dict[str, Tensor | BlockMask]:
    """One mask for each layer type in use, in the form that the head's attention takes."""
    masks: dict[str, Tensor | BlockMask] = {}
    for layer_type in set(config.layer_types):
        window = config.sliding_window if layer_type == "sliding_attention" else None
        blocks = (anchors, position_ids, config.block_size)
        if attention_of(config) == "flex_attention":
            num_slots = anchors.shape[1] * config.block_size
            create = torch.compile(create_block_mask)  # compiled, it does not make the whole mask on the way
            masks[layer_type] = create(
                training_predicate(*blocks, is_causal=config.is_causal, window=window),
                B=len(anchors),
                H=None,
                Q_LEN=num_slots,
                KV_LEN=position_ids.shape[1] + num_slots,
                device=anchors.device,
            )
        else:
            # sdpa would make these numbers of the truth values by itself: once for each layer, and keep them all.
            mask = training_mask(*blocks, is_causal=config.is_causal, window=window)
            masks[layer_type] = as_bias(mask, dtype)
    return masks
