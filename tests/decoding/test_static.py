"""Static caches, and what is compiled with them. That they change no token is tested with the other options, too."""

import copy
import gc
import itertools
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.families import (
    FAMILIES,
    NO_CHUNKS,
    NUM_PADS,
    PROMPT,
    assert_oracle_was_accepted,
    assert_same_output,
    generate,
)
from support.heads import HEADS, markov_head, oracle_head, random_head
from support.pairwise import pairwise
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from jetspec_hf import DraftOptions, decode_with
from jetspec_hf.drafting.node_count import STATIC_SIZES
from jetspec_hf.upstream import CACHE

CHAIN = DraftOptions(24, is_chain=True)
STATIC = {"cache_implementation": "static"}
PADDED = torch.cat([torch.full((1, NUM_PADS), 63), PROMPT], dim=1)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.8, "top_k": 20},
    {"prefill_chunk_size": 4},
    {"prompt": PADDED, "attention_mask": (torch.arange(PADDED.shape[1]) >= NUM_PADS).long()[None]},
]


@pytest.fixture
def target(make_target: Callable) -> PreTrainedModel:
    return make_target()


@pytest.fixture
def num_graphs() -> Iterator[Callable[[], int]]:
    """How many graphs were made in this test."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled(backend: str = "eager") -> dict[str, Any]:
    """Options of `generate` that compile on a CPU, and fail where that is not possible."""
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return STATIC | {"compile_config": config}


@pytest.mark.parametrize(
    ("family", "option", "head_name"), pairwise(itertools.product(FAMILIES, range(len(OPTIONS)), ["markov", "oracle"]))
)
def test_a_static_cache_gives_what_the_family_gives(family: str, option: int, head_name: str) -> None:
    options = OPTIONS[option]
    if "prefill_chunk_size" in options and family in NO_CHUNKS:
        pytest.skip("this transformers itself fails")
    target = FAMILIES[family].build(FAMILIES[family].attentions[0])
    plain = generate(target, **options)
    num_pads = plain.sequences.shape[1] - PROMPT.shape[1] - 13
    head = HEADS[head_name](target, plain.sequences[:, num_pads:])
    output = generate(target, **options, **STATIC, assistant_model=head)
    assert_same_output(output, plain)
    if head_name == "oracle":
        assert_oracle_was_accepted(output)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_target_returns_is_what_hooks_take(family: str) -> None:
    """So the head drafts the same until the end is near, where trees of other caches are cut."""
    target = FAMILIES[family].build(FAMILIES[family].attentions[0])
    lengths = []
    for cache in ({}, STATIC):
        output = generate(target, max_new_tokens=40, **cache, assistant_model=random_head(target))
        totals = itertools.accumulate(length + 1 for length in output.statistics.accepted_lengths)
        lengths.append([total for total in totals if total < 30])
    assert lengths[0] == lengths[1]
    assert len(lengths[0]) < 29  # something was accepted


def test_in_bfloat16_each_token_is_all_but_the_likeliest(target: PreTrainedModel) -> None:
    target.to(torch.bfloat16)
    text = generate(target, **STATIC, assistant_model=markov_head(target)).sequences
    with torch.no_grad():
        logits = target(text).logits[0, PROMPT.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, text[0, PROMPT.shape[1] :, None])[:, 0]
    assert ((logits.max(dim=-1).values - chosen) <= 0.1 * logits.std(dim=-1)).all()


def test_a_chain_in_our_loop_may_be_static(target: PreTrainedModel) -> None:
    plain = generate(target).sequences
    head = oracle_head(target, plain)
    output = generate(target, **STATIC, custom_generate=decode_with(head, options=CHAIN))
    assert output.sequences.equal(plain)
    assert output.statistics.num_rounds == 2


def test_the_cache_that_is_returned_holds_the_text_and_goes_on(make_target: Callable) -> None:
    target = make_target(use_sliding_window=True, sliding_window=6, max_window_layers=2)
    text = generate(target, max_new_tokens=26).sequences
    head = oracle_head(target, text)
    first = generate(target, **STATIC, assistant_model=head)
    held = [layer.keys.clone() for layer in first[CACHE].layers]
    assert first[CACHE].get_seq_length() == first.sequences.shape[1] - 1
    generate(target, PROMPT.flip(1), **STATIC, assistant_model=head)  # in the same static caches
    assert all(layer.keys.equal(keys) for layer, keys in zip(first[CACHE].layers, held, strict=True))
    for assistant in (None, head):
        cache = copy.deepcopy(first[CACHE])
        second = generate(target, first.sequences, **{CACHE: cache}, assistant_model=assistant)
        assert second.sequences.equal(text)


# --- compiled ---


@pytest.mark.parametrize("make_head", [random_head, markov_head])
def test_rounds_and_calls_share_their_graphs(
    target: PreTrainedModel, make_head: Callable, num_graphs: Callable[[], int]
) -> None:
    for prompt, length in [(PROMPT, 20), (PROMPT, 150), (PROMPT[:, :5], 60)]:
        plain = generate(target, prompt, max_new_tokens=length)
        output = generate(target, prompt, max_new_tokens=length, **compiled(), assistant_model=make_head(target))
        assert_same_output(output, plain)
        assert num_graphs() == 4  # the head's pass, the tree, the target's forward, what is kept
        assert output.statistics.num_rounds > 6


def test_what_cannot_be_compiled_as_a_whole_is_compiled_in_parts(
    target: PreTrainedModel, num_graphs: Callable[[], int]
) -> None:
    plain = generate(target, max_new_tokens=40)
    options = compiled()
    options["compile_config"].fullgraph = False
    head = oracle_head(target, plain.sequences)  # a script is no arithmetic
    output = generate(target, max_new_tokens=40, **options, assistant_model=head)
    assert_same_output(output, plain)
    assert_oracle_was_accepted(output)
    assert num_graphs() > 4


def test_each_number_of_nodes_is_compiled_once(target: PreTrainedModel, num_graphs: Callable[[], int]) -> None:
    head = random_head(target, num_assistant_tokens=None)
    sizes = set()
    for _ in range(3):
        plain = generate(target, max_new_tokens=60)
        output = generate(target, max_new_tokens=60, **compiled(), assistant_model=head)
        assert_same_output(output, plain)
        sizes |= set(output.statistics.drafted_nodes)
        assert num_graphs() == 7  # two sizes of trees and three of the target's forward
    assert sizes == set(STATIC_SIZES)


# Sharing, windows and sizes by layer; experts that are switched. Dense families compile alike.
COMPILED = ("gemma4_sharing", "qwen3_moe_sliding")


@pytest.mark.parametrize(
    "family", [*COMPILED, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in COMPILED)]
)
def test_every_family_compiles(family: str, num_graphs: Callable[[], int]) -> None:
    target = FAMILIES[family].build(FAMILIES[family].attentions[0])
    plain = generate(target)
    assert_same_output(generate(target, **compiled(), assistant_model=random_head(target)), plain)
    assert num_graphs() == 4


@pytest.mark.skipif(shutil.which("c++") is None, reason="a CPU compiles with a C++ compiler")
def test_what_inductor_compiles_gives_the_same_text(make_target: Callable, num_graphs: Callable[[], int]) -> None:
    target = make_target(num_hidden_layers=2, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    options = {"block_size": 3, "num_hidden_layers": 1, "num_assistant_tokens": 5, "prompt_lookup_num_tokens": 2}
    head = markov_head(target, target_layer_ids=[0], **options)
    for options in OPTIONS[2:]:
        plain = generate(target, **options)
        assert_same_output(generate(target, **options, **compiled("inductor"), assistant_model=head), plain)
    assert num_graphs() > 4


def test_nothing_is_compiled_on_a_cpu_unasked(target: PreTrainedModel, num_graphs: Callable[[], int]) -> None:
    generate(target, **STATIC, assistant_model=random_head(target))
    assert num_graphs() == 0


# --- caches ---


class Failing(BaseStreamer):
    """Fails in the third round."""

    def __init__(self) -> None:
        self.num_puts = 0

    def put(self, value: torch.Tensor) -> None:
        self.num_puts += 1
        if self.num_puts > 4:
            raise RuntimeError("enough")

    def end(self) -> None:
        """Never comes."""


def test_longer_texts_and_failures_leave_later_calls_alone(target: PreTrainedModel) -> None:
    head = random_head(target)
    long = PROMPT.repeat(1, 40)
    plain = {prompt: generate(target, prompt).sequences for prompt in (PROMPT, long)}
    for prompt in (PROMPT, long, PROMPT):
        assert generate(target, prompt, **STATIC, assistant_model=head).sequences.equal(plain[prompt])
        with pytest.raises(RuntimeError, match="enough"):
            generate(target, prompt, **STATIC, assistant_model=head, streamer=Failing())
        with torch.inference_mode():
            assert generate(target, prompt, **STATIC, assistant_model=head).sequences.equal(plain[prompt])


def test_two_threads_have_caches_of_their_own(target: PreTrainedModel) -> None:
    head = random_head(target)
    prompts = [PROMPT, PROMPT.flip(1)]
    plain = [generate(target, prompt, max_new_tokens=60).sequences for prompt in prompts]
    outputs: dict[int, list] = {0: [], 1: []}

    def work(which: int) -> None:
        for _ in range(5):
            options = {"max_new_tokens": 60, "do_sample": False, "assistant_model": head, **STATIC}
            outputs[which].append(target.generate(prompts[which], **options))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert [output.equal(plain[which]) for output in outputs[which]] == [True] * 5


def test_caches_go_with_their_models(make_target: Callable) -> None:
    target = make_target()
    generate(target, **STATIC, assistant_model=random_head(target))
    reference = weakref.ref(target)
    del target
    gc.collect()
    assert reference() is None


def test_no_node_stands_behind_the_last_token(target: PreTrainedModel) -> None:
    """Some targets know only so many positions."""
    seen: list[int] = []
    hook = lambda module, args, kwargs: seen.append(int(kwargs["position_ids"].max()))  # noqa: E731
    handle = target.register_forward_pre_hook(hook, with_kwargs=True)
    output = generate(target, **STATIC, assistant_model=random_head(target))
    handle.remove()
    assert max(seen) < output.sequences.shape[1]
