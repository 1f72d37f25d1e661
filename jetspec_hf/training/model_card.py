"""The model card of a trained head, filled in."""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..head.loading import is_hub_id

_MEASURE = re.compile(r"eval_(.*(?:loss|accuracy_depth_\d+|tokens_per_round_\w+))")
_TITLE = "# JetSpec draft head for "

_TEXT = """\
{title}{target}

It makes `generate` of its target faster and leaves the output as it is.

```python
from transformers import AutoModelForCausalLM
from jetspec_hf import JetSpecDraftHead

target = AutoModelForCausalLM.from_pretrained("{target}")
{loading}
target.generate(..., assistant_model=head)
```

It expects what it was trained on: conversations in the target's chat template, if not said otherwise below.

## Head

{layers} layers, {parameters:.1f} million parameters, blocks of {block_size} ({attention}), taps after layers {taps},
mask token {mask_token_id}.

## Training

Data: {data}.

Objective: forward KL with weight {kl_weight}, the rest cross-entropy, over up to {num_anchors} random anchors per row.
{epochs:.3g} epochs in {steps} steps, {batch_size} rows per device and step, accumulated over {accumulation};
learning rate {learning_rate} ({scheduler}), seed {seed}.

## Results

{results}
"""

_RESULTS = """\
After step {step}, on {texts}, read in {dtype} on {device}, torch {torch}, transformers {transformers}, {date}.
`tokens_per_round` is what `generate` would emit in a round, with a chain or trees of so many nodes.

| measure | value |
| --- | ---: |
{rows}\
"""


@dataclass(frozen=True)
class Provenance:
    """Where a head comes from. Its card names Hub ids as they are, and of files and folders the last part alone.

    Args:
        target (`str`): folder or Hub id of its target.
        data (`Sequence[str]`, *optional*): files or Hub data sets that it learned from.
        eval_data (`Sequence[str]`, *optional*): the same that it was evaluated on; without, texts held out of `data`.
        num_eval_texts (`int`, *optional*, defaults to 0): how many of them; 0 if that is not known.
        reading (`str`, *optional*, defaults to `""`): how texts were read, such as `"packed"`.
    """

    target: str
    data: Sequence[str] = ()
    eval_data: Sequence[str] = ()
    num_eval_texts: int = 0
    reading: str = ""


def head_card(
    head: PreTrainedModel,
    name: str,
    training: TrainingArguments,
    state: TrainerState,
    provenance: Provenance,
    **metadata: Any,
) -> ModelCard:
    """Fill in the card.

    Args:
        head (`JetSpecDraftHead`): the head, or a PEFT model around it, whose adapter the card then describes.
        name (`str`): folder or Hub id of the head.
        training (`JetSpecTrainingArguments`): how it was trained.
        state (`TrainerState`): how far; the card has the results of its last evaluation.
        provenance (`Provenance`): with what.
        metadata: more of what [`~huggingface_hub.ModelCardData`] takes, such as `license`.
    """
    is_adapter = not isinstance(head, PreTrainedModel)
    base_model = head.config.name_or_path if is_adapter else provenance.target
    _, results = _last_results(state)
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=[source.partition(":")[0] for source in provenance.data if is_hub_id(source)] or None,
        model_name=own_name(name).split("/")[-1],
        eval_results=[_eval_result(measure, value, provenance) for measure, value in results.items()] or None,
        tags=["speculative-decoding", "jetspec", "draft-head", *metadata.pop("tags", [])],
        **metadata,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(head, name, training, state, provenance)}")


def may_replace(path: Path) -> bool:
    """Whether a card may be written to `path`: nothing is there, or our card, or an unfilled one that PEFT left."""
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return _TITLE in text or "# Model Card for Model ID" in text


def own_name(name: str) -> str:
    """A Hub id as it is; of a file or folder its name without the path."""
    return name if is_hub_id(name) else Path(name).resolve().name


def _last_results(state: TrainerState) -> tuple[int, dict[str, float]]:
    """The step after which the head was last evaluated, and what was found."""
    found: dict[int, dict[str, float]] = {}
    for entry in state.log_history:
        for name, value in entry.items():
            if match := _MEASURE.fullmatch(name):
                found.setdefault(int(entry["step"]), {})[match[1]] = float(value)
    return max(found.items(), default=(0, {}))


def _eval_result(measure: str, value: float, provenance: Provenance) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=", ".join(map(own_name, provenance.eval_data or provenance.data)) or "unknown",
        dataset_name=_eval_texts(provenance),
        metric_type=measure,
        metric_value=round(value, 3),
    )


def _eval_texts(provenance: Provenance) -> str:
    where = "of " + ", ".join(map(own_name, provenance.eval_data)) if provenance.eval_data else "held out"
    return f"{provenance.num_eval_texts} texts {where}" if provenance.num_eval_texts else f"texts {where}"


def _loading(head: PreTrainedModel, name: str) -> str:
    if isinstance(head, PreTrainedModel):
        return f'head = JetSpecDraftHead.from_pretrained("{own_name(name)}")'
    base = head.config.name_or_path
    return (
        f'head = JetSpecDraftHead.from_pretrained("{own_name(base) if base else "..."}")\n'
        f'head = PeftModel.from_pretrained(head, "{own_name(name)}")  # of `peft`'
    )


def _results(state: TrainerState, provenance: Provenance, head: PreTrainedModel) -> str:
    step, results = _last_results(state)
    if not results:
        return "Not evaluated."
    return _RESULTS.format(
        step=step,
        texts=_eval_texts(provenance),
        dtype=str(head.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name() if head.device.type == "cuda" else head.device.type.upper(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        date=datetime.date.today(),
        rows="\n".join(f"| {measure} | {value:.3f} |" for measure, value in results.items()),
    )


def _text(head: PreTrainedModel, name: str, training: Any, state: TrainerState, provenance: Provenance) -> str:
    config: Any = head.config
    sources = ", ".join(map(own_name, provenance.data)) or "not named"
    return _TEXT.format(
        title=_TITLE,
        target=own_name(provenance.target),
        loading=_loading(head, name),
        layers=config.num_hidden_layers,
        parameters=head.num_parameters() / 1e6,
        block_size=config.block_size,
        attention="causal" if config.is_causal else "bidirectional",
        taps=", ".join(map(str, config.target_layer_ids)),
        mask_token_id=config.mask_token_id,
        data=f"{sources}; {provenance.reading}" if provenance.reading else sources,
        kl_weight=training.kl_weight,
        num_anchors=training.num_anchors,
        epochs=state.epoch or 0,
        steps=state.global_step,
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        scheduler=training.lr_scheduler_type.value,
        seed=training.seed,
        results=_results(state, provenance, head),
    )
