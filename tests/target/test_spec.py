"""What a target's configuration says, family by family."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    Qwen3VLConfig,
)

from jetspec_hf.target.spec import TargetSpec

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("config", "layer_types", "window"),
    [
        (Qwen3Config(num_hidden_layers=3), (FULL,) * 3, None),
        (
            Qwen2Config(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1),
            (FULL, SLIDING, SLIDING),
            8,
        ),
        (LlamaConfig(num_hidden_layers=2), (FULL,) * 2, None),  # has neither types nor a window
        (MistralConfig(num_hidden_layers=2, sliding_window=8), (SLIDING,) * 2, 8),  # has no types
        (MistralConfig(num_hidden_layers=2, sliding_window=None), (FULL,) * 2, None),
        (Gemma2Config(num_hidden_layers=2, sliding_window=8), (SLIDING, FULL), 8),
        (Gemma3Config(text_config={"num_hidden_layers": 6, "sliding_window": 8}), (SLIDING,) * 5 + (FULL,), 8),
        (GPT2Config(n_layer=2), (FULL,) * 2, None),
    ],
    ids=["qwen3", "qwen2", "llama", "mistral", "mistral_full", "gemma2", "gemma3", "gpt2"],
)
def test_each_layer_has_its_attention(
    config: PreTrainedConfig, layer_types: tuple[str, ...], window: int | None
) -> None:
    spec = TargetSpec.of(config)
    assert (spec.layer_types, spec.window, spec.num_layers) == (layer_types, window, len(layer_types))
    assert (spec.window_of(SLIDING), spec.window_of(FULL)) == (window, None)


def test_what_no_mask_can_follow_keeps_its_name() -> None:
    assert set(TargetSpec.of(Qwen3NextConfig(num_hidden_layers=4)).layer_types) == {"linear_attention", FULL}


@pytest.mark.parametrize(
    ("config", "rope_types"),
    [
        (Qwen3Config(), {"default"}),
        (Qwen3Config(rope_parameters=YARN), {"yarn"}),
        (
            Gemma3Config(text_config={"rope_parameters": {SLIDING: {"rope_type": "default"}, FULL: YARN}}),
            {"default", "yarn"},
        ),
        (GPT2Config(), set()),
        (MambaConfig(), set()),
    ],
    ids=["default", "yarn", "one for each type", "none", "no attention"],
)
def test_all_rotary_embeddings_are_named(config: PreTrainedConfig, rope_types: set[str]) -> None:
    assert TargetSpec.of(config).rope_types == rope_types


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (Qwen3Config(vocab_size=50, hidden_size=24, num_hidden_layers=2), (50, 24, 2, None)),
        (GPT2Config(vocab_size=50, n_embd=24, n_layer=2), (50, 24, 2, None)),
        (Gemma2Config(vocab_size=50, hidden_size=24, num_hidden_layers=2, final_logit_softcapping=3.0), (50, 24, 2, 3)),
        (Qwen3VLConfig(text_config={"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2}), (50, 24, 2, None)),
    ],
    ids=["qwen3", "other names", "squashed logits", "text as a part"],
)
def test_sizes_are_those_of_the_text_model(config: PreTrainedConfig, sizes: tuple[Any, ...]) -> None:
    spec = TargetSpec.of(config)
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.softcap) == sizes


def test_a_spec_can_be_a_key_and_stays_as_it_is() -> None:
    one, other = TargetSpec.of(Qwen3Config()), TargetSpec.of(Qwen3Config())
    assert {one: 1}[other] == 1
    with pytest.raises(FrozenInstanceError):
        one.window = 3  # type: ignore[misc]
