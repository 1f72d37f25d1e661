"""Verification: the target scores all nodes of a tree in one forward pass."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .cache import check_cache, keep_path, release
from .head_masking import as_bias
from .taps import HiddenStateTaps
from .tree import DraftTree
from .tree_masking import ancestor_mask, tree_mask
from .upstream import CACHE, first_cached, prefill, record_past

# Tensors that tell text from images, sound and the like. Of text alone they are 0.
MODALITY_INPUTS = {"token_type_ids", "mm_token_type_ids"}


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The attention type of each decoder layer of a target, by its text configuration."""
    if getattr(config, "layer_types", None) is not None:
        return list(config.layer_types)
    # Families without the field have one type throughout; some lack even the window.
    is_sliding = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if is_sliding else "full_attention"] * config.num_hidden_layers


def input_device(target: PreTrainedModel) -> torch.device:
    """Where a target takes its inputs; where weights are fetched when they are needed, inputs are, too."""
    return torch.device("cpu") if target.device.type == "meta" else target.device


def has_virtual_tokens(target: PreTrainedModel) -> bool:
    """Whether PEFT puts tokens of its own before the prompt (prefix tuning, prompt tuning and their kin)."""
    prepare = vars(target).get("prepare_inputs_for_generation")
    return inspect.ismethod(prepare) and prepare.__self__ is not target


def check_prefill(
    target: PreTrainedModel, cache: Cache | None, held: Cache, num_before: int, num_read: int, num_prompt: int
) -> None:
    """Refuse to go on from a cache that does not hold what was read.

    Args:
        target (`PreTrainedModel`): the target.
        cache (`Cache`, *optional*): what it returned.
        held (`Cache`): what it was given.
        num_before (`int`): tokens that were cached before.
        num_read (`int`): tokens that it read.
        num_prompt (`int`): tokens of the prompt, those cached before included.

    Raises:
        ValueError: says what may be the reason, and what to do.
    """
    num_cached = 0 if cache is None else int(cache.get_seq_length())
    if cache is None or num_cached == num_before:
        raise ValueError(
            f"{type(target).__name__} caches nothing of the prompt, as in training with checkpointing; "
            "call `target.eval()` before `generate`."
        )
    if has_virtual_tokens(target):
        check_cache(cache)
        if num_before > 0 or num_cached <= num_prompt:
            raise ValueError(
                f"PEFT puts virtual tokens before the prompt, but after {num_prompt} tokens the cache holds "
                f"{num_cached}; start from an empty cache, with a PEFT that is made for this version of transformers."
            )
    elif cache is not held or num_cached - num_before != num_read:
        raise ValueError(
            f"{type(target).__name__} read {num_read} tokens, and its cache grew by {num_cached - num_before}, or is "
            "another than `generate` gave it; call `generate` without `assistant_model`."
        )


class TargetVerifier:
    """The target within one `generate` call: its cache, its positions, and the taps for the head.

    Hooks are on the target from `__enter__` to `__exit__`, which leaves the cache as plain decoding would.

    Args:
        target (`PreTrainedModel`): any causal language model.
        layer_ids (`list[int]`): the decoder layers to tap.
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompt.
        model_kwargs (`dict`): what `generate` has prepared, the cache among it.
    """

    def __init__(
        self, target: PreTrainedModel, layer_ids: list[int], input_ids: Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        config = target.config.get_text_config()
        self._target = target
        self._taps = HiddenStateTaps(target, layer_ids)
        self._model_kwargs = model_kwargs
        self._layer_types = layer_types(config)
        self._window = getattr(config, "sliding_window", None)
        self.cache = model_kwargs[CACHE]
        padding_mask = model_kwargs.get("attention_mask")
        is_padded = padding_mask is not None and not bool(padding_mask.all())
        self._padding_mask = padding_mask if is_padded else None
        self._positions = self._prompt_positions(input_ids)
        # What goes to every verification as it stands. The rest is made anew for each tree.
        made = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "cache_position"}
        self._fixed_kwargs = {name: value for name, value in model_kwargs.items() if name not in made | MODALITY_INPUTS}

    def __enter__(self) -> "TargetVerifier":
        self._taps.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._taps.__exit__(*exception)
        release(self.cache)

    def _prompt_positions(self, input_ids: Tensor) -> Tensor:
        """The position of every prompt token, cached ones included, `(batch, tokens)`.

        Targets whose rotary embedding knows time, height and width have `(rows, batch, tokens)`, and of text all alike.
        """
        positions = self._model_kwargs.get("position_ids")
        if positions is not None:
            return positions
        if self._padding_mask is not None:
            return (self._padding_mask.long().cumsum(-1) - 1).clamp(min=0)
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)

    def prefill(self, input_ids: Tensor, generation_config: GenerationConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Read the prompt, or what of it the cache does not hold yet.

        Returns:
            `tuple`: logits after the last token, `(batch, 1, vocab)`; taps of the tokens read, `(batch, tokens, taps *
            hidden)`; and their positions, `(batch, tokens)`.
        """
        num_before = int(self.cache.get_seq_length())  # a static cache counts in place
        with self._taps.recording():
            outputs = prefill(self._target, input_ids, generation_config, self._model_kwargs)
        taps = self._taps.take()
        num_read, cache = taps.shape[1], outputs.get(CACHE)
        check_prefill(self._target, cache, self.cache, num_before, num_read, input_ids.shape[1])
        if has_virtual_tokens(self._target):
            self._insert_virtual_tokens(cache, num_read)
        # Only from here on: a long prompt need not stay whole in sliding layers.
        record_past(self.cache, True)
        return outputs.logits[:, -1:], taps, self._text_positions()[:, -num_read:]

    def _insert_virtual_tokens(self, cache: Cache, num_read: int) -> None:
        """Go on behind the tokens that PEFT has put before the prompt, in a cache of its own or by reading them."""
        num_cached, num_virtual = cache.get_seq_length(), cache.get_seq_length() - self._positions.shape[1]
        self.cache = cache
        self._positions = self._positions + num_virtual
        if num_read == num_cached:  # it then counts all, padding too
            self._positions = torch.arange(num_cached, device=self._positions.device)[None]
        if self._padding_mask is not None:
            self._padding_mask = torch.nn.functional.pad(self._padding_mask, (num_virtual, 0), value=1)

    def next_position(self) -> Tensor:
        """The position of the next token that is not cached, `(batch, 1)`."""
        return self._positions[..., -1:] + 1

    def _text_positions(self) -> Tensor:
        """The newest positions as the head counts them, `(batch, tokens)`."""
        return self._positions[0] if self._positions.ndim == 3 else self._positions

    def padding_mask(self) -> Tensor | None:
        """Nonzero on real tokens among the cached ones, `(batch, cached)`; `None` where there is no padding."""
        if self._padding_mask is None:
            return None
        missing = self.cache.get_seq_length() - self._padding_mask.shape[1]
        return torch.nn.functional.pad(self._padding_mask, (0, missing), value=1)

    def score(self, tree: DraftTree) -> tuple[Tensor, Tensor]:
        """One forward over all nodes, under masks that show each only its own path.

        Returns:
            `tuple`: logits, `(batch, nodes, vocab)`, and taps, `(batch, nodes, taps * hidden)`, at every node.
        """
        with self._taps.recording():
            outputs = self._target(
                input_ids=tree.tokens,
                attention_mask=self._masks(tree),
                position_ids=self.next_position() + tree.depths,
                use_cache=True,
                **{CACHE: self.cache},
                **self._fixed_kwargs,
            )
        return outputs.logits, self._taps.take()

    def keep(self, num_nodes: int, path: Tensor) -> Tensor:
        """Keep the accepted nodes of the tree just scored, drop the rest, and return their positions."""
        keep_path(self.cache, num_nodes, path)
        return self._advance(path.shape[1])

    def result_cache(self) -> Cache:
        """The cache for whoever goes on with it."""
        return self.cache

    def _advance(self, num_kept: int) -> Tensor:
        """Count on from the last position: those of newly committed tokens, `(batch, kept)`."""
        start = self.next_position()
        self._positions = start + torch.arange(num_kept, device=start.device)
        return self._text_positions()

    def _masks(self, tree: DraftTree) -> Tensor | dict[str, Tensor] | None:
        """One mask where all layers attend alike, else one for each layer type; none where a single node sees all."""
        padding_mask = self.padding_mask()
        if len(tree) == 1 and padding_mask is None and "sliding_attention" not in self._layer_types:
            return None
        ancestors = ancestor_mask(tree.parents)
        masks = {}
        for layer_type in set(self._layer_types):
            mask = tree_mask(
                ancestors,
                tree.depths,
                num_past=self.cache.get_seq_length(),
                first_key=first_cached(self.cache, self._layer_types.index(layer_type), len(tree)),
                window=self._window if layer_type == "sliding_attention" else None,
                padding_mask=padding_mask,
            )
            # The one form that both sdpa and eager attention read alike.
            masks[layer_type] = as_bias(mask, self._target.dtype)
        # Families of one layer type take no dictionary.
        return masks if len(masks) > 1 else next(iter(masks.values()))
