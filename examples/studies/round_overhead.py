# /// script
# dependencies = ["jetspec_hf"]
# ///
"""What a round costs beyond its two forwards: building trees, masks, acceptance, keeping the path, Python.

The time of a round of `generate` is divided by that of one target forward over as many tokens and one head forward,
embedding and LM head included, each timed alone right after the round, behind a cache as long. 1.00 is no overhead.
The prompts are random tokens, since times do not depend on what a text says, even where it is longer than the target
was trained for. On one CPU thread it is CPU time that counts, which other programs on the machine do not lengthen.

python examples/studies/round_overhead.py --threads 1
python examples/studies/round_overhead.py --target Qwen/Qwen3-0.6B --head runs/head --device cuda --dtype bfloat16
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, logging

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.upstream import CACHE

PAIR = Path(__file__).parents[1] / "demo_pair"
NEW_TOKENS = 64  # of each prompt


class Forwards:
    """The two forwards of a round, each behind its own cache of `context` tokens."""

    def __init__(self, target, head, num_nodes: int, context: int) -> None:
        self.target, self.head, self.context = target, head, context
        self.nodes = torch.zeros(1, 1 + num_nodes, dtype=torch.long, device=target.device)
        self.block = torch.zeros(1, head.config.block_size, dtype=torch.long, device=target.device)
        self.taps = torch.zeros(1, context, head.fc.in_features, device=target.device, dtype=target.dtype)
        self.target_cache, self.head_cache = DynamicCache(config=target.config), DynamicCache(config=head.config)
        for cache in (self.target_cache, self.head_cache):
            cache.activate_past_recording()
        target(self.nodes.new_zeros(1, context), **{CACHE: self.target_cache}, logits_to_keep=1)
        self.run_head(context)

    def run_target(self) -> None:
        """Score as many tokens as a tree has nodes."""
        self.target(self.nodes, **{CACHE: self.target_cache})
        self.target_cache.crop(-self.nodes.shape[1])

    def run_head(self, num_new: int) -> None:
        """Draft a block behind so many new tokens."""
        start = self.head_cache.get_seq_length()
        positions = torch.arange(start, start + num_new + self.block.shape[1], device=self.block.device)[None]
        embeddings, lm_head = self.target.get_input_embeddings(), self.target.get_output_embeddings()
        states = self.head(embeddings(self.block), self.taps[:, :num_new], positions, cache=self.head_cache)
        lm_head(states.last_hidden_state[:, 1:])
        self.head_cache.crop(self.context - self.head_cache.get_seq_length())


class Stopwatch:
    """Times rounds, from one pass of the head to the next, and each time the two forwards alone before it goes on.

    Not the first round, in which the head reads the prompt, nor the last ones, whose trees are cut to the length left.
    """

    def __init__(self, forwards: Forwards) -> None:
        self.forwards, self.rounds, self.is_running = forwards, [], False
        self.start()

    def start(self) -> None:
        """Get ready for a prompt."""
        self.num_passes = self.num_tokens = 0

    def __call__(self, head: torch.nn.Module, args: tuple, kwargs: dict[str, torch.Tensor]) -> None:
        """Called before each pass of the head, which then reads the tokens of the round before."""
        if self.is_running:
            return
        ended, num_new = now(), kwargs["context_hidden_states"].shape[1]
        if self.num_passes > 1 and self.num_tokens + self.forwards.block.shape[1] <= NEW_TOKENS:
            self.is_running = True
            alone = seconds(self.forwards.run_target), seconds(self.forwards.run_head, num_new)
            self.is_running = False
            self.rounds.append((ended - self.started, *alone))
        self.num_tokens += num_new if self.num_passes > 0 else 1
        self.num_passes += 1
        self.started = now()


def now() -> float:
    """The time in seconds once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(call: Callable, *arguments) -> float:
    """How long a call takes."""
    started = now()
    call(*arguments)
    return now() - started


def main() -> None:
    """Print a table: a row for each context, a column for each number of nodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=PAIR / "target")
    parser.add_argument("--head", default=PAIR / "head")
    parser.add_argument("--nodes", type=int, nargs="+", default=[15, 63, 127])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096, 8192], help="tokens")
    parser.add_argument("--rounds", type=int, default=20, help="least rounds timed for each number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype).to(args.device)
    head = JetSpecDraftHead.from_pretrained(args.head, dtype=args.dtype).to(args.device)
    target.generation_config.eos_token_id = None

    print("context  nodes  round, ms  target, ms  head, ms  overhead")
    for context in args.contexts:
        for num_nodes in args.nodes:
            head.config.num_assistant_tokens = num_nodes
            with torch.inference_mode():
                watch = Stopwatch(Forwards(target, head, num_nodes, context + NEW_TOKENS // 2))
            options = {"assistant_model": head, "max_new_tokens": NEW_TOKENS, "do_sample": False}
            with head.register_forward_pre_hook(watch, with_kwargs=True):
                while len(watch.rounds) < args.rounds:
                    prompt = torch.randint(target.config.vocab_size, (1, context), device=args.device)
                    watch.start()
                    target.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            whole, *parts = (1000 * torch.tensor(watch.rounds).median(dim=0).values).tolist()
            cells = f"{whole:9.2f}  {parts[0]:10.2f}  {parts[1]:8.2f}  {whole / sum(parts):8.2f}"
            print(f"{context:7}  {num_nodes:5}  {cells}", flush=True)


if __name__ == "__main__":
    main()
