# /// script
# dependencies = ["jetspec_hf[train]"]
# ///
r"""Adapt a head to another domain with LoRA, and see what that does there and at home.

    python examples/adapt_head.py --data mbpp_prompts.jsonl --here examples/prompts/mbpp.jsonl \
        --home examples/prompts/gsm8k.jsonl --output_dir runs/code_adapter

The target answers the prompts of `--data` itself, so they need no responses. The adapter goes on like this:

    head = PeftModel.from_pretrained(JetSpecDraftHead.from_pretrained("examples/demo_pair/head"), "runs/code_adapter")
    target.generate(..., assistant_model=head)          # as it is, or merged: head.merge_and_unload()
"""

import argparse
import logging
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.training import JetSpecTrainer, JetSpecTrainingArguments
from jetspec_hf.training.data import answers_of, collate
from jetspec_hf.training.evaluation import tokens_per_round
from jetspec_hf.training.regeneration import regenerate
from jetspec_hf.training.sources import load_prompts, load_texts

DEMO_PAIR = Path(__file__).parent / "demo_pair"


def main() -> None:
    """Answer, evaluate, adapt, evaluate again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=DEMO_PAIR / "target")
    parser.add_argument("--head", default=DEMO_PAIR / "head")
    parser.add_argument("--data", nargs="+", required=True, help="prompts to train on")
    parser.add_argument("--here", required=True, help="prompts of the new domain to evaluate on")
    parser.add_argument("--home", required=True, help="prompts of the old domain to evaluate on")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--num_anchors", type=int, default=32)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jetspec_hf").setLevel(logging.INFO)  # what is read, and what is left out
    args.output_dir.mkdir(parents=True, exist_ok=True)
    target = AutoModelForCausalLM.from_pretrained(args.target)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    head = JetSpecDraftHead.from_pretrained(args.head)

    def answered(name: str, sources: list[str]) -> Dataset:
        file = args.output_dir / f"{name}.jsonl"
        regenerate(target, tokenizer, load_prompts(sources), file, max_new_tokens=256, batch_size=64)
        return load_texts(tokenizer, [file], max_length=448)

    rows = answered("train", args.data)
    domains = {
        name: [text for row in answered(name, [getattr(args, name)]) for text in answers_of(row)]
        for name in ("here", "home")
    }
    before = {name: tokens_per_round(head, target, texts, [15, 63]) for name, texts in domains.items()}

    torch.manual_seed(0)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(head, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=projections))
    adapted.print_trainable_parameters()
    JetSpecTrainer(
        adapted,
        target,
        args=JetSpecTrainingArguments(
            str(args.output_dir / "run"),
            max_steps=args.max_steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            num_anchors=args.num_anchors,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id)._asdict(),
    ).train()
    adapted.eval().save_pretrained(args.output_dir)

    print("tokens per round      15 nodes          63 nodes")
    for name, texts in domains.items():
        after = tokens_per_round(adapted, target, texts, [15, 63])
        print(name.ljust(16), *(f"{before[name][nodes]:8.2f} -> {after[nodes]:.2f} " for nodes in (15, 63)))


if __name__ == "__main__":
    main()
