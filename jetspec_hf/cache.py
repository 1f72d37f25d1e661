"""Key-value caches: which ones can hold a tree, how the accepted path is kept, and rows that come and go."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .upstream import CACHE, holding_layers, is_offloading, num_cached, record_past

_SLOTS = 512  # static caches have a multiple of so many, so that calls of like lengths share what was compiled
_ROOM = 64  # tokens for which a growing cache takes room at once


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


class GrowingLayer(DynamicLayer):
    """Keys and values of rows that come and go, in tensors with room for the next tokens.

    A `DynamicLayer` copies all that it holds for each new token. Here `keys` and `values` are what is filled of their
    tensors, and a sliding window is left to the mask.
    """

    _rooms: list[Tensor]  # of keys and of values, both (rows, heads, room, head_dim)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens behind those that are there, and return all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = [_room_for(states, len(states), end) for states in (key_states, value_states)]
        elif end > self._rooms[0].shape[-2]:
            self._rooms = [_move(held, _room_for(held, len(held), end), end=start) for held in (self.keys, self.values)]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values

    def replace_rows(self, rows: Tensor, start: int, newcomers: "GrowingLayer | None") -> None:
        """See [`GrowingCache.replace_rows`]."""
        kept = self.get_seq_length() - start
        joined = [] if newcomers is None else [newcomers]
        length = max(kept, *(layer.get_seq_length() for layer in joined), 0)
        rooms = []
        for i, held in enumerate((self.keys, self.values)):
            room = _room_for(held, len(rows) + sum(len(layer.keys) for layer in joined), length)
            _move(held[rows.to(held.device), :, start:], room[: len(rows)], end=length)
            for layer in joined:
                _move((layer.keys, layer.values)[i], room[len(rows) :], end=length)
            rooms.append(room)
        self._rooms = rooms
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)


def _room_for(states: Tensor, num_rows: int, length: int) -> Tensor:
    """Zeros, since what a mask hides must still be numbers."""
    return states.new_zeros(num_rows, states.shape[1], length + _ROOM, states.shape[3])


def _move(states: Tensor, room: Tensor, end: int) -> Tensor:
    """Write keys or values into a room, so that they end there."""
    room[:, :, end - states.shape[2] : end] = states
    return room


class GrowingCache(Cache):
    """A cache for several rows at once, which may leave and be replaced by others while they grow.

    Args:
        config (`PreTrainedConfig`): of a target with [`can_replace_rows`].
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        cache = DynamicCache(config=config)
        holding = holding_layers(cache)
        super().__init__(layers=[GrowingLayer() if layer in holding else layer for layer in cache.layers])

    def replace_rows(self, rows: Tensor, start: int, newcomers: "GrowingCache | None") -> None:
        """Keep some rows, from a token on, and put others behind them; both end at the same place.

        Args:
            rows (`torch.LongTensor` of shape `(kept,)`): which to keep.
            start (`int`): tokens at the start of each row that are dropped.
            newcomers (`GrowingCache`, *optional*): the others.
        """
        others = self._filled() if newcomers is None else newcomers._filled()
        for layer, other in zip(self._filled(), others, strict=True):
            layer.replace_rows(rows, start, None if newcomers is None else other)

    def bytes_per_token(self) -> float:
        """What a token of a row takes, room for others left out."""
        held = [states for layer in self._filled() for states in (layer.keys, layer.values)]
        return sum(states.nbytes / (states.shape[0] * states.shape[2]) for states in held)

    def _filled(self) -> list[GrowingLayer]:
        return [layer for layer in self.layers if isinstance(layer, GrowingLayer) and layer.is_initialized]


def can_replace_rows(config: PreTrainedConfig) -> bool:
    """Whether a target keeps of each token keys and values alone, so that rows can leave a batch and others join."""
    layers = holding_layers(DynamicCache(config=config))
    return {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
