"""Every refusal of a call, before the target has run and a token has come; and targets that look alike and verify."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.heads import CHECKPOINTING, markov_head, random_head
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from jetspec_hf.upstream import CACHE

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5]])
STATIC = {"cache_implementation": "static"}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
Targets = Callable[..., PreTrainedModel]


@dataclass
class Refusal:
    """A call, and what its error must say.

    Args:
        match (`str`): pattern of the message.
        options (`dict`): of `generate`; functions are called with the target.
        target (`Callable`): makes the target, given what makes the usual one.
        head (`Callable`): makes the head for the usual target.
    """

    match: str
    options: dict[str, Any] = field(default_factory=dict)
    target: Callable[[Targets], PreTrainedModel] = lambda make_target: make_target()
    head: Callable[[PreTrainedModel], PreTrainedModel] = random_head


class Unasked(BaseStreamer):
    """Takes the prompt, and nothing else."""

    def __init__(self) -> None:
        self.has_prompt = False

    def put(self, value: Tensor) -> None:
        assert not self.has_prompt
        self.has_prompt = True

    def end(self) -> None:
        raise AssertionError("ended")


class QuantizedLikeLayer(DynamicLayer):
    pass


def odd_cache(target: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [QuantizedLikeLayer()]
    return cache


def changed(change: Callable[[PreTrainedModel], None], make_target: Targets) -> PreTrainedModel:
    target = make_target()
    change(target)
    return target


def compile_forward(target: PreTrainedModel) -> None:
    target.forward = torch.compile(target.forward, backend="eager")


def compile_target(target: PreTrainedModel) -> None:
    target.compile(backend="eager")


def compile_decoder(target: PreTrainedModel) -> None:
    target.model.compile(backend="eager")


def compile_layers(target: PreTrainedModel) -> None:
    for layer in target.model.layers:
        layer.compile(backend="eager")


def attending(attention: str, make_target: Targets) -> PreTrainedModel:
    target = make_target()
    target.config._attn_implementation_internal = attention
    return target


def quantized(dtype: torch.dtype, make_target: Targets) -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(make_target(), {nn.Linear}, dtype=dtype)


def turning(rope_type: str, make_target: Targets) -> PreTrainedModel:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 24}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64, head_dim=8, rope_parameters=rope))


def hybrid(make_target: Targets) -> PreTrainedModel:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    linear = {"key_head_dim": 8, "value_head_dim": 8, "num_key_heads": 2, "num_value_heads": 2}
    config = Qwen3NextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        shared_expert_intermediate_size=16,
        **experts,
        **{f"linear_{name}": value for name, value in linear.items()},
    )
    return Qwen3NextForCausalLM(config)


def encoder_decoder(make_target: Targets) -> PreTrainedModel:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def embeddings(target: PreTrainedModel) -> Tensor:
    return target.get_input_embeddings()(PROMPT).detach()


STATES = {"return_dict_in_generate": True}
INT8 = "quantizes activations by all tokens.*quantize weights only"
COMPILED = r"was compiled.*`cache_implementation='static'`"
REFUSALS = {
    # --- calls ---
    "a batch in caches of a fixed size": Refusal(
        "one prompt at a time and got 2", {"inputs": PROMPT.expand(2, -1), "cache_implementation": "static"}
    ),
    "several texts in them": Refusal(
        "one prompt at a time and got 3",
        {"num_return_sequences": 3, "do_sample": True, "cache_implementation": "static"},
    ),
    "an empty prompt": Refusal("prompt is empty.*`bos_token_id`", {"inputs": torch.zeros(1, 0, dtype=torch.long)}),
    "embeddings": Refusal("pass `input_ids`", {"inputs": None, "inputs_embeds": embeddings}),
    "labels": Refusal("without labels", {"labels": PROMPT}),
    "no cache": Refusal("leave out `use_cache=False`", {"use_cache": False}),
    "an offloaded cache": Refusal("plain `DynamicCache`", {"cache_implementation": "offloaded"}),
    "an offloaded static cache": Refusal(
        r"(?s)StaticCache.*or set it to 'static'", {"cache_implementation": "offloaded_static"}
    ),
    "an odd cache": Refusal(f"QuantizedLikeLayer.*{CACHE}=DynamicCache", {CACHE: odd_cache}),
    "a static cache of the caller": Refusal(
        "got StaticCache.*set it to 'static'",
        {CACHE: lambda target: StaticCache(config=target.config, max_cache_len=64)},
    ),
    "hidden states": Refusal("without `assistant_model`", STATES | {"output_hidden_states": True}),
    "attentions": Refusal(
        "`output_attentions`.*without `assistant_model`",
        STATES | {"output_attentions": True},
        lambda make_target: make_target(attn_implementation="eager"),
    ),
    "synced GPUs": Refusal("`synced_gpus`.*`device_map`", {"synced_gpus": True}),
    **{
        f"{name}={value!r}": Refusal(f"`{name}` counts .* and is {value!r}", {name: value})
        for name in ("num_assistant_tokens", "prompt_lookup_num_tokens")
        for value in (7.5, "15", -1)
    },
    # --- heads ---
    "another vocabulary": Refusal("vocab_size 80 and 64.*trained for", head=partial(random_head, vocab_size=80)),
    "another width": Refusal("hidden_size 48 and 32.*trained for", head=partial(random_head, hidden_size=48)),
    "another depth": Refusal("layers 9 and 4.*trained for", head=partial(random_head, num_target_layers=9)),
    "two others": Refusal(
        "vocab_size 65 and 64; hidden_size 16 and 32", head=partial(random_head, vocab_size=65, hidden_size=16)
    ),
    "the last layer, static": Refusal(
        r"last layer, 3.*leave out `cache_implementation='static'`",
        STATIC,
        head=partial(random_head, target_layer_ids=[0, 3]),
    ),
    # --- targets ---
    "an encoder-decoder": Refusal("encoder-decoder", target=encoder_decoder),
    "a recurrent target": Refusal(
        "MambaForCausalLM has .*without `assistant_model`",
        target=lambda make_target: MambaForCausalLM(
            MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=4)
        ),
    ),
    "a hybrid target": Refusal("linear_attention.*without", target=hybrid),
    "layers of another name": Refusal(
        "cannot be tapped.*without `assistant_model`",
        target=lambda make_target: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4)),
    ),
    **{
        f"{attention} attention": Refusal(
            f"{attention}.*attn_implementation='sdpa'", target=partial(attending, attention)
        )
        for attention in ("flash_attention_2", "flex_attention")
    },
    **{
        f"{rope_type} rotary embeddings": Refusal(
            f"{rope_type} rotary.*without `assistant_model`", target=partial(turning, rope_type)
        )
        for rope_type in ("dynamic", "longrope")
    },
    **{
        f"{change.__name__}{', static' if options else ''}": Refusal(COMPILED, options, partial(changed, change))
        for change in (compile_forward, compile_target, compile_decoder)
        for options in ({}, STATIC)
    },
    "int8 activations": Refusal(INT8, target=partial(quantized, torch.qint8)),
    "int8 activations, a Markov head": Refusal(INT8, target=partial(quantized, torch.qint8), head=markov_head),
    "an LM head without weight": Refusal(
        r"offloaded or quantized.*`head.markov_head = None`",
        target=partial(quantized, torch.float16),
        head=markov_head,
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's quantization
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_it_is_refused_before_the_first_token(refusal: Refusal, make_target: Targets) -> None:
    target, head = refusal.target(make_target).eval(), refusal.head(make_target())
    options = {name: value(target) if callable(value) else value for name, value in refusal.options.items()}
    options = {"inputs": PROMPT, "max_new_tokens": 19, "do_sample": False} | options
    calls: list[int] = []
    with (
        target.register_forward_pre_hook(lambda *_: calls.append(1)),
        pytest.raises(ValueError, match=refusal.match),
    ):
        target.generate(**options, assistant_model=head, streamer=Unasked())
    assert not calls


# --- what verifies ---


@pytest.fixture
def target(make_target: Targets) -> PreTrainedModel:
    return make_target()


def generate(target: PreTrainedModel, head: PreTrainedModel | None = None, **options: str) -> list[list[int]]:
    return target.generate(PROMPT, max_new_tokens=19, do_sample=False, assistant_model=head, **options).tolist()


def test_a_target_whose_layers_were_compiled_one_by_one_verifies(target: PreTrainedModel) -> None:
    compile_layers(target)
    assert generate(target, random_head(target)) == generate(target)


def test_a_target_that_is_kept_from_being_compiled_verifies(target: PreTrainedModel) -> None:
    plain = generate(target)
    target.forward = torch.compiler.disable(target.forward)
    assert generate(target, random_head(target)) == plain


def test_a_compiled_copy_of_a_target_verifies(target: PreTrainedModel) -> None:
    assert generate(torch.compile(target, backend="eager"), random_head(target)) == generate(target)


def test_a_target_in_training_with_checkpointing_verifies_or_is_refused(target: PreTrainedModel) -> None:
    plain, head = generate(target), random_head(target)
    getattr(target, f"{CHECKPOINTING}_enable")()
    assert generate(target.train(), None) is not None
    try:
        assert generate(target, head) == plain  # versions that keep a cache where there is no gradient
    except ValueError as error:
        assert "caches nothing of the prompt" in str(error)  # noqa: PT017, either is right
        assert "`target.eval()`" in str(error)  # noqa: PT017
    assert generate(target.eval(), head) == plain


# --- quantized ---


class RowScaledLinear(nn.Module):
    """Quantizes activations too, but each row by itself."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight

    def forward(self, inputs: Tensor) -> Tensor:
        scale = inputs.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / 127
        return nn.functional.linear((inputs / scale).round() * scale, self.weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_target_whose_weights_alone_are_quantized_verifies(target: PreTrainedModel) -> None:
    weights_only = quantized(torch.float16, lambda: copy.deepcopy(target))
    assert generate(weights_only, random_head(target)) == generate(weights_only)


def test_a_target_that_quantizes_each_token_by_itself_verifies(target: PreTrainedModel) -> None:
    for path, module in list(target.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in path:
            target.set_submodule(path, RowScaledLinear(module))
    assert generate(target, random_head(target)) == generate(target)


def test_adapters_that_drop_out_are_not_taken_for_it(target: PreTrainedModel) -> None:
    adapter = LoraConfig(target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    model = get_peft_model(target, adapter).train()
    text = model.generate(input_ids=PROMPT, max_new_tokens=9, do_sample=False, assistant_model=random_head(target))
    assert text.shape == (1, 15)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_its_markov_head_a_head_needs_no_weight_of_the_lm_head(target: PreTrainedModel) -> None:
    weights_only, head = quantized(torch.float16, lambda: copy.deepcopy(target)), markov_head(target)
    assert not list(weights_only.lm_head.parameters())
    head.markov_head = None
    assert generate(weights_only, head) == generate(weights_only)
