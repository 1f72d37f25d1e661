"""The main property: with any head, `generate` gives what it gives without one."""

import copy
import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.heads import CHECKPOINTING, HEADS, HOSTILE_HEADS, constant_head, oracle_head, random_head
from support.node_counts import InTurn
from support.pairwise import pairwise
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from jetspec_hf import DraftOptions, DraftStatistics, JetSpecGenerateOutput, decode_with
from jetspec_hf.drafting.node_count import NodeCount
from jetspec_hf.drafting.round_costs import Choice
from jetspec_hf.upstream import CACHE

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5]])
WITH_EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture
def target(make_target: Callable) -> PreTrainedModel:
    return make_target()


@pytest.fixture(scope="session")
def text(make_target: Callable) -> Tensor:
    """The prompt and 31 tokens that the target continues it with."""
    return generate(make_target(), max_new_tokens=31)


def generate(target: PreTrainedModel, prompt: Tensor | None = PROMPT, **options: Any) -> Any:
    torch.manual_seed(11)
    if "max_length" not in options:
        options = {"max_new_tokens": 19} | options
    return target.generate(prompt, **({"do_sample": False} | options))


class RecordingStreamer(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.num_ends = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.flatten().tolist())
        self.shapes.append(tuple(value.shape))

    def end(self) -> None:
        self.num_ends += 1

    @property
    def tokens(self) -> list[int]:
        return list(itertools.chain(*self.puts))


class RecordingCriteria(StoppingCriteria):
    """Stops at a length, and remembers every text that it was asked about."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.texts: list[list[int]] = []
        self.num_scores: list[int | None] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.texts.append(input_ids[0].tolist())
        self.num_scores.append(None if scores is None else len(scores))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class BrokenProcessor(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("broken")


class CountingProcessor(LogitsProcessor):
    """Has a state: at its n-th call it forbids token n, in place, and remembers the text."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.texts.append(input_ids[0].tolist())
        scores[:, len(self.texts) % scores.shape[1]] = -torch.inf
        scores[:, ::7] -= 1.5
        return scores


# Options of `generate`, given the text that the target continues the prompt with.
OPTIONS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "greedy": lambda text: {},
    "1_token": lambda text: {"max_new_tokens": 1},
    "2_tokens": lambda text: {"max_new_tokens": 2},
    "3_tokens": lambda text: {"max_new_tokens": 3},
    "7_tokens": lambda text: {"max_new_tokens": 7},
    "40_tokens": lambda text: {"max_new_tokens": 40},
    "max_length": lambda text: {"max_length": 19},
    "max_length_of_the_prompt": lambda text: {"stopping_criteria": [MaxLengthCriteria(6)]},
    "max_length_below_the_prompt": lambda text: {"stopping_criteria": [MaxLengthCriteria(3)]},
    "two_max_lengths": lambda text: {"stopping_criteria": [MaxLengthCriteria(33), MaxLengthCriteria(15)]},
    "eos": lambda text: {"eos_token_id": text[15]},
    "eos_first": lambda text: {"eos_token_id": text[6]},
    "eos_list": lambda text: {"eos_token_id": [text[24], text[16], 60]},
    "min_new_tokens": lambda text: {"eos_token_id": text[9], "min_new_tokens": 12},
    "prefill_chunk_size_1": lambda text: {"prefill_chunk_size": 1},
    "prefill_chunk_size_4": lambda text: {"prefill_chunk_size": 4},
    "repetition_penalty": lambda text: {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": lambda text: {
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 9,
        "eos_token_id": text[8],
        "repetition_penalty": 0.6,
    },
    "bad_words_ids": lambda text: {"bad_words_ids": [[text[8]], [text[10], text[11]]]},
    "suppress_tokens": lambda text: {"suppress_tokens": text[6:9], "begin_suppress_tokens": [text[12]]},
    "sequence_bias": lambda text: {"sequence_bias": [[[text[6]], -4.0], [[text[9], 5], 6.0]]},
    "forced_eos_token_id": lambda text: {"forced_eos_token_id": 17, "max_new_tokens": 9},
    "exponential_decay_length_penalty": lambda text: {
        "exponential_decay_length_penalty": (4, 1.3),
        "eos_token_id": 17,
    },
    "prefix_allowed_tokens_fn": lambda text: {
        "prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 5 + i) % 64 for i in range(9)]
    },
    "guidance_scale": lambda text: {"guidance_scale": 1.7},
    "negative_prompt": lambda text: {"guidance_scale": 2.5, "negative_prompt_ids": torch.tensor([[8, 2, 44]])},
    "stateful_processor": lambda text: {"logits_processor": LogitsProcessorList([CountingProcessor()])},
    "custom_processor_and_eos": lambda text: {
        "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(14, text[9])]),
        "eos_token_id": text[9],
    },
    "stopping_criteria": lambda text: {"stopping_criteria": StoppingCriteriaList([RecordingCriteria(17)])},
    "longer_max_length_criteria": lambda text: {"stopping_criteria": [MaxLengthCriteria(33)]},
    "sample": lambda text: {"do_sample": True},
    "temperature": lambda text: {"do_sample": True, "temperature": 0.5, "top_k": 0},
    "top_k": lambda text: {"do_sample": True, "top_k": 5},
    "top_p": lambda text: {"do_sample": True, "top_p": 0.7, "temperature": 1.4},
    "min_p": lambda text: {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.3},
    "sample_eos": lambda text: {"do_sample": True, "eos_token_id": list(range(0, 64, 9))},
    "watermark": lambda text: {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=3.0)},
    "1_node": lambda text: {"num_assistant_tokens": 1},
    "more_nodes_than_tokens": lambda text: {"num_assistant_tokens": 200},
    "confident_nodes": lambda text: {"assistant_confidence_threshold": 0.9},
    "one_beam": lambda text: {"num_beams": 1, "num_return_sequences": 1},
}


@pytest.mark.parametrize(
    ("option", "head_name", "cache"), pairwise(itertools.product(OPTIONS, HEADS, [None, "static"]))
)
def test_every_option_gives_what_plain_generate_gives(
    target: PreTrainedModel, text: Tensor, option: str, head_name: str, cache: str | None
) -> None:
    def options() -> dict[str, Any]:
        return OPTIONS[option](text[0].tolist())

    plain = generate(target, **options(), **WITH_EVERYTHING)
    head = HEADS[head_name](target, plain.sequences)
    ours = generate(target, **options(), **WITH_EVERYTHING, assistant_model=head, cache_implementation=cache)
    assert_same_output(ours, plain)
    num_new = ours.statistics.num_new_tokens
    if head_name == "oracle" and num_new > 6 and option != "1_node":
        assert ours.statistics.num_rounds <= num_new / 4
    if num_new > 2:
        # A random head is rarely so confident.
        assert ours.statistics.num_drafted_tokens > 0 or option == "confident_nodes"


@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize(
    "option",
    [
        "greedy",
        "1_token",
        "2_tokens",
        "3_tokens",
        "7_tokens",
        "two_max_lengths",
        "max_length_below_the_prompt",
        "max_length",
        "eos",
        "eos_first",
        "eos_list",
    ],
)
def test_tokens_alone_take_a_shorter_way_to_the_same_end(
    target: PreTrainedModel, text: Tensor, option: str, head_name: str
) -> None:
    options = OPTIONS[option](text[0].tolist())
    head = HEADS[head_name](target, text)
    tokens = generate(target, **options, assistant_model=head)
    assert isinstance(tokens, Tensor)
    assert tokens.tolist() == generate(target, **options).tolist()


@pytest.mark.parametrize(
    ("option", "head_name", "cache"),
    pairwise(
        itertools.product(
            ["greedy", "eos", "sample", "no_repeat_ngram_size", "1_node", "confident_nodes"],
            HOSTILE_HEADS,
            [None, "static"],
        )
    ),
)
def test_no_head_can_change_the_output(
    target: PreTrainedModel, text: Tensor, option: str, head_name: str, cache: str | None
) -> None:
    head = HOSTILE_HEADS[head_name](target, text)
    options = {"max_new_tokens": 12} | OPTIONS[option](text[0].tolist())
    plain = generate(target, **options, **WITH_EVERYTHING)
    options |= {"assistant_model": head, "cache_implementation": cache}
    assert_same_output(generate(target, **options, **WITH_EVERYTHING), plain)
    assert generate(target, **options).tolist() == plain.sequences.tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        {"block_size": 2},
        {"block_size": 17},
        {"is_causal": False},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
        {"target_layer_ids": [3, 0], "num_hidden_layers": 1},
        {"attn_implementation": "eager"},
        {"num_assistant_tokens": 200},
    ],
    ids=["chain_of_1", "long_block", "bidirectional", "sliding", "unsorted_taps", "eager", "wide"],
)
@pytest.mark.parametrize("make_head", [random_head, oracle_head])
@pytest.mark.parametrize("cache", [None, "static"])
def test_any_shape_of_head_gives_the_same_tokens(
    target: PreTrainedModel, text: Tensor, make_head: Callable, overrides: dict[str, Any], cache: str | None
) -> None:
    if cache == "static" and 3 in overrides.get("target_layer_ids", []):
        overrides = overrides | {"target_layer_ids": [2, 0]}
    head = make_head(target, *([text] if make_head is oracle_head else []), **overrides)
    options = {"max_new_tokens": 31, "cache_implementation": cache, "return_dict_in_generate": True}
    output = generate(target, assistant_model=head, **options)
    assert output.sequences.tolist() == text.tolist()
    if make_head is oracle_head:
        # In each full round all drafted tokens are accepted, and the bonus token comes on top.
        assert set(output.statistics.accepted_lengths[:-1]) == {head.config.block_size - 1}


def test_a_vocabulary_smaller_than_the_tree_is_wide(make_target: Callable) -> None:
    target = make_target(vocab_size=3)
    prompt, plain = torch.tensor([[0, 1, 1]]), generate(target, torch.tensor([[0, 1, 1]])).tolist()
    options = {"num_assistant_tokens": 500, "return_dict_in_generate": True}
    grafted = generate(target, prompt, assistant_model=random_head(target), **options)
    assert grafted.sequences.tolist() == plain
    assert min(grafted.statistics.accepted_lengths[:-1]) >= 5
    output = generate(target, prompt, assistant_model=random_head(target, prompt_lookup_num_tokens=0), **options)
    assert output.sequences.tolist() == plain
    # Every continuation of up to 5 tokens is in the tree, 3 + 9 + 27 + 81 + 243 of them, so one is accepted whole.
    assert output.statistics.drafted_nodes[0] == 363
    assert output.statistics.accepted_lengths == [5, 5, 5]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, 63), min_size=1, max_size=12),
    num_assistant_tokens=st.integers(1, 80),
    block_size=st.integers(2, 10),
    max_new_tokens=st.integers(1, 20),
    eos=st.none() | st.integers(0, 63) | st.lists(st.integers(0, 63), min_size=2, max_size=8),
)
def test_any_call_gives_the_same_tokens(
    target: PreTrainedModel,
    seed: int,
    prompt: list[int],
    num_assistant_tokens: int,
    block_size: int,
    max_new_tokens: int,
    eos: int | list[int] | None,
) -> None:
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": eos}
    plain = generate(target, torch.tensor([prompt]), **options, **WITH_EVERYTHING)
    best, second = torch.cat(plain.logits).topk(2).values.unbind(dim=-1)
    assume((best - second).min() > 1e-4)  # else rounding decides
    head = random_head(target, seed=seed, block_size=block_size, num_assistant_tokens=num_assistant_tokens)
    tokens = generate(target, torch.tensor([prompt]), **options, assistant_model=head)
    assert tokens.tolist() == plain.sequences.tolist()


# --- where the text ends ---


@pytest.mark.parametrize("position", range(6, 18, 2))
def test_an_eos_inside_an_accepted_run_is_the_last_token(target: PreTrainedModel, text: Tensor, position: int) -> None:
    head = oracle_head(target, text)  # goes on past the EOS
    eos = int(text[0, position])
    plain = generate(target, eos_token_id=[eos], return_dict_in_generate=True)
    output = generate(target, eos_token_id=[eos], return_dict_in_generate=True, assistant_model=head)
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert output.sequences[0, -1] == eos
    assert output[CACHE].get_seq_length() == output.sequences.shape[1] - 1
    # 6 tokens for each round, and the first comes from the prefill.
    assert output.statistics.num_rounds == -(-(output.statistics.num_new_tokens - 1) // 6)


def test_a_head_that_always_drafts_eos_does_not_end_the_text(target: PreTrainedModel, text: Tensor) -> None:
    eos = next(token for token in range(64) if token not in text[0])
    head = constant_head(target, eos)
    assert generate(target, max_new_tokens=31, eos_token_id=eos, assistant_model=head).tolist() == text.tolist()


def test_max_time_stops_early(target: PreTrainedModel, text: Tensor) -> None:
    output = generate(target, max_new_tokens=31, max_time=1e-9, assistant_model=oracle_head(target, text))
    num_new = output.shape[1] - PROMPT.shape[1]
    assert 1 <= num_new < 31
    assert output.tolist() == text[:, : output.shape[1]].tolist()


@pytest.mark.parametrize("head_name", HEADS)
def test_a_stop_string_ends_the_text_where_it_ends_plain_text(
    target: PreTrainedModel, text: Tensor, head_name: str
) -> None:
    # The criterion of transformers needs a tokenizer that knows the word "abcdef".
    vocabulary = {f"<{token}>": token for token in range(63)} | {"abcdef": 63}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<0>")))
    options = {"stop_strings": [f"{text[0, 14]}> <{text[0, 15]}"], "tokenizer": tokenizer}
    plain = generate(target, **options)
    assert plain.tolist() == text[:, :16].tolist()
    head = HEADS[head_name](target, text)
    assert generate(target, **options, assistant_model=head).tolist() == plain.tolist()


@pytest.mark.parametrize("length", [7, 9, 14])
def test_stopping_criteria_are_asked_after_every_token(target: PreTrainedModel, text: Tensor, length: int) -> None:
    criteria = RecordingCriteria(length)
    output = generate(
        target,
        stopping_criteria=[criteria],
        assistant_model=oracle_head(target, text),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert output.sequences.tolist() == text[:, :length].tolist()
    assert criteria.texts == [text[0, :n].tolist() for n in range(7, length + 1)]
    assert criteria.num_scores == list(range(1, length - 5))
    assert output[CACHE].get_seq_length() == length - 1


# --- what processors see ---


@pytest.mark.parametrize("head_name", HEADS)
def test_processors_see_only_true_prefixes_and_each_once(target: PreTrainedModel, head_name: str) -> None:
    plain, ours = CountingProcessor(), CountingProcessor()
    text = generate(target, logits_processor=[plain])
    output = generate(
        target,
        logits_processor=[ours],
        assistant_model=HEADS[head_name](target, text),
        return_dict_in_generate=True,
    )
    assert ours.texts == plain.texts == [text[0, :n].tolist() for n in range(6, 25)]
    assert output.statistics.num_accepted_tokens > 0 or head_name != "oracle"


def test_a_processor_that_runs_the_target_does_not_disturb_the_taps(target: PreTrainedModel) -> None:
    class RunsTheTarget(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            target(input_ids.flip(1))
            return scores

    class DoesNothing(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores

    head = random_head(target)
    runs = []
    for processor in (DoesNothing(), RunsTheTarget()):
        with contexts_of(head) as contexts:
            generate(target, logits_processor=[processor], assistant_model=head)
        runs.append(torch.cat(contexts, dim=1))
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize("option", ["greedy", "guidance_scale", "prefill_chunk_size_4", "sample", "40_tokens"])
@pytest.mark.parametrize("head_name", HEADS)
def test_the_head_reads_the_hidden_states_of_the_text(
    target: PreTrainedModel, text: Tensor, option: str, head_name: str
) -> None:
    options = OPTIONS[option](text[0].tolist())
    head = HEADS[head_name](target, generate(target, **options))
    with contexts_of(head) as contexts:
        tokens = generate(target, **options, assistant_model=head)
    states = target(tokens, output_hidden_states=True).hidden_states
    expected = torch.cat([states[i + 1] for i in head.config.target_layer_ids], dim=-1)
    seen = torch.cat(contexts, dim=1)
    assert tokens.shape[1] - 7 <= seen.shape[1] < tokens.shape[1]
    torch.testing.assert_close(seen, expected[:, : seen.shape[1]], rtol=1e-3, atol=1e-3)


class contexts_of:  # noqa: N801, reads as a phrase
    """Collects the context that a head is given."""

    def __init__(self, head: PreTrainedModel) -> None:
        self.head = head

    def __enter__(self) -> list[Tensor]:
        contexts: list[Tensor] = []
        self.handle = self.head.register_forward_pre_hook(
            lambda module, args, kwargs: contexts.append(kwargs["context_hidden_states"]), with_kwargs=True
        )
        return contexts

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()


# --- sampling ---


@pytest.mark.parametrize("head_name", ["random", "last_token"])
def test_sampled_texts_are_as_frequent_as_the_target_says(make_target: Callable, head_name: str) -> None:
    """400 draws of 3 tokens among 4, chi-square against the exact probabilities of all 64 texts.

    With 63 degrees of freedom, 1 in 10000 honest samples exceeds 114.
    """
    target = make_target(vocab_size=4, num_hidden_layers=2, initializer_range=0.25)
    prompt = torch.tensor([[2, 0, 1]])
    texts = torch.tensor(list(itertools.product(range(4), repeat=3)))
    inputs = torch.cat([prompt.expand(64, -1), texts], dim=1)
    with torch.no_grad():
        log_probs = target(inputs).logits[:, 2:-1].log_softmax(dim=-1)
    expected = log_probs.gather(2, texts[:, :, None]).sum(dim=(1, 2)).exp()
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))

    head = (HEADS | HOSTILE_HEADS)[head_name](target, texts[:1])
    torch.manual_seed(5)
    counts, accepted = torch.zeros(64), 0
    for _ in range(400):
        output = target.generate(
            prompt,
            do_sample=True,
            top_k=0,
            max_new_tokens=3,
            assistant_model=head,
            num_assistant_tokens=6,
            return_dict_in_generate=True,
        )
        first, second, third = output.sequences[0, 3:].tolist()
        counts[16 * first + 4 * second + third] += 1
        accepted += output.statistics.num_accepted_tokens
    assert 0 < accepted < 800
    assert chi_square(counts, expected) < 114
    # The test can tell: it refuses another distribution, and one that is somewhat too greedy.
    assert chi_square(400 * expected[torch.randperm(64)], expected) > 114
    greedier = expected**1.5 / (expected**1.5).sum()
    assert chi_square(400 * greedier, expected) > 114, chi_square(400 * greedier, expected)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    wanted = counts.sum() * expected
    return float(((counts - wanted) ** 2 / wanted).sum())


def test_drafting_draws_no_random_numbers(target: PreTrainedModel) -> None:
    head = random_head(target)
    before = torch.get_rng_state()
    target.generate(PROMPT, do_sample=False, max_new_tokens=9, assistant_model=head)
    assert torch.equal(torch.get_rng_state(), before)


# --- half precision ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_tokens_are_the_likeliest_up_to_rounding(make_target: Callable, attention: str) -> None:
    target = make_target(attn_implementation=attention).to(torch.bfloat16)
    for head in (random_head(target), oracle_head(target, generate(target, max_new_tokens=31))):
        assert head.dtype == torch.bfloat16
        tokens = generate(target, max_new_tokens=31, assistant_model=head)
        with torch.no_grad():
            logits = target(tokens).logits[:, 5:-1].float()
        chosen = logits.gather(2, tokens[:, 6:, None])[..., 0]
        missing = logits.max(dim=-1).values - chosen
        assert missing.max() < 0.15
        assert (logits.max(dim=-1).values - logits.median(dim=-1).values).min() > 1.0


# --- streamer ---


@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("option", ["greedy", "1_token", "eos", "sample", "stopping_criteria"])
def test_the_streamer_gets_the_prompt_then_every_token_then_the_end(
    target: PreTrainedModel, text: Tensor, option: str, head_name: str
) -> None:
    options = OPTIONS[option](text[0].tolist())
    plain, streamer = RecordingStreamer(), RecordingStreamer()
    tokens = generate(target, **options, streamer=plain)
    generate(target, **options, streamer=streamer, assistant_model=HEADS[head_name](target, text))
    assert streamer.tokens == tokens[0].tolist()
    assert (streamer.puts, streamer.shapes) == (plain.puts, plain.shapes)
    assert streamer.num_ends == 1


def test_a_text_streamer_prints_the_same_text(golden: Path, capsys: pytest.CaptureFixture) -> None:
    target = AutoModelForCausalLM.from_pretrained(golden / "target")
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    text = generate(target)
    capsys.readouterr()
    generate(target, streamer=TextStreamer(tokenizer, skip_prompt=True))
    plain = capsys.readouterr().out
    generate(target, streamer=TextStreamer(tokenizer, skip_prompt=True), assistant_model=oracle_head(target, text))
    assert capsys.readouterr().out == plain
    assert plain.split() == [f"t{token}" for token in text[0, 6:].tolist()]


# --- caches ---


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_cache_may_have_its_older_name(target: PreTrainedModel, text: Tensor) -> None:
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(PROMPT[:, :4], past_key_values=cache)
    options = {"max_new_tokens": 31, "return_dict_in_generate": True, "assistant_model": random_head(target)}
    output = generate(target, past_key_values=cache, **options)
    assert output.sequences.tolist() == text.tolist()
    assert output.past_key_values is cache


@pytest.mark.parametrize("head_name", HEADS)
def test_the_returned_cache_is_that_of_plain_generate(target: PreTrainedModel, text: Tensor, head_name: str) -> None:
    head = HEADS[head_name](target, text)
    plain = generate(target, max_new_tokens=13, return_dict_in_generate=True)
    output = generate(target, max_new_tokens=13, return_dict_in_generate=True, assistant_model=head)
    assert_same_cache(output[CACHE], plain[CACHE])
    assert output[CACHE].get_seq_length() == output.sequences.shape[1] - 1

    for assistant in (None, head):
        cache = copy.deepcopy(output[CACHE])
        longer = generate(target, output.sequences, **{CACHE: cache}, max_new_tokens=18, assistant_model=assistant)
        assert longer.tolist() == text[:, : longer.shape[1]].tolist()


@pytest.mark.parametrize(
    ("num_cached", "head_name", "has_config"), pairwise(itertools.product([1, 3, 5], HEADS, [True, False]))
)
def test_a_cached_prefix_is_continued(
    target: PreTrainedModel, text: Tensor, head_name: str, num_cached: int, has_config: bool
) -> None:
    head = HEADS[head_name](target, text)
    for prompt in (PROMPT, PROMPT[:, num_cached:]):  # all of it, or what is not cached yet
        cache = DynamicCache(config=target.config) if has_config else DynamicCache()
        with torch.no_grad():
            target(PROMPT[:, :num_cached], **{CACHE: cache})
        output = generate(
            target,
            prompt,
            attention_mask=torch.ones_like(PROMPT),
            **{CACHE: cache},
            assistant_model=head,
            return_dict_in_generate=True,
        )
        assert output.sequences.tolist() == torch.cat([prompt, text[:, 6:25]], dim=1).tolist()
        assert output[CACHE] is cache
        assert cache.get_seq_length() == 24
        if head_name == "oracle":
            assert output.statistics.num_rounds == 3


def test_plain_and_drafted_turns_can_alternate_on_one_cache(target: PreTrainedModel, text: Tensor) -> None:
    head = random_head(target)
    cache = DynamicCache(config=target.config)
    tokens = PROMPT
    for assistant in (head, None, head, None):
        tokens = generate(target, tokens, **{CACHE: cache}, max_new_tokens=7, assistant_model=assistant)
    assert tokens.tolist() == text[:, : tokens.shape[1]].tolist()
    assert cache.get_seq_length() == tokens.shape[1] - 1


# --- padding and positions ---


@pytest.mark.parametrize(
    ("option", "head_name", "attention"),
    pairwise(
        itertools.product(["greedy", "sample", "prefill_chunk_size_4", "repetition_penalty"], HEADS, ["sdpa", "eager"])
    ),
)
def test_left_padding_is_not_seen(make_target: Callable, attention: str, head_name: str, option: str) -> None:
    target = make_target(attn_implementation=attention)
    padded = torch.cat([torch.full((1, 4), 63), PROMPT], dim=1)
    mask = (torch.arange(10) >= 4).long()[None]
    options = OPTIONS[option](PROMPT[0].tolist()) | {"attention_mask": mask}
    plain = generate(target, padded, **options, **WITH_EVERYTHING)
    assert plain.sequences.tolist() != generate(target, padded, **(options | {"attention_mask": None})).tolist()
    head = HEADS[head_name](target, plain.sequences[:, 4:])
    output = generate(target, padded, **options, **WITH_EVERYTHING, assistant_model=head)
    assert_same_output(output, plain)
    if head_name == "oracle":
        assert output.statistics.num_rounds == 3


@pytest.mark.parametrize("head_name", HEADS)
def test_given_positions_are_kept(target: PreTrainedModel, head_name: str) -> None:
    positions = torch.tensor([[7, 8, 9, 20, 21, 22]])
    plain = generate(target, position_ids=positions, **WITH_EVERYTHING)
    assert plain.sequences.tolist() != generate(target).tolist()
    at_positions = torch.cat([torch.zeros(1, 17, dtype=torch.long), plain.sequences], dim=1)
    head = HEADS[head_name](target, at_positions)
    output = generate(target, position_ids=positions, **WITH_EVERYTHING, assistant_model=head)
    assert_same_output(output, plain)
    if head_name == "oracle":
        assert output.statistics.num_rounds == 3


# --- options of the tree ---


def test_the_defaults_of_transformers_count_as_not_given(target: PreTrainedModel) -> None:
    head = random_head(target, num_assistant_tokens=9)

    def drafted(**options: Any) -> list[int]:
        output = generate(target, assistant_model=head, return_dict_in_generate=True, **options)
        return output.statistics.drafted_nodes

    assert drafted()[0] == 9
    assert drafted(num_assistant_tokens=20, assistant_confidence_threshold=0.4) == drafted()
    assert drafted(num_assistant_tokens=5)[0] == 5
    assert drafted(num_assistant_tokens=19)[0] == 19
    assert drafted(assistant_confidence_threshold=0.9)[0] < 9


def test_a_confident_head_drafts_a_chain(target: PreTrainedModel, text: Tensor) -> None:
    output = generate(
        target,
        assistant_model=oracle_head(target, text),
        assistant_confidence_threshold=0.9,
        return_dict_in_generate=True,
    )
    assert output.statistics.drafted_nodes == [5, 5, 5]
    assert output.statistics.accepted_lengths == [5, 5, 5]


def test_the_options_of_the_head_hold_where_the_call_names_none(target: PreTrainedModel, text: Tensor) -> None:
    head = oracle_head(target, text, num_assistant_tokens=3, assistant_confidence_threshold=0.9)
    output = generate(target, assistant_model=head, return_dict_in_generate=True)
    assert output.statistics.drafted_nodes == [3, 3, 3, 3, 1]


# --- how many nodes ---


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> InTurn:
    count = InTurn()
    monkeypatch.setattr("jetspec_hf.decoding.workers.node_count_of", lambda *place: count)
    return count


@pytest.mark.parametrize(
    ("option", "head_name"),
    [
        *itertools.product(
            ["greedy", "40_tokens", "eos", "sample", "stateful_processor", "repetition_penalty", "confident_nodes"],
            HEADS,
        ),
        *itertools.product(["eos", "sample"], HOSTILE_HEADS),
    ],
)
def test_sizes_that_change_from_round_to_round_give_the_same_text(
    target: PreTrainedModel, text: Tensor, in_turn: InTurn, option: str, head_name: str
) -> None:
    plain = generate(target, **OPTIONS[option](text[0].tolist()), **WITH_EVERYTHING)
    head = (HEADS | HOSTILE_HEADS)[head_name](target, plain.sequences)
    head.config.num_assistant_tokens = None
    output = generate(target, **OPTIONS[option](text[0].tolist()), **WITH_EVERYTHING, assistant_model=head)
    assert_same_output(output, plain)
    drafted = output.statistics.drafted_nodes
    assert len(drafted) == len(in_turn.chosen)
    assert all(nodes <= chosen.num_nodes for nodes, chosen in zip(drafted, in_turn.chosen, strict=True))
    statistics = output.statistics
    assert statistics.num_accepted_tokens + statistics.num_rounds + 1 == statistics.num_new_tokens


@pytest.mark.parametrize("is_chain", [False, True])
@pytest.mark.parametrize("option", ["greedy", "sample", "eos", "confident_nodes", "repetition_penalty"])
def test_grafts_alone_are_accepted_and_the_head_rests(
    make_target: Callable, in_turn: InTurn, monkeypatch: pytest.MonkeyPatch, option: str, is_chain: bool
) -> None:
    target, prompt = make_target(vocab_size=8), torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    monkeypatch.setattr(in_turn, "ALL", [Choice(31, runs_head=False)])
    options = {"max_new_tokens": 60} | OPTIONS[option](generate(target, prompt, max_new_tokens=30)[0].tolist())
    plain = generate(target, prompt, **options, **WITH_EVERYTHING)
    head = random_head(target)
    threshold = options.pop("assistant_confidence_threshold", 0.0)
    drafting = DraftOptions(None, threshold, prompt_lookup_num_tokens=16, is_chain=is_chain)
    with contexts_of(head) as contexts:
        output = generate(
            target, prompt, **options, **WITH_EVERYTHING, custom_generate=decode_with(head, options=drafting)
        )
    assert_same_output(output, plain)
    assert contexts == []
    assert output.statistics.num_drafted_tokens > 0 or threshold
    assert max(output.statistics.drafted_nodes) <= (16 if is_chain else 31)
    if option == "greedy":
        assert output.statistics.tokens_per_round > 1.5


@pytest.mark.parametrize(
    "options", [{"attn_implementation": "eager"}, {"sliding_window": 4, "use_sliding_window": True}]
)
def test_plain_rounds_see_what_drafted_ones_see(make_target: Callable, in_turn: InTurn, options: dict) -> None:
    target = make_target(**options, max_window_layers=2)
    padded = torch.cat([torch.full((1, 4), 63), PROMPT], dim=1)
    for prompt, mask in [(PROMPT, None), (padded, (torch.arange(10) >= 4).long()[None])]:
        plain = generate(target, prompt, attention_mask=mask, max_new_tokens=31)
        head = random_head(target, num_assistant_tokens=None)
        assert generate(target, prompt, attention_mask=mask, max_new_tokens=31, assistant_model=head).equal(plain)


def test_the_head_sees_all_of_a_text_that_was_partly_decoded_plainly(target: PreTrainedModel, in_turn: InTurn) -> None:
    head = random_head(target, num_assistant_tokens=None)
    with contexts_of(head) as contexts:
        output = generate(target, assistant_model=head, max_new_tokens=40, return_dict_in_generate=True)
    tokens, drafted = output.sequences, output.statistics.drafted_nodes
    ran = [choice.runs_head and nodes > 0 for choice, nodes in zip(in_turn.chosen, drafted, strict=True)]
    assert len(contexts) == sum(ran) < len(drafted) - 3
    states = target(tokens, output_hidden_states=True).hidden_states
    expected = torch.cat([states[i + 1] for i in head.config.target_layer_ids], dim=-1)
    seen = torch.cat(contexts, dim=1)
    torch.testing.assert_close(seen, expected[:, : seen.shape[1]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head_name", HEADS)
def test_no_clock_can_change_the_text(
    target: PreTrainedModel, text: Tensor, head_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = random.Random(0)
    now = itertools.accumulate(numbers.choice([0.0, 1e-9, 1e-3, 50.0]) for _ in itertools.count())
    monkeypatch.setattr("jetspec_hf.decoding.outputs.time.perf_counter", lambda: next(now))
    head = HEADS[head_name](target, text)
    head.config.num_assistant_tokens = None
    sizes = set()
    for _ in range(4):
        output = generate(target, max_new_tokens=31, assistant_model=head, return_dict_in_generate=True)
        assert output.sequences.equal(text)
        sizes |= set(output.statistics.drafted_nodes)
    assert len(sizes) > 2


def test_numbers_that_are_given_hold(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_to_choose(*args: Any) -> NodeCount:
        raise AssertionError("asked how many nodes to draft")

    monkeypatch.setattr("jetspec_hf.decoding.workers.node_count_of", refuse_to_choose)
    head = random_head(target, num_assistant_tokens=None)
    output = generate(target, assistant_model=head, num_assistant_tokens=5, return_dict_in_generate=True)
    assert set(output.statistics.drafted_nodes[:-3]) == {5}
    head.config.num_assistant_tokens = 6
    output = generate(target, assistant_model=head, return_dict_in_generate=True)
    assert set(output.statistics.drafted_nodes[:-3]) == {6}
    head.config.num_assistant_tokens = None
    with pytest.raises(AssertionError, match="asked"):
        generate(target, assistant_model=head, num_assistant_tokens=20)  # filled in by transformers, so not given


# --- statistics ---


@pytest.mark.parametrize("option", ["greedy", "1_token", "2_tokens", "40_tokens", "eos", "sample", "stopping_criteria"])
@pytest.mark.parametrize("head_name", HEADS)
def test_statistics_add_up(target: PreTrainedModel, text: Tensor, option: str, head_name: str) -> None:
    options = OPTIONS[option](text[0].tolist())
    num_forwards = 0

    def count(*args: Any) -> None:
        nonlocal num_forwards
        num_forwards += 1

    head = HEADS[head_name](target, text)
    with target.register_forward_hook(count):
        output = generate(target, **options, assistant_model=head, return_dict_in_generate=True)
    assert isinstance(output, JetSpecGenerateOutput)
    statistics = output.statistics
    assert isinstance(statistics, DraftStatistics)
    assert statistics.num_prompt_tokens == 6
    assert statistics.num_new_tokens == output.sequences.shape[1] - 6
    assert statistics.num_accepted_tokens + statistics.num_rounds + 1 == statistics.num_new_tokens
    assert statistics.num_rounds == len(statistics.accepted_lengths) == num_forwards - 1
    assert statistics.tokens_per_round == (statistics.num_new_tokens - 1) / max(num_forwards - 1, 1)
    pairs = zip(statistics.accepted_lengths, statistics.drafted_nodes, strict=True)
    assert all(accepted <= drafted <= 24 for accepted, drafted in pairs)
    phases = {"prefill", "processors"} if option in ("sample", "stopping_criteria") else {"prefill"}
    phases = phases | ({"draft", "build", "verify", "accept", "commit"} if statistics.num_rounds else set())
    assert statistics.seconds.keys() == phases
    assert all(seconds >= 0 for seconds in statistics.seconds.values())


def test_a_phase_does_not_count_the_phases_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 9.0])  # accept from 0 to 9, in it processors from 1 to 4
    monkeypatch.setattr("jetspec_hf.decoding.outputs.time.perf_counter", lambda: next(clock))
    statistics = DraftStatistics(num_prompt_tokens=1, seconds={"verify": 7.0})
    statistics.timed("accept", statistics.timed("processors", lambda: None))()
    assert statistics.seconds == {"verify": 7.0, "accept": 6.0, "processors": 3.0}


@pytest.mark.parametrize("head_name", ["random", "markov"])
def test_a_greedy_round_waits_for_the_device_once(
    target: PreTrainedModel, text: Tensor, head_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = HEADS[head_name](target, text)
    num_waits = 0

    def counted(name: str) -> Callable:
        method = getattr(Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_waits
            num_waits += 1
            return method(*args, **kwargs)

        return call

    monkeypatch.setattr(Tensor, "is_cpu", False)  # on a CPU there is nothing to wait for
    for name in ("tolist", "item", "cpu", "nonzero", "__int__", "__bool__", "__index__", "__float__"):
        monkeypatch.setattr(Tensor, name, counted(name))

    def waits(max_new_tokens: int) -> tuple[int, int]:
        nonlocal num_waits
        num_waits = 0
        output = generate(target, max_new_tokens=max_new_tokens, assistant_model=head, return_dict_in_generate=True)
        return num_waits, output.statistics.num_rounds

    (few, few_rounds), (many, many_rounds) = waits(8), waits(30)
    assert many_rounds > few_rounds
    assert many - few == many_rounds - few_rounds


# --- what a call leaves behind ---


def hooks_of(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class BrokenError(Exception):
    pass


class Raises(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= 10:
            raise BrokenError
        return scores


def test_hooks_are_there_during_a_call_and_gone_after(target: PreTrainedModel) -> None:
    during = []

    class CountsHooks(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            during.append(hooks_of(target))
            return scores

    head = random_head(target)
    before = hooks_of(target)
    generate(target, logits_processor=[CountsHooks()], assistant_model=head)
    assert set(during) == {before + len(head.config.target_layer_ids)}
    assert hooks_of(target) == before


@pytest.mark.parametrize("where", ["processor", "head", "target"])
def test_hooks_are_gone_after_a_call_that_fails(target: PreTrainedModel, text: Tensor, where: str) -> None:
    head = random_head(target)
    before = hooks_of(target)
    options: dict[str, Any] = {}
    num_calls = 0

    def fail(*args: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise BrokenError

    if where == "processor":
        options["logits_processor"] = [Raises()]
    handle = {"processor": None, "head": head, "target": target.lm_head}[where]
    removable = None if handle is None else handle.register_forward_pre_hook(fail)
    with pytest.raises(BrokenError):
        generate(target, **options, assistant_model=head)
    if removable is not None:
        removable.remove()
    assert hooks_of(target) == before
    assert generate(target, assistant_model=head).tolist() == text[:, :25].tolist()


def test_a_call_changes_neither_head_nor_target(target: PreTrainedModel) -> None:
    head = random_head(target)
    before = [copy.deepcopy(model.state_dict()) for model in (head, target)]
    configs = [model.config.to_dict() for model in (head, target)]
    defaults = target.generation_config.to_dict()
    generate(target, assistant_model=head, num_assistant_tokens=7)
    for model, weights, config in zip((head, target), before, configs, strict=True):
        torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)
        assert model.config.to_dict() == config
    assert target.generation_config.to_dict() == defaults


def test_threads_may_share_a_target(target: PreTrainedModel) -> None:
    prompts = [PROMPT, torch.tensor([[40, 2, 2, 61, 33, 7, 8, 19, 1]]), torch.tensor([[11]])]
    heads = [random_head(target, seed=seed, block_size=4 + seed) for seed in range(3)]
    expected = [generate(target, prompt) for prompt in prompts]
    alone = [run_recorded(target, prompt, head) for prompt, head in zip(prompts, heads, strict=True)]
    start = threading.Barrier(3)
    together: dict[int, Any] = {}

    def run(i: int) -> None:
        start.wait()
        together[i] = [run_recorded(target, prompts[i], heads[i]) for _ in range(2)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        for tokens, contexts in together[i]:
            assert tokens.tolist() == expected[i].tolist()
            torch.testing.assert_close(contexts, alone[i][1])


def run_recorded(target: PreTrainedModel, prompt: Tensor, head: PreTrainedModel) -> tuple[Tensor, Tensor]:
    with contexts_of(head) as contexts:
        tokens = target.generate(prompt, do_sample=False, max_new_tokens=19, assistant_model=head)
    return tokens, torch.cat(contexts, dim=1)


def test_inference_mode_gives_the_same_tokens(target: PreTrainedModel, text: Tensor) -> None:
    with torch.inference_mode():
        tokens = generate(target, max_new_tokens=31, assistant_model=random_head(target))
    assert tokens.tolist() == text.tolist()


# --- comparing ---


def assert_same_output(ours: Any, plain: Any) -> None:
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(plain[name]) == plain.sequences.shape[1] - (ours.statistics.num_prompt_tokens)
        for one, other in zip(ours[name], plain[name], strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def assert_same_cache(ours: DynamicCache, plain: DynamicCache) -> None:
    assert len(ours.layers) == len(plain.layers)
    for one, other in zip(ours.layers, plain.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.values, other.values, rtol=1e-3, atol=1e-3)


# --- heads and targets that are kept in other ways ---


def test_a_head_in_training_drafts_as_in_evaluation_and_goes_on_training(target: PreTrainedModel) -> None:
    head = random_head(target, attention_dropout=0.5).train()
    getattr(head, f"{CHECKPOINTING}_enable")()
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 30}
    torch.manual_seed(3)
    plain = generate(target, **options)
    torch.manual_seed(3)
    assert generate(target, **options, assistant_model=head).tolist() == plain.tolist()
    assert head.training
    with pytest.raises(RuntimeError, match="broken"):
        generate(target, assistant_model=head, logits_processor=LogitsProcessorList([BrokenProcessor()]))
    assert head.training


def test_an_offloaded_target_drafts(target: PreTrainedModel, text: Tensor) -> None:
    offloaded = cpu_offload(copy.deepcopy(target), execution_device=torch.device("cpu"))
    assert offloaded.lm_head.weight.is_meta
    head = random_head(target)
    assert generate(offloaded, max_new_tokens=31, assistant_model=head).tolist() == text.tolist()


def test_what_comes_out_can_be_trained_on(target: PreTrainedModel) -> None:
    output = generate(
        target,
        max_new_tokens=12,
        assistant_model=random_head(target),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    states = [tensor for layer in output[CACHE].layers for tensor in (layer.keys, layer.values)]
    assert not any(tensor.is_inference() for tensor in [output.sequences, *output.scores, *output.logits, *states])
    target.train()(output.sequences, labels=output.sequences).loss.backward()
