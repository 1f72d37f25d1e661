"""A round without data: on torch's `meta` device whatever reads a number, or makes a tensor elsewhere, fails.

The nearest that a machine without a GPU comes to proving that the host waits once a round: to read what was accepted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.heads import random_head
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationConfig

from jetspec_hf.drafting.drafter import Drafter, DynamicDrafter
from jetspec_hf.drafting.options import DraftOptions
from jetspec_hf.drafting.static import StaticDrafter
from jetspec_hf.pair import DecodingPair
from jetspec_hf.upstream import CACHE
from jetspec_hf.verification.dynamic import DynamicVerifier
from jetspec_hf.verification.static import StaticVerifier
from jetspec_hf.verification.verifier import Verifier

PROMPT = [3, 14, 15, 3, 14, 15, 3, 14]  # with something to graft
META = torch.device("meta")
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MIXED = SLIDING | {"layer_types": SLIDING["layer_types"] * 2}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"is_causal": False},
    "sliding": SLIDING,
    "markov": {"markov_rank": 4},
    "markov with memory": {"markov_rank": 4, "markov_head_type": "rnn"},
    "markov with tables": {"markov_rank": 4, "tie_markov_head": False},
    "calibrated": {"draft_temperatures": [1.5] * 5},
}


class OnlyMeta(TorchDispatchMode):
    """Fails at the first operation that takes or makes a tensor on another device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device == META for tensor in tensors), f"{function} of {[t.device for t in tensors]}"
        return result


@contextmanager
def dynamic(pair: DecodingPair, options: DraftOptions) -> Iterator[tuple[Drafter, Verifier]]:
    """What drafts and what verifies, after the prompt."""
    prompt, model_kwargs = torch.tensor([PROMPT], device=META), {CACHE: DynamicCache(config=pair.target.config)}
    with DynamicVerifier(pair, prompt, model_kwargs) as verifier:
        drafter = DynamicDrafter(pair, options)
        scores, positions = verifier.prefill(prompt, GenerationConfig())
        drafter.extend(scores.taps, positions)
        yield drafter, verifier


@contextmanager
def static(pair: DecodingPair, options: DraftOptions) -> Iterator[tuple[Drafter, Verifier]]:
    """The same, after no prompt: how much of that a static cache holds, only a tensor says."""
    with pair.static_caches(pair.spec.num_layers, num_slots=100) as caches:
        for cache in (caches.target, caches.head):
            cache.early_initialization(1, 2, 8, pair.target.dtype, META)
        shared: dict[str, Any] = {"caches": caches, "compile_step": lambda step: step, "max_depth": 8}
        drafter, prompt = StaticDrafter(pair, options, **shared), torch.tensor([PROMPT], device=META)
        width = len(pair.head.config.target_layer_ids) * pair.spec.hidden_size
        drafter.extend(torch.empty(1, 3, width, device=META), torch.arange(3, device=META)[None])
        yield drafter, StaticVerifier(pair, prompt, {}, **shared, max_length=40)


@torch.no_grad()
def decode_rounds(make: Callable, pair: DecodingPair, options: DraftOptions) -> None:
    """Rounds as the loop decodes them, but for reading what the target agrees with. The first may set things up."""
    sizes, accepted = {"num_nodes": 24, "max_depth": 20}, PROMPT[2:5]
    with make(pair, options) as (drafter, verifier):
        drafter.observe(PROMPT)
        for watch in (nullcontext(), OnlyMeta(), OnlyMeta()):
            with watch:
                anchor = torch.empty(1, dtype=torch.long, device=META)
                block = drafter.run_head(anchor, **sizes, padding_mask=verifier.padding_mask())
                tree = drafter.grow(anchor, block, **sizes)
                logits, taps = verifier.score(tree)
                path = torch.empty(1, len(accepted), dtype=torch.long, device=META)
                positions = verifier.keep(len(tree), path)
                drafter.extend(taps[:, path[0]], positions)
            drafter.observe(accepted)
            assert (len(tree), logits.shape, positions.shape) == (25, (1, 25, 64), (1, 3))


@pytest.mark.parametrize(
    ("kind", "graft_length", "window"),
    [("plain", 0, {}), ("markov", 0, {}), *((kind, 8, MIXED) for kind in HEADS)],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("make", [dynamic, static])
def test_a_round_reads_no_number_and_stays_on_one_device(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable,
    kind: str,
    graft_length: int,
    window: dict[str, Any],
    make_target: Callable,
) -> None:
    target = make_target(**window)
    # Real targets with weights on the meta device have their inputs elsewhere, and lend no LM head to tied tables.
    monkeypatch.setattr(DecodingPair, "input_device", META)
    pair = DecodingPair(random_head(target, **HEADS[kind]), target)
    pair.head.to(META), pair.target.to(META)
    decode_rounds(make, pair, DraftOptions(prompt_lookup_num_tokens=graft_length))


THERE, HERE = torch.empty(3, device=META), torch.empty(3)


@pytest.mark.parametrize("read", [THERE.tolist, THERE.sum().item, THERE.nonzero, THERE.cpu, lambda: bool(THERE[0] > 0)])
def test_reading_a_number_fails_here(read: Callable) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)), OnlyMeta():
        read()


@pytest.mark.parametrize("mix", [lambda: HERE.to(META), lambda: HERE + 1, lambda: THERE * HERE.sum(), HERE.clone])
def test_another_device_fails_here(mix: Callable) -> None:
    mix()
    with pytest.raises(AssertionError, match="cpu"), OnlyMeta():
        mix()
