"""The options of `jetspec regenerate`, `extract`, `train` and `evaluate`; several share those of target and data."""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ..ranges import check_at_least

logger = logging.getLogger(__name__)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_FITTING: Any = None  # a default that depends on the device
# With these a step of a small target takes seconds on a CPU, not minutes, and logits are small enough to stay mapped.
_ON_ACCELERATOR = {"num_anchors": 512, "per_device_train_batch_size": 8, "logits_chunk_size": 1024}
_ON_CPU = {"num_anchors": 16, "per_device_train_batch_size": 4, "logits_chunk_size": 128}


@dataclass
class TargetArguments:
    """Which target, and how to load it.

    Args:
        target (`str`): folder or Hub id of the target.
        gguf_file (`str`, *optional*): file there that holds it, where it is GGUF; its numbers are dequantized.
        dtype (`str`, *optional*, defaults to `"auto"`): number type of the target.
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    gguf_file: str | None = field(default=None, metadata={"help": "File there that holds it, where it is GGUF."})
    dtype: Dtype = field(
        default="auto",
        metadata={"help": "Number type of the target.", "aliases": ["--target_dtype"]},
    )


@dataclass
class DataArguments:
    """What to read, and how conversations become text.

    Args:
        data (`list[str]`): JSON-lines or Parquet files or Hub data sets.
        enable_thinking (`bool`, *optional*, defaults to `False`): what to tell the chat template.
    """

    data: list[str] = field(metadata={"help": "JSON-lines or Parquet files or Hub data sets."})
    enable_thinking: bool = field(default=False, metadata={"help": "Let the chat template ask for thoughts."})


@dataclass
class TextArguments(DataArguments):
    """The same, of texts with the target's own answers.

    Args:
        max_length (`int`, *optional*, defaults to 3072): longest text in tokens; the rest is cut off.
    """

    max_length: int = field(default=3072, metadata={"help": "Longest text in tokens."})

    def __post_init__(self) -> None:
        check_at_least(self, max_length=1)


@dataclass
class RegenerateArguments:
    """Which answers, and where to write them.

    Args:
        output (`str`): JSON-lines file; a stopped run goes on from there.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer in tokens.
        temperature (`float`, *optional*, defaults to 0.0): 0 for greedy answers.
        seed (`int`, *optional*, defaults to 0): of the order of prompts, and of what is drawn.
        num_prompts (`int`, *optional*): how many prompts to answer; all by default.
        batch_size (`int`, *optional*): most prompts at once; by default what memory allows, up to what is of use.
        head (`str`, *optional*): folder or Hub id of a head that drafts for the target.
    """

    output: str = field(metadata={"help": "JSON-lines file to write; a stopped run goes on from there."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0 for greedy answers; above, they are drawn."})
    seed: int = field(default=0, metadata={"help": "Of the order of prompts, and of what is drawn."})
    num_prompts: int | None = field(default=None, metadata={"help": "How many prompts to answer; all by default."})
    batch_size: int | None = field(default=None, metadata={"help": "Most prompts at once; what memory allows."})
    head: str | None = field(default=None, metadata={"help": "Folder or Hub id of a head that drafts for the target."})

    def __post_init__(self) -> None:
        check_at_least(self, max_new_tokens=1, temperature=0, seed=0, num_prompts=1, batch_size=1)


@dataclass
class ExtractArguments:
    """Where to store hidden states, and for which head.

    Args:
        output_dir (`str`): folder; a stopped run goes on from there.
        num_hidden_layers (`int`, *optional*, defaults to 5): layers of the head that will be trained.
        target_layer_ids (`list[int]`, *optional*): the target's layers that heads may tap; by default those that a head
            of so many layers does.
    """

    output_dir: str = field(metadata={"help": "Folder to write; a stopped run goes on from there."})
    num_hidden_layers: int = field(default=5, metadata={"help": "Layers of the head that will be trained."})
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "Layers of the target to tap, from 0; as many as the head has by default."}
    )

    def __post_init__(self) -> None:
        check_at_least(self, num_hidden_layers=1)


@dataclass
class HeadArguments:
    """Which head to train: one of a shape, or one to go on from.

    Args:
        num_hidden_layers (`int`, *optional*, defaults to 5): layers of the head.
        block_size (`int`, *optional*, defaults to 16): positions in one draft pass, the anchor counted.
        target_layer_ids (`list[int]`, *optional*): the target's layers that the head taps, counted from 0; by default
            evenly spaced, one for each of its own.
        is_causal (`bool`, *optional*, defaults to `True`): whether blocks are causal.
        markov_rank (`int`, *optional*, defaults to 64): rank of the Markov head; 0 for none, as in the paper.
        markov_head_type (`str`, *optional*, defaults to `"gated"`): `vanilla`, `gated` or `rnn`.
        tie_markov_head (`bool`, *optional*, defaults to `True`): whether it shares the target's tables.
        head (`str`, *optional*): folder or Hub id of a head to go on from, whose shape holds; it gets a Markov head if
            it has none and `markov_rank` is not 0.
        markov_only (`bool`, *optional*, defaults to `False`): whether the Markov head alone learns.
        attn_implementation (`str`, *optional*): of the head; `flex_attention` keeps no mask, and needs CUDA.
        mask_token_id (`int`, *optional*): a token that never occurs in text; found by itself where there is one.
    """

    num_hidden_layers: int = field(default=5, metadata={"help": "Layers of the head."})
    block_size: int = field(default=16, metadata={"help": "Positions in one draft pass, the anchor counted."})
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "Layers of the target to tap, from 0; as many as the head has by default."}
    )
    is_causal: bool = field(default=True, metadata={"help": "Whether blocks are causal."})
    markov_rank: int = field(default=64, metadata={"help": "Rank of the Markov head; 0 for none."})
    markov_head_type: str = field(default="gated", metadata={"help": "vanilla, gated or rnn."})
    tie_markov_head: bool = field(default=True, metadata={"help": "Whether it shares the target's tables."})
    head: str | None = field(default=None, metadata={"help": "Folder or Hub id of a head to go on from."})
    markov_only: bool = field(default=False, metadata={"help": "Whether the Markov head alone learns."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flex_attention (CUDA)."})
    mask_token_id: int | None = field(default=None, metadata={"help": "A token that never occurs in text."})

    def __post_init__(self) -> None:
        check_at_least(self, num_hidden_layers=1, block_size=2, markov_rank=0, mask_token_id=0)


@dataclass
class TrainArguments:
    """How to read the texts that a head learns from.

    Args:
        states (`str`, *optional*): what `jetspec extract` wrote; then of the target only the tokenizer is loaded.
        eval_data (`list[str]`, *optional*): as `data`, to evaluate on; without, up to 32 rows of `data`, held out.
        packing (`bool`, *optional*, defaults to `False`): lay texts side by side in rows of `max_length` tokens.
        streaming (`bool`, *optional*, defaults to `False`): read `data` while training; needs `max_steps`.
    """

    states: str | None = field(default=None, metadata={"help": "Hidden states that `jetspec extract` wrote."})
    eval_data: list[str] | None = field(default=None, metadata={"help": "As the data, to evaluate on."})
    packing: bool = field(default=False, metadata={"help": "Lay texts side by side in rows of max_length tokens."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})


@dataclass
class EvaluateArguments:
    """Which head to evaluate, and with how many nodes.

    Args:
        head (`str`): folder or Hub id of the head.
        num_assistant_tokens (`list[int]`, *optional*, defaults to `[15, 31, 63]`): numbers of nodes to draft.
        prompt_lookup_num_tokens (`int`, *optional*): longest graft in tokens, 0 for none; the head's own value without.
        num_texts (`int`, *optional*): most texts, drawn at random, always the same; all without.
    """

    head: str = field(metadata={"help": "Folder or Hub id of the head."})
    num_assistant_tokens: list[int] = field(
        default_factory=lambda: [15, 31, 63], metadata={"help": "Numbers of nodes to draft."}
    )
    prompt_lookup_num_tokens: int | None = field(default=None, metadata={"help": "Longest graft in tokens."})
    num_texts: int | None = field(default=None, metadata={"help": "Most texts, drawn at random; all by default."})

    def __post_init__(self) -> None:
        check_at_least(self, num_assistant_tokens=1, prompt_lookup_num_tokens=0, num_texts=1)


@dataclass
class JetSpecTrainingArguments(TrainingArguments):
    """Arguments of [`JetSpecTrainer`], beside those of transformers.

    Args:
        num_anchors (`int`, *optional*, defaults to 512, or 16 on a CPU): most draft blocks in one example.
        per_device_train_batch_size (`int`, *optional*, defaults to 8, or 4 on a CPU): texts at once.
        kl_weight (`float`, *optional*, defaults to 1.0): share of the forward KL; the rest is cross-entropy.
        distillation_temperature (`float`, *optional*, defaults to 1.0): `T` of the forward KL.
        depth_decay (`float`, *optional*): `gamma` of the depth weights, in tokens; uniform without.
        plain_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the loss without the Markov head, whose likeliest tokens are its candidates; beside that of the
            loss with it, 1. Of no effect for a head that has none.
        logits_chunk_size (`int`, *optional*, defaults to 1024, or 128 on a CPU): slots whose logits are held at once.
        eval_num_assistant_tokens (`list[int]`, *optional*, defaults to `[15, 63]`):
            Numbers of nodes for which evaluation counts the tokens per round that `generate` would emit.
        logging_steps (`float`, *optional*, defaults to 10): differs from the parent, whose 500 are more than short runs
            have.
        remove_unused_columns (`bool`, *optional*, defaults to `False`): differs from the parent, which does not know
            what the head learns from.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`): differs from the parent, since every step
            uses every weight of a head, those of its Markov head outside of its forward.
        dataloader_pin_memory (`bool`, *optional*): as in the parent, but never on a CPU, which has nothing to pin for.
    """

    num_anchors: int = field(
        default=_FITTING, metadata={"help": "Most draft blocks in one example; 512 by default, or 16 on a CPU."}
    )
    per_device_train_batch_size: int = field(
        default=_FITTING, metadata={"help": "Texts at once; 8 by default, or 4 on a CPU."}
    )
    kl_weight: float = field(default=1.0, metadata={"help": "Share of the forward KL; the rest is cross-entropy."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of the forward KL."})
    depth_decay: float | None = field(default=None, metadata={"help": "Decay of the depth weights; none by default."})
    plain_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the loss without the Markov head."})
    logits_chunk_size: int = field(
        default=_FITTING, metadata={"help": "Slots whose logits are held at once; 1024 by default, or 128 on a CPU."}
    )
    eval_num_assistant_tokens: list[int] = field(
        default_factory=lambda: [15, 63], metadata={"help": "Numbers of nodes to evaluate drafting with."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two losses in the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the forward does not name."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for weights that a step does not use; a head has none."}
    )

    def __post_init__(self) -> None:
        is_on_cpu = self.use_cpu or not torch.accelerator.is_available()
        fitting = _ON_CPU if is_on_cpu else _ON_ACCELERATOR
        chosen = {name: value for name, value in fitting.items() if vars(self)[name] is None}
        self.__dict__.update(chosen)
        if is_on_cpu:
            self.dataloader_pin_memory = False
        super().__post_init__()
        if is_on_cpu and chosen and self.local_process_index == 0:
            listed = ", ".join(f"`{name}` {value}" for name, value in chosen.items())
            logger.info(f"Chosen to fit a CPU: {listed}")
