# /// script
# dependencies = ["jetspec_hf[train]"]
# ///
r"""What makes a head draft well: one factor changed at a time, several seeds, the same data and steps.

    python examples/studies/head_study.py --answers answers.jsonl --originals gsm8k.jsonl --output_dir runs/study
    python examples/studies/head_study.py --target runs/smollm2 --answers answers.jsonl --states states \
      --learning_rate 1e-3 --num_anchors 16 --nodes 7 15 31 63 --output_dir runs/smollm2_study

`--answers` holds the target's own answers (`jetspec regenerate`), `--originals` what people wrote to the same
prompts. `--states` holds what `jetspec extract` stored of the target for both, to be read in its place: for all but a
tiny target that is most of the time. Each run leaves a JSON file, and one that is there is not repeated, so
`--variants` and `--seeds` can split the work over processes that share a folder. The tables are written whenever the
script ends: the mean of the tokens per round over the seeds, and half their range.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from jetspec_hf import JetSpecConfig, JetSpecDraftHead
from jetspec_hf.target.reading import TargetReader
from jetspec_hf.target.stored import StoredTarget
from jetspec_hf.training import JetSpecTrainer, JetSpecTrainingArguments
from jetspec_hf.training.data import Answer, answers_of, collate, encode, find_mask_token
from jetspec_hf.training.evaluation import CHAIN, tokens_per_round
from jetspec_hf.training.regeneration import regenerate
from jetspec_hf.training.sources import load_prompts, load_rows

EXAMPLES = Path(__file__).parents[1]


class TiledAnchorsTrainer(JetSpecTrainer):
    """Blocks side by side from the start of the answer."""

    def draw_anchors(self, inputs: dict[str, Tensor]) -> Tensor:
        """Every `block_size`-th position of the answers."""
        rows = [mask.nonzero().flatten()[: -1 : self.model.config.block_size] for mask in inputs["loss_mask"]]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


@dataclass
class Variant:
    """One change to the default: of the head, of the training, of the trainer, or of the data."""

    head: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    trainer: type[JetSpecTrainer] = JetSpecTrainer
    data: str = "answers"


def markov(training: dict | None = None, **head: Any) -> Variant:
    """A head with a Markov head; by default a gated one of rank 64, tied to the target's tables."""
    options = {"markov_rank": 64, "markov_head_type": "gated", "tie_markov_head": True}
    return Variant(head=options | head, training={"plain_loss_weight": 0.3} | (training or {}))


VARIANTS = {
    "default": Variant(),
    "bidirectional": Variant(head={"is_causal": False}),
    "cross_entropy": Variant(training={"kl_weight": 0.0}),
    "decay_7": Variant(training={"depth_decay": 7.0}),
    "tiled_anchors": Variant(trainer=TiledAnchorsTrainer),
    "original_answers": Variant(data="originals"),
    "block_16": Variant(head={"block_size": 16}),
    "one_layer": Variant(head={"num_hidden_layers": 1}),
    "four_layers": Variant(head={"num_hidden_layers": 4}),
    "markov": markov(),
    **{f"markov_{kind}": markov(markov_head_type=kind) for kind in ("vanilla", "rnn")},
    **{
        f"markov_{kind}_own": markov(markov_head_type=kind, tie_markov_head=False)
        for kind in ("vanilla", "gated", "rnn")
    },
    **{f"markov_rank_{rank}": markov(markov_rank=rank) for rank in (16, 256)},
    "markov_bidirectional": markov(is_causal=False),
    **{f"markov_plain_loss_{weight}": markov(training={"plain_loss_weight": weight}) for weight in (0.0, 1.0)},
}


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=EXAMPLES / "demo_pair/target")
    parser.add_argument("--answers", nargs="+", required=True, help="the target's own answers")
    parser.add_argument("--originals", nargs="+", help="other answers to the same prompts")
    parser.add_argument("--eval_prompts", nargs="+", type=Path, help="default: GSM8K, MATH-500, MBPP, MT-Bench")
    parser.add_argument("--num_eval_prompts", type=int, default=16, help="from each file")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="at its peak")
    parser.add_argument("--num_anchors", type=int, default=32, help="most blocks in a text")
    parser.add_argument("--nodes", nargs="+", type=int, default=[15, 63, 127], help="of trees, the root not counted")
    parser.add_argument("--states", help="stored states to train from, which hold the taps that the heads read")
    parser.add_argument("--save", action="store_true", help="keep the heads, in `output_dir`/heads")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    target = AutoModelForCausalLM.from_pretrained(args.target)
    reader = target if args.states is None else StoredTarget(args.states)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = EXAMPLES / "prompts"
    files = args.eval_prompts or [prompts / f"{name}.jsonl" for name in ("gsm8k", "math500", "mbpp", "mt_bench")]
    texts = {file.stem: answered(target, tokenizer, file, args) for file in files}
    data = {"answers": encode_short(tokenizer, load_rows(args.answers))}
    if args.originals:
        known = set(load_prompts(args.answers))
        pairs = load_rows(args.originals).filter(lambda pair: pair["prompt"] in known)
        data["originals"] = encode_short(tokenizer, pairs)
    for seed in args.seeds:
        for name in args.variants:
            file = args.output_dir / f"{name}-{args.max_steps}-{seed}.json"
            if file.exists() or VARIANTS[name].data not in data:
                continue
            result = run(VARIANTS[name], data, texts, target, reader, tokenizer, file, seed, args)
            file.write_text(json.dumps({"variant": name, "steps": args.max_steps, "seed": seed, **result}, indent=1))
            print(file.name, result["tokens_per_round"], flush=True)
    write_tables(args.output_dir, list(texts), {CHAIN: "chain", **{n: f"{n + 1} nodes" for n in args.nodes}})


def answered(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Path, args: argparse.Namespace
) -> list[Answer]:
    """The target's own answers to the prompts of one evaluation set."""
    file = args.output_dir / f"answers_{prompts.stem}.jsonl"
    asked = load_prompts([prompts])[: args.num_eval_prompts]
    regenerate(target, tokenizer, asked, file, max_new_tokens=160, batch_size=20)
    return [text for row in encode_short(tokenizer, load_rows([file]), 1024) for text in answers_of(row)]


def encode_short(tokenizer: PreTrainedTokenizerBase, pairs: Dataset, max_length: int = 256) -> Dataset:
    """Encode all pairs and leave out those of `max_length` tokens or more."""
    rows = pairs.map(
        lambda pair: encode(tokenizer, pair, max_length=max_length),
        remove_columns=pairs.column_names,
    )
    return rows.filter(lambda row: row["length"] < max_length and sum(row["loss_mask"]) > 1)


def run(
    variant: Variant,
    data: dict[str, Dataset],
    texts: dict[str, list[Answer]],
    target: PreTrainedModel,
    reader: TargetReader,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    seed: int,
    args: argparse.Namespace,
) -> dict:
    """Train one head and count its tokens per round."""
    torch.manual_seed(seed)
    shape = {
        "num_hidden_layers": 2,
        "block_size": 8,
        "intermediate_size": 4 * target.config.hidden_size,
        "num_key_value_heads": target.config.num_attention_heads,
        "target_layer_ids": [1, target.config.num_hidden_layers - 3],
        "prompt_lookup_num_tokens": 0,  # the head alone
    }
    mask_token_id = tokenizer.mask_token_id
    if mask_token_id is None:
        mask_token_id = find_mask_token(tokenizer, target.config.vocab_size)
    config = JetSpecConfig.for_target(target.config, mask_token_id=mask_token_id, **(shape | variant.head))
    options = {
        "max_steps": args.max_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": args.max_steps // 10,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "num_anchors": args.num_anchors,
        "logits_chunk_size": 128,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }
    trainer = variant.trainer(
        JetSpecDraftHead(config),
        reader,
        args=JetSpecTrainingArguments(str(args.output_dir / "run"), **(options | variant.training)),
        train_dataset=data[variant.data],
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id)._asdict(),
    )
    start = time.process_time()
    loss = trainer.train().training_loss
    seconds = time.process_time() - start
    head = trainer.model.eval()
    counted = {name: tokens_per_round(head, target, rows, [CHAIN, *args.nodes]) for name, rows in texts.items()}
    result = {"loss": loss, "seconds": seconds, "parameters": head.num_parameters(), "tokens_per_round": counted}
    if args.save:
        head.save_pretrained(args.output_dir / "heads" / file.stem)
    return result


def write_tables(folder: Path, eval_sets: list[str], drafts: dict[int | str, str]) -> None:
    """One table for each evaluation set: mean over seeds, and half the range; the root counts as a node."""
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*-*-*.json"))]
    results = [one for one in results if one["variant"] in VARIANTS]
    lines = []
    for name in eval_sets:
        lines += [f"\n{name}, tokens per round\n", f"| variant | steps | seeds | {' | '.join(drafts.values())} |"]
        lines += ["| --- " + "| ---: " * (2 + len(drafts)) + "|"]
        for variant, steps in sorted(
            {(one["variant"], one["steps"]) for one in results}, key=lambda one: (one[1], list(VARIANTS).index(one[0]))
        ):
            found = [one for one in results if (one["variant"], one["steps"]) == (variant, steps)]
            cells = []
            for draft in map(str, drafts):
                values = [one["tokens_per_round"][name][draft] for one in found]
                cells.append(f"{sum(values) / len(values):.2f} ± {(max(values) - min(values)) / 2:.2f}")
            lines.append(f"| {variant} | {steps} | {len(found)} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (folder / "study.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
