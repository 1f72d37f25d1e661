"""The model card of a trained head, filled in."""

import datetime
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, TrainingArguments

_MEASURES = ("eval_loss", "eval_accuracy", "eval_tokens_per_round")

_CARD = """\
---
library_name: transformers
base_model: {target}
tags: [speculative-decoding, jetspec, draft-head]
---

# JetSpec draft head for {target}

It makes `generate` of its target faster and leaves the output as it is.

```python
from transformers import AutoModelForCausalLM
from jetspec_hf import JetSpecDraftHead

target = AutoModelForCausalLM.from_pretrained("{target}")
head = JetSpecDraftHead.from_pretrained("{name}")
target.generate(..., assistant_model=head)
```

It expects what it was trained on: conversations in the target's chat template, if not said otherwise below.

## Head

{layers} layers, {parameters:.1f} million parameters, blocks of {block_size} ({attention}), taps after layers {taps},
mask token {mask_token_id}.

## Training

Data: {data}.

Objective: forward KL with weight {kl_weight}, the rest cross-entropy, over up to {num_anchors} random anchors per row.
{duration}, {batch_size} rows per device and step, accumulated over {accumulation}; learning rate {learning_rate}
({scheduler}), seed {seed}.

## Results

On {eval_data}, read in {dtype} on {device}, torch {torch}, transformers {transformers}, {date}.
`tokens_per_round` is what `generate` would emit per forward of the target, with a chain or trees of so many nodes.

{results}
"""


def head_card(
    head: PreTrainedModel,
    target: str,
    training: TrainingArguments,
    results: dict[str, float],
    *,
    data: str,
    eval_data: str,
) -> str:
    """Fill in the card.

    Args:
        head (`JetSpecDraftHead`): the head.
        target (`str`): folder or Hub id of its target.
        training (`JetSpecTrainingArguments`): how it was trained.
        results (`dict[str, float]`): what evaluation found.
        data (`str`): what it was trained on.
        eval_data (`str`): what it was evaluated on.
    """
    config: Any = head.config
    arguments: Any = training
    measures = {name: value for name, value in results.items() if name.startswith(_MEASURES)}
    rows = [f"| {name.removeprefix('eval_')} | {value:.3f} |" for name, value in measures.items()]
    steps = arguments.max_steps
    return _CARD.format(
        target=target,
        name=arguments.hub_model_id or arguments.output_dir,
        layers=config.num_hidden_layers,
        parameters=head.num_parameters() / 1e6,
        block_size=config.block_size,
        attention="causal" if config.is_causal else "bidirectional",
        taps=", ".join(map(str, config.target_layer_ids)),
        mask_token_id=config.mask_token_id,
        data=data,
        kl_weight=arguments.kl_weight,
        num_anchors=arguments.num_anchors,
        duration=f"{steps} steps" if steps > 0 else f"{arguments.num_train_epochs:g} epochs",
        batch_size=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        scheduler=arguments.lr_scheduler_type.value,
        seed=arguments.seed,
        eval_data=eval_data,
        dtype=str(head.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name() if head.device.type == "cuda" else head.device.type.upper(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        date=datetime.date.today(),
        results="\n".join(["| measure | value |", "| --- | ---: |", *rows]) if rows else "Not evaluated.",
    )
