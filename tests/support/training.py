"""A trainer on a few random rows, and stored states of them."""

from pathlib import Path

import torch

from jetspec_hf.target.extraction import extract
from jetspec_hf.training.data import collate
from jetspec_hf.training.trainer import JetSpecTrainer, JetSpecTrainingArguments


def make_rows(target, num_rows: int) -> list[dict]:
    prompts = torch.randint(4, 60, (num_rows, 4), generator=torch.Generator().manual_seed(0))
    texts = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, min_new_tokens=20, do_sample=False
    )
    return [{"input_ids": text.tolist(), "loss_mask": [0] * 4 + [1] * 20, "length": 24} for text in texts]


def make_trainer(head, target, rows, folder, eval_rows=None, provenance=None, **options) -> JetSpecTrainer:
    arguments = {
        "per_device_train_batch_size": 8,
        "max_steps": 150,
        "learning_rate": 5e-3,
        "num_anchors": 8,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return JetSpecTrainer(
        head,
        target,
        provenance=provenance,
        args=JetSpecTrainingArguments(str(folder), **(arguments | options)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=lambda batch: collate(batch, 0)._asdict(),
    )


def losses_of(trainer: JetSpecTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def write_states(target, texts: list[list[int]], folder: Path, **options) -> None:
    extract(target, texts, folder, **({"layer_ids": [1, 2], "pad_token_id": 0, "shard_bytes": 20_000} | options))
