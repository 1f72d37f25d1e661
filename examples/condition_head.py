# /// script
# dependencies = ["jetspec_hf[train]"]
# ///
r"""Give a head in the published format a Markov head, train only that, and see what it brings.

    python examples/condition_head.py --answers answers.jsonl --output_dir runs/conditioned

`--answers` holds the target's own answers (`jetspec regenerate`). The rest of the head stays as it is, bit for bit, so
a few minutes are enough. Without `--head` it is the demo head, whose own Markov head is taken off first. With `--lora`
the Markov head is trained beside a LoRA adapter and saved as one:

    head = JetSpecDraftHead.from_pretrained("hao-ai-lab/jetspec-qwen3-8b")
    head.add_markov_head()
    head = PeftModel.from_pretrained(head, "runs/conditioned")

Either folder goes to the Hub with `push_to_hub("your-name/your-head")` and comes back with `from_pretrained`.
"""

import argparse
import logging
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from jetspec_hf import JetSpecConfig, JetSpecDraftHead
from jetspec_hf.training import JetSpecTrainer, JetSpecTrainingArguments
from jetspec_hf.training.data import answers_of, collate, encode
from jetspec_hf.training.evaluation import CHAIN, tokens_per_round
from jetspec_hf.training.regeneration import regenerate
from jetspec_hf.training.sources import load_prompts, load_rows

EXAMPLES = Path(__file__).parent


def main() -> None:
    """Evaluate, add, train, evaluate again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=EXAMPLES / "demo_pair/target")
    parser.add_argument("--head", help="default: the demo head without its Markov head")
    parser.add_argument("--answers", nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", help="to evaluate on; default: GSM8K, MATH-500, MBPP")
    parser.add_argument("--num_prompts", type=int, default=16, help="from each file")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--lora", action="store_true", help="beside an adapter of rank 8 on the attention")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jetspec_hf").setLevel(logging.INFO)  # what is read, and what is left out
    args.output_dir.mkdir(parents=True, exist_ok=True)
    target = AutoModelForCausalLM.from_pretrained(args.target)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    head = JetSpecDraftHead.from_pretrained(args.head) if args.head else published_demo_head()

    texts = {}
    for prompts in args.prompts or [EXAMPLES / f"prompts/{name}.jsonl" for name in ("gsm8k", "math500", "mbpp")]:
        file = args.output_dir / f"answers_{prompts.stem}.jsonl"
        asked = load_prompts([prompts])[: args.num_prompts]
        regenerate(target, tokenizer, asked, file, max_new_tokens=160, batch_size=16)
        texts[prompts.stem] = [
            text for row in load_rows([file]) for text in answers_of(encode(tokenizer, row, max_length=1024))
        ]
    drafts = [CHAIN, 15, 63]
    before = {name: tokens_per_round(head, target, rows, drafts) for name, rows in texts.items()}

    torch.manual_seed(0)
    head.add_markov_head(args.rank)
    if args.lora:
        projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
        head = get_peft_model(head, LoraConfig(r=8, target_modules=projections, modules_to_save=["markov_head"]))
    else:
        head.requires_grad_(False)
        head.markov_head.requires_grad_(True)
    pairs = load_rows(args.answers)
    rows = pairs.map(lambda pair: encode(tokenizer, pair, max_length=256), remove_columns=pairs.column_names)
    JetSpecTrainer(
        head,
        target,
        args=JetSpecTrainingArguments(
            str(args.output_dir / "run"),
            max_steps=args.max_steps,
            per_device_train_batch_size=8,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            num_anchors=32,
            logits_chunk_size=128,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows.filter(lambda row: sum(row["loss_mask"]) > 1),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id)._asdict(),
    ).train()
    head.eval().save_pretrained(args.output_dir)

    print("tokens per round".ljust(18), *(str(draft).rjust(14) for draft in drafts))
    for name, rows in texts.items():
        after = tokens_per_round(head, target, rows, drafts)
        print(name.ljust(18), *(f"{before[name][draft]:6.2f} -> {after[draft]:.2f}" for draft in drafts))


def published_demo_head() -> JetSpecDraftHead:
    """The demo head as it would be published, without a Markov head and its calibration; no grafts, to see it alone."""
    whole = JetSpecDraftHead.from_pretrained(EXAMPLES / "demo_pair/head")
    options = {"markov_rank": 0, "draft_temperatures": None, "prompt_lookup_num_tokens": 0}
    config = JetSpecConfig.from_dict(whole.config.to_dict() | options)
    head = JetSpecDraftHead(config)
    head.load_state_dict({name: value for name, value in whole.state_dict().items() if "markov_head" not in name})
    return head.eval()


if __name__ == "__main__":
    main()
