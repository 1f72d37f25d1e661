"""Key-value caches: which ones can hold a tree, and how the accepted path is kept."""

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .upstream import CACHE, holding_layers, is_offloading, num_cached, record_past


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


def make_static_cache(num_layers: int, num_slots: int) -> Cache:
    """An empty cache of `num_slots` tokens. All its layers are full ones, since a static window cannot go back."""
    return Cache(layers=[StaticLayer(max_cache_len=num_slots) for _ in range(num_layers)])


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
