"""Key-value caches: which ones can hold a tree, how the accepted path is kept, and rows that come and go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .upstream import CACHE, holding_layers, is_offloading, num_cached, record_past, set_num_seen

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


def keep_paths(cache: Cache, num_nodes: int, paths: Tensor, lengths: Tensor, longest: int) -> None:
    """[`keep_path`] for rows of different lengths: what a row keeps moves right behind its own text.

    What then lies behind a row's text has no meaning, and must be masked.

    Args:
        cache (`Cache`): ends with the nodes of one tree for each row; its layers are full ones.
        num_nodes (`int`): nodes in each tree.
        paths (`torch.LongTensor` of shape `(batch, kept)`): as in [`keep_path`]; any node where a row keeps fewer.
        lengths (`torch.LongTensor` of shape `(batch,)`): cached tokens of each row before its tree.
        longest (`int`): cached tokens of the longest row with what it keeps.
    """
    num_past = cache.get_seq_length() - num_nodes
    slots = lengths[:, None] + torch.arange(paths.shape[1], device=lengths.device)
    for layer in holding_layers(cache):
        first = layer.get_seq_length() - layer.keys.shape[2]
        places = (num_past + paths - first, slots - first)
        source, target = (one.to(layer.keys.device)[:, None, :, None] for one in places)
        for states in (layer.keys, layer.values):
            expanded = [index.expand(-1, states.shape[1], -1, states.shape[3]) for index in (source, target)]
            states.scatter_(2, expanded[1], states.gather(2, expanded[0]))
    cache.crop(longest - num_past - num_nodes)


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


class UnslidLayer(DynamicLayer):
    """A layer with a sliding window that for a while keeps all it has, since rows of different lengths share it.

    Args:
        layer (`DynamicSlidingWindowLayer`): what it holds, and what it becomes again.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values, self._layer = layer.keys, layer.values, layer
        self.first = layer.get_seq_length() - layer.keys.shape[-2]  # the first token that it holds

    def get_seq_length(self) -> int:
        """All tokens, those that have left the window before it opened among them."""
        return self.first + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As in transformers: how many keys a mask has, and which is the first."""
        return self.keys.shape[-2] + query_length, self.first

    def slid(self) -> DynamicSlidingWindowLayer:
        """The layer that it was, with the newest tokens of this one."""
        set_num_seen(self._layer, self.get_seq_length())
        width = self._layer.sliding_window - 1
        self._layer.keys, self._layer.values = self.keys[:, :, -width:], self.values[:, :, -width:]
        return self._layer


def open_windows(cache: Cache) -> None:
    """Let layers with a sliding window keep all they have from here on."""
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[i] = UnslidLayer(layer)


def close_windows(cache: Cache) -> None:
    """Undo [`open_windows`]."""
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, UnslidLayer):
            cache.layers[i] = layer.slid()


class ParkedRows:
    """Rows of a cache that are finished while others go on; put back for whoever goes on with the cache.

    Args:
        num_rows (`int`): rows of the cache.
    """

    def __init__(self, num_rows: int) -> None:
        self._going = list(range(num_rows))
        # The keys and values of each layer, each (1, heads, tokens, head_dim), of each row.
        self._parked: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def park(self, cache: Cache, staying: Sequence[int], lengths: Sequence[int]) -> None:
        """Take all but some rows out of a cache.

        Args:
            cache (`Cache`): the cache.
            staying (`Sequence[int]`): numbers of its rows that go on; at least one.
            lengths (`Sequence[int]`): cached tokens of each of its rows.
        """
        for row in set(range(len(self._going))) - set(staying):
            self._parked[self._going[row]] = _row_of(cache, row, lengths[row])
        self._going = [self._going[row] for row in staying]
        cache.batch_select_indices(torch.tensor(staying))
        cache.crop(max(lengths[row] for row in staying) - cache.get_seq_length())

    def put_back(self, cache: Cache, lengths: Sequence[int]) -> None:
        """Bring all rows together again; behind shorter ones there are zeros.

        Args:
            cache (`Cache`): the cache.
            lengths (`Sequence[int]`): cached tokens of each of its rows.
        """
        if not self._parked:
            return
        for row, number in enumerate(self._going):
            self._parked[number] = _row_of(cache, row, lengths[row])
        rows = [layers for _, layers in sorted(self._parked.items())]
        for layer, held in zip(holding_layers(cache), zip(*rows, strict=True), strict=True):
            layer.keys, layer.values = (_padded(states) for states in zip(*held, strict=True))
        self._parked, self._going = {}, list(range(len(rows)))


def _row_of(cache: Cache, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Copies of the first `length` tokens of a row, of each layer."""
    ends = [length - layer.get_seq_length() + layer.keys.shape[2] for layer in holding_layers(cache)]
    return [
        (layer.keys[row, None, :, :end].clone(), layer.values[row, None, :, :end].clone())
        for layer, end in zip(holding_layers(cache), ends, strict=True)
    ]


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows below each other, each `(1, heads, its tokens, head_dim)`."""
    longest = max(row.shape[2] for row in rows)
    return torch.cat([nn.functional.pad(row, (0, 0, 0, longest - row.shape[2])) for row in rows])


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
