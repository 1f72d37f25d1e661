"""Targets of other families, with the prompt longer than any sliding window."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
import transformers
from heads import HEADS
from pairwise import pairwise
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    StoppingCriteria,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from jetspec_hf.upstream import CACHE

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46]])
NUM_PADS = 3
NAMES = ["markov", "oracle"]  # Qwen3 alone is tried with all others
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
VISION = {
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
    **dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 1000),
}
UNTIED = {"tie_word_embeddings": False}  # tied and random, a Gemma repeats its last token for ever
BY_LAYER = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4}
GEMMA4 = {"sliding_window": 8, "layer_types": MIXED, "global_head_dim": 16, "num_global_key_value_heads": 1}


@dataclass(frozen=True)
class Family:
    """How to build a tiny target."""

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    options: dict[str, Any] = field(default_factory=dict)
    attentions: tuple[str, ...] = ("sdpa", "eager")
    wrapper: dict[str, Any] | None = None  # what else the configuration has around that of the text

    def build(self, attention: str) -> PreTrainedModel:
        fields = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.4,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        set_seed(0)
        text = fields | self.options
        text = text if self.wrapper is None else {"text_config": text} | self.wrapper
        config = self.config_class(**text, attn_implementation=attention)
        model = self.model_class(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "layernorm" not in name and "norm" not in name and weight.std() == 0:
                    weight.normal_(std=0.4)  # some families start biases, sinks or experts at a constant
        return model


FAMILIES = {
    "qwen2": Family(Qwen2ForCausalLM, Qwen2Config),
    "qwen2_sliding": Family(
        Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    ),
    "qwen3_mixed": Family(
        Qwen3ForCausalLM, Qwen3Config, {"use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED}
    ),
    "qwen3_sliding": Family(
        Qwen3ForCausalLM,
        Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 4},
    ),
    "qwen3_moe": Family(Qwen3MoeForCausalLM, Qwen3MoeConfig, MOE),
    "qwen3_moe_sliding": Family(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, MOE | {"use_sliding_window": True, "sliding_window": 8}
    ),
    "llama": Family(LlamaForCausalLM, LlamaConfig),
    "mistral": Family(MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "mistral_full": Family(MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "gemma2": Family(
        Gemma2ForCausalLM,
        Gemma2Config,
        UNTIED | {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 12.0},
        ("eager",),
    ),
    "gemma3": Family(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        UNTIED | {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": MIXED},
    ),
    "gemma4": Family(Gemma4ForCausalLM, Gemma4TextConfig, UNTIED | GEMMA4 | BY_LAYER),
    "gemma4_sharing": Family(
        Gemma4ForCausalLM, Gemma4TextConfig, UNTIED | GEMMA4 | BY_LAYER | {"num_kv_shared_layers": 2}, ("sdpa",)
    ),
    "gpt_oss": Family(
        GptOssForCausalLM,
        GptOssConfig,
        {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": MIXED},
        ("eager",),
    ),
    "qwen2_5_vl": Family(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, MROPE, wrapper=VISION),
    "qwen3_vl": Family(Qwen3VLForConditionalGeneration, Qwen3VLConfig, MROPE, ("sdpa",), VISION),
}
# With 5.15, transformers itself fails to read their prompts in chunks, those of Gemma 4 into static caches.
NO_CHUNKS = {"gemma4", "gemma4_sharing", "qwen2_5_vl", "qwen3_vl"} if transformers.__version__ < "5.16" else set()
PAIRS = [(family, attention) for family in FAMILIES for attention in FAMILIES[family].attentions]
SLIDING = [
    "qwen2_sliding",
    "qwen3_mixed",
    "qwen3_sliding",
    "qwen3_moe_sliding",
    "mistral",
    "gemma2",
    "gemma3",
    "gemma4",
    "gpt_oss",
]

# Options of `generate`, given the text that the target continues the prompt with.
OPTIONS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "greedy": lambda text: {},
    "sample": lambda text: {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "eos_list": lambda text: {"eos_token_id": [text[22], text[23]]},
    "repetition_penalty": lambda text: {"repetition_penalty": 1.5},
    "prefill_chunk_size": lambda text: {"prefill_chunk_size": 4},
    "max_length": lambda text: {"max_length": len(text) - 2, "max_new_tokens": None},
    "max_time": lambda text: {"max_time": 3600.0},
    "stop_strings": lambda text: {"stop_strings": [f"<{text[-4]}>"], "tokenizer": TOKENIZER},
    "own_criterion": lambda text: {"stopping_criteria": [EndsAt(len(text) - 4)]},
}
CASES = pairwise((*pair, *rest) for pair in PAIRS for rest in product(OPTIONS, NAMES))
# The criterion of transformers needs a tokenizer that knows the word "abcdef".
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(
        WordLevel({f"<{token}>": token for token in range(63)} | {"abcdef": 63}, unk_token="<0>")
    )
)


class EndsAt(StoppingCriteria):
    """Ends a text at a length, and sees every length on the way."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.shape[1])
        assert self.seen == list(range(self.seen[0], self.seen[-1] + 1))
        return torch.full((1,), input_ids.shape[1] >= self.length)


class TokenList(BaseStreamer):
    """Gathers what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_ends = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.num_ends += 1


def generate(target: PreTrainedModel, prompt: Tensor = PROMPT, **options: Any) -> Any:
    torch.manual_seed(11)
    everything = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    return target.generate(prompt, **({"max_new_tokens": 13, "do_sample": False} | everything | options))


def assert_same_output(ours: Any, plain: Any) -> None:
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(plain[name]) == ours.statistics.num_new_tokens
        for one, other in zip(ours[name], plain[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def assert_oracle_was_accepted(output: Any) -> None:
    """5 drafted tokens and the bonus in each round, after the one of the prefill."""
    assert output.statistics.num_rounds == -(-(output.statistics.num_new_tokens - 1) // 6)


@pytest.mark.parametrize(("family", "attention"), PAIRS)
def test_a_head_gives_what_the_family_gives(family: str, attention: str) -> None:
    target = FAMILIES[family].build(attention)
    text = generate(target).sequences[0].tolist()
    assert len(set(text[PROMPT.shape[1] :])) > 3  # a text that could go wrong
    for option, head_name in [case[2:] for case in CASES if case[:2] == (family, attention)]:
        make_options = OPTIONS[option]
        if option == "prefill_chunk_size" and family in NO_CHUNKS:
            continue
        plain = generate(target, **make_options(text))
        head = HEADS[head_name](target, plain.sequences)
        output = generate(target, **make_options(text), assistant_model=head)
        assert_same_output(output, plain)
        assert output[CACHE].get_seq_length() == output.sequences.shape[1] - 1
        if head_name == "oracle":
            assert_oracle_was_accepted(output)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_streamed_once_and_one_token_is_enough(family: str) -> None:
    target = FAMILIES[family].build(FAMILIES[family].attentions[0])
    plain = generate(target).sequences
    for head_name in NAMES:
        for number in (1, 13):
            streamer, text = TokenList(), plain[:, : PROMPT.shape[1] + number]
            head = HEADS[head_name](target, plain)
            output = generate(target, max_new_tokens=number, assistant_model=head, streamer=streamer)
            assert output.sequences.tolist() == text.tolist()
            assert (streamer.tokens, streamer.num_ends) == (text[0].tolist(), 1)


@pytest.mark.parametrize(("family", "head_name"), [*zip(FAMILIES, cycle(NAMES), strict=False)])
def test_in_bfloat16_each_token_is_all_but_the_likeliest(family: str, head_name: str) -> None:
    target = FAMILIES[family].build(FAMILIES[family].attentions[0]).to(torch.bfloat16)
    head = HEADS[head_name](target, generate(target).sequences)
    text = generate(target, assistant_model=head).sequences
    with torch.no_grad():
        logits = target(text).logits[0, PROMPT.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, text[0, PROMPT.shape[1] :, None])[:, 0]
    assert ((logits.max(dim=-1).values - chosen) <= 0.1 * logits.std(dim=-1)).all()


@pytest.mark.parametrize(
    ("family", "attention", "head_name"), pairwise((*pair, name) for pair in PAIRS for name in NAMES)
)
def test_left_padding_is_not_seen(family: str, attention: str, head_name: str) -> None:
    target = FAMILIES[family].build(attention)
    padded = torch.cat([torch.full((1, NUM_PADS), 63), PROMPT], dim=1)
    mask = (torch.arange(padded.shape[1]) >= NUM_PADS).long()[None]
    plain = generate(target, padded, attention_mask=mask)
    head = HEADS[head_name](target, plain.sequences[:, NUM_PADS:])
    output = generate(target, padded, attention_mask=mask, assistant_model=head)
    assert_same_output(output, plain)
    if head_name == "oracle":
        assert_oracle_was_accepted(output)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_what_tells_text_from_images_may_say_that_all_is_text(family: str) -> None:
    target = FAMILIES[family].build("sdpa")
    kinds = {"mm_token_type_ids": torch.zeros_like(PROMPT)}
    plain = generate(target, **kinds)
    assert_same_output(generate(target, **kinds, assistant_model=HEADS["markov"](target, plain.sequences)), plain)
    kinds["mm_token_type_ids"][0, 3] = 1
    with pytest.raises(ValueError, match="without mm_token_type_ids"):
        generate(target, **kinds, assistant_model=HEADS["markov"](target, plain.sequences))


# Less and more is cached than a window.
@pytest.mark.parametrize(("family", "num_cached", "head_name"), pairwise(product(FAMILIES, (4, 12), NAMES)))
def test_a_cache_is_continued_and_can_be_continued(family: str, num_cached: int, head_name: str) -> None:
    target = FAMILIES[family].build(FAMILIES[family].attentions[0])
    text = generate(target, max_new_tokens=26).sequences
    head = HEADS[head_name](target, text)
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(PROMPT[:, :num_cached], **{CACHE: cache})
    first = generate(target, **{CACHE: cache}, assistant_model=head)
    # The cache is as plain decoding leaves it: its windows slide on.
    assert not any(getattr(layer, "record_past", False) for layer in first[CACHE].layers)
    assert first.sequences.tolist() == text[:, : first.sequences.shape[1]].tolist()
    for assistant in (None, head):
        cache = copy.deepcopy(first[CACHE])
        second = generate(target, first.sequences, **{CACHE: cache}, assistant_model=assistant)
        assert second.sequences.tolist() == text.tolist()


@pytest.mark.parametrize("head_name", NAMES)
@pytest.mark.parametrize("family", SLIDING)
def test_a_cache_without_windows_serves_a_sliding_target(family: str, head_name: str) -> None:
    target = FAMILIES[family].build(FAMILIES[family].attentions[0])
    text = generate(target).sequences
    head = HEADS[head_name](target, text)
    output = generate(target, **{CACHE: DynamicCache()}, assistant_model=head)
    assert output.sequences.tolist() == text.tolist()
    if head_name == "oracle":
        assert_oracle_was_accepted(output)


@pytest.mark.parametrize("family", SLIDING)
def test_the_windows_of_these_targets_matter(family: str) -> None:
    target = FAMILIES[family].build(FAMILIES[family].attentions[0])
    wide = FAMILIES[family].options | {"sliding_window": 100}
    without = replace(FAMILIES[family], options=wide).build(FAMILIES[family].attentions[0])
    without.load_state_dict(target.state_dict())
    with torch.no_grad():
        difference = (without(PROMPT).logits - target(PROMPT).logits)[0].abs().amax(dim=-1)
    assert difference[:4].max() < 1e-3
    assert difference[-1] > 1e-2


@pytest.mark.parametrize("num_shared", [0, 2])
def test_a_target_with_several_streams_of_hidden_states_is_refused(num_shared: int) -> None:
    options = UNTIED | BY_LAYER | {"sliding_window": 8, "layer_types": MIXED, "num_kv_shared_layers": num_shared}
    options |= {"activation_sparsity_pattern": None, "laurel_rank": 4}
    target = Family(Gemma3nForCausalLM, Gemma3nTextConfig, options).build("sdpa")
    with pytest.raises(ValueError, match=r"Gemma3nForCausalLM give .* \(4, 1, 14, 32\), several streams for one token"):
        generate(target, assistant_model=HEADS["random"](target, PROMPT))


def test_shared_keys_and_values_fit_a_static_cache() -> None:
    target = FAMILIES["gemma4_sharing"].build("sdpa")
    plain = generate(target)
    output = generate(target, assistant_model=HEADS["oracle"](target, plain.sequences), cache_implementation="static")
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert_oracle_was_accepted(output)
