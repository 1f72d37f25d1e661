"""What works in one `generate` call: what drafts, what verifies, and what says how large trees are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from ..compiling import step_compiler
from ..drafting.drafter import Drafter, DynamicDrafter
from ..drafting.node_count import SIZES, STATIC_SIZES, FixedCount, TimedCount, node_count_of
from ..drafting.options import DraftOptions
from ..drafting.static import StaticDrafter
from ..pair import DecodingPair
from ..upstream import CACHE, holding_layers
from ..verification.dynamic import DynamicVerifier
from ..verification.static import StaticVerifier
from ..verification.verifier import Verifier
from .emission import Emission


class Workers(NamedTuple):
    """What drafts and what verifies."""

    drafter: Drafter
    verifier: Verifier


def is_static(generation_config: GenerationConfig) -> bool:
    """Whether a call wants caches of a fixed size."""
    return generation_config.cache_implementation == "static"


def inner_mode(generation_config: GenerationConfig) -> Callable[[], Callable]:
    """In which mode the steps of a round run: inference mode, which spares bookkeeping for every small operation.

    Only what stays within a round runs in it; tokens, scores and the code of others do not. Static caches stay for
    later calls.
    """
    return torch.no_grad if is_static(generation_config) else torch.inference_mode


def make_node_count(
    pair: DecodingPair,
    options: DraftOptions,
    generation_config: GenerationConfig,
    clock: Callable[[], float],
    num_rows: int = 1,
) -> FixedCount | TimedCount:
    """What says how many nodes each round drafts: the call, or what rounds are found to cost.

    Args:
        pair (`DecodingPair`): the head and its target.
        options (`DraftOptions`): of the call.
        generation_config (`GenerationConfig`): of the call.
        clock (`Callable`): seconds spent in rounds so far.
        num_rows (`int`, *optional*, defaults to 1): texts that decode.
    """
    if options.num_assistant_tokens is not None:
        return FixedCount(options.num_assistant_tokens)
    return TimedCount(node_count_of(pair, STATIC_SIZES if is_static(generation_config) else SIZES, num_rows), clock)


@contextmanager
def open_workers(
    pair: DecodingPair,
    options: DraftOptions,
    emission: Emission,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Iterator[Workers]:
    """Those that a call wants, with caches that grow or of a fixed size.

    Args:
        pair (`DecodingPair`): the head and its target.
        options (`DraftOptions`): of the call.
        emission (`Emission`): the text, at its prompt.
        generation_config (`GenerationConfig`): of the call.
        model_kwargs (`dict`): what `generate` has prepared.
    """
    if is_static(generation_config):
        with _static_workers(pair, options, emission, generation_config, model_kwargs) as workers:
            yield workers
    else:
        with DynamicVerifier(pair, emission.input_ids, model_kwargs) as verifier:
            yield Workers(DynamicDrafter(pair, options), verifier)


@contextmanager
def _static_workers(
    pair: DecodingPair,
    options: DraftOptions,
    emission: Emission,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Iterator[Workers]:
    """With caches of a fixed size, and steps that are compiled."""
    block_size = pair.head.config.block_size
    most_nodes = STATIC_SIZES[-1] if options.num_assistant_tokens is None else options.num_assistant_tokens
    max_depth = max(block_size - 1, options.prompt_lookup_num_tokens)
    # Behind the text: a tree, or what the head reads at once and its block.
    num_slots = max(emission.max_length, generation_config.max_cache_len or 0)
    num_slots += max(1 + most_nodes, 1 + max_depth + block_size)
    compile_step = step_compiler(pair.target, generation_config, model_kwargs)
    with pair.static_caches(len(holding_layers(model_kwargs[CACHE])), num_slots) as caches:
        shared: dict[str, Any] = {"caches": caches, "compile_step": compile_step, "max_depth": max_depth}
        verifier = StaticVerifier(pair, emission.input_ids, model_kwargs, **shared, max_length=emission.max_length)
        yield Workers(StaticDrafter(pair, options, **shared), verifier)
