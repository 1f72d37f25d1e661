"""Verification of trees of few shapes, so that it can be compiled once for all rounds."""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig

from .cache import StaticCaches, dynamic_copy, keep_static_path
from .compiling import CompileStep
from .head_masking import as_bias
from .pair import DecodingPair
from .taps import HiddenStateTaps
from .tree import DraftTree
from .tree_masking import ancestor_mask, static_tree_mask
from .upstream import CACHE, num_cached
from .verifier import Scores, TextLayout, fixed_kwargs, read_prompt


class StaticVerifier:
    """A [`~jetspec_hf.verifier.Verifier`] with a cache of fixed size.

    Args:
        pair (`DecodingPair`): the head, whose `target_layer_ids` do not name the last layer, and its target.
        input_ids (`torch.LongTensor` of shape `(1, tokens)`): the prompt.
        model_kwargs (`dict`): what `generate` has prepared.
        caches (`StaticCaches`): the target's is filled.
        compile_step (`Callable`): what compiles a step.
        max_depth (`int`): deepest node that a tree may have.
        max_length (`int`): longest text, in tokens.
    """

    def __init__(
        self,
        pair: DecodingPair,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        *,
        caches: StaticCaches,
        compile_step: CompileStep,
        max_depth: int,
        max_length: int,
    ) -> None:
        self._pair, self._cache = pair, caches.target
        self._model_kwargs = model_kwargs | {CACHE: caches.target}
        self._layout = TextLayout(input_ids, model_kwargs)
        self._fixed_kwargs = fixed_kwargs(model_kwargs)
        self._padding_mask = self._layout.padding_mask
        if self._padding_mask is not None:
            missing = caches.num_slots - self._padding_mask.shape[1]
            self._padding_mask = nn.functional.pad(self._padding_mask, (0, missing), value=1)
        self._width = max_depth + 1
        self._last_position = self._layout.last_position + (max_length - input_ids.shape[1])
        self._score, self._keep = compile_step(_score), compile_step(_keep)

    def prefill(self, input_ids: Tensor, generation_config: GenerationConfig) -> tuple[Scores, Tensor]:
        """See [`~jetspec_hf.verifier.Verifier`]; never compiled."""
        eager_config = copy(generation_config)
        eager_config.disable_compile = True
        # Only here: graphs take what the target returns.
        with HiddenStateTaps(self._pair.target, self._pair.head.config.target_layer_ids) as taps:
            scores, positions, _ = read_prompt(
                self._pair, taps, input_ids, eager_config, self._model_kwargs, self._layout
            )
        return scores, positions

    def padding_mask(self) -> Tensor | None:
        """See [`~jetspec_hf.verifier.Verifier`]; of shape `(1, slots)`."""
        return self._padding_mask

    def score(self, tree: DraftTree) -> Scores:
        """See [`~jetspec_hf.verifier.Verifier`]."""
        # Nodes below the last token of the text are of no use, and may be where the target knows no position.
        positions = (self._layout.last_position + 1 + tree.depths).minimum(self._last_position)
        # The first forward that returns hidden states sets the target up for it, which no graph can do.
        is_set_up: list[bool] = self._pair.kept("has returned hidden states", list)
        score = self._score if is_set_up else _score
        tensors = (tree.tokens, tree.parents, tree.depths, positions, self._padding_mask)
        logits, taps = score(self._pair, self._cache, *tensors, **self._fixed_kwargs)
        is_set_up[:] = [True]
        return Scores(logits, taps)

    def keep(self, num_nodes: int, path: Tensor) -> Tensor:
        """See [`~jetspec_hf.verifier.Verifier`]."""
        num_kept = path.shape[1]
        # The slots behind are as good as empty and stay what they are.
        padded = torch.arange(self._width, device=path.device)
        padded[:num_kept] = path[0]
        counts = (torch.full((), count, device=path.device) for count in (num_nodes, num_kept))
        self._keep(self._cache, padded, *counts)
        return self._layout.advance(num_kept)

    def result_cache(self) -> Cache:
        """A copy, of the size of the text: this cache belongs to the calls after this one."""
        return dynamic_copy(self._cache, self._pair.target.config)


def _score(
    pair: DecodingPair,
    cache: Cache,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    positions: Tensor,
    padding_mask: Tensor | None,
    **fixed_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Logits and taps at every node."""
    num_past = num_cached(cache.layers[0]).to(depths.device, copy=True)
    ancestors = ancestor_mask(parents)
    masks = {}
    for layer_type in set(pair.spec.layer_types):
        mask = static_tree_mask(
            ancestors,
            depths,
            num_past=num_past,
            num_slots=cache.get_max_length(),
            window=pair.spec.window_of(layer_type),
            padding_mask=padding_mask,
        )
        masks[layer_type] = as_bias(mask, pair.target.dtype)
    outputs = pair.target(
        input_ids=tokens,
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=positions,
        use_cache=True,
        # Hooks would have to be the same ones in every call.
        output_hidden_states=True,
        **{CACHE: cache},
        **fixed_kwargs,
    )
    layer_ids = pair.head.config.target_layer_ids
    taps = [outputs.hidden_states[1 + layer_id].to(depths.device) for layer_id in layer_ids]
    return outputs.logits, torch.cat(taps, dim=-1)


def _keep(cache: Cache, path: Tensor, num_nodes: Tensor, num_kept: Tensor) -> tuple[()]:
    keep_static_path(cache, path, num_nodes, num_kept)
    return ()
