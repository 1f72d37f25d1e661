"""`jetspec regenerate`, `extract`, `train` and `evaluate`: from prompts to a head that is known to draft."""

import importlib.util
import json
import logging
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.compatibility import check_target
from ..head.configuration_jetspec import JetSpecConfig
from ..head.modeling_jetspec import JetSpecDraftHead
from ..head.published import default_target_layer_ids
from ..pair import DecodingPair
from ..ranges import check_above, check_at_least
from ..target.extraction import check_states_folder, extract
from ..target.loading import check_target_name, load_target
from ..target.spec import TargetSpec
from ..target.stored import StoredTarget
from .arguments import (
    DataArguments,
    EvaluateArguments,
    ExtractArguments,
    HeadArguments,
    JetSpecTrainingArguments,
    RegenerateArguments,
    TargetArguments,
    TextArguments,
    TrainArguments,
)
from .data import answers_of, collate, find_mask_token, pack, turn_end
from .evaluation import CHAIN, measure_drafting
from .folder import TRAINING_PLOT, open_output_dir
from .memory import keep_freed_memory
from .model_card import Provenance
from .regeneration import check_answers, regenerate
from .sources import load_prompts, load_texts
from .trainer import JetSpecTrainer

logger = logging.getLogger(__name__)


def run_regenerate(targets: TargetArguments, data: DataArguments, answers: RegenerateArguments) -> None:
    """Run `jetspec regenerate`."""
    check_answers(answers.output, data.data)
    prompts = load_prompts(data.data)
    target, tokenizer = _load_target(targets)
    head = None
    if answers.head is not None:
        head = JetSpecDraftHead.from_pretrained(answers.head, dtype=target.dtype).to(target.device)
        check_target(target)
        DecodingPair(head, target)  # or say why not
    regenerate(
        target,
        tokenizer,
        prompts,
        answers.output,
        max_new_tokens=answers.max_new_tokens,
        temperature=answers.temperature,
        seed=answers.seed,
        num_prompts=answers.num_prompts,
        batch_size=answers.batch_size,
        enable_thinking=data.enable_thinking,
        head=head,
    )


def run_extract(targets: TargetArguments, texts: TextArguments, states: ExtractArguments) -> None:
    """Run `jetspec extract`."""
    check_states_folder(states.output_dir)
    target, tokenizer = _load_target(targets, "auto")
    num_layers = TargetSpec.of(target.config).num_layers
    layer_ids = states.target_layer_ids or default_target_layer_ids(num_layers, states.num_hidden_layers)
    if not all(0 <= layer < num_layers for layer in layer_ids):
        raise ValueError(f"`target_layer_ids` is {layer_ids} for a target of {num_layers} layers; count them from 0.")
    extract(
        target,
        _load_texts(tokenizer, texts)["input_ids"],
        states.output_dir,
        layer_ids=layer_ids,
        pad_token_id=tokenizer.pad_token_id,
    )


def run_train(
    targets: TargetArguments,
    texts: TextArguments,
    heads: HeadArguments,
    arguments: TrainArguments,
    training: JetSpecTrainingArguments,
) -> None:
    """Run `jetspec train`.

    Raises:
        ValueError: if the output folder holds a head or checkpoints that nobody asked to go on with, or files of
            others under the names of ours, or no checkpoint to go on from.
    """
    _check_ranges(training)
    keep_freed_memory()
    open_output_dir(training)
    target, tokenizer = _load_target(targets, training.device, arguments.states)
    head = _make_head(heads, target, tokenizer, training.seed)
    rows, eval_rows = _train_and_eval_rows(tokenizer, texts, arguments, training.seed)
    # Each process reads its own rows: those of several, unequal in length, do not fit into one batch.
    training.accelerator_config.dispatch_batches = False
    trainer = JetSpecTrainer(
        head,
        target,
        provenance=_provenance(targets, texts, arguments, len(eval_rows) if eval_rows is not None else 0),
        args=training,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id)._asdict(),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if eval_rows is not None:
        trainer.calibrate()
        trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        _plot(trainer.state.log_history, Path(training.output_dir) / TRAINING_PLOT)


def run_evaluate(targets: TargetArguments, texts: TextArguments, arguments: EvaluateArguments) -> None:
    """Run `jetspec evaluate`, whose result alone goes to stdout."""
    keep_freed_memory()
    target, tokenizer = _load_target(targets)
    head = JetSpecDraftHead.from_pretrained(arguments.head).to(target.device)
    DecodingPair(head, target)  # or say why not
    if arguments.prompt_lookup_num_tokens is not None:
        head.config.prompt_lookup_num_tokens = arguments.prompt_lookup_num_tokens
    rows = _load_texts(tokenizer, texts)
    if arguments.num_texts is not None and arguments.num_texts < len(rows):
        rows = rows.shuffle(seed=0).select(range(arguments.num_texts))
    answers = tqdm([answer for row in rows for answer in answers_of(row)], desc="drafting", unit="answer")
    found = measure_drafting(head, target, answers, [CHAIN, *arguments.num_assistant_tokens])
    scores = [bucket._asdict() for bucket in found.scores]
    print(json.dumps({"tokens_per_round": found.tokens_per_round, "scores": scores}, indent=2))


def _plot(log: list[dict[str, Any]], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.info(f"There is no matplotlib, so no {path.name}; run `pip install jetspec_hf[bench]`.")
        return
    from .plots import plot_training  # needs matplotlib, which is optional

    plot_training(log, path)


def _load_texts(tokenizer: PreTrainedTokenizerBase, texts: TextArguments, *, streaming: bool = False) -> Any:
    return load_texts(
        tokenizer,
        texts.data,
        max_length=texts.max_length,
        streaming=streaming,
        enable_thinking=texts.enable_thinking,
    )


def _provenance(
    targets: TargetArguments, texts: TextArguments, arguments: TrainArguments, num_eval_texts: int
) -> Provenance:
    reading = f"texts of up to {texts.max_length} tokens"
    return Provenance(
        targets.target,
        texts.data,
        arguments.eval_data or (),
        num_eval_texts=num_eval_texts,
        reading=reading + ", packed" * arguments.packing + ", thinking on" * texts.enable_thinking,
    )


def _check_ranges(training: JetSpecTrainingArguments) -> None:
    check_at_least(training, per_device_train_batch_size=1, per_device_eval_batch_size=1, num_anchors=1)
    check_at_least(training, gradient_accumulation_steps=1, logits_chunk_size=1, eval_num_assistant_tokens=1)
    check_at_least(training, kl_weight=0, plain_loss_weight=0, learning_rate=0, seed=0)
    check_above(training, num_train_epochs=0, distillation_temperature=0, depth_decay=0)


def _train_and_eval_rows(
    tokenizer: PreTrainedTokenizerBase, texts: TextArguments, arguments: TrainArguments, seed: int
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    rows = _load_texts(tokenizer, texts, streaming=arguments.streaming)
    if arguments.eval_data:
        eval_rows = _load_texts(tokenizer, replace(texts, data=arguments.eval_data))
    elif arguments.streaming:
        eval_rows, rows = Dataset.from_list(list(rows.take(32))), rows.skip(32)
    else:
        held_out, kept = _split(len(rows), min(32, len(rows) // 10))
        eval_rows = rows.select(held_out) if held_out else None
        rows = rows.select(kept)
    if arguments.streaming:
        rows = rows.shuffle(seed, buffer_size=1000)
    if arguments.packing:
        pack_rows = partial(pack, max_length=texts.max_length)
        rows = rows.map(pack_rows, batched=True, remove_columns=["input_ids", "loss_mask", "length"])
    return rows, eval_rows


def _split(num_rows: int, num_held_out: int) -> tuple[list[int], list[int]]:
    """Rows to hold out and rows to keep: the same in every run, and no others than the rest, whatever their order."""
    held_out = random.Random(0).sample(range(num_rows), num_held_out)
    return sorted(held_out), sorted(set(range(num_rows)) - set(held_out))


def _make_head(
    heads: HeadArguments, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> JetSpecDraftHead:
    """A new head, or the one to go on from; frozen but for its Markov head where only that is to learn."""
    torch.manual_seed(seed)
    head = _new_head(heads, target, tokenizer) if heads.head is None else _trained_head(heads, target)
    if heads.attn_implementation is not None:
        head.set_attn_implementation(heads.attn_implementation)
    if heads.markov_only:
        if head.markov_head is None:
            raise ValueError("`markov_only` needs a Markov head to train; pass a `markov_rank` above 0.")
        head.requires_grad_(False)
        head.markov_head.requires_grad_(True)
    return head


def _trained_head(heads: HeadArguments, target: PreTrainedModel) -> JetSpecDraftHead:
    head = JetSpecDraftHead.from_pretrained(heads.head, dtype=torch.float32)
    DecodingPair(head, target)  # or say why not
    if head.markov_head is None and heads.markov_rank > 0:
        head.add_markov_head(heads.markov_rank, heads.markov_head_type, is_tied=heads.tie_markov_head)
    return head


def _new_head(heads: HeadArguments, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> JetSpecDraftHead:
    mask_token_id = heads.mask_token_id
    if mask_token_id is None:
        mask_token_id = find_mask_token(tokenizer, TargetSpec.of(target.config).vocab_size)
    config = JetSpecConfig.for_target(
        target.config,
        mask_token_id=mask_token_id,
        num_hidden_layers=heads.num_hidden_layers,
        block_size=heads.block_size,
        target_layer_ids=heads.target_layer_ids,
        is_causal=heads.is_causal,
        markov_rank=heads.markov_rank,
        markov_head_type=heads.markov_head_type,
        tie_markov_head=heads.tie_markov_head,
    )
    return JetSpecDraftHead(config)


def _load_target(
    targets: TargetArguments, device: torch.device | str | None = None, states: str | None = None
) -> tuple[PreTrainedModel | StoredTarget, PreTrainedTokenizerBase]:
    """The target, or what was stored of it, and its tokenizer."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if states is not None:
        check_target_name(targets.target, targets.gguf_file)
        return StoredTarget(states).to(device).eval(), _load_tokenizer(targets)
    target = load_target(targets.target, targets.gguf_file, dtype=targets.dtype, device_map=device)
    tokenizer = _load_tokenizer(targets)
    _warn_of_turn_end(target, tokenizer)
    return target.eval(), tokenizer


def _load_tokenizer(targets: TargetArguments) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(targets.target, gguf_file=targets.gguf_file)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {targets.target!r} has no end-of-sequence token; set `eos_token` and save it again."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _warn_of_turn_end(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so where `generate` does not stop at what ends a turn."""
    if tokenizer.chat_template is None:
        return
    last, eos = turn_end(tokenizer), target.generation_config.eos_token_id
    if last not in (eos if isinstance(eos, list) else [eos]):
        logger.warning(
            f"The template ends turns with {tokenizer.convert_ids_to_tokens(last)!r}, where `generate` does not "
            f"stop; add {last} to `generation_config.eos_token_id`, which is {eos}, and save the target again."
        )
