import json
from pathlib import Path
from typing import Any

import pytest

from jetspec_hf.head.configuration_jetspec import JetSpecConfig
from jetspec_hf.head.published import default_target_layer_ids


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
