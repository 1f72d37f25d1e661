# /// script
# dependencies = ["jetspec_hf[train]"]
# ///
r"""Where the time of a training step goes, and how many tokens a second it reads.

    python examples/studies/profile_training.py --answers answers.jsonl --threads 1

The trainer marks its phases for `torch.profiler`: the target's forward, the head's forward, and the logits of target
and head with their gradient, chunk by chunk. What is left is the head's backward and the optimizer.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.training import JetSpecTrainer, JetSpecTrainingArguments
from jetspec_hf.training.data import collate, encode
from jetspec_hf.training.sources import load_rows

EXAMPLES = Path(__file__).parents[1]
PHASES = ("target", "head", "logits")


def main() -> None:
    """Warm up, then profile some steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=EXAMPLES / "demo_pair/target")
    parser.add_argument("--head", default=EXAMPLES / "demo_pair/head")
    parser.add_argument("--answers", nargs="+", required=True)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_anchors", type=int, default=32)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = AutoModelForCausalLM.from_pretrained(args.target)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    rows = (encode(tokenizer, row, max_length=320) for row in load_rows(args.answers))
    rows = [row for row, _ in zip(rows, range(args.batch_size * args.num_steps), strict=False)]

    def train(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = JetSpecTrainer(
                JetSpecDraftHead.from_pretrained(args.head),
                target,
                args=JetSpecTrainingArguments(
                    folder,
                    max_steps=steps,
                    per_device_train_batch_size=args.batch_size,
                    num_anchors=args.num_anchors,
                    logits_chunk_size=128,
                    bf16=True,
                    use_cpu=not torch.cuda.is_available(),
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                ),
                train_dataset=[row for row in rows if sum(row["loss_mask"]) > 1],
                data_collator=lambda batch: collate(batch, tokenizer.pad_token_id)._asdict(),
            )
            super(JetSpecTrainer, trainer).train()  # without the look at the data that comes first

    train(2)
    start = time.perf_counter()
    with profile() as profiler:
        train(args.num_steps)
    seconds = time.perf_counter() - start
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    spent = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages() if event.key in PHASES}
    print(f"{num_tokens / seconds:.0f} tokens of text a second")
    for name, share in (*spent.items(), ("backward, optimizer, rest", seconds - sum(spent.values()))):
        print(f"{name:<28}{share / args.num_steps:7.3f} s a step {100 * share / seconds:5.1f}%")


if __name__ == "__main__":
    main()
