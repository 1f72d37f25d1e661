"""`jetspec regenerate`, `jetspec train` and `jetspec evaluate`: from prompts to a head that is known to draft."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_jetspec import JetSpecConfig
from .data import collate, encode_pair, find_mask_token, load_pairs, load_prompts, regenerate, text_of
from .evaluation import CHAIN, tokens_per_round
from .model_card import head_card
from .modeling_jetspec import JetSpecDraftHead
from .trainer import JetSpecTrainer, JetSpecTrainingArguments


@dataclass
class RegenerateArguments:
    """Whose answers to write, to which prompts, and where.

    Args:
        target (`str`): folder or Hub id of the target.
        data (`list[str]`): JSON-lines files or Hub data sets with prompts.
        output (`str`): JSON-lines file; a stopped run goes on from there.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer in tokens.
        batch_size (`int`, *optional*, defaults to 16): prompts at once.
        dtype (`str`, *optional*, defaults to `"auto"`): number type of the target.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    data: list[str] = field(metadata={"help": "JSON-lines files or Hub data sets with prompts."})
    output: str = field(metadata={"help": "JSON-lines file to write; a stopped run goes on from there."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest answer in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Prompts at once."})
    dtype: str = field(default="auto", metadata={"help": "Number type of the target."})


@dataclass
class TrainArguments:
    """What to train a head for, on what, and of which shape.

    Args:
        target (`str`): folder or Hub id of the target.
        data (`list[str]`): JSON-lines files or Hub data sets with prompts and the target's own answers.
        eval_data (`list[str]`, *optional*): the same to evaluate on at the end; the last 32 rows of `data` without.
        num_hidden_layers (`int`, *optional*, defaults to 5): layers of the head.
        block_size (`int`, *optional*, defaults to 16): positions in one draft pass, the anchor counted.
        is_causal (`bool`, *optional*, defaults to `True`): whether blocks are causal.
        mask_token_id (`int`, *optional*): a token that never occurs in text; found by itself where there is one.
        max_length (`int`, *optional*, defaults to 3072): longest text in tokens; the rest is cut off.
        target_dtype (`str`, *optional*, defaults to `"auto"`): number type of the target.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    data: list[str] = field(metadata={"help": "JSON-lines files or Hub data sets with the target's own answers."})
    eval_data: list[str] | None = field(default=None, metadata={"help": "The same to evaluate on."})
    num_hidden_layers: int = field(default=5, metadata={"help": "Layers of the head."})
    block_size: int = field(default=16, metadata={"help": "Positions in one draft pass, the anchor counted."})
    is_causal: bool = field(default=True, metadata={"help": "Whether blocks are causal."})
    mask_token_id: int | None = field(default=None, metadata={"help": "A token that never occurs in text."})
    max_length: int = field(default=3072, metadata={"help": "Longest text in tokens."})
    target_dtype: str = field(default="auto", metadata={"help": "Number type of the target."})


@dataclass
class EvaluateArguments:
    """Which head to evaluate, with which target, on what.

    Args:
        target (`str`): folder or Hub id of the target.
        head (`str`): folder or Hub id of the head.
        data (`list[str]`): JSON-lines files or Hub data sets with prompts and the target's own answers.
        num_assistant_tokens (`list[int]`, *optional*, defaults to `[15, 31, 63]`): numbers of nodes to draft.
        max_length (`int`, *optional*, defaults to 3072): longest text in tokens; the rest is cut off.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    head: str = field(metadata={"help": "Folder or Hub id of the head."})
    data: list[str] = field(metadata={"help": "JSON-lines files or Hub data sets with the target's own answers."})
    num_assistant_tokens: list[int] = field(
        default_factory=lambda: [15, 31, 63], metadata={"help": "Numbers of nodes to draft."}
    )
    max_length: int = field(default=3072, metadata={"help": "Longest text in tokens."})


def run_regenerate(arguments: RegenerateArguments) -> None:
    """Run `jetspec regenerate`."""
    target, tokenizer = _load_target(arguments.target, arguments.dtype)
    regenerate(
        target,
        tokenizer,
        sorted(set(load_prompts(arguments.data))),
        arguments.output,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )


def run_train(arguments: TrainArguments, training: JetSpecTrainingArguments) -> None:
    """Run `jetspec train`.

    Raises:
        ValueError: if the output folder holds a head or checkpoints that nobody asked to go on with.
    """
    _check_output(training)
    target, tokenizer = _load_target(arguments.target, arguments.target_dtype, training.device)
    mask_token_id = arguments.mask_token_id
    if mask_token_id is None:
        mask_token_id = find_mask_token(tokenizer, target.config.get_text_config().vocab_size)
    rows, eval_rows = _encode(tokenizer, load_pairs(arguments.data), arguments.max_length), None
    if arguments.eval_data:
        eval_rows = _encode(tokenizer, load_pairs(arguments.eval_data), arguments.max_length)
    elif (num_held_out := min(32, len(rows) // 10)) > 0:
        split = rows.train_test_split(test_size=num_held_out, shuffle=False)
        rows, eval_rows = split["train"], split["test"]
    torch.manual_seed(training.seed)
    head = JetSpecDraftHead(
        JetSpecConfig.for_target(
            target.config,
            mask_token_id=mask_token_id,
            num_hidden_layers=arguments.num_hidden_layers,
            block_size=arguments.block_size,
            is_causal=arguments.is_causal,
        )
    )
    trainer = JetSpecTrainer(
        head,
        target,
        args=training,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id)._asdict(),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    results = trainer.evaluate() if eval_rows is not None else {}
    trainer.save_model()
    if trainer.is_world_process_zero():
        card = head_card(head, arguments.target, arguments.data, training, results)
        (Path(training.output_dir) / "README.md").write_text(card, encoding="utf-8")


def run_evaluate(arguments: EvaluateArguments) -> None:
    """Run `jetspec evaluate`."""
    target, tokenizer = _load_target(arguments.target, "auto")
    head = JetSpecDraftHead.from_pretrained(arguments.head).to(target.device)
    rows = _encode(tokenizer, load_pairs(arguments.data), arguments.max_length)
    counted = tokens_per_round(head, target, map(text_of, rows), [CHAIN, *arguments.num_assistant_tokens])
    print(json.dumps({"tokens_per_round": counted}, indent=2))


def _check_output(training: JetSpecTrainingArguments) -> None:
    """Refuse to write over what someone trained."""
    folder = Path(training.output_dir)
    # What a killed run was still writing has no state yet.
    checkpoints = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    if training.resume_from_checkpoint is not None or not ((folder / "config.json").exists() or checkpoints):
        return
    go_on = ""
    if checkpoints:
        last = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        go_on = f", or go on with `--resume_from_checkpoint {last}`"
    raise ValueError(f"{training.output_dir!r} already holds a trained head; choose another `--output_dir`{go_on}.")


def _load_target(
    name: str, dtype: str, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name!r} has no end-of-sequence token; set `eos_token` and save it again.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return target.eval(), tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, pairs: Dataset, max_length: int) -> Dataset:
    """Encode all pairs, say how many were cut, and leave out those without an answer to learn from."""
    rows = pairs.map(
        lambda pair: encode_pair(tokenizer, pair["prompt"], pair["response"], max_length=max_length),
        remove_columns=pairs.column_names,
    )
    num_cut = sum(length == max_length for length in rows["length"])
    useful = rows.filter(lambda row: sum(row["loss_mask"]) > 1)
    print(
        f"{len(useful)} texts; {num_cut} cut to {max_length} tokens, {len(rows) - len(useful)} left without an answer"
    )
    if len(useful) == 0:
        raise ValueError("No text has an answer within `max_length`; raise it, or check the data.")
    return useful
