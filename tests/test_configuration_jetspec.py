import json
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

from jetspec_hf.configuration_jetspec import JetSpecConfig, default_target_layer_ids

SMALL = {"vocab_size": 100, "num_hidden_layers": 2, "mask_token_id": 99, "num_target_layers": 8}


def published(tmp_path: Path, *, dflash: dict[str, Any] | None = None, without: str = "", **top: Any) -> Path:
    """A folder with a small published config.json, changed."""
    config = {
        "model_type": "qwen3",
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "block_size": 8,
        "num_target_layers": 8,
        "dflash_config": {"mask_token_id": 99},
    }
    config |= top
    config["dflash_config"] = config["dflash_config"] | (dflash or {})
    config.pop(without, None)
    config["dflash_config"].pop(without, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("num_target_layers", "num_taps", "expected"),
    [
        (36, 5, [1, 9, 17, 25, 33]),
        (48, 5, [1, 12, 23, 34, 45]),
        (40, 5, [1, 10, 19, 28, 37]),
        (24, 5, [1, 6, 11, 16, 21]),
        (8, 3, [1, 3, 5]),
        (36, 1, [18]),
    ],
)
def test_default_taps_are_those_of_published_heads(num_target_layers: int, num_taps: int, expected: list[int]) -> None:
    assert default_target_layer_ids(num_target_layers, num_taps) == expected


@pytest.mark.parametrize("num_taps", [2, 3, 5])
@pytest.mark.parametrize("num_target_layers", [2, 3, 4, 5, 6])
def test_shallow_targets_are_tapped_below_their_last_layer(num_target_layers: int, num_taps: int) -> None:
    ids = default_target_layer_ids(num_target_layers, num_taps)
    assert ids == sorted(set(ids))
    assert ids
    assert ids[0] >= 0
    assert ids[-1] < num_target_layers - 1


def test_a_target_of_one_layer_is_tapped_there() -> None:
    assert default_target_layer_ids(1, 1) == default_target_layer_ids(1, 3) == [0]


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


def test_published_configuration_is_read(golden: Path) -> None:
    for name, is_causal in (("head_causal", True), ("head_bidirectional", False)):
        config = JetSpecConfig.from_pretrained(golden / name)
        assert config.model_type == "jetspec"
        assert config.is_causal is is_causal
        assert (config.block_size, config.mask_token_id, config.num_target_layers) == (8, 255, 8)
        assert config.target_layer_ids == [1, 3, 5]
        assert config.rope_parameters["rope_theta"] == 10000.0
        assert not {"dflash_config", "auto_map", "causal_head"} & set(config.to_dict())


def test_published_configuration_in_a_subfolder_is_read(golden: Path) -> None:
    assert JetSpecConfig.from_pretrained(f"{golden}::head_causal").is_causal
    assert not JetSpecConfig.from_pretrained(f"{golden}::head_bidirectional").is_causal


def test_published_configuration_stays_the_same_once_saved(golden: Path, tmp_path: Path) -> None:
    config = JetSpecConfig.from_pretrained(golden / "head_bidirectional")
    config.save_pretrained(tmp_path)
    assert JetSpecConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_published_configuration_is_read_from_a_dictionary(golden: Path) -> None:
    config_dict = json.loads((golden / "head_causal" / "config.json").read_text())
    assert JetSpecConfig.from_dict(config_dict).target_layer_ids == [1, 3, 5]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("spelling", ["is_causal", "causal", "causal_head"])
@pytest.mark.parametrize("where", ["top", "dflash"])
def test_every_spelling_of_the_causal_flag_is_read(tmp_path: Path, where: str, spelling: str, value: bool) -> None:
    options = {spelling: value} if where == "top" else {"dflash": {spelling: value}}
    assert JetSpecConfig.from_pretrained(published(tmp_path, **options)).is_causal is value


def test_a_published_head_that_says_nothing_is_bidirectional(tmp_path: Path) -> None:
    assert JetSpecConfig.from_pretrained(published(tmp_path)).is_causal is False


def test_the_code_of_the_publisher_is_no_longer_named(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    JetSpecConfig.from_pretrained(published(tmp_path)).save_pretrained(saved)
    assert "auto_map" not in json.loads((saved / "config.json").read_text())


def test_taps_by_rule_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert JetSpecConfig.from_pretrained(published(tmp_path)).target_layer_ids == [1, 3, 5]
    assert [record.message for record in caplog.records if "`target_layer_ids`; taking [1, 3, 5]" in record.message]
    assert len(caplog.records) == 1
    JetSpecConfig.from_pretrained(published(tmp_path, target_layer_ids=[1, 3, 5]))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("architecture", ["DFlashDraftModel", "Qwen3DFlashDraftModel"])
def test_both_architecture_names_are_read(tmp_path: Path, architecture: str) -> None:
    assert JetSpecConfig.from_pretrained(published(tmp_path, architectures=[architecture])).block_size == 8


@pytest.mark.parametrize("name", ["block_size", "mask_token_id", "num_target_layers", "target_layer_ids"])
def test_options_are_read_from_either_place(tmp_path: Path, name: str) -> None:
    value = [2, 0, 4] if name == "target_layer_ids" else 6
    top = published(tmp_path, without=name)
    config = json.loads((top / "config.json").read_text())
    for place in (config, config["dflash_config"]):
        place[name] = value
        (top / "config.json").write_text(json.dumps(config))
        assert getattr(JetSpecConfig.from_pretrained(top), name) == value
        del place[name]


def test_both_places_may_say_the_same(tmp_path: Path) -> None:
    folder = published(tmp_path, dflash={"block_size": 8, "causal": True, "causal_head": True}, is_causal=True)
    config = JetSpecConfig.from_pretrained(folder)
    assert (config.block_size, config.is_causal) == (8, True)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e7},
        {"rope_theta": 1e7, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}},
    ],
    ids=["alone", "unscaled", "parameters"],
)
def test_every_spelling_of_the_rope_base_is_read(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = JetSpecConfig.from_pretrained(published(tmp_path, **rope))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e7}


@pytest.mark.parametrize(
    ("top", "dflash"),
    [
        ({}, {"use_swa": True, "swa_window_size": 12}),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 12, "use_sliding_window": False}, {}),
    ],
    ids=["use_swa", "layer_types"],
)
def test_sliding_layers_are_read(tmp_path: Path, top: dict[str, Any], dflash: dict[str, Any]) -> None:
    config = JetSpecConfig.from_pretrained(published(tmp_path, dflash=dflash, **top))
    assert config.layer_types == ["sliding_attention"] * 3
    assert (config.use_sliding_window, config.sliding_window) == (True, 12)


@pytest.mark.parametrize(
    ("top", "dflash", "name"),
    [
        ({"is_causal": True}, {"causal": False}, "is_causal"),
        ({}, {"causal": True, "causal_head": False}, "causal_head"),
        ({"block_size": 8}, {"block_size": 16}, "block_size"),
        ({"mask_token_id": 3}, {"mask_token_id": 99}, "mask_token_id"),
        ({"num_target_layers": 8}, {"num_target_layers": 9}, "num_target_layers"),
        ({"target_layer_ids": [1]}, {"target_layer_ids": [2]}, "target_layer_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictions_are_refused_and_named(
    tmp_path: Path, top: dict[str, Any], dflash: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"contradicts itself.*{name}"):
        JetSpecConfig.from_pretrained(published(tmp_path, dflash=dflash, **top))


@pytest.mark.parametrize("name", ["block_size", "mask_token_id", "num_target_layers"])
def test_a_missing_value_is_refused_and_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"does not say `{name}`"):
        JetSpecConfig.from_pretrained(published(tmp_path, without=name))


@pytest.mark.parametrize("where", ["top", "dflash"])
@pytest.mark.parametrize(
    "option",
    [
        {"sample_from_anchor": True},
        {"projector_type": "mlp"},
        {"attention_sink_bias": True},
        {"shift_label": True},
        {"draft_shift": True},
        {"pure_draft_prefix_len": 2},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_the_head_does_not_have_are_refused(tmp_path: Path, option: dict[str, Any], where: str) -> None:
    options = option if where == "top" else {"dflash": option}
    with pytest.raises(ValueError, match=rf"needs {next(iter(option))}"):
        JetSpecConfig.from_pretrained(published(tmp_path, **options))


def test_options_that_are_switched_off_do_no_harm(tmp_path: Path) -> None:
    off = {"draft_shift": False, "projector_type": None, "target_hidden_size": 64}
    assert JetSpecConfig.from_pretrained(published(tmp_path, dflash=off)).hidden_size == 64


def test_a_target_of_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs target_hidden_size"):
        JetSpecConfig.from_pretrained(published(tmp_path, dflash={"target_hidden_size": 128}))


def test_a_checkpoint_that_is_no_head_is_refused(golden: Path) -> None:
    with pytest.raises(ValueError, match=r"holds \['Qwen3ForCausalLM'\], not a draft head"):
        JetSpecConfig.from_pretrained(golden / "target")
