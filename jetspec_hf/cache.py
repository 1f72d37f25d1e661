"""Key-value caches: which ones can hold a tree, and how the accepted path is kept."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .upstream import CACHE, holding_layers, is_offloading, num_cached, record_past

_SLOTS = 512  # static caches have a multiple of so many, so that calls of like lengths share what was compiled


def check_cache(cache: Cache | None) -> None:
    """Refuse a cache from which rejected nodes cannot be taken out again.

    Raises:
        ValueError: unless every layer is a plain dynamic one, full or sliding.
    """
    layers = [] if cache is None else holding_layers(cache)
    odd = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    offloads = isinstance(cache, DynamicCache) and is_offloading(cache)
    if not isinstance(cache, DynamicCache) or offloads or odd:
        what = type(cache).__name__ + (" that offloads" if offloads else "")
        what += f" with {', '.join(sorted(odd))}" if odd else ""
        raise ValueError(
            f"A draft head needs a plain `DynamicCache`, which can drop rejected nodes; got {what}. "
            "Leave out `cache_implementation` or set it to 'static', or pass "
            f"`{CACHE}=DynamicCache(config=model.config)`."
        )


def make_head_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a draft head, able to drop its block after each pass."""
    cache = DynamicCache(config=config)
    record_past(cache, True)
    return cache


@dataclass(frozen=True)
class StaticCaches:
    """The caches of one call, of a fixed size.

    All their layers are full ones, since a static window cannot go back.

    Args:
        target (`Cache`): the target's.
        head (`Cache`): the head's.
        num_slots (`int`): tokens that each of them has room for.
    """

    target: Cache
    head: Cache
    num_slots: int

    @classmethod
    def of(cls, num_target_layers: int, num_head_layers: int, num_slots: int) -> "StaticCaches":
        """Empty ones, of at least `num_slots` tokens."""
        num_slots = -(-num_slots // _SLOTS) * _SLOTS
        target, head = (
            Cache(layers=[StaticLayer(max_cache_len=num_slots) for _ in range(num_layers)])
            for num_layers in (num_target_layers, num_head_layers)
        )
        return cls(target, head, num_slots)

    def reset(self) -> None:
        """Make them as good as empty."""
        for cache in (self.target, self.head):
            cache.reset()


def dynamic_copy(cache: Cache, config: PreTrainedConfig) -> DynamicCache:
    """What a static cache holds, as a cache that grows, with the windows of `config`."""
    copy = DynamicCache(config=config)
    for layer_idx, layer in enumerate(cache.layers):
        length = int(num_cached(layer))
        copy.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), layer_idx)
    return copy


def release(cache: Cache) -> None:
    """Leave a cache as plain decoding would, for whoever goes on with it: ordinary tensors, windows that slide."""
    record_past(cache, False)
    for layer in holding_layers(cache):
        if layer.is_initialized and layer.keys.is_inference():
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def keep_path(cache: Cache, num_nodes: int, path: Tensor) -> None:
    """Of the newest `num_nodes` cached tokens keep those on `path`, in its order, and drop the others.

    Only accepted entries move, and the root stays where it is.

    Args:
        cache (`Cache`): ends with the nodes of one tree; it recorded its past when they came.
        num_nodes (`int`): nodes in that tree.
        path (`torch.LongTensor` of shape `(batch, kept)`): the nodes to keep, root first.
    """
    num_kept = path.shape[1]
    for layer in holding_layers(cache) if num_kept > 1 else []:
        index = path[:, 1:].to(layer.keys.device)[:, None, :, None]  # (batch, heads, kept, head_dim)
        for states in (layer.keys, layer.values):
            nodes = states[:, :, -num_nodes:]
            nodes[:, :, 1:num_kept] = nodes.gather(2, index.expand(-1, nodes.shape[1], -1, nodes.shape[3]))
    # Also when nothing is dropped: sliding layers shrink back to their window here.
    cache.crop(num_kept - num_nodes)


def keep_static_path(cache: Cache, path: Tensor, num_nodes: Tensor, num_kept: Tensor) -> None:
    """[`keep_path`] for a static cache of one row, without a host number, so that it can be compiled.

    Args:
        cache (`Cache`): ends with the nodes of one tree.
        path (`torch.LongTensor` of shape `(width,)`): which of its nodes to move to the front, root first; those behind
            `num_kept` are dropped.
        num_nodes (`torch.LongTensor` of shape `()`): nodes in that tree.
        num_kept (`torch.LongTensor` of shape `()`): nodes to keep.
    """
    for layer in cache.layers:
        nodes = path.to(layer.keys.device)
        start = num_cached(layer) - num_nodes.to(nodes.device)
        slots = start + torch.arange(len(nodes), device=nodes.device)
        for states in (layer.keys, layer.values):
            states.index_copy_(2, slots, states.index_select(2, start + nodes))
        num_cached(layer).copy_(start + num_kept.to(nodes.device))
