# /// script
# dependencies = ["jetspec_hf[train]"]
# ///
"""Make the demo pair: a tokenizer, a small target, the target's own answers, and a draft head trained on them.

    python examples/studies/train_demo_pair.py --data openai/gsm8k:main --output_dir runs/demo_pair

Sources are JSON-lines files with `prompt` and `response`, or Hub data sets; one that is listed twice counts double. A
stage whose result lies in the output folder already is not repeated. On two cores, two processes of one thread
each train faster than one of two; put `OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2` in place of `python`
once the answers are there.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from jetspec_hf import JetSpecConfig, JetSpecDraftHead
from jetspec_hf.training import JetSpecTrainer, JetSpecTrainingArguments
from jetspec_hf.training.data import collate, encode
from jetspec_hf.training.regeneration import regenerate
from jetspec_hf.training.sources import load_prompts, load_rows

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]


def train_tokenizer(pairs: Dataset) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens, single digits, with a mask token that never occurs in text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in (pair["prompt"], pair["response"])), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode_short(tokenizer: PreTrainedTokenizerFast, pairs: Dataset) -> Dataset:
    """Encode pairs and leave out those of 448 tokens or more."""
    rows = pairs.map(
        lambda pair: encode(tokenizer, pair, max_length=448),
        remove_columns=pairs.column_names,
    )
    return rows.filter(lambda row: row["length"] < 448)


def train_target(tokenizer: PreTrainedTokenizerFast, pairs: Dataset, training: dict, args: argparse.Namespace) -> None:
    """Train a deep and narrow Qwen3 of 3.4 million parameters on all text, prompts too."""
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=10,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    target = Qwen3ForCausalLM(config)
    rows = encode_short(tokenizer, pairs)
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(
        model=target,
        args=TrainingArguments(
            f"{args.output_dir}/target_run",
            num_train_epochs=args.target_epochs,
            max_steps=args.max_steps,
            learning_rate=3e-3,
            remove_unused_columns=False,
            **training,
        ),
        train_dataset=rows,
        data_collator=lambda batch: pad([{"input_ids": row["input_ids"]} for row in batch]),
    )
    trainer.train()
    target.save_pretrained(f"{args.output_dir}/target")
    tokenizer.save_pretrained(f"{args.output_dir}/target")


def train_head(
    tokenizer: PreTrainedTokenizerFast,
    target: Qwen3ForCausalLM,
    pairs: Dataset,
    training: dict,
    args: argparse.Namespace,
) -> None:
    """Distil the target into a head of two layers and a Markov head: random anchors, forward KL, uniform weights."""
    torch.manual_seed(args.seed)
    rows = encode_short(tokenizer, pairs).train_test_split(test_size=32, seed=args.seed)
    config = JetSpecConfig.for_target(
        target.config,
        mask_token_id=tokenizer.mask_token_id,
        num_hidden_layers=args.head_layers,
        block_size=args.block_size,
        intermediate_size=640,
        num_key_value_heads=target.config.num_attention_heads,
        markov_rank=64,
    )
    trainer = JetSpecTrainer(
        JetSpecDraftHead(config),
        target,
        args=JetSpecTrainingArguments(
            f"{args.output_dir}/head_run",
            num_train_epochs=args.head_epochs,
            max_steps=args.max_steps,
            learning_rate=2e-3,
            num_anchors=args.num_anchors,
            logits_chunk_size=128,
            **training,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id)._asdict(),
    )
    trainer.train()
    trainer.calibrate()
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(f"{args.output_dir}/head")


def main() -> None:
    """Run the stages whose results are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="text to train the target on, in order")
    parser.add_argument("--prompts", nargs="+", help="sources of the prompts to answer (default: --data)")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--target_epochs", type=float, default=1)
    parser.add_argument("--head_epochs", type=float, default=3)
    parser.add_argument("--head_layers", type=int, default=2)
    parser.add_argument("--block_size", type=int, default=8)
    parser.add_argument("--num_anchors", type=int, default=32, help="draft blocks per example")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop training early, to try things out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(args.output_dir)
    training = {
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 50,
        "save_steps": 400,
        "save_total_limit": 1,
        "report_to": "none",
        "seed": args.seed,
    }

    if not (folder / "target").exists():
        pairs = load_rows(args.data)
        train_target(train_tokenizer(pairs), pairs, training, args)
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    target = AutoModelForCausalLM.from_pretrained(folder / "target")

    answers = folder / "answers.jsonl"
    prompts = sorted(load_prompts(args.prompts or args.data))
    regenerate(target, tokenizer, prompts, answers, max_new_tokens=256, batch_size=64)

    if not (folder / "head").exists():
        train_head(tokenizer, target, load_rows([answers]), training, args)


if __name__ == "__main__":
    main()
