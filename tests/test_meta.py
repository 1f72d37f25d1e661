"""A round without data: on torch's `meta` device whatever reads a number, or makes a tensor elsewhere, fails.

The nearest that a machine without a GPU comes to proving that the host waits once a round: to read what was accepted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from heads import random_head
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from jetspec_hf.candidates import JetSpecCandidateGenerator
from jetspec_hf.static import static_pair
from jetspec_hf.upstream import CACHE
from jetspec_hf.verification import TargetVerifier

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
def dynamic_pair(head: PreTrainedModel, target: PreTrainedModel, **options: Any) -> Iterator[tuple]:
    """What drafts and what verifies, after the prompt."""
    generator = JetSpecCandidateGenerator(head, target, **options)
    prompt, model_kwargs = torch.tensor([PROMPT], device=META), {CACHE: DynamicCache(config=target.config)}
    with TargetVerifier(target, head.config.target_layer_ids, prompt, model_kwargs) as verifier:
        _, taps, positions = verifier.prefill(prompt, GenerationConfig())
        generator.extend(taps, positions)
        yield generator, verifier


@contextmanager
def pair_of_fixed_size(head: PreTrainedModel, target: PreTrainedModel, **options: Any) -> Iterator[tuple]:
    """The same, after no prompt: how much of that a static cache holds, only a tensor says."""
    prompt, model_kwargs = torch.tensor([PROMPT], device=META), {CACHE: DynamicCache(config=target.config)}
    config = GenerationConfig(cache_implementation="static")
    with static_pair(head, target, prompt, config, model_kwargs, max_length=40, **options) as (generator, verifier):
        for cache in (verifier.cache, generator._cache):
            cache.early_initialization(1, 2, 8, target.dtype, META)
        width = len(head.config.target_layer_ids) * head.config.hidden_size
        generator.extend(torch.empty(1, 3, width, device=META), torch.arange(3, device=META)[None])
        yield generator, verifier


@torch.no_grad()
def decode_rounds(make_pair: Callable, head: PreTrainedModel, target: PreTrainedModel, graft_length: int) -> None:
    """Rounds as the loop decodes them, but for reading what the target agrees with. The first may set things up."""
    accepted = PROMPT[2:5]
    with make_pair(head, target, num_assistant_tokens=24, prompt_lookup_num_tokens=graft_length) as (generator, target):
        generator.observe(PROMPT)
        for watch in (nullcontext(), OnlyMeta(), OnlyMeta()):
            with watch:
                anchor = torch.empty(1, dtype=torch.long, device=META)
                tree = generator.draft(anchor, max_depth=20)
                logits, taps = target.score(tree)
                path = torch.empty(1, len(accepted), dtype=torch.long, device=META)
                positions = target.keep(len(tree), path)
                generator.extend(taps.gather(1, path[:, :, None].expand(-1, -1, taps.shape[2])), positions)
            generator.observe(accepted)
            assert (len(tree), logits.shape, positions.shape) == (25, (1, 25, 64), (1, 3))


@pytest.mark.parametrize(
    ("kind", "graft_length", "window"),
    [("plain", 0, {}), ("markov", 0, {}), *((kind, 8, MIXED) for kind in HEADS)],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("make_pair", [dynamic_pair, pair_of_fixed_size], ids=["dynamic", "static"])
def test_a_round_reads_no_number_and_stays_on_one_device(
    request: pytest.FixtureRequest,
    make_pair: Callable,
    kind: str,
    graft_length: int,
    window: dict[str, Any],
    make_target: Callable,
) -> None:
    if kind == "calibrated" and make_pair is dynamic_pair:
        reason = "brings the temperatures to the device in every round"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    target = make_target(**window)
    head = random_head(target, **HEADS[kind])
    decode_rounds(make_pair, head.to(META), target.to(META), graft_length)


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
