"""Heads that others publish: how their config.json says what ours says."""

import logging
from typing import Any

logger = logging.getLogger(__name__)
# What our own config.json says of itself.
MODEL_TYPE = "jetspec"
# Architectures whose weights are those of our head, under the same names.
PUBLISHED_ARCHITECTURES = ("DFlashDraftModel", "Qwen3DFlashDraftModel")
# Our fields that they write in either of two places, and how they spell them.
_SPELLINGS = {
    "is_causal": ("is_causal", "causal", "causal_head"),
    "block_size": ("block_size",),
    "mask_token_id": ("mask_token_id",),
    "num_target_layers": ("num_target_layers",),
    "target_layer_ids": ("target_layer_ids",),
}
# What it means where they leave one out; the others must be there.
_UNSAID = {"is_causal": False, "target_layer_ids": None}
# Options of published heads that change what the head computes, and that this head does not have.
_UNSUPPORTED_OPTIONS = (
    "sample_from_anchor",
    "projector_type",
    "attention_sink_bias",
    "shift_label",
    "draft_shift",
    "pure_draft_prefix_len",
)


def default_target_layer_ids(num_target_layers: int, num_taps: int) -> list[int]:
    """The layers that published heads tap: evenly spaced from the second to the fourth from last.

    A single tap takes the middle layer. Targets too shallow for the rule give fewer taps. Several never take the last.
    """
    if num_taps == 1:
        return [num_target_layers // 2]
    first, last = 1, num_target_layers - 3
    ids = {round(first + i * (last - first) / (num_taps - 1)) for i in range(num_taps)}
    return sorted({min(max(i, 0), max(num_target_layers - 2, 0)) for i in ids})


def from_published(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Translate the configuration of a published JetSpec or DFlash head; any other passes unchanged.

    Raises:
        ValueError: if two spellings of one option disagree, a needed one is missing, or the head has parts that ours
            has not.
    """
    if "dflash_config" not in config_dict and config_dict.get("model_type") in (None, MODEL_TYPE):
        return config_dict
    _check_architectures(config_dict)
    config = {k: v for k, v in config_dict.items() if k not in ("dflash_config", "architectures", "auto_map")}
    dflash = dict(config_dict.get("dflash_config") or {})
    _check_options(config, dflash)
    fields = {name: _only_value(name, config, dflash) for name in _SPELLINGS}
    if fields["target_layer_ids"] is None:
        num_layers = _only_value("num_hidden_layers", config, dflash)
        fields["target_layer_ids"] = default_target_layer_ids(fields["num_target_layers"], num_layers)
        logger.warning(
            f"The head's config.json does not say `target_layer_ids`; taking {fields['target_layer_ids']}, the rule of "
            "published heads. If it was trained with others, it drafts badly until its config.json names them."
        )
    fields |= _sliding_fields(config, dflash)
    rest = {name: value for name, value in config.items() if name not in _SPELLINGS["is_causal"]}
    return rest | fields | {"model_type": MODEL_TYPE}


def _check_architectures(config_dict: dict[str, Any]) -> None:
    architectures = config_dict.get("architectures") or []
    if not any(name in PUBLISHED_ARCHITECTURES for name in architectures):
        raise ValueError(
            f"This checkpoint holds {architectures or config_dict.get('model_type')}, not a draft head; "
            f"a head says `model_type` {MODEL_TYPE!r} or one of {', '.join(PUBLISHED_ARCHITECTURES)}."
        )


def _check_options(config: dict[str, Any], dflash: dict[str, Any]) -> None:
    unsupported = [name for name in _UNSUPPORTED_OPTIONS if dflash.get(name) or config.get(name)]
    if dflash.get("target_hidden_size", config.get("hidden_size")) != config.get("hidden_size"):
        unsupported.append("target_hidden_size")
    if unsupported:
        raise ValueError(
            f"This head needs {', '.join(unsupported)}, which is not implemented here; use a head without."
        )


def _sliding_fields(config: dict[str, Any], dflash: dict[str, Any]) -> dict[str, Any]:
    """What says that layers have a sliding window, if they have one."""
    if dflash.get("use_swa"):
        return {
            "use_sliding_window": True,
            "sliding_window": _only_value("swa_window_size", config, dflash),
            "layer_types": ["sliding_attention"] * _only_value("num_hidden_layers", config, dflash),
        }
    return {"use_sliding_window": True} if "sliding_attention" in (config.get("layer_types") or []) else {}


def _only_value(name: str, config: dict[str, Any], dflash: dict[str, Any]) -> Any:
    """The value that all spellings of an option agree on."""
    found = {
        f"{where}{spelling}": values[spelling]
        for where, values in (("", config), ("dflash_config.", dflash))
        for spelling in _SPELLINGS.get(name, (name,))
        if values.get(spelling) is not None
    }
    if not found and name in _UNSAID:
        return _UNSAID[name]
    if not found:
        raise ValueError(f"The head's config.json does not say `{name}`; add it, or ask its publisher.")
    first, *others = found.values()
    if any(other != first for other in others):
        raise ValueError(f"The head's config.json contradicts itself: {found}; keep the one that it was trained with.")
    return first
