"""The model card of a trained head, filled in."""

from typing import Any

from transformers import PreTrainedModel, TrainingArguments

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
head = JetSpecDraftHead.from_pretrained("path/to/this/head")
target.generate(..., assistant_model=head)
```

## Head

{layers} layers, {parameters:.1f} million parameters, blocks of {block_size} ({attention}), taps after layers {taps},
mask token {mask_token_id}.

## Training

Data: {data}.

Objective: forward KL with weight {kl_weight}, the rest cross-entropy, over up to {num_anchors} random anchors per text.
Steps: {max_steps} of {num_epochs} epochs, {batch_size} texts per device and step, accumulated over {accumulation};
learning rate {learning_rate}.

## Results

{results}
"""


def head_card(
    head: PreTrainedModel, target: str, data: list[str], training: TrainingArguments, results: dict[str, float]
) -> str:
    """Fill in the card.

    Args:
        head (`JetSpecDraftHead`): the head.
        target (`str`): folder or Hub id of its target.
        data (`list[str]`): what it was trained on.
        training (`JetSpecTrainingArguments`): how.
        results (`dict[str, float]`): what evaluation found.
    """
    config: Any = head.config
    arguments: Any = training
    rows = [f"| {name} | {value:.3f} |" for name, value in sorted(results.items()) if isinstance(value, float)]
    table = "\n".join(["| measure | value |", "| --- | ---: |", *rows]) if rows else "Not evaluated."
    return _CARD.format(
        target=target,
        layers=config.num_hidden_layers,
        parameters=head.num_parameters() / 1e6,
        block_size=config.block_size,
        attention="causal" if config.is_causal else "bidirectional",
        taps=", ".join(map(str, config.target_layer_ids)),
        mask_token_id=config.mask_token_id,
        data=", ".join(data),
        kl_weight=arguments.kl_weight,
        num_anchors=arguments.num_anchors,
        num_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps if arguments.max_steps > 0 else "all",
        learning_rate=arguments.learning_rate,
        batch_size=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        results=table,
    )
