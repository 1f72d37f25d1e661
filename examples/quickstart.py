# /// script
# dependencies = ["jetspec_hf"]
# ///
"""Answer real questions twice, plainly and with a draft head: the same tokens, and how much sooner.

python examples/quickstart.py
python examples/quickstart.py --prompt "A pen costs 3 dollars. How much do 12 pens cost?"
python examples/quickstart.py --prompts examples/prompts/mbpp.jsonl --num_prompts 10
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from jetspec_hf import DraftStatistics, JetSpecDraftHead

EXAMPLES = Path(__file__).parent
COLOURS = [f"\033[{code}m" for code in (32, 36, 33, 35)]


def coloured(tokenizer, tokens: list[int], statistics: DraftStatistics) -> str:
    """The answer, a colour for each round; without a terminal, a bar between rounds."""
    pieces, start = [], 0
    # The first token comes with the prompt, then each round gives what it accepted and the bonus token.
    for length in [1] + [accepted + 1 for accepted in statistics.accepted_lengths]:
        pieces.append(tokenizer.decode(tokens[start : start + length]))
        start += length
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return "|".join(pieces)
    return "".join(COLOURS[i % len(COLOURS)] + piece for i, piece in enumerate(pieces)) + "\033[0m"


def main() -> None:
    """Decode every prompt both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", help="one question of your own")
    parser.add_argument("--prompts", type=Path, default=EXAMPLES / "prompts/gsm8k.jsonl", help="JSON lines")
    parser.add_argument("--num_prompts", type=int, default=5)
    parser.add_argument("--target", default=EXAMPLES / "demo_pair/target")
    parser.add_argument("--head", default=EXAMPLES / "demo_pair/head")
    parser.add_argument("--num_assistant_tokens", type=int, help="nodes drafted per round (default: the head's)")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args()
    logging.disable_progress_bar()

    target = AutoModelForCausalLM.from_pretrained(args.target)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    head = JetSpecDraftHead.from_pretrained(args.head)
    if args.num_assistant_tokens:
        head.config.num_assistant_tokens = args.num_assistant_tokens
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: args.num_prompts]
    prompts = [args.prompt] if args.prompt else [json.loads(line)["prompt"] for line in lines]

    def answer(prompt: str, **options) -> tuple[object, list[int], float]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        start = time.perf_counter()
        output = target.generate(
            **inputs, max_new_tokens=args.max_new_tokens, do_sample=False, return_dict_in_generate=True, **options
        )
        seconds = time.perf_counter() - start
        return output, output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), seconds

    for options in ({}, {"assistant_model": head}):
        answer(prompts[0], **options)  # warm-up

    num_equal, num_tokens, num_drafted, num_rounds, plain_seconds, tree_seconds = 0, 0, 0, 0, 0.0, 0.0
    for prompt in prompts:
        _, plain, seconds = answer(prompt)
        plain_seconds += seconds
        output, tokens, seconds = answer(prompt, assistant_model=head)
        tree_seconds += seconds
        num_equal += tokens == plain
        num_tokens += len(tokens)
        num_rounds += output.statistics.num_rounds
        num_drafted += sum(accepted + 1 for accepted in output.statistics.accepted_lengths)
        print(f"\n{prompt}\n-> {coloured(tokenizer, tokens, output.statistics)}")

    print(f"\nsame tokens      {num_equal} of {len(prompts)} answers")
    print(f"tokens per round {num_drafted / num_rounds:.2f} (bonus token counted; plain decoding has 1)")
    print(f"plain            {num_tokens / plain_seconds:.0f} tokens/s")
    print(f"with the head    {num_tokens / tree_seconds:.0f} tokens/s")
    print(f"ratio            {plain_seconds / tree_seconds:.2f} (float32, {torch.get_num_threads()} CPU threads)")


if __name__ == "__main__":
    main()
