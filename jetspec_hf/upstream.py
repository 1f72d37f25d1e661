"""All that transformers keeps private, or renames from version to version, and that we cannot do without.

No other module speaks these names, so that a new release is one file to look at, and a missing name is known before the
first token.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import transformers
from torch import Tensor
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# Minor releases on which the tests pass; pyproject.toml has the same.
OLDEST, NEWEST = (5, 15), (5, 24)

# What `generate`, its `model_kwargs`, every forward and every output call a key-value cache: since 5.24 "cache".
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# What loading adds for a GGUF file, whose numbers become ordinary ones; before 5.24 they always did.
GGUF_OPTIONS: dict[str, Any] = (
    {"quantization_config": transformers.GgufConfig(dequantize=True)} if "GgufConfig" in dir(transformers) else {}
)

# Methods of `GenerationMixin` that are wrapped, with the parameters that this takes, since `generate` asks no assistant
# how it wants to decode.
WRAPPED = {
    "_assisted_decoding": {
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
        "assistant_model",
    },
    "_validate_generation_mode": {"generation_mode", "generation_config", "generation_mode_kwargs"},
}

# What every call with a head needs, by name, and where it is found.
NEEDED: dict[str, Callable[[], Any]] = {
    "GenerationMixin._prefill": lambda: GenerationMixin._prefill,
    "GenerationMixin._valid_auto_compile_criteria": lambda: GenerationMixin._valid_auto_compile_criteria,
    "GenerationMixin._optimize_model_for_decode": lambda: GenerationMixin._optimize_model_for_decode,
    "GenerationConfig._get_default_generation_params": lambda: GenerationConfig._get_default_generation_params,
    "GenerationConfig().speculation_type": lambda: GenerationConfig().speculation_type,
    "CompileConfig()._compile_all_devices": lambda: CompileConfig()._compile_all_devices,
    "PreTrainedModel._is_stateful": lambda: PreTrainedModel._is_stateful,
    "PreTrainedConfig()._attn_implementation": lambda: PreTrainedConfig()._attn_implementation,
    "DynamicCache().offloading": lambda: DynamicCache().offloading,
    "CacheLayerMixin.get_mask_sizes": lambda: CacheLayerMixin.get_mask_sizes,
    "DynamicSlidingWindowLayer().record_past": lambda: DynamicSlidingWindowLayer(sliding_window=1).record_past,
    "DynamicSlidingWindowLayer().cumulative_length": lambda: (
        DynamicSlidingWindowLayer(sliding_window=1).cumulative_length
    ),
    "StaticLayer().cumulative_length": lambda: StaticLayer(max_cache_len=1).cumulative_length,
}


def missing_names() -> list[str]:
    """Those of [`NEEDED`] that the installed transformers does not have."""

    def is_missing(find: Callable[[], Any]) -> bool:
        try:
            find()
        except (AttributeError, TypeError):  # the name, or a parameter of what has it
            return True
        return False

    return [name for name, find in NEEDED.items() if is_missing(find)]


MISSING = missing_names()


def check_names() -> None:
    """Refuse a version of transformers that cannot work.

    Raises:
        RuntimeError: names what is gone, and says which version to install.
    """
    if MISSING:
        raise RuntimeError(
            f"transformers {transformers.__version__} has no {', '.join(f'`{name}`' for name in MISSING)}, which a "
            f"draft head needs; run `{install_command()}`."
        )


def warn_if_untested() -> None:
    """Say so where the tests have not run on the installed version."""
    installed = tuple(map(int, transformers.__version__.split(".")[:2]))
    if not OLDEST <= installed <= NEWEST:
        warnings.warn(
            f"jetspec_hf is tested with transformers {_dotted(OLDEST)} to {_dotted(NEWEST)} and found "
            f"{transformers.__version__}; if it fails, run `{install_command()}`.",
            stacklevel=3,
        )


def install_command() -> str:
    """What brings a version that is tested."""
    return f'pip install "transformers>={_dotted(OLDEST)},<{_dotted((NEWEST[0], NEWEST[1] + 1))}"'


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def prefill(
    target: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Any:
    """Read a prompt as `generate` does, in chunks or behind a cache; announced upstream as public one day."""
    return target._prefill(input_ids, generation_config, model_kwargs)


def is_to_compile(target: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
    """Whether `generate` would compile the target's forward; it decides in passing, in a method of its own."""
    return target._valid_auto_compile_criteria(model_kwargs, generation_config)


def compile_everywhere(config: CompileConfig) -> CompileConfig:
    """Let `generate` compile on a CPU too, which it keeps for its own tests."""
    config._compile_all_devices = True
    return config


def decoding(target: PreTrainedModel) -> AbstractContextManager[None]:
    """While tokens are decoded one by one, mixtures of experts run otherwise; `generate` has no hook for it."""
    return target._optimize_model_for_decode()


def filled_in(generation_config: GenerationConfig) -> dict[str, Any]:
    """What `generate` puts where a call says nothing, before anyone else is asked."""
    return generation_config._get_default_generation_params()


def pad_token_of(generation_config: GenerationConfig) -> int:
    """What `generate` puts behind texts that end before others; it decides late, and keeps that as a tensor."""
    return int(generation_config._pad_token_tensor)


def is_chain(generation_config: GenerationConfig) -> bool:
    """Whether a call asks for transformers' own chain decoding; a young option."""
    return generation_config.speculation_type == "dflash"


def has_recurrent_state(target: PreTrainedModel) -> bool:
    """What assisted decoding refuses; no configuration says it."""
    return target._is_stateful


def attention_of(config: PreTrainedConfig) -> str:
    """The attention that a model runs; public is only how to set it."""
    return config._attn_implementation


def is_offloading(cache: DynamicCache) -> bool:
    """Whether a cache moves its layers away; not in its documentation."""
    return cache.offloading


def record_past(cache: Cache, is_recording: bool) -> None:
    """Let sliding layers keep what their window has passed, so that nodes can be dropped again, or no longer.

    `Cache.activate_past_recording` has no way back.
    """
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = is_recording


def holding_layers(cache: Cache) -> list[CacheLayerMixin]:
    """The layers of a cache but for those of a target's layers that share the keys and values of earlier ones."""
    return [layer for layer in cache.layers if type(layer).__name__ != "DummyLayer"]  # which transformers 5.15 lacks


def first_cached(cache: Cache, layer_idx: int, num_queries: int) -> int:
    """The first token that a layer still holds; above 0 where a sliding window has dropped older ones.

    Meant for mask makers, which know no trees.
    """
    return cache.layers[layer_idx].get_mask_sizes(num_queries)[1]


def set_num_seen(layer: DynamicSlidingWindowLayer, num_tokens: int) -> None:
    """Tell a sliding layer how many tokens went through it; it counts by itself only while it slides."""
    layer.cumulative_length = num_tokens


def num_cached(layer: StaticLayer) -> Tensor:
    """Tokens in a static layer, to be set in place; `crop` goes back by a host number only, which no graph can take."""
    return layer.cumulative_length
