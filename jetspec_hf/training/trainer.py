r"""Training: a `Trainer` whose loss distils a frozen target into a draft head.

Memory. Logits exist for `logits_chunk_size` slots at a time. With one text of $L$ tokens, $S$ = anchors x block
positions to draft, $M = L + S$, $n$ layers and $K$ taps of width $H$, MLPs of width $I$, queries of width $A$, keys of
width $G$, heads of width $D$, a vocabulary of $V$ and chunks of $C$, a step needs at its peak, in numbers:

| what | plain | with checkpointing |
| --- | --- | --- |
| mask; with `flex_attention`, $S M / 4096$ | $S M$ | $S M$ |
| taps, last hidden states, context, rotary embedding | $(K + 4) L H + 2 M D$ | the same |
| layers | $n \, [S (6 H + 4 I + 4 A) + M (H + 2 A + 2 G)]$ | $n S H$ |
| head's output and its gradient | $4 S H$ | $4 S H$ |
| logits | $4 C V$; $5 C V$ if no two slots of a chunk share a place | the same |
| with a Markov head of rank $R$, instead | $6 C V + 3 V R$ | the same |

With checkpointing, one layer as in the plain column plus $S I + M H$ takes the place of output and logits, where that
is more. A number has 4 bytes; bfloat16 autocast saves about a third. Beside it there are 16 bytes for each parameter of
the head (weight, gradient, AdamW) and the target's weights; the target's forward keeps nothing but what is listed.

For Qwen3-8B ($L$ = 4096, 512 blocks of 16, $V$ = 151,936, $C$ = 1024, 5 layers, $R$ = 64, all in float32 but
the target) that is 24 GB plain, or 6 GB with checkpointing, beside 17 GB for the head and 16 GB for the target: on
paper, not measured.
"""

import itertools
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..pair import DecodingPair
from ..target.reading import TargetReader, TargetStates, read_target
from ..upstream import attention_of
from .arguments import JetSpecTrainingArguments
from .blocks import draft_blocks
from .data import Answer, Batch, answers_of, collate, document_lengths
from .evaluation import CHAIN, surprise, tokens_per_round
from .model_card import Provenance, head_card, may_replace
from .objective import Objective
from .slots import MarkovCodes, Slots, block_tokens, sample_anchors, select_slots, slot_weights

logger = logging.getLogger(__name__)
_MIXED_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NUM_CHECKED = 8  # answers, whose hundreds of tokens say well enough whose they are
_MOST_EXCESS = 0.2  # nats per token by which answers may be less likely than the target's own samples


class _CardBeforePush(TrainerCallback):
    """Checkpoints are pushed without a card of their own."""

    def __init__(self, create_model_card: Callable[[], None]) -> None:
        self._create_model_card = create_model_card

    def on_push_begin(self, *args: Any, **kwargs: Any) -> None:
        self._create_model_card()


class JetSpecTrainer(Trainer):
    """Trains a head on the hidden states and the distributions of a frozen target.

    Args:
        model (`JetSpecDraftHead`): the head.
        target (`PreTrainedModel` or `TargetReader`): its target, put into eval mode and never changed, or what reads in
            its place, such as a [`~jetspec_hf.target.stored.StoredTarget`].
        provenance (`Provenance`, *optional*): what the card says of target and data; without, the target's name alone.
        kwargs:
            As in [`~transformers.Trainer`]. The collator gives a [`~jetspec_hf.training.data.Batch`] as a dictionary.

    Raises:
        ValueError: if head and target do not fit, or, in `train`, if no row has an answer to learn from, the target
            lets packed texts see each other, or the head has `flex_attention` and the device is not CUDA.
        FloatingPointError: in `train`, if the loss is not a number; what was saved before stays as it is.
    """

    args: JetSpecTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        target: PreTrainedModel | TargetReader,
        *,
        provenance: Provenance | None = None,
        **kwargs: Any,
    ) -> None:
        pair = DecodingPair(model, target)
        super().__init__(model=model, **kwargs)
        self._provenance = provenance or Provenance(target.config.name_or_path or f"a {type(target).__name__}")
        self.add_callback(_CardBeforePush(self.create_model_card))
        if isinstance(target, nn.Module):
            target.eval().requires_grad_(False)
        self._target, self._embed, self._lm_head = target, pair.embed, pair.lm_head
        self._objective = Objective(
            pair.unembed,
            chunk_size=self.args.logits_chunk_size,
            kl_weight=self.args.kl_weight,
            temperature=self.args.distillation_temperature,
            plain_loss_weight=self.args.plain_loss_weight,
        )
        self._hits = torch.zeros(2, self.model.config.block_size - 1, device=self.args.device)
        # The loss is a sum divided by the weights of the whole step, over all processes and accumulated batches.
        self.model_accepts_loss_kwargs = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and says so first if the answers do not look like the target's own."""
        if attention_of(self.model.config) == "flex_attention" and self.args.device.type != "cuda":
            raise ValueError(
                f"flex attention trains on CUDA only; this run is on {self.args.device.type!r}. "
                "Call `head.set_attn_implementation('sdpa')`, or leave out `--attn_implementation`."
            )
        rows = list(itertools.islice(self.train_dataset, 32))
        self._check_packing(rows)
        self._check_answers([answer for row in rows for answer in answers_of(row)])
        return super().train(*args, **kwargs)

    def _check_answers(self, answers: list[Answer]) -> None:
        """Refuse to learn from nothing, and say how much the answers look like the target's own."""
        if not answers:
            raise ValueError(
                "The first rows of `train_dataset` have no answer to learn from; "
                "check that `loss_mask` is 1 on the target's answers."
            )
        answers = answers[:: max(1, len(answers) // _NUM_CHECKED)][:_NUM_CHECKED]
        found = surprise(self._target, self._progress(answers, "checking answers", "answer"))
        if self.is_local_process_zero():
            logger.info(
                f"Mean log-probability of {len(answers)} answers under the target: {found.log_prob:.2f} nats per token"
            )
        if found.excess > _MOST_EXCESS:
            logger.warning(
                f"The answers do not look like the target's own: {found.log_prob:.2f} nats per token, where its own "
                f"samples would have about {-found.entropy:.2f}. A head trained on them accepts much less; "
                "write the target's answers with `jetspec regenerate` first."
            )

    def _progress(self, steps: Iterable[Any], name: str, unit: str) -> Iterable[Any]:
        """A bar for what takes long, and is no step of training."""
        return tqdm(
            steps, desc=name, unit=unit, leave=False, disable=self.args.disable_tqdm or not self.is_local_process_zero()
        )

    def _check_packing(self, rows: list[dict[str, Any]]) -> None:
        """Some attention implementations ignore where documents end; then their last reads differently alone."""
        row = next((row for row in rows if len(document_lengths(row)) > 1), None)
        if row is None:
            return
        last = document_lengths(row)[-1]
        alone = {"input_ids": row["input_ids"][-last:], "loss_mask": row["loss_mask"][-last:]}
        batches = [Batch(*(part.to(self.args.device) for part in collate([text, text], 0))) for text in (row, alone)]
        packed, read = (self._read(batch).last_hidden[0, -last:].float() for batch in batches)
        if (packed - read).norm() > 0.1 * read.norm():
            raise ValueError(
                "The target lets packed texts see each other under `attn_implementation` "
                f"{attention_of(self._target.config)!r}; load it with 'sdpa', or train without packing."
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """As in transformers, and draws the anchors, so that the weights of the whole step are known before it."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        total = torch.zeros((), device=device)
        for sample in samples:
            sample["anchors"] = self.draw_anchors(sample)
            total += self._weights(sample).sum().to(device)
        return samples, self.accelerator.gather(total).sum()

    def draw_anchors(self, inputs: dict[str, Tensor]) -> Tensor:
        """Anchors of each row, `(batch, anchors)`, -1 where a row has fewer. Override it to place blocks otherwise.

        They depend on seed, step and text alone: not on what ran before, nor on which process has the row.
        """
        drawn = []
        for ids, attention_mask, loss_mask in zip(
            inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool(), inputs["loss_mask"].cpu(), strict=True
        ):
            text = zlib.crc32(ids[attention_mask].numpy().tobytes())
            generator = torch.Generator().manual_seed((self.args.seed << 40) + (self.state.global_step << 32 ^ text))
            drawn.append(sample_anchors(loss_mask, self.args.num_anchors, generator))
        anchors = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-1)
        return anchors.to(inputs["input_ids"].device)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of [`~jetspec_hf.training.losses.slot_losses`] over randomly anchored blocks (paper, section 4)."""
        slots = self._draft_slots(model, inputs)
        if num_items_in_batch is None:
            loss = self._mean_loss(slots)
        else:
            # Gradients are averaged over processes, and each has only its share of the sum.
            loss = self._sum_losses(slots) / num_items_in_batch * self.accelerator.num_processes
        if model.training and not loss.isfinite():
            raise FloatingPointError(
                f"The loss of step {self.state.global_step} is {loss.item()}; go on from the last checkpoint with a "
                "lower learning rate, or in float32."
            )
        return (loss, {"loss": loss}) if return_outputs else loss

    def _draft_slots(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Slots:
        """What target and head say of a batch, at the slots that are in the loss."""
        if "anchors" not in inputs:
            inputs = inputs | {"anchors": self.draw_anchors(inputs)}
        anchors = inputs["anchors"]
        batch = Batch(**{name: inputs[name] for name in Batch._fields})
        with record_function("target"):
            states = self._read(batch)
        dtype = _MIXED_PRECISION.get(self.accelerator.mixed_precision, self.model.dtype)
        with record_function("head"):
            hidden_states = draft_blocks(
                model,
                self.model.config,
                self._embed,
                batch.input_ids,
                batch.position_ids,
                states.taps.to(dtype),
                anchors,
            )  # (batch, anchors, block - 1, hidden)
        # In training the path is the text, as it is where the target has agreed so far.
        paths = block_tokens(batch.input_ids, anchors, self.model.config.block_size)[:, :, :-1]
        codes = self._markov_codes(model, paths, hidden_states)
        return select_slots(batch.input_ids, anchors, self._weights(inputs), hidden_states, states.last_hidden, codes)

    def _markov_codes(self, model: PreTrainedModel, paths: Tensor, hidden_states: Tensor) -> MarkovCodes | None:
        markov_head = self.accelerator.unwrap_model(model).markov_head
        if markov_head is None:
            return None
        states = markov_head.follow(paths, self._embed)
        return MarkovCodes(markov_head.context_codes(states, hidden_states), markov_head.token_codes(self._lm_head))

    def _mean_loss(self, slots: Slots) -> Tensor:
        return self._sum_losses(slots) / slots.weights.sum().clamp(min=1e-9)

    def _sum_losses(self, slots: Slots) -> Tensor:
        with record_function("logits"):
            return self._objective.sum_losses(slots)

    def prediction_step(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone, which needs no labels; where the head is right is counted on the way."""
        with torch.no_grad(), self.compute_loss_context_manager():
            slots = self._draft_slots(model, self._prepare_inputs(inputs))
            self._count(self._objective.are_correct(slots), slots.depths)
            return self._mean_loss(slots), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in transformers, and how well the head drafts, for callbacks and the choice of the best model too.

        `{prefix}_accuracy_depth_{k}` is the share of blocks whose likeliest token `k` below the anchor is the text's.
        `{prefix}_tokens_per_round_{nodes}`, for a chain and for trees, is what `generate` would
        emit in a round; the rows are read as prompts with the target's own answers, see
        [`~jetspec_hf.training.evaluation.tokens_per_round`].
        """
        self._hits = torch.zeros(2, self.model.config.block_size - 1, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        drafting = self._tokens_per_round(dataloader.dataset) | self._accuracies()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in drafting.items()})
        return output

    def _tokens_per_round(self, rows: Any) -> dict[str, float]:
        answers = [answer for row in rows for answer in answers_of(row)]
        head = self.accelerator.unwrap_model(self.model).eval()
        seen = self._progress(answers, "tokens per round", "answer")
        counted = tokens_per_round(head, self._target, seen, [CHAIN, *self.args.eval_num_assistant_tokens])
        return {f"tokens_per_round_{nodes}": mean for nodes, mean in counted.items()}

    def _accuracies(self) -> dict[str, float]:
        hits, slots = self.accelerator.reduce(self._hits)
        depths = enumerate(zip(hits.tolist(), slots.tolist(), strict=True), start=1)
        return {f"accuracy_depth_{depth}": right / of for depth, (right, of) in depths if of > 0}

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write the card of the head, as it is now, into the output folder; every push to the Hub does so first.

        Args:
            language (`str`, *optional*): of the texts, for the metadata.
            license (`str`, *optional*): of the head, for the metadata.
            tags (`str` or `list[str]`, *optional*): for the metadata, beside our own.
            args: of no effect; the card knows what was trained on what.
            kwargs: the same.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if not may_replace(folder / "README.md"):
            logger.warning(f"{folder / 'README.md'} is not the card of a head, and stays; move it away to get one.")
            return
        card = head_card(
            self.accelerator.unwrap_model(self.model),
            self.hub_model_id or self.args.output_dir,
            self.args,
            self.state,
            self._provenance,
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags or [],
        )
        card.save(folder / "README.md")

    def calibrate(self, eval_dataset: Any = None) -> list[float]:
        """Find the head's `draft_temperatures`, on which trees are better spent, and set them.

        The temperature of each depth, to 0.05, under whose softmax the texts are likeliest. The loss makes the head's
        distributions like the target's, but greedy decoding always takes the likeliest token, more often than that
        is likely; so on the target's greedy answers they mostly are below 1.

        Args:
            eval_dataset (`Dataset`, *optional*): texts that the head has not learned from; by default those of
                evaluation.

        Returns:
            `list[float]`: a temperature for each depth.
        """
        temperatures = [step / 20 for step in range(6, 41)]
        surprisals = torch.zeros(self.model.config.block_size - 1, len(temperatures), device=self.args.device)
        self.model.eval()
        for inputs in self._progress(self.get_eval_dataloader(eval_dataset), "calibrating", "batch"):
            with torch.no_grad(), self.compute_loss_context_manager():
                slots = self._draft_slots(self.model, self._prepare_inputs(inputs))
                surprisals.index_add_(0, slots.depths, self._objective.surprisals(slots, temperatures))
        best = self.accelerator.reduce(surprisals).argmin(dim=1).tolist()
        found = [temperatures[step] for step in best]
        self.model.config.draft_temperatures = found
        return found

    def _count(self, is_correct: Tensor, depths: Tensor) -> None:
        """Take in which slots of evaluation were right, `(slots,)`, and how far below their anchors they are."""
        for row, counted in zip(self._hits, (depths[is_correct], depths), strict=True):
            row += torch.bincount(counted, minlength=len(row))

    def _weights(self, inputs: dict[str, Tensor]) -> Tensor:
        return slot_weights(inputs["anchors"], inputs["loss_mask"], self.model.config.block_size, self.args.depth_decay)

    def _read(self, batch: Batch) -> TargetStates:
        if batch.input_ids.device.type != "cpu":
            return self._read_rows(batch.input_ids, batch.position_ids)
        # A CPU is as busy with one row as with many, and need not read the padding.
        lengths = batch.attention_mask.sum(dim=1).tolist()
        rows = [
            self._read_rows(ids[None, :length], positions[None, :length])
            for ids, positions, length in zip(batch.input_ids, batch.position_ids, lengths, strict=True)
        ]
        longest = batch.input_ids.shape[1]
        return TargetStates(*(_stack(states, longest) for states in zip(*rows, strict=True)))

    def _read_rows(self, input_ids: Tensor, position_ids: Tensor) -> TargetStates:
        return read_target(self._target, input_ids, self.model.config.target_layer_ids, position_ids=position_ids)


def _stack(states: Sequence[Tensor], length: int) -> Tensor:
    """States of rows, each `(1, its length, width)`, behind each other, `(rows, length, width)`."""
    stacked = states[0].new_zeros(len(states), length, states[0].shape[2])
    for row, one in zip(stacked, states, strict=True):
        row[: one.shape[1]] = one[0]
    return stacked
