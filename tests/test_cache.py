from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, Qwen3Config, Qwen3NextConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, QuantoQuantizedLayer

from jetspec_hf.cache import (
    GrowingCache,
    ParkedRows,
    UnslidLayer,
    can_replace_rows,
    check_cache,
    close_windows,
    keep_path,
    keep_paths,
    make_head_cache,
    open_windows,
)
from jetspec_hf.head.configuration_jetspec import JetSpecConfig
from jetspec_hf.upstream import first_cached

WINDOW = 5
HEADS, HEAD_DIM = 2, 3


@pytest.fixture
def config() -> Qwen3Config:
    """One full and one sliding layer."""
    return Qwen3Config(
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=WINDOW,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
    )


def random_states(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, batch, HEADS, length, HEAD_DIM).unbind(0)


def select(states: Tensor, path: Tensor) -> Tensor:
    """The states of the nodes on each row's path, one row after the other."""
    return torch.stack([states[row][:, nodes] for row, nodes in enumerate(path.tolist())])


@pytest.mark.parametrize("num_past", [0, 1, 3, 4, 5, 11], ids=lambda n: f"{n} past")
@pytest.mark.parametrize(
    "paths",
    [
        [[[0]], [[0, 2]], [[0, 1, 3]]],
        [[[0, 2, 3]], [[0, 1, 2, 3, 4, 5]], [[0]], [[0, 3, 5]]],
        [[[0, 1, 2, 5], [0, 3, 4, 5]], [[0, 1], [0, 3]]],
    ],
    ids=["short paths", "whole tree too", "two rows"],
)
def test_the_path_stays_and_the_rest_goes(config: Qwen3Config, num_past: int, paths: list) -> None:
    num_nodes, batch = 6, len(paths[0])
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    committed = [random_states(batch, num_past) for _ in range(2)]  # for each layer, keys and values of all tokens
    if num_past:
        for layer, states in enumerate(committed):
            cache.update(*states, layer)
        cache.crop(0)  # as after a prompt: sliding layers shrink to their window

    for kept in map(torch.tensor, paths):
        for layer in range(2):
            nodes = random_states(batch, num_nodes)
            cache.update(*nodes, layer)
            committed[layer] = tuple(
                torch.cat([old, select(new, kept)], dim=2) for old, new in zip(committed[layer], nodes, strict=True)
            )
        keep_path(cache, num_nodes, kept)

        num_committed = committed[0][0].shape[2]
        for layer, window in ((0, num_committed), (1, WINDOW - 1)):
            first = max(num_committed - window, 0)
            assert cache.get_seq_length(layer) == num_committed
            assert first_cached(cache, layer, num_nodes) == first
            torch.testing.assert_close(cache.layers[layer].keys, committed[layer][0][:, :, first:], rtol=0, atol=0)
            torch.testing.assert_close(cache.layers[layer].values, committed[layer][1][:, :, first:], rtol=0, atol=0)


class RaggedRows:
    """A cache of rows of different lengths, and lists of the states of their tokens, as they should be."""

    def __init__(self, config: Qwen3Config, num_rows: int, num_past: int) -> None:
        self.cache = DynamicCache(config=config)
        self.states = [random_states(num_rows, num_past) for _ in range(2)]  # of each layer, keys and values
        for layer, states in enumerate(self.states):
            self.cache.update(*states, layer)
        # Of each row and layer, keys and values, (heads, tokens, head_dim).
        self.rows = [[[part[row] for part in states] for states in self.states] for row in range(num_rows)]
        open_windows(self.cache)
        self.parked, self.going = ParkedRows(num_rows), list(range(num_rows))

    @property
    def lengths(self) -> list[int]:
        return [self.rows[row][0][0].shape[1] for row in self.going]

    def keep(self, num_nodes: int, paths: list[list[int]]) -> None:
        """A round with a tree for each row, whose paths differ in length."""
        before, most = torch.tensor(self.lengths), max(map(len, paths))
        for layer in range(2):
            nodes = random_states(len(self.going), num_nodes)
            self.cache.update(*nodes, layer)
            for i, (row, path) in enumerate(zip(self.going, paths, strict=True)):
                held = self.rows[row][layer]
                held[:] = [torch.cat([old, new[i][:, path]], dim=1) for old, new in zip(held, nodes, strict=True)]
        padded = torch.tensor([path + [0] * (most - len(path)) for path in paths])
        keep_paths(self.cache, num_nodes, padded, before, max(self.lengths))
        self.check()

    def park(self, staying: list[int]) -> None:
        self.parked.park(self.cache, staying, self.lengths)
        self.going = [self.going[row] for row in staying]
        self.check()

    def put_back(self) -> None:
        self.parked.put_back(self.cache, self.lengths)
        self.going = list(range(len(self.rows)))
        self.check()

    def check(self) -> None:
        longest = max(self.lengths)
        for layer_idx, layer in enumerate(self.cache.layers):
            assert layer.get_seq_length() == longest
            first = longest - layer.keys.shape[2]
            for i, row in enumerate(self.going):
                for found, wanted in zip((layer.keys, layer.values), self.rows[row][layer_idx], strict=True):
                    assert torch.equal(found[i, :, : wanted.shape[1] - first], wanted[:, first:])


@pytest.mark.parametrize("num_past", [1, 3, WINDOW, 11], ids=lambda n: f"{n} past")
def test_rows_of_different_lengths_keep_their_paths_and_may_leave(config: Qwen3Config, num_past: int) -> None:
    rows = RaggedRows(config, 4, num_past)
    rows.keep(6, [[0], [0, 2, 3], [0, 1], [0, 1, 2, 3, 4, 5]])
    rows.keep(4, [[0, 1, 2, 3], [0], [0, 3], [0]])
    rows.park([0, 1, 2])  # the longest leaves
    rows.keep(1, [[0], [0], [0]])
    rows.keep(5, [[0, 4], [0, 2, 3, 4], [0]])
    rows.park([1])
    rows.keep(5, [[0, 1, 2, 3]])
    rows.put_back()
    layer = rows.cache.layers[1]
    assert isinstance(layer, UnslidLayer)
    assert first_cached(rows.cache, 1, 3) == max(num_past - (WINDOW - 1), 0)
    assert not layer.keys[3, :, rows.lengths[3] - first_cached(rows.cache, 1, 3) :].any(), "zeros behind shorter rows"
    longest = max(rows.lengths)
    close_windows(rows.cache)
    layer = rows.cache.layers[1]
    assert type(layer) is DynamicSlidingWindowLayer
    assert layer.get_seq_length() == longest
    assert layer.keys.shape[2] == layer.values.shape[2] == min(longest, WINDOW - 1)
    assert torch.equal(layer.keys[1], rows.rows[1][1][0][:, -(WINDOW - 1) :])
    # It slides on.
    rows.cache.update(*random_states(4, 1), 1)
    assert layer.get_seq_length() == longest + 1
    assert layer.keys.shape[2] <= WINDOW - 1


def test_without_rows_that_left_nothing_is_put_back(config: Qwen3Config) -> None:
    rows = RaggedRows(config, 2, 6)
    rows.keep(3, [[0], [0, 1]])
    before = [layer.keys for layer in rows.cache.layers]
    rows.put_back()
    assert all(layer.keys is keys for layer, keys in zip(rows.cache.layers, before, strict=True))


def test_an_open_window_says_how_many_keys_a_mask_has(config: Qwen3Config) -> None:
    cache = DynamicCache(config=config)
    cache.update(*random_states(2, 9), 1)
    open_windows(cache)
    assert cache.layers[1].get_mask_sizes(3) == (WINDOW - 1 + 3, 9 - (WINDOW - 1))
    cache.update(*random_states(2, 3), 1)
    assert cache.layers[1].get_mask_sizes(3) == (WINDOW - 1 + 6, 9 - (WINDOW - 1))
    assert cache.layers[1].get_seq_length() == 12


def test_head_cache_drops_a_block_beyond_its_window(config: Qwen3Config) -> None:
    head_config = JetSpecConfig.for_target(
        config,
        mask_token_id=7,
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        use_sliding_window=True,
        sliding_window=WINDOW,
    )
    cache = make_head_cache(head_config)
    keys, values = random_states(1, 13)
    cache.update(keys, values, 0)
    cache.crop(-4)  # 9 of context, 4 of block
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(cache.layers[0].keys, keys[:, :, 9 - (WINDOW - 1) : 9], rtol=0, atol=0)
    torch.testing.assert_close(cache.layers[0].values, values[:, :, 9 - (WINDOW - 1) : 9], rtol=0, atol=0)


def test_plain_dynamic_caches_are_accepted(config: Qwen3Config) -> None:
    check_cache(DynamicCache())
    check_cache(DynamicCache(config=config))


class PlainLayers(Cache):
    """Plain layers in a cache that is not a `DynamicCache`."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(layers=[DynamicLayer(), DynamicLayer()])


def with_layer(layer_class: type) -> Callable[[Qwen3Config], Cache]:
    """A dynamic cache whose second layer is of another class."""

    def make(config: Qwen3Config) -> Cache:
        cache = DynamicCache(config=config)
        cache.layers[1] = object.__new__(layer_class)
        return cache

    return make


@pytest.mark.parametrize(
    ("make_cache", "named"),
    [
        (lambda config: None, "NoneType"),
        (lambda config: StaticCache(config=config, max_cache_len=8), "StaticCache"),
        (lambda config: StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=8), "StaticLayer"),
        (PlainLayers, "PlainLayers"),
        (with_layer(QuantoQuantizedLayer), "QuantoQuantizedLayer"),
        (with_layer(LinearAttentionLayer), "LinearAttentionLayer"),
        (with_layer(type("OddLayer", (DynamicLayer,), {})), "OddLayer"),
    ],
    ids=["none", "static", "static layers", "another class", "quantized", "recurrent", "a subclass of a layer"],
)
def test_caches_that_cannot_drop_nodes_are_refused_by_name(
    config: Qwen3Config, make_cache: Callable[[Qwen3Config], Cache | None], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"needs a plain `DynamicCache`.*got .*{named}"):
        check_cache(make_cache(config))


def test_an_offloading_cache_is_refused(config: Qwen3Config) -> None:
    cache = DynamicCache(config=config)
    cache.offloading = True  # what `offloading=True` sets, beside a CUDA stream
    with pytest.raises(ValueError, match=r"needs a plain `DynamicCache`"):
        check_cache(cache)


def test_rows_come_and_go_with_their_keys_and_values() -> None:
    """Against lists of the tokens of each row, over more tokens than room is taken for at once."""
    config = Qwen3Config(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    cache, others = GrowingCache(config), GrowingCache(config)

    def write(to: GrowingCache, num_rows: int, num_tokens: int) -> torch.Tensor:
        keys = torch.randn(num_rows, 1, num_tokens, 2)
        held, values = to.update(keys, -keys, 0)
        assert torch.equal(held, -values)
        return held

    write(cache, 3, 60)
    held = torch.cat([write(cache, 3, 1) for _ in range(20)][-1:])
    assert held.shape == (3, 1, 80, 2)
    assert cache.bytes_per_token() == 2 * 2 * 4
    new = write(others, 2, 90)
    cache.replace_rows(torch.tensor([0, 2]), 30, others)
    found = cache.layers[0].keys
    assert (found.shape, cache.get_seq_length()) == ((4, 1, 90, 2), 90)
    assert torch.equal(found[:2, :, 40:], held[[0, 2], :, 30:])
    assert torch.equal(found[2:], new)
    assert not found[:2, :, :40].any()
    cache.replace_rows(torch.tensor([1]), 40, None)
    assert torch.equal(write(cache, 1, 2)[:, :, :-2], held[[2], :, 30:])


def test_only_plain_caches_have_rows_that_can_be_replaced() -> None:
    assert can_replace_rows(Qwen3Config(num_hidden_layers=2))
    assert not can_replace_rows(Qwen3NextConfig(num_hidden_layers=4))
