"""Training: a `Trainer` whose loss distils a frozen target into a draft head."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .data import Batch
from .losses import block_positions, forward_kl, sample_anchors, slot_weights
from .masking import as_bias, training_mask
from .taps import HiddenStateTaps


@dataclass
class JetSpecTrainingArguments(TrainingArguments):
    """Arguments of [`JetSpecTrainer`], beside those of transformers.

    Args:
        num_anchors (`int`, *optional*, defaults to 512): most draft blocks in one example.
        distillation_temperature (`float`, *optional*, defaults to 1.0): `T` of the forward KL.
        depth_decay (`float`, *optional*): `gamma` of the depth weights; uniform without.
        remove_unused_columns (`bool`, *optional*, defaults to `False`): differs from the parent, which does not know
            what the head learns from.
    """

    num_anchors: int = field(default=512, metadata={"help": "Most draft blocks in one example."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of the forward KL."})
    depth_decay: float | None = field(default=None, metadata={"help": "Decay of the depth weights; none by default."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the forward does not name."})


class JetSpecTrainer(Trainer):
    """Trains a head on the hidden states and the distributions of a frozen target.

    Args:
        model (`JetSpecDraftHead`): the head.
        target (`PreTrainedModel`): its target; put into eval mode, never changed.
        kwargs: as in [`~transformers.Trainer`]. The collator gives a [`~jetspec_hf.data.Batch`] as a dictionary.
    """

    args: JetSpecTrainingArguments

    def __init__(self, model: PreTrainedModel, target: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self._target = target.eval().requires_grad_(False).to(self.args.device)
        self._embed = target.get_input_embeddings()
        self._lm_head = target.get_output_embeddings()

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The forward KL over randomly anchored blocks (paper, section 4)."""
        batch = Batch(**inputs)
        config = self.model.config
        # Resuming at a step draws what an uninterrupted run would.
        generator = torch.Generator(device=batch.loss_mask.device)
        generator.manual_seed(self.args.seed + self.state.global_step)
        anchors = sample_anchors(batch.loss_mask, self.args.num_anchors, generator)
        weights = slot_weights(anchors, batch.loss_mask, config.block_size, self.args.depth_decay)

        context, last_hidden = self._read(batch)
        student = self._draft(model, batch, context, anchors)[:, :, 1:]  # (batch, anchors, block - 1, hidden)
        active = weights > 0
        # The target's state before a token predicts that token.
        before = block_positions(anchors, config.block_size)[:, :, :-1].clamp(max=last_hidden.shape[1] - 1)
        rows = torch.arange(len(anchors), device=anchors.device)[:, None, None].expand_as(before)
        with torch.no_grad():
            teacher_logits = self._lm_head(last_hidden[rows[active], before[active]])
        loss = forward_kl(
            self._lm_head(student[active]),
            teacher_logits,
            weights[active],
            temperature=self.args.distillation_temperature,
        )
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Taps, `(batch, length, taps * hidden)`, and last hidden states, `(batch, length, hidden)`, of the target."""
        with HiddenStateTaps(self._target, self.model.config.target_layer_ids) as taps, taps.recording():
            outputs = self._target.get_decoder()(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        return taps.take(), outputs.last_hidden_state

    def _draft(self, model: PreTrainedModel, batch: Batch, context: Tensor, anchors: Tensor) -> Tensor:
        """All blocks of all rows in one head pass, `(batch, anchors, block, hidden)`."""
        config = self.model.config
        (rows, num_anchors), block_size = anchors.shape, config.block_size
        tokens = anchors.new_full((rows, num_anchors, block_size), config.mask_token_id)
        tokens[:, :, 0] = batch.input_ids.gather(1, anchors.clamp(min=0))
        positions = torch.arange(context.shape[1], device=anchors.device).expand(rows, -1)
        mask = training_mask(anchors, batch.attention_mask, block_size, is_causal=config.is_causal)
        hidden_states = model(
            noise_embeds=self._embed(tokens.flatten(1)),
            context_hidden_states=context,
            position_ids=torch.cat([positions, block_positions(anchors, block_size).flatten(1)], dim=1),
            attention_mask=as_bias(mask, context.dtype) if config._attn_implementation == "eager" else mask,
        ).last_hidden_state
        return hidden_states.unflatten(1, (num_anchors, block_size))
