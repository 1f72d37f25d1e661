"""Runs that are killed, start late, or are short of memory."""

import json
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.heads import CHECKPOINTING
from support.training import losses_of, make_rows, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from jetspec_hf.training.data import collate

# Dies at once, as by `kill -9`, in the middle of an epoch and after the second of its checkpoints.
KILLED = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from support.training import make_trainer
from transformers import Qwen3ForCausalLM, TrainerCallback
from jetspec_hf import JetSpecDraftHead

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

folder = sys.argv[2]
trainer = make_trainer(
    JetSpecDraftHead.from_pretrained(folder + "/head"),
    Qwen3ForCausalLM.from_pretrained(folder + "/target"),
    json.load(open(folder + "/rows.json")),
    folder + "/run",
    **json.load(open(folder + "/options.json")),
)
trainer.add_callback(Kill())
trainer.train()
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 24)
    options = {"max_steps": 9, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    make_head(target, initializer_range=0.05).save_pretrained(tmp_path / "head")
    target.save_pretrained(tmp_path / "target")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "options.json").write_text(json.dumps(options))
    words = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(tmp_path)]
    killed = subprocess.run(words, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    checkpoints = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-2", "checkpoint-4"}

    whole = make_trainer(make_head(target, initializer_range=0.05), target, rows, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(make_head(target, seed=7), target, rows, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses_of(whole)) == 9  # of three steps an epoch
    assert losses_of(resumed) == pytest.approx(losses_of(whole), rel=1e-6)
    ours, theirs = (load_file(tmp_path / run / "checkpoint-8/model.safetensors") for run in ("run", "whole"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)


class KeepGradients(TrainerCallback):
    """The gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("kind", ["plain", "reentrant", "adapter"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, make_target, make_head, kind: str) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 4)

    def gradients_and_passes(**options) -> tuple[dict, int]:
        head = make_head(target)
        passes = []
        head.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: passes.append(1))
        if kind == "adapter":
            head = get_peft_model(head, LoraConfig(r=4, target_modules=["q_proj", "fc"], init_lora_weights=False))
            torch.manual_seed(0)
            for name, value in head.named_parameters():
                if "lora" in name:
                    torch.nn.init.normal_(value, std=0.1)
        trainer = make_trainer(head, target, rows, tmp_path, max_steps=1, **options)
        keep = KeepGradients()
        trainer.add_callback(keep)
        trainer.train()
        return keep.gradients, len(passes)

    options: dict[str, Any] = {CHECKPOINTING: True}
    if kind == "reentrant":
        options[f"{CHECKPOINTING}_kwargs"] = {"use_reentrant": True}
    expected, num_passes = gradients_and_passes()
    gradients, num_recomputed = gradients_and_passes(**options)
    assert (num_passes, num_recomputed) == (1, 2)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-6, atol=1e-6)


def test_bfloat16_autocast_learns_as_float32_does(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 8)
    seen = {}
    for bf16 in (False, True):
        head = make_head(target, initializer_range=0.05)
        trainer = make_trainer(head, target, rows, tmp_path, bf16=bf16, max_steps=30, logging_steps=1)
        trainer.train()
        seen[bf16] = losses_of(trainer)
        assert head.dtype == torch.float32
    assert seen[True] != seen[False]
    assert seen[True] == pytest.approx(seen[False], rel=0.1)
    assert seen[True][-1] < seen[True][0] / 2


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("vocab", "rank"), [(256, 0), (8192, 0), (8192, 16)])
def test_memory_follows_the_formula(
    tmp_path, make_target, make_head, vocab: int, rank: int, checkpointing: bool
) -> None:
    """That of the docstring of `trainer.py`."""
    hidden, inner, heads, kv_heads, width, taps, layers = 64, 128, 4, 2, 16, 2, 2
    length, anchors, block, chunk = 256, 32, 16, 128
    target = make_target(vocab_size=vocab, hidden_size=hidden, head_dim=width, intermediate_size=inner)
    head = make_head(
        target, block_size=block, num_hidden_layers=layers, target_layer_ids=[1, 2], markov_rank=rank
    ).train()
    trainer = make_trainer(head, target, [], tmp_path, num_anchors=anchors, logits_chunk_size=chunk)
    if checkpointing:
        getattr(head, f"{CHECKPOINTING}_enable")()
    ids = torch.randint(0, vocab - 1, (1, length))
    batch = collate([{"input_ids": ids[0].tolist(), "loss_mask": [1] * length}], 0)._asdict()
    trainer.compute_loss(head, batch).backward()  # makes the gradients of the weights
    with LiveBytes() as measured:
        trainer.compute_loss(head, batch).backward()

    slots = anchors * block
    keys = length + slots
    mask = slots * keys
    context = (taps + 4) * length * hidden + 2 * keys * width
    layer = slots * (6 * hidden + 4 * inner + 4 * heads * width)
    layer += keys * (hidden + 2 * heads * width + 2 * kv_heads * width)
    loss = 4 * slots * hidden + ((6 * chunk + 3 * rank) if rank else 4 * chunk) * vocab
    if checkpointing:
        expected = mask + context + layers * slots * hidden + max(loss, layer + slots * inner + keys * hidden)
    else:
        expected = mask + context + layers * layer + loss
    assert measured.peak == pytest.approx(4 * expected, rel=0.1)
