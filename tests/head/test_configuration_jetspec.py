from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    BloomConfig,
    CodeGenConfig,
    Cohere2MoeConfig,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from jetspec_hf.head.configuration_jetspec import JetSpecConfig
from jetspec_hf.head.published import default_target_layer_ids

SMALL = {"vocab_size": 100, "num_hidden_layers": 2, "mask_token_id": 99, "num_target_layers": 8}


@pytest.mark.parametrize(
    ("target_config", "theta", "head_dim"),
    [
        (Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), 1e6, 128),
        (LlamaConfig(hidden_size=96, num_attention_heads=4, eos_token_id=[2, 3]), 1e4, 24),
        (MistralConfig(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=40), 1e4, 40),
        (Gemma3Config(), 1e6, 256),  # nested, and with one rope for each layer type
        (GptOssConfig(), 150000.0, 64),  # yarn
    ],
    ids=["qwen3", "llama", "mistral", "gemma3", "gpt-oss"],
)
def test_a_head_configuration_fits_its_target(target_config: PreTrainedConfig, theta: float, head_dim: int) -> None:
    text = target_config.get_text_config()
    config = JetSpecConfig.for_target(target_config, mask_token_id=9, num_hidden_layers=3, block_size=7)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(config, name) == getattr(text, name), name
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": theta}
    assert config.head_dim == head_dim
    assert config.num_target_layers == text.num_hidden_layers
    assert config.target_layer_ids == default_target_layer_ids(text.num_hidden_layers, 3)
    assert (config.mask_token_id, config.num_hidden_layers, config.block_size) == (9, 3, 7)
    assert config.is_causal


@pytest.mark.parametrize(
    ("target_config", "expected"),
    [
        (Gemma4TextConfig(), {"head_dim": 256, "intermediate_size": 9216, "num_key_value_heads": 4}),
        (Gemma4TextConfig(layer_types=["full_attention"] * 30), {"head_dim": 512}),
        (Gemma3nTextConfig(), {"head_dim": 256, "intermediate_size": 16384}),
        (BloomConfig(), {"num_key_value_heads": 8, "intermediate_size": 256}),
        (CodeGenConfig(), {"pad_token_id": None}),
        (Cohere2MoeConfig(), {"rms_norm_eps": 1e-6}),
    ],
    ids=["gemma4", "gemma4 full", "gemma3n", "bloom", "codegen", "cohere2-moe"],
)
def test_a_field_that_is_odd_or_absent_is_filled(target_config: PreTrainedConfig, expected: dict[str, Any]) -> None:
    config = JetSpecConfig.for_target(target_config, mask_token_id=9)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_layer_type_may_have_no_rope() -> None:
    target_config = LlamaConfig()
    target_config.rope_parameters = {"full_attention": None, "sliding_attention": {"rope_theta": 5e5}}
    assert JetSpecConfig.for_target(target_config, mask_token_id=9).rope_parameters["rope_theta"] == 5e5


def test_a_target_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="MambaConfig names no `num_attention_heads`"):
        JetSpecConfig.for_target(MambaConfig(), mask_token_id=9)


def test_any_field_may_differ_from_the_target() -> None:
    config = JetSpecConfig.for_target(
        Qwen3Config(), mask_token_id=9, intermediate_size=77, head_dim=32, is_causal=False, target_layer_ids=[3, 0]
    )
    assert (config.intermediate_size, config.head_dim, config.is_causal) == (77, 32, False)
    assert config.target_layer_ids == [3, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 1}, r"`block_size`.*at least 2; got 1"),
        ({"mask_token_id": 100}, r"`mask_token_id` is 100, outside the vocabulary of 100"),
        ({"mask_token_id": -1}, r"`mask_token_id` is -1, outside"),
        ({"target_layer_ids": []}, r"`target_layer_ids` is \[\] for a target of 8 layers"),
        ({"target_layer_ids": [1, 8]}, r"`target_layer_ids` is \[1, 8\] for a target of 8 layers"),
        ({"target_layer_ids": [-1]}, r"`target_layer_ids` is \[-1\]"),
        ({"num_assistant_tokens": 0}, r"`num_assistant_tokens` must be at least 1.*got 0 and"),
        ({"assistant_confidence_threshold": 1.5}, r"from 0 to 1; got None and 1\.5"),
        ({"draft_temperatures": [1.0] * 14}, r"needs 15 positive numbers"),
        ({"draft_temperatures": [0.0] * 15}, r"needs 15 positive numbers"),
        ({"prompt_lookup_num_tokens": -1}, r"must not be negative; got -1"),
        ({"assistant_confidence_threshold": -0.5}, r"from 0 to 1; got None and -0\.5"),
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused(fields: dict[str, Any], message: str) -> None:
    JetSpecConfig(**SMALL)  # good by itself
    with pytest.raises(ValueError, match=message):
        JetSpecConfig(**(SMALL | fields))


def test_saved_configuration_loads_as_it_was(tmp_path: Path) -> None:
    config = JetSpecConfig(
        **SMALL,
        block_size=5,
        is_causal=False,
        target_layer_ids=[4, 2],
        num_assistant_tokens=30,
        assistant_confidence_threshold=0.25,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=17,
    )
    config.save_pretrained(tmp_path)
    for loaded in (JetSpecConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is JetSpecConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert (loaded.target_layer_ids, loaded.sliding_window) == ([4, 2], 17)
