"""On a CUDA device: the same text, few waits, graphs that are replayed, flex attention's gradients, sharding.

python -m pytest -m gpu tests/test_gpu.py
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.families import PROMPT, assert_oracle_was_accepted, assert_same_output, generate
from support.heads import HEADS, HOSTILE_HEADS, markov_head, random_head
from support.training import losses_of, make_rows, make_trainer
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from jetspec_hf import DraftStatistics, JetSpecDraftHead
from jetspec_hf.training.data import collate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FSDP2 = Path(__file__).parent.parent / "examples/accelerate/fsdp2.yaml"
STATIC = {"cache_implementation": "static"}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "static_but_not_compiled": STATIC | {"disable_compile": True},
}


@pytest.fixture
def target(make_target: Callable) -> PreTrainedModel:
    return make_target().cuda()


@pytest.fixture
def prompt() -> Tensor:
    return PROMPT.cuda()


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """What is compiled in a test is counted and dropped in it."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("head_name", [*HEADS, "nan", "constant"])
def test_the_text_is_the_targets_own(target, prompt, head_name: str, option: str) -> None:
    """In float32: with fewer bits, a forward of many tokens rounds otherwise than one of a single token."""
    plain = generate(target, prompt, **OPTIONS[option])
    head = (HEADS | HOSTILE_HEADS)[head_name](target, plain.sequences).cuda()
    output = generate(target, prompt, **OPTIONS[option], assistant_model=head)
    assert_same_output(output, plain)
    if head_name == "oracle":
        assert_oracle_was_accepted(output)


def test_in_bfloat16_each_token_is_all_but_the_likeliest(target, prompt) -> None:
    target.to(torch.bfloat16)
    text = generate(target, prompt, max_new_tokens=60, assistant_model=markov_head(target).cuda()).sequences
    with torch.no_grad():
        logits = target(text).logits[0, prompt.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, text[0, prompt.shape[1] :, None])[:, 0]
    assert ((logits.max(dim=-1).values - chosen) <= 0.1 * logits.std(dim=-1)).all()


# --- waits ---


def greedy(target: PreTrainedModel, prompt: Tensor, head: JetSpecDraftHead, **options: Any) -> Any:
    """A call whose tokens are chosen from logits that nothing touches."""
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True} | options
    return target.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=head, **options)


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("make_head", [random_head, markov_head])
def test_the_host_goes_ahead_until_the_target_has_spoken(
    target, prompt, fresh_graphs, monkeypatch, make_head: Callable, options: dict
) -> None:
    """Head, tree and target are queued without a wait. Grafts come from the host, and are left out here."""
    head = make_head(target, prompt_lookup_num_tokens=0).cuda()
    for _ in range(2):  # to record a graph is to wait
        greedy(target, prompt, head, **options)
    timed, phases = DraftStatistics.timed, set()

    def strict(self: DraftStatistics, phase: str, step: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            phases.add(phase)
            torch.cuda.set_sync_debug_mode("error" if phase in ("draft", "build", "verify") else "default")
            try:
                return step(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return timed(self, phase, watched)

    monkeypatch.setattr(DraftStatistics, "timed", strict)
    greedy(target, prompt, head, **options)
    assert phases >= {"draft", "build", "verify", "accept", "commit"}


@pytest.mark.parametrize("graft_length", [0, 8])
@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_a_round_waits_for_what_it_accepts_and_for_small_copies(
    target, prompt, fresh_graphs, options: dict, graft_length: int
) -> None:
    """Accepted tokens come back, tokens and path go there, and so do tokens and scores of grafts."""
    head = markov_head(target, prompt_lookup_num_tokens=graft_length).cuda()
    seen = []
    for length in (20, 20, 60):  # the first for what is done only once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            output = greedy(target, prompt, head, max_new_tokens=length, **options)
            torch.cuda.set_sync_debug_mode("default")
        seen.append((output.statistics.num_rounds, sum("synchroniz" in str(one.message) for one in caught)))
    (_, _), (few_rounds, few_waits), (many_rounds, many_waits) = seen
    assert many_waits - few_waits <= (3 + 2 * (graft_length > 0)) * (many_rounds - few_rounds)


# --- compiled ---


@pytest.mark.parametrize("make_head", [random_head, markov_head])
def test_graphs_are_replayed_and_give_the_same_text(target, prompt, fresh_graphs, make_head: Callable) -> None:
    head = make_head(target).cuda()
    for one in (prompt, prompt.flip(1), prompt):
        plain = generate(target, one, max_new_tokens=60)
        output = generate(target, one, max_new_tokens=60, **STATIC, assistant_model=head)
        assert_same_output(output, plain)
        assert counters["stats"]["unique_graphs"] == 4  # the head's pass, the tree, the target's forward, what is kept
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_as_many_nodes_as_pay_are_compiled_once_each(target, prompt, fresh_graphs) -> None:
    head = random_head(target, num_assistant_tokens=None).cuda()
    plain = generate(target, prompt, max_new_tokens=60)
    for _ in range(2):
        assert_same_output(generate(target, prompt, max_new_tokens=60, **STATIC, assistant_model=head), plain)
    assert counters["stats"]["unique_graphs"] == 7  # two sizes of trees and three of the target's forward
    assert counters["inductor"]["cudagraph_skips"] == 0


# --- training ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_attention_has_the_gradients_of_sdpa_and_keeps_no_mask(
    tmp_path, make_target, make_head, dtype: torch.dtype
) -> None:
    target = make_target(head_dim=16).cuda()
    head = make_head(target, block_size=16, initializer_range=0.1).train()
    ids = torch.randint(0, 63, (2, 1024))
    rows = [{"input_ids": row.tolist(), "loss_mask": [1] * len(row)} for row in ids]
    options = {"use_cpu": False, "bf16": dtype == torch.bfloat16, "num_anchors": 128, "logits_chunk_size": 256}
    trainer = make_trainer(head, target, rows, tmp_path, **options)
    batch = {name: part.cuda() for name, part in collate(rows, 0)._asdict().items()}
    gradients, peaks = [], []
    for attention in ("sdpa", "flex_attention"):
        head.set_attn_implementation(attention)
        for _ in range(2):  # compiling needs memory of its own
            head.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(head, dict(batch))
            loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in head.named_parameters()})
        peaks.append(torch.cuda.max_memory_allocated())
    rtol = 1e-4 if dtype == torch.float32 else 3e-2
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= rtol * gradient.norm(), name
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_a_head_trains_on_a_gpu(tmp_path, make_target, make_head, attention: str) -> None:
    target = make_target(head_dim=16)
    rows = make_rows(target, 8)
    head = make_head(target, initializer_range=0.05, markov_rank=8)
    head.set_attn_implementation(attention)
    trainer = make_trainer(head, target.cuda(), rows, tmp_path, use_cpu=False, bf16=True, max_steps=30, logging_steps=1)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] / 2
    head.set_attn_implementation("sdpa")
    trainer.save_model(tmp_path / "head")
    again = JetSpecDraftHead.from_pretrained(tmp_path / "head").cuda()
    for ours, theirs in zip(again.parameters(), head.parameters(), strict=True):
        assert ours.equal(theirs)


SHARDED = """
import json, os, sys, torch
from transformers import Qwen3ForCausalLM
from jetspec_hf import JetSpecDraftHead
from jetspec_hf.training.data import collate
from jetspec_hf.training.trainer import JetSpecTrainer, JetSpecTrainingArguments
folder, run, resume = sys.argv[1], sys.argv[2], len(sys.argv) > 3
trainer = JetSpecTrainer(
    JetSpecDraftHead.from_pretrained(folder + "/head"),
    Qwen3ForCausalLM.from_pretrained(folder + "/target").cuda(),
    args=JetSpecTrainingArguments(
        f"{folder}/{run}", per_device_train_batch_size=4, max_steps=8, learning_rate=5e-3, num_anchors=8,
        report_to="none", save_strategy="steps", save_steps=4, disable_tqdm=True, logging_steps=1,
        train_sampling_strategy="sequential", lr_scheduler_type="constant",
    ),
    train_dataset=json.load(open(folder + "/rows.json")),
    data_collator=lambda batch: collate(batch, 0)._asdict(),
)
trainer.train(resume_from_checkpoint=f"{folder}/{run}/checkpoint-4" if resume else None)
is_sharded = any(hasattr(weight, "placements") for weight in trainer.model_wrapped.parameters())
trainer.save_model(f"{folder}/{run}/head")
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    json.dump({"losses": losses, "is_sharded": is_sharded}, open(f"{folder}/{run}/seen.json", "w"))
"""


def test_a_sharded_head_learns_the_same_and_is_saved_whole(tmp_path, make_target, make_head) -> None:
    """FSDP2 in one process: what it does to weights, checkpoints and files does not need a second."""
    target = make_target()
    make_head(target, initializer_range=0.05, markov_rank=8).save_pretrained(tmp_path / "head")
    target.save_pretrained(tmp_path / "target")
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(target, 16)))
    script = tmp_path / "train.py"
    script.write_text(SHARDED)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", FSDP2, "--num_processes", "1"]
    sharded = [*launch, script, tmp_path, "sharded"]
    for command in ([sys.executable, script, tmp_path, "whole"], sharded, [*sharded, "resume"]):
        done = subprocess.run([str(part) for part in command], capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-4000:]
    whole, parts = (json.loads((tmp_path / run / "seen.json").read_text()) for run in ("whole", "sharded"))
    assert (whole["is_sharded"], parts["is_sharded"]) == (False, True)
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-3)  # after going on from a checkpoint
    one, other = (load_file(tmp_path / run / "head/model.safetensors") for run in ("whole", "sharded"))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-2, atol=1e-3)
    JetSpecDraftHead.from_pretrained(tmp_path / "sharded/head")
