# /// script
# dependencies = ["jetspec_hf"]
# ///
r"""How long a round takes at the size of real models, beside a plain step and beside what memory allows.

    python examples/studies/round_times.py --shape Qwen3-8B --output qwen3-8b.json
    python examples/studies/round_times.py --shape tiny --contexts 128 --nodes 15 63 --output tiny.json  # without a GPU

Targets of published shapes, and heads like those published for Qwen3-8B, have random weights, built on the device:
nothing is downloaded, and times are true. Acceptance is not: such a head is hardly ever right, so a round emits about
one token, and commit keeps short paths. A trained head that emits n tokens a round makes text n / (x plain) times as
fast. The head has no Markov head, and drafts without grafts, which a random target that repeats itself would accept.

With a static cache, transformers compiles the target on CUDA; on a CPU it does not. Each row is compiled anew, as in a
process of its own. A time is the median over the rounds of the second of two equal `generate` calls, less the first
ones, in which the head reads the prompt, and the last ones, whose trees are cut to the length left; the device is
waited for after each. Phases are host time, means over all rounds of that call; where the device works on while the
host goes ahead, it is waited for in accept. The floor is the time in which the device, at the speed at which it copies,
reads the target's weights and cache once, and in a round the head's, too, and the LM head a second time.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.generation.streamers import BaseStreamer

import jetspec_hf
from jetspec_hf import JetSpecConfig

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FIELDS += ("head_dim", "vocab_size", "tie_word_embeddings")
SHAPES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "tiny": (64, 192, 8, 4, 2, 16, 4096, True),
}
CACHES = ("dynamic", "static")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_FIRST = 4  # rounds left out
PHASES = ("draft", "build", "verify", "accept", "commit")
COLUMNS = ("context", "cache", "nodes", "tokens", "ms", "x plain", "floor, ms", "x floor", *PHASES)


class Stopwatch(BaseStreamer):
    """Notes when the prompt comes, and then each token, once the device is done with it."""

    def __init__(self) -> None:
        self.times = []

    def put(self, tokens: torch.Tensor) -> None:
        """Take the prompt, then a token."""
        self.times.append(now())

    def end(self) -> None:
        """Nothing to finish."""


def now() -> float:
    """The time in seconds once the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def build(shape: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random target, and a random head of five layers and a block of 16."""
    config = Qwen3Config(
        **dict(zip(FIELDS, SHAPES[shape], strict=True)),
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    mask_token_id = config.vocab_size - 1
    head_config = JetSpecConfig.for_target(config, mask_token_id=mask_token_id, prompt_lookup_num_tokens=0)
    with torch.device(DEVICE):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = AutoModel.from_config(head_config, dtype=dtype)
    target.generation_config.eos_token_id = None
    return target.eval(), head.eval()


def copy_bandwidth() -> float:
    """Bytes read and written in a second of a large copy."""
    source = torch.ones(2**30 if DEVICE == "cuda" else 2**26, dtype=torch.uint8, device=DEVICE)
    copy, times = torch.empty_like(source), []
    for _ in range(20):
        for _ in range(5):
            copy.copy_(source)
        times.append(now())
    return 5 * 2 * source.nbytes / median(end - start for start, end in pairwise(times))


def bytes_read(target: PreTrainedModel, head: PreTrainedModel | None, context: int) -> int:
    """What a round reads at least, or without a head a plain step: weights, and the keys and values of the context."""
    embedding, lm_head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    total = 0 if embedding is lm_head else -embedding.nbytes  # a forward reads a row for each token
    for model in (target,) if head is None else (target, head):
        config = model.config
        num_cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
        total += sum(weight.nbytes for weight in model.parameters()) + num_cached * model.dtype.itemsize
    return total if head is None else total + lm_head.nbytes


def measure(target: PreTrainedModel, prompt: torch.Tensor, num_rounds: int, block_size: int, **options: Any) -> dict:
    """Milliseconds of a pass and of its phases, and the tokens that it emits."""
    torch.compiler.reset()  # or shapes compiled before would make this one dynamic
    gc.collect()
    options |= {"max_new_tokens": 1 + NUM_FIRST + num_rounds + block_size, "do_sample": False}
    for _ in range(2):
        watch = Stopwatch()
        output = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), streamer=watch, return_dict_in_generate=True, **options
        )
    passes = [1] * (len(watch.times) - 1)  # tokens of each
    if "assistant_model" in options:
        passes = [1, *(1 + length for length in output.statistics.accepted_lengths)]
    emitted = list(accumulate(passes))
    # The tokens of a pass come together when it ends.
    ended = watch.times[:1] + [watch.times[1 + number - tokens] for number, tokens in zip(emitted, passes, strict=True)]
    whole = range(1 + NUM_FIRST, sum(number <= options["max_new_tokens"] - block_size for number in emitted))
    row = {
        "rounds": len(whole),
        "tokens": mean(passes[i] for i in whole),
        "ms": 1000 * median(ended[1 + i] - ended[i] for i in whole),
    }
    if "assistant_model" in options:
        statistics = output.statistics
        row |= {phase: 1000 * statistics.seconds[phase] / statistics.num_rounds for phase in PHASES}
    return row


def measure_all(args: argparse.Namespace, bandwidth: float) -> Iterator[dict]:
    """One row after the other; one that fails says why."""
    target, head = build(args.shape, args.dtype)
    for context in sorted(args.contexts):  # transformers makes no static cache shorter than the last one
        prompt = torch.randint(target.config.vocab_size, (1, context), device=DEVICE)
        for cache in args.caches:
            plain = None  # ms
            for num_nodes in (None, *args.nodes):
                head.config.num_assistant_tokens = num_nodes
                options = {} if cache == "dynamic" else {"cache_implementation": cache}
                options |= {} if num_nodes is None else {"assistant_model": head}
                row: dict[str, Any] = {"context": context, "cache": cache, "nodes": num_nodes or "plain"}
                try:
                    row |= measure(target, prompt, args.rounds, head.config.block_size, **options)
                except Exception as error:  # whatever it is, the other rows are worth having
                    yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
                    continue
                plain = row["ms"] if num_nodes is None else plain
                floor = 1000 * bytes_read(target, options.get("assistant_model"), context) / bandwidth
                row |= {"x plain": row["ms"] / plain} if plain else {}
                yield row | {"floor, ms": floor, "x floor": row["ms"] / floor}


def as_line(row: dict) -> str:
    """A row of the table, in Markdown."""
    shown = row | ({"tokens": row["error"].replace("|", "/")} if "error" in row else {})
    cells = (shown.get(column, "") for column in COLUMNS)
    return f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def main() -> None:
    """Print the table and write the file, row by row, so that a run that is stopped keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192], help="tokens")
    parser.add_argument("--nodes", type=int, nargs="+", default=[15, 31, 63, 127, 255])
    parser.add_argument("--caches", choices=CACHES, nargs="+", default=list(CACHES))
    parser.add_argument("--rounds", type=int, default=40, help="timed for each row")
    parser.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth()
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": args.dtype,
        "batch_size": 1,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "jetspec_hf": jetspec_hf.__version__,
        "rows": [],
    }
    print(*(f"{name} {value}" for name, value in report.items() if name != "rows"), sep=", ", end="\n\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}", flush=True)
    for row in measure_all(args, bandwidth):
        report["rows"].append(row)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(as_line(row), flush=True)


if __name__ == "__main__":
    main()
