# /// script
# dependencies = ["jetspec_hf"]
# ///
"""Ask SmolLM2-135M-Instruct a question, plainly and with its draft head: the same words, streamed, and how much sooner.

python examples/smollm2.py
python examples/smollm2.py --question "Write a Python function that reverses a string." --max_new_tokens 256
python examples/smollm2.py --temperature 0.8 --threads 1

The target is what `examples/smollm2_target.py` wrote, or the original on the Hub, for which the head was not trained
but which is the same model in more bits: `--target HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, TextStreamer, logging

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.target.loading import load_target
from jetspec_hf.training.data import encode_prompt

HEAD = Path(__file__).parent / "smollm2_pair/head"
QUESTION = "A bakery sells 12 cakes a day for 5 dollars each. How much does it earn in a week?"


def main() -> None:
    """Answer twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--target", default="runs/smollm2", help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--head", default=HEAD, help="folder or Hub id (default: the one beside this file)")
    parser.add_argument("--num_assistant_tokens", type=int, help="nodes drafted per round (default: what is fastest)")
    parser.add_argument("--max_new_tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest tokens")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch decides)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        target = load_target(str(args.target), dtype=torch.float32).eval()
        head = JetSpecDraftHead.from_pretrained(args.head, dtype=torch.float32)
    except (ValueError, OSError) as error:
        sys.exit(f"{error} `python examples/smollm2_target.py runs/smollm2` writes the target.")
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    ids = torch.tensor([encode_prompt(tokenizer, args.question)])
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}

    def answer(max_new_tokens: int = args.max_new_tokens, **options) -> tuple[object, float]:
        torch.manual_seed(0)
        start = time.perf_counter()
        output = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **sampling,
            **options,
        )
        return output, time.perf_counter() - start

    with_head = {"assistant_model": head, "num_assistant_tokens": args.num_assistant_tokens}
    answer(8)  # warm-up
    answer(8, **with_head)
    print(f"{args.question}\n\n--- the target alone")
    plain, plain_seconds = answer(streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    print("\n--- with the head")
    drafted, seconds = answer(streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **with_head)
    num_tokens = plain.sequences.shape[1] - ids.shape[1]
    print(f"\nsame tokens      {'yes' if torch.equal(plain.sequences, drafted.sequences) else 'no'}")
    print(f"tokens per round {drafted.statistics.tokens_per_round:.2f} (bonus token counted; plain decoding has 1)")
    print(f"plain            {num_tokens / plain_seconds:.1f} tokens/s")
    print(f"with the head    {num_tokens / seconds:.1f} tokens/s")
    print(f"ratio            {plain_seconds / seconds:.2f} (float32, {torch.get_num_threads()} CPU threads)")


if __name__ == "__main__":
    main()
