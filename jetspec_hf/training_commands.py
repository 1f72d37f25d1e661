"""`jetspec regenerate`, `extract`, `train` and `evaluate`: from prompts to a head that is known to draft."""

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_jetspec import JetSpecConfig
from .data import collate, find_mask_token, pack, texts_of, turn_end
from .evaluation import CHAIN, score_buckets, tokens_per_round
from .extraction import check_states_folder, extract
from .model_card import Provenance, may_replace
from .modeling_jetspec import JetSpecDraftHead
from .options import check_above, check_at_least
from .pair import DecodingPair
from .published import default_target_layer_ids
from .records import check_free
from .regeneration import check_answers, regenerate
from .sources import load_prompts, load_texts
from .stored import StoredTarget
from .targets import check_target_name, load_target
from .trainer import JetSpecTrainer, JetSpecTrainingArguments

logger = logging.getLogger(__name__)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_FILES_OF_A_HEAD = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "training_args.bin",
    "README.md",
)


@dataclass
class RegenerateArguments:
    """Whose answers to write, to which prompts, and where.

    Args:
        target (`str`): folder or Hub id of the target.
        data (`list[str]`): JSON-lines or Parquet files or Hub data sets with prompts.
        output (`str`): JSON-lines file; a stopped run goes on from there.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer in tokens.
        batch_size (`int`, *optional*, defaults to 16): prompts at once.
        dtype (`str`, *optional*, defaults to `"auto"`): number type of the target.
        enable_thinking (`bool`, *optional*, defaults to `False`): what to tell the chat template.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    data: list[str] = field(metadata={"help": "JSON-lines or Parquet files or Hub data sets with prompts."})
    output: str = field(metadata={"help": "JSON-lines file to write; a stopped run goes on from there."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest answer in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Prompts at once."})
    dtype: Dtype = field(default="auto", metadata={"help": "Number type of the target."})
    enable_thinking: bool = field(default=False, metadata={"help": "Let the chat template ask for thoughts."})

    def __post_init__(self) -> None:
        check_at_least(self, max_new_tokens=1, batch_size=1)


@dataclass
class ExtractArguments:
    """Whose hidden states to store, on which texts, for which head.

    Args:
        target (`str`): folder or Hub id of the target; one that needs several devices is spread over them.
        data (`list[str]`): JSON-lines or Parquet files or Hub data sets to train and to evaluate on.
        output_dir (`str`): folder; a stopped run goes on from there.
        num_hidden_layers (`int`, *optional*, defaults to 5): layers of the head that will be trained.
        max_length (`int`, *optional*, defaults to 3072): longest text in tokens; the rest is cut off.
        dtype (`str`, *optional*, defaults to `"auto"`): number type of the target.
        enable_thinking (`bool`, *optional*, defaults to `False`): what to tell the chat template.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    data: list[str] = field(metadata={"help": "JSON-lines or Parquet files or Hub data sets."})
    output_dir: str = field(metadata={"help": "Folder to write; a stopped run goes on from there."})
    num_hidden_layers: int = field(default=5, metadata={"help": "Layers of the head that will be trained."})
    max_length: int = field(default=3072, metadata={"help": "Longest text in tokens."})
    dtype: Dtype = field(default="auto", metadata={"help": "Number type of the target."})
    enable_thinking: bool = field(default=False, metadata={"help": "Let the chat template ask for thoughts."})

    def __post_init__(self) -> None:
        check_at_least(self, num_hidden_layers=1, max_length=1)


@dataclass
class TrainArguments:
    """What to train a head for, on what, and of which shape.

    Args:
        target (`str`): folder or Hub id of the target.
        data (`list[str]`): JSON-lines or Parquet files or Hub data sets with the target's own answers.
        states (`str`, *optional*): what `jetspec extract` wrote; then of the target only the tokenizer is loaded.
        eval_data (`list[str]`, *optional*): the same to evaluate on; without, up to 32 rows of `data`, held out.
        num_hidden_layers (`int`, *optional*, defaults to 5): layers of the head.
        block_size (`int`, *optional*, defaults to 16): positions in one draft pass, the anchor counted.
        is_causal (`bool`, *optional*, defaults to `True`): whether blocks are causal.
        markov_rank (`int`, *optional*, defaults to 64): rank of the Markov head; 0 for none, as in the paper.
        markov_head_type (`str`, *optional*, defaults to `"gated"`): `vanilla`, `gated` or `rnn`.
        tie_markov_head (`bool`, *optional*, defaults to `True`): whether it shares the target's tables.
        head (`str`, *optional*): folder or Hub id of a head to go on from, whose shape holds; it gets a Markov head if
            it has none and `markov_rank` is not 0.
        markov_only (`bool`, *optional*, defaults to `False`): whether the Markov head alone learns.
        attn_implementation (`str`, *optional*): of the head; `flex_attention` keeps no mask, and needs CUDA.
        mask_token_id (`int`, *optional*): a token that never occurs in text; found by itself where there is one.
        max_length (`int`, *optional*, defaults to 3072): longest text in tokens; the rest is cut off.
        packing (`bool`, *optional*, defaults to `False`): lay texts side by side in rows of `max_length` tokens.
        streaming (`bool`, *optional*, defaults to `False`): read `data` while training; needs `max_steps`.
        target_dtype (`str`, *optional*, defaults to `"auto"`): number type of the target.
        enable_thinking (`bool`, *optional*, defaults to `False`): what to tell the chat template.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    data: list[str] = field(metadata={"help": "JSON-lines or Parquet files or Hub data sets."})
    states: str | None = field(default=None, metadata={"help": "Hidden states that `jetspec extract` wrote."})
    eval_data: list[str] | None = field(default=None, metadata={"help": "The same to evaluate on."})
    num_hidden_layers: int = field(default=5, metadata={"help": "Layers of the head."})
    block_size: int = field(default=16, metadata={"help": "Positions in one draft pass, the anchor counted."})
    is_causal: bool = field(default=True, metadata={"help": "Whether blocks are causal."})
    markov_rank: int = field(default=64, metadata={"help": "Rank of the Markov head; 0 for none."})
    markov_head_type: str = field(default="gated", metadata={"help": "vanilla, gated or rnn."})
    tie_markov_head: bool = field(default=True, metadata={"help": "Whether it shares the target's tables."})
    head: str | None = field(default=None, metadata={"help": "Folder or Hub id of a head to go on from."})
    markov_only: bool = field(default=False, metadata={"help": "Whether the Markov head alone learns."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flex_attention (CUDA)."})
    mask_token_id: int | None = field(default=None, metadata={"help": "A token that never occurs in text."})
    max_length: int = field(default=3072, metadata={"help": "Longest text in tokens."})
    packing: bool = field(default=False, metadata={"help": "Lay texts side by side in rows of max_length tokens."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})
    target_dtype: Dtype = field(default="auto", metadata={"help": "Number type of the target."})
    enable_thinking: bool = field(default=False, metadata={"help": "Let the chat template ask for thoughts."})

    def __post_init__(self) -> None:
        check_at_least(self, num_hidden_layers=1, block_size=2, markov_rank=0, mask_token_id=0, max_length=1)


@dataclass
class EvaluateArguments:
    """Which head to evaluate, with which target, on what.

    Args:
        target (`str`): folder or Hub id of the target.
        head (`str`): folder or Hub id of the head.
        data (`list[str]`): JSON-lines or Parquet files or Hub data sets with the target's own answers.
        num_assistant_tokens (`list[int]`, *optional*, defaults to `[15, 31, 63]`): numbers of nodes to draft.
        prompt_lookup_num_tokens (`int`, *optional*): longest graft in tokens, 0 for none; the head's own value without.
        max_length (`int`, *optional*, defaults to 3072): longest text in tokens; the rest is cut off.
        enable_thinking (`bool`, *optional*, defaults to `False`): what to tell the chat template.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    head: str = field(metadata={"help": "Folder or Hub id of the head."})
    data: list[str] = field(metadata={"help": "JSON-lines or Parquet files or Hub data sets."})
    num_assistant_tokens: list[int] = field(
        default_factory=lambda: [15, 31, 63], metadata={"help": "Numbers of nodes to draft."}
    )
    prompt_lookup_num_tokens: int | None = field(default=None, metadata={"help": "Longest graft in tokens."})
    max_length: int = field(default=3072, metadata={"help": "Longest text in tokens."})
    enable_thinking: bool = field(default=False, metadata={"help": "Let the chat template ask for thoughts."})

    def __post_init__(self) -> None:
        check_at_least(self, num_assistant_tokens=1, prompt_lookup_num_tokens=0, max_length=1)


def run_regenerate(arguments: RegenerateArguments) -> None:
    """Run `jetspec regenerate`."""
    check_answers(arguments.output, arguments.data)
    prompts = load_prompts(arguments.data)
    target, tokenizer = _load_target(arguments.target, arguments.dtype)
    regenerate(
        target,
        tokenizer,
        prompts,
        arguments.output,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        enable_thinking=arguments.enable_thinking,
    )


def run_extract(arguments: ExtractArguments) -> None:
    """Run `jetspec extract`."""
    check_states_folder(arguments.output_dir)
    target, tokenizer = _load_target(arguments.target, arguments.dtype, "auto")
    rows = load_texts(
        tokenizer, arguments.data, max_length=arguments.max_length, enable_thinking=arguments.enable_thinking
    )
    extract(
        target,
        rows["input_ids"],
        arguments.output_dir,
        layer_ids=default_target_layer_ids(
            target.config.get_text_config().num_hidden_layers, arguments.num_hidden_layers
        ),
        pad_token_id=tokenizer.pad_token_id,
    )


def run_train(arguments: TrainArguments, training: JetSpecTrainingArguments) -> None:
    """Run `jetspec train`.

    Raises:
        ValueError: if the output folder holds a head or checkpoints that nobody asked to go on with, or files of
            others under the names of ours, or no checkpoint to go on from.
    """
    _check_ranges(training)
    _check_output(training)
    target, tokenizer = _load_target(arguments.target, arguments.target_dtype, training.device, arguments.states)
    head = _make_head(arguments, target, tokenizer, training.seed)
    rows, eval_rows = _train_and_eval_rows(tokenizer, arguments, training.seed)
    # Each process reads its own rows: those of several, unequal in length, do not fit into one batch.
    training.accelerator_config.dispatch_batches = False
    reading = f"texts of up to {arguments.max_length} tokens"
    trainer = JetSpecTrainer(
        head,
        target,
        provenance=Provenance(
            arguments.target,
            arguments.data,
            arguments.eval_data or (),
            num_eval_texts=len(eval_rows) if eval_rows is not None else 0,
            reading=reading + ", packed" * arguments.packing + ", thinking on" * arguments.enable_thinking,
        ),
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


def _check_ranges(training: JetSpecTrainingArguments) -> None:
    check_at_least(training, per_device_train_batch_size=1, per_device_eval_batch_size=1, num_anchors=1)
    check_at_least(training, gradient_accumulation_steps=1, logits_chunk_size=1, eval_num_assistant_tokens=1)
    check_at_least(training, kl_weight=0, plain_loss_weight=0, learning_rate=0, seed=0)
    check_above(training, num_train_epochs=0, distillation_temperature=0, depth_decay=0)


def _train_and_eval_rows(
    tokenizer: PreTrainedTokenizerBase, arguments: TrainArguments, seed: int
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    options: dict[str, Any] = {"max_length": arguments.max_length, "enable_thinking": arguments.enable_thinking}
    rows = load_texts(tokenizer, arguments.data, streaming=arguments.streaming, **options)
    if arguments.eval_data:
        eval_rows = load_texts(tokenizer, arguments.eval_data, **options)
    elif arguments.streaming:
        eval_rows, rows = Dataset.from_list(list(rows.take(32))), rows.skip(32)
    else:
        num_held_out = min(32, len(rows) // 10)
        eval_rows = rows.select(range(len(rows) - num_held_out, len(rows))) if num_held_out else None
        rows = rows.select(range(len(rows) - num_held_out))
    if arguments.streaming:
        rows = rows.shuffle(seed, buffer_size=1000)
    if arguments.packing:
        pack_rows = partial(pack, max_length=arguments.max_length)
        rows = rows.map(pack_rows, batched=True, remove_columns=["input_ids", "loss_mask", "length"])
    return rows, eval_rows


def _make_head(
    arguments: TrainArguments, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> JetSpecDraftHead:
    """A new head, or the one to go on from; frozen but for its Markov head where only that is to learn."""
    torch.manual_seed(seed)
    if arguments.head is not None:
        head = JetSpecDraftHead.from_pretrained(arguments.head, dtype=torch.float32)
        DecodingPair(head, target)  # or say why not
        if head.markov_head is None and arguments.markov_rank > 0:
            kind, is_tied = arguments.markov_head_type, arguments.tie_markov_head
            head.add_markov_head(arguments.markov_rank, kind, is_tied=is_tied)
    else:
        mask_token_id = arguments.mask_token_id
        if mask_token_id is None:
            mask_token_id = find_mask_token(tokenizer, target.config.get_text_config().vocab_size)
        config = JetSpecConfig.for_target(
            target.config,
            mask_token_id=mask_token_id,
            num_hidden_layers=arguments.num_hidden_layers,
            block_size=arguments.block_size,
            is_causal=arguments.is_causal,
            markov_rank=arguments.markov_rank,
            markov_head_type=arguments.markov_head_type,
            tie_markov_head=arguments.tie_markov_head,
        )
        head = JetSpecDraftHead(config)
    if arguments.attn_implementation is not None:
        head.set_attn_implementation(arguments.attn_implementation)
    if arguments.markov_only:
        if head.markov_head is None:
            raise ValueError("`markov_only` needs a Markov head to train; pass a `markov_rank` above 0.")
        head.requires_grad_(False)
        head.markov_head.requires_grad_(True)
    return head


def run_evaluate(arguments: EvaluateArguments) -> None:
    """Run `jetspec evaluate`."""
    target, tokenizer = _load_target(arguments.target, "auto")
    head = JetSpecDraftHead.from_pretrained(arguments.head).to(target.device)
    DecodingPair(head, target)  # or say why not
    if arguments.prompt_lookup_num_tokens is not None:
        head.config.prompt_lookup_num_tokens = arguments.prompt_lookup_num_tokens
    rows = load_texts(
        tokenizer, arguments.data, max_length=arguments.max_length, enable_thinking=arguments.enable_thinking
    )
    texts = [text for row in rows for text in texts_of(row)]
    counted = tokens_per_round(head, target, texts, [CHAIN, *arguments.num_assistant_tokens])
    buckets = score_buckets(head, target, texts, max(arguments.num_assistant_tokens))
    scores = [bucket._asdict() for bucket in buckets]
    print(json.dumps({"tokens_per_round": counted, "scores": scores}, indent=2))


def _check_output(training: JetSpecTrainingArguments) -> None:
    """Refuse to write over what someone trained, or over any other file; find the checkpoint to go on from."""
    folder = Path(training.output_dir)
    own = [path for path in folder.glob("checkpoint-[0-9]*") if _is_of_a_head(path)]
    others = [path for path in folder.glob("checkpoint-[0-9]*") if path not in own]
    # What a killed run was still writing has no state yet.
    finished = [path for path in own if (path / "trainer_state.json").exists()]
    last = max(finished, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    training.resume_from_checkpoint = _checkpoint_of(training, last)
    if last is None:
        check_free([folder / name for name in _FILES_OF_A_HEAD] + [*folder.glob("model-*.safetensors"), *others])
    elif training.resume_from_checkpoint is None:
        raise ValueError(
            f"{training.output_dir!r} already holds a trained head; choose another `--output_dir`, or go on with "
            f"`--resume_from_checkpoint {last}`."
        )
    else:
        card = folder / "README.md"
        check_free(others if may_replace(card) else [card, *others])


def _is_of_a_head(checkpoint: Path) -> bool:
    """Whether a checkpoint is a head's, or was left before it said what it is."""
    config = checkpoint / "config.json"
    if not config.exists():
        return checkpoint.is_dir()
    return PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type") == JetSpecConfig.model_type


def _checkpoint_of(training: JetSpecTrainingArguments, last: Path | None) -> str | None:
    """The checkpoint to go on from: `true` means the last, `false` none."""
    given = training.resume_from_checkpoint
    if given is None or str(given).lower() == "false":
        return None
    checkpoint = last if str(given).lower() == "true" else Path(given)
    if checkpoint is None or not (checkpoint / "trainer_state.json").exists() or not _is_of_a_head(checkpoint):
        raise ValueError(
            f"{training.output_dir if checkpoint is None else given!r} holds no checkpoint of a head to go on from; "
            "name one, or leave out `--resume_from_checkpoint`."
        )
    return str(checkpoint)


def _load_target(
    name: str, dtype: str, device: torch.device | str | None = None, states: str | None = None
) -> tuple[PreTrainedModel | StoredTarget, PreTrainedTokenizerBase]:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target: Any
    if states is not None:
        check_target_name(name)
        target = StoredTarget(states).to(device)
    else:
        target = load_target(name, dtype=dtype, device_map=device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name!r} has no end-of-sequence token; set `eos_token` and save it again.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if states is None and tokenizer.chat_template is not None:
        end, ends = turn_end(tokenizer), target.generation_config.eos_token_id
        if end not in (ends if isinstance(ends, list) else [ends]):
            logger.warning(
                f"The template ends turns with {tokenizer.convert_ids_to_tokens(end)!r}, where `generate` does not "
                f"stop; add {end} to `generation_config.eos_token_id`, which is {ends}, and save the target again."
            )
    return target.eval(), tokenizer
