"""What a draft head cannot work with, refused before the first token."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..cache import check_cache
from ..pair import DecodingPair
from ..target.spec import FULL, SLIDING, TargetSpec, input_device
from ..upstream import CACHE, attention_of, has_recurrent_state
from ..verification.verifier import MODALITY_INPUTS, has_virtual_tokens

_MASKABLE_ATTENTION = ("sdpa", "eager")
_MOVING_ROPE = {"dynamic", "longrope"}
_TENSOR_INPUTS = {"attention_mask", "position_ids", "inputs_embeds", "cache_position", "logits_to_keep"}


def check_target(target: PreTrainedModel) -> None:
    """Refuse a target that cannot verify trees.

    Raises:
        ValueError: with both values where they differ, and what to do instead.
    """
    name = type(target).__name__
    if target.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; a draft head needs a decoder-only target.")
    spec, attention = TargetSpec.of(target.config), attention_of(target.config.get_text_config())
    unmaskable = set(spec.layer_types) - {SLIDING, FULL}
    if has_recurrent_state(target) or unmaskable:
        what = ", ".join(sorted(unmaskable)) or "a recurrent state"
        raise ValueError(
            f"{name} has {what}, which no mask can make follow a tree; call `generate` without `assistant_model`."
        )
    if attention not in _MASKABLE_ATTENTION:
        raise ValueError(
            f"{name} runs {attention!r} attention, which takes no tree mask; "
            "load it with `attn_implementation='sdpa'` (or 'eager')."
        )
    if not hasattr(target.get_decoder(), "layers"):
        raise ValueError(
            f"{name} keeps its decoder layers under another name than `layers`, so they cannot be tapped; "
            "call `generate` without `assistant_model`."
        )
    moving = spec.rope_types & _MOVING_ROPE
    if moving:
        raise ValueError(
            f"{name} has {', '.join(sorted(moving))} rotary embeddings, whose frequencies depend on the last "
            "position of a forward, so a tree would change the tokens; call `generate` without `assistant_model`."
        )
    _check_modules(target)


def _check_modules(target: PreTrainedModel) -> None:
    """Refuse a target whose parts were exchanged for ones that cannot be tapped, or that let nodes see each other."""
    name = type(target).__name__
    path = next(path for path, module in target.named_modules() if module is target.get_decoder())
    parts = path.split(".")
    if any(_is_compiled(target.get_submodule(".".join(parts[:i]))) for i in range(len(parts) + 1)):
        raise ValueError(
            f"{name} was compiled, and in its graphs the hooks that feed a head do not run; load it anew and leave "
            "compiling to `cache_implementation='static'`."
        )
    kinds = {type(module): (path, module) for path, module in target.named_modules() if _is_odd_linear(module)}
    place = {"device": input_device(target), "dtype": target.dtype}
    for path, module in kinds.values():
        if _mixes_rows(module, torch.linspace(-1, 1, module.in_features, **place)):
            raise ValueError(
                f"`{path}` of {name}, {type(module).__name__}, quantizes activations by all tokens of a forward, so "
                "the nodes of a tree would change each other; quantize weights only, or call `generate` without "
                "`assistant_model`."
            )


def _is_compiled(module: nn.Module) -> bool:
    """Whether by `module.compile()` or by `module.forward = torch.compile(module.forward)`."""
    is_wrapped = hasattr(module.forward, "_torchdynamo_orig_callable")  # also by what keeps it from being compiled
    return module._compiled_call_impl is not None or (
        is_wrapped and not hasattr(module.forward, "_torchdynamo_disable")
    )


def _is_odd_linear(module: nn.Module) -> bool:
    """Whether a linear map, or the weight of a plain one, is of another class than torch's."""
    if type(module) is nn.Linear:
        return type(module.weight) is not nn.Parameter
    is_wrapper = "base_layer" in module._modules  # of PEFT, which may drop out; what it wraps is asked by itself
    return {"in_features", "out_features"} <= vars(module).keys() and not is_wrapper


@torch.no_grad()
def _mixes_rows(linear: nn.Module, row: Tensor) -> bool:
    """Whether what a linear map makes of `row`, `(features,)`, changes when a much larger one is beside it."""
    alone = linear(row[None])[0]
    beside = linear(torch.stack([row, 1000 * row]))[0]
    return bool((beside - alone).norm() > 0.1 * alone.norm())


def check_call(
    pair: DecodingPair,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> None:
    """Refuse options of one `generate` call that a tree cannot honour, or not with this pair.

    Raises:
        ValueError: says what to do instead.
    """
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("A draft head needs the tokens of the prompt; pass `input_ids` instead of `inputs_embeds`.")
    if input_ids.shape[1] == 0:
        raise ValueError("The prompt is empty; start it with a token, such as the tokenizer's `bos_token_id`.")
    if not model_kwargs.get("use_cache"):
        raise ValueError("A draft head needs a key-value cache; leave out `use_cache=False`.")
    extra = [name for name, value in model_kwargs.items() if isinstance(value, Tensor) and name not in _TENSOR_INPUTS]
    extra = [name for name in extra if name not in MODALITY_INPUTS or model_kwargs[name].any()]
    if extra:
        raise ValueError(f"A draft head reads text alone; call `generate` without {', '.join(sorted(extra))}.")
    if generation_config.cache_implementation == "static":
        _check_static(pair, len(input_ids))
    else:
        check_cache(model_kwargs.get(CACHE))
    if len(input_ids) > 1 and has_virtual_tokens(pair.target):
        raise ValueError(
            "PEFT puts virtual tokens before the prompt, which is possible for one prompt at a time; call `generate` "
            "for each."
        )
    wants_states = generation_config.output_attentions or generation_config.output_hidden_states
    if generation_config.return_dict_in_generate and wants_states:
        raise ValueError(
            "`output_attentions` and `output_hidden_states` are not available for trees; "
            "call `generate` without `assistant_model`, or run the target on the finished text."
        )
    if synced_gpus:
        raise ValueError("`synced_gpus` is not available with a draft head; load the target with `device_map` instead.")


def _check_static(pair: DecodingPair, num_rows: int) -> None:
    """Refuse what caches of a fixed size cannot serve."""
    if num_rows > 1:
        raise ValueError(
            f"Caches of a fixed size take one prompt at a time and got {num_rows}; leave out "
            "`cache_implementation='static'`, or call `generate` for each."
        )
    last = pair.spec.num_layers - 1
    if last in pair.head.config.target_layer_ids:
        raise ValueError(
            f"The head reads what the target's last layer, {last}, gives, and a target returns that only normed; "
            "leave out `cache_implementation='static'`."
        )
    if has_virtual_tokens(pair.target):
        raise ValueError(
            "PEFT puts virtual tokens before the prompt, for which a cache of a fixed size has no room; "
            "leave out `cache_implementation='static'`."
        )
