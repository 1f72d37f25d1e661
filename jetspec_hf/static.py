"""Decoding with caches of a fixed size, so that draft and verification can be compiled once and for all rounds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, CompileConfig, GenerationConfig, PreTrainedModel

from .cache import dynamic_copy, make_static_cache
from .candidates import Block, JetSpecCandidateGenerator
from .grafts import MOST_GRAFTS, stack_grafts
from .head_masking import as_bias, static_block_mask
from .tree import DraftTree, root_tree
from .tree_masking import ancestor_mask, static_tree_mask
from .unembedding import Unembedding
from .upstream import CACHE, holding_layers, is_to_compile, num_cached
from .verification import TargetVerifier

_SLOTS = 512  # caches have a multiple of so many, so that calls of like lengths share what was compiled

# A function of tensors that gives tensors.
_Step = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class StaticCaches:
    """The caches of one call.

    Args:
        target (`Cache`): the target's.
        head (`Cache`): the head's.
        num_slots (`int`): tokens that each of them has room for.
    """

    target: Cache
    head: Cache
    num_slots: int


# Those that no call is using, as long as head and target live: a CUDA graph knows its caches by their addresses.
_FREE_CACHES: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[PreTrainedModel, dict[tuple, list[StaticCaches]]]]
_FREE_CACHES = WeakKeyDictionary()

# Targets that have returned hidden states.
_SET_UP: WeakSet[PreTrainedModel] = WeakSet()


@contextmanager
def borrow_caches(
    head: PreTrainedModel, target: PreTrainedModel, num_layers: int, num_slots: int
) -> Iterator[StaticCaches]:
    """Empty caches for one call, of at least `num_slots` tokens. A call that fails does not give them back."""
    of_pair = _FREE_CACHES.setdefault(head, WeakKeyDictionary()).setdefault(target, {})
    # Inference tensors must not be written to outside of inference mode.
    key = (target.device, target.dtype, head.device, head.dtype, torch.is_inference_mode_enabled())
    if key not in of_pair:
        of_pair.clear()
    free = of_pair.setdefault(key, [])
    try:
        caches = free.pop()
    except IndexError:
        caches = None
    if caches is None or caches.num_slots < num_slots:
        num_slots = -(-num_slots // _SLOTS) * _SLOTS
        caches = StaticCaches(
            make_static_cache(num_layers, num_slots),
            make_static_cache(head.config.num_hidden_layers, num_slots),
            num_slots,
        )
    yield caches
    for cache in (caches.target, caches.head):
        cache.reset()
    free.append(caches)


def step_compiler(
    target: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Callable[[_Step], _Step]:
    """Compiles the steps of a round where `generate` would compile the target's forward, and with the same options."""
    if not is_to_compile(target, generation_config, model_kwargs):
        return lambda step: step
    options = (generation_config.compile_config or CompileConfig()).to_dict()
    if options["dynamic"] is None:  # there are few shapes, and they come back
        options["dynamic"] = False

    def compile_step(step: _Step) -> _Step:
        compiled = torch.compile(step, **options)
        # CUDA graphs write their next results over the last.
        return lambda *args, **kwargs: tuple(one.clone() for one in compiled(*args, **kwargs))

    return compile_step


@contextmanager
def static_pair(
    head: PreTrainedModel,
    target: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    max_length: int,
    **options: Any,
) -> Iterator[tuple["StaticCandidateGenerator", "StaticVerifier"]]:
    """What drafts and what verifies in one `generate` call.

    Args:
        head (`JetSpecDraftHead`): the head, or one wrapped by PEFT.
        target (`PreTrainedModel`): any causal language model.
        input_ids (`torch.LongTensor` of shape `(1, tokens)`): the prompt.
        generation_config (`GenerationConfig`): of the call.
        model_kwargs (`dict`): what `generate` has prepared.
        max_length (`int`): longest text, in tokens.
        options: for [`JetSpecCandidateGenerator`], with the most nodes of any tree.
    """
    max_depth = max(head.config.block_size - 1, options["prompt_lookup_num_tokens"])
    # Behind the text: a tree, or what the head reads at once and its block.
    num_slots = max(max_length, generation_config.max_cache_len or 0)
    num_slots += max(1 + options["num_assistant_tokens"], 1 + max_depth + head.config.block_size)
    compile_step = step_compiler(target, generation_config, model_kwargs)
    with borrow_caches(head, target, len(holding_layers(model_kwargs[CACHE])), num_slots) as caches:
        shared = {"caches": caches, "compile_step": compile_step, "max_depth": max_depth}
        generator = StaticCandidateGenerator(head, target, **shared, **options)
        layer_ids = head.config.target_layer_ids
        with StaticVerifier(target, layer_ids, input_ids, model_kwargs, **shared, max_length=max_length) as verifier:
            yield generator, verifier


class StaticCandidateGenerator(JetSpecCandidateGenerator):
    """Drafts trees of one shape within one `generate` call.

    A tree always has its full size: where candidates run out, impossible ones fill it up, and
    `assistant_confidence_threshold` leaves none out.

    Args:
        head (`JetSpecDraftHead`): the head, or one wrapped by PEFT.
        target (`PreTrainedModel`): lends its embedding and LM head.
        caches (`StaticCaches`): the head's is filled.
        compile_step (`Callable`): what [`step_compiler`] gives.
        max_depth (`int`): deepest node that a tree may have.
        options: as of [`JetSpecCandidateGenerator`].
    """

    def __init__(
        self,
        head: PreTrainedModel,
        target: PreTrainedModel,
        *,
        caches: StaticCaches,
        compile_step: Callable[[_Step], _Step],
        max_depth: int,
        **options: Any,
    ) -> None:
        super().__init__(head, target, **(options | {"assistant_confidence_threshold": 0.0}))
        self._cache = caches.head
        self._graft_length: int = options["prompt_lookup_num_tokens"]
        self.max_depth = max_depth
        if self._temperatures is not None:  # not in a graph
            self._temperatures = self._temperatures.to(target.device)
        self._run_head, self._build_tree = compile_step(_run_head), compile_step(_build_tree)

    def draft_block(self, anchor: Tensor, *, max_depth: int, padding_mask: Tensor | None = None) -> Block | None:
        """One pass of the head, of all depths of its block whatever `max_depth` is."""
        if self.num_assistant_tokens < 1:
            return None
        grafts = self._find_grafts(anchor.device)
        block, taps, positions = self._take_new(anchor)
        num_new = taps.shape[1]
        # A prompt, and what was decoded plainly, has its own length, and no graph makes the tensors of a cache.
        is_usual = num_new <= self.max_depth + 1 and self._cache.layers[0].is_initialized
        missing = max(0, self.max_depth + 1 - num_new)
        ahead = torch.arange(1, block.shape[1] + 1, device=positions.device)
        positions = torch.cat([nn.functional.pad(positions, (0, missing)), positions[:, -1:] + ahead], dim=1)
        taps, new = nn.functional.pad(taps, (0, 0, 0, missing)), torch.full((), num_new, device=taps.device)
        if padding_mask is not None:
            padding_mask = padding_mask.to(taps.device)
        run_head: _Step = self._run_head if is_usual else _run_head
        hidden_states, logits = run_head(
            self._head, self._embed, self._unembed, self._cache, block, taps, positions, new, padding_mask
        )
        return Block(hidden_states, logits, grafts)

    def build(self, anchor: Tensor, block: Block | None, *, max_depth: int) -> DraftTree:
        """The best tree of full size and depth."""
        anchor = _packed(anchor)
        return root_tree(anchor) if block is None else DraftTree(*self._build_tree(self, anchor, block))

    def _find_grafts(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Always as many, of the same length."""
        if self._grafter is None:
            return None
        return stack_grafts(self._grafter.find(), device, (MOST_GRAFTS, self._graft_length))


class StaticVerifier(TargetVerifier):
    """Scores trees of few shapes within one `generate` call.

    Args:
        target (`PreTrainedModel`): any causal language model.
        layer_ids (`list[int]`): the decoder layers to tap; the last layer is not among them.
        input_ids (`torch.LongTensor` of shape `(1, tokens)`): the prompt.
        model_kwargs (`dict`): what `generate` has prepared.
        caches (`StaticCaches`): the target's is filled.
        compile_step (`Callable`): what [`step_compiler`] gives.
        max_depth (`int`): deepest node that a tree may have.
        max_length (`int`): longest text, in tokens.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        layer_ids: list[int],
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        *,
        caches: StaticCaches,
        compile_step: Callable[[_Step], _Step],
        max_depth: int,
        max_length: int,
    ) -> None:
        super().__init__(target, layer_ids, input_ids, model_kwargs | {CACHE: caches.target})
        self._kinds = (tuple(self._layer_types), self._window, tuple(layer_ids))
        self._width = max_depth + 1
        if self._padding_mask is not None:
            missing = caches.num_slots - self._padding_mask.shape[1]
            self._padding_mask = nn.functional.pad(self._padding_mask, (0, missing), value=1)
        self._last_position = self._positions[..., -1:] + (max_length - input_ids.shape[1])
        self._score, self._keep = compile_step(_score), compile_step(_keep)

    def __enter__(self) -> "StaticVerifier":
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._taps.__exit__(*exception)

    def prefill(self, input_ids: Tensor, generation_config: GenerationConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Read the prompt, never compiled; see [`TargetVerifier`]."""
        eager_config = copy(generation_config)
        eager_config.disable_compile = True
        prefilled = super().prefill(input_ids, eager_config)
        self._taps.__exit__()  # graphs have their own
        return prefilled

    def padding_mask(self) -> Tensor | None:
        """Nonzero where not padding, `(1, slots)`; `None` where there is no padding."""
        return self._padding_mask

    def score(self, tree: DraftTree) -> tuple[Tensor, Tensor]:
        """One forward over all nodes; see [`TargetVerifier`]."""
        # Nodes below the last token of the text are of no use, and may be where the target knows no position.
        positions = (self.next_position() + tree.depths).minimum(self._last_position)
        # The first forward that returns hidden states sets the target up for it, which no graph can do.
        score = self._score if self._target in _SET_UP else _score
        tensors = (tree.tokens, tree.parents, tree.depths, positions, self._padding_mask)
        logits, taps = score(self._target, self.cache, *tensors, *self._kinds, **self._fixed_kwargs)
        _SET_UP.add(self._target)
        return logits, taps

    def keep(self, num_nodes: int, path: Tensor) -> Tensor:
        """Keep the accepted nodes of the tree just scored, drop the rest, and return their positions."""
        num_kept = path.shape[1]
        # The slots behind are as good as empty and stay what they are.
        padded = torch.arange(self._width, device=path.device)
        padded[:num_kept] = path[0]
        counts = (torch.full((), count, device=path.device) for count in (num_nodes, num_kept))
        self._keep(self.cache, padded, *counts)
        return self._advance(num_kept)

    def result_cache(self) -> Cache:
        """A copy, of the size of the text: this cache belongs to the calls after this one."""
        return dynamic_copy(self.cache, self._target.config)


def _packed(part: Tensor) -> Tensor:
    """A copy whose strides do not tell what it is a part of, since a graph is for one set of strides."""
    return part.clone(memory_format=torch.contiguous_format)


def _run_head(
    head: PreTrainedModel,
    embed: nn.Module,
    unembed: Unembedding,
    cache: Cache,
    block: Tensor,
    taps: Tensor,
    positions: Tensor,
    num_new: Tensor,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Let the head read `num_new` of `taps`, `(1, new, taps * hidden)`, and draft `block`, `(1, block)`.

    The block stands in the cache behind all of `taps`, and the next pass writes over what was not meant to be read.

    Returns:
        `tuple`: hidden states and logits of the masks.
    """
    width, block_size = taps.shape[1], block.shape[1]
    num_read = num_cached(cache.layers[0]).to(num_new.device, copy=True)
    num_context = num_read + num_new
    masks = {
        layer_type: static_block_mask(
            num_context,
            num_read + width,
            cache.get_max_length(),
            block_size,
            is_causal=head.config.is_causal,
            window=head.config.sliding_window if layer_type == "sliding_attention" else None,
            padding_mask=padding_mask,
        )
        for layer_type in set(head.config.layer_types)
    }
    hidden_states = head(
        noise_embeds=embed(block).to(head.device, head.dtype),
        context_hidden_states=taps,
        position_ids=positions,
        attention_mask=masks,
        cache=cache,
    ).last_hidden_state[:, 1:]
    for layer in cache.layers:
        num_cached(layer).copy_(num_context)
    return hidden_states, unembed(hidden_states.to(block.device))


def _build_tree(generator: StaticCandidateGenerator, anchor: Tensor, block: Block) -> tuple[Tensor, ...]:
    """The fields of the best tree."""
    tree = generator.best_tree(anchor, block, generator.max_depth)
    return tree.tokens, tree.parents, tree.depths, tree.log_probs


def _score(
    target: PreTrainedModel,
    cache: Cache,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    positions: Tensor,
    padding_mask: Tensor | None,
    layer_types: tuple[str, ...],
    window: int | None,
    layer_ids: tuple[int, ...],
    **fixed_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Logits and taps at every node."""
    num_past = num_cached(cache.layers[0]).to(depths.device, copy=True)
    ancestors = ancestor_mask(parents)
    masks = {}
    for layer_type in set(layer_types):
        mask = static_tree_mask(
            ancestors,
            depths,
            num_past=num_past,
            num_slots=cache.get_max_length(),
            window=window if layer_type == "sliding_attention" else None,
            padding_mask=padding_mask,
        )
        masks[layer_type] = as_bias(mask, target.dtype)
    outputs = target(
        input_ids=tokens,
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=positions,
        use_cache=True,
        # Hooks would have to be the same ones in every call.
        output_hidden_states=True,
        **{CACHE: cache},
        **fixed_kwargs,
    )
    taps = [outputs.hidden_states[1 + layer_id].to(depths.device) for layer_id in layer_ids]
    return outputs.logits, torch.cat(taps, dim=-1)


def _keep(cache: Cache, path: Tensor, num_nodes: Tensor, num_kept: Tensor) -> tuple[()]:
    """Of the newest `num_nodes` move those of `path`, `(width,)`, to the front, and drop all behind `num_kept`."""
    for layer in cache.layers:
        nodes = path.to(layer.keys.device)
        start = num_cached(layer) - num_nodes.to(nodes.device)
        slots = start + torch.arange(len(nodes), device=nodes.device)
        for states in (layer.keys, layer.values):
            states.index_copy_(2, slots, states.index_select(2, start + nodes))
        num_cached(layer).copy_(start + num_kept.to(nodes.device))
    return ()
