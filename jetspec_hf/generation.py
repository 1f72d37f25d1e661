"""The decoding loop: draft a tree, score it, accept a path, keep it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .compatibility import check_call, check_static, check_target
from .draft_options import DraftOptions
from .drafter import Drafter, DynamicDrafter
from .emission import Emission
from .node_count import SIZES, STATIC_SIZES, FixedCount, TimedCount, node_count_of
from .outputs import DraftStatistics, JetSpecGenerateOutput
from .pair import DecodingPair
from .static_drafting import CompileStep, StaticDrafter, Step
from .static_verification import StaticVerifier
from .tree import root_tree
from .upstream import CACHE, check_names, decoding, holding_layers, is_to_compile
from .verification import DynamicVerifier
from .verifier import Verifier


@torch.no_grad()
def tree_assisted_decoding(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant_model: PreTrainedModel,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    options: DraftOptions | None = None,
    **model_kwargs: Any,
) -> JetSpecGenerateOutput | Tensor:
    """Decode with a target, checking trees that a head drafts (paper, sections 2 and 3).

    The output is the target's own, greedy or sampled: each token is chosen from the target's logits after the true
    prefix, by the processors, random draws and criteria that `generate` would use, in their order.

    Args:
        model (`PreTrainedModel`): the target; [`~jetspec_hf.compatibility.check_target`] has passed it.
        input_ids (`torch.LongTensor` of shape `(1, tokens)`): the prompt.
        logits_processor (`LogitsProcessorList`): processors and warpers.
        stopping_criteria (`StoppingCriteriaList`): asked after every emitted token.
        generation_config (`GenerationConfig`):
            `num_assistant_tokens`, `assistant_confidence_threshold` and `prompt_lookup_num_tokens` steer the tree.
        assistant_model (`JetSpecDraftHead`): the head.
        synced_gpus (`bool`): not available.
        streamer (`BaseStreamer`, *optional*): gets every token, those of a round when it ends.
        options (`DraftOptions`, *optional*): by default what the call asks for, and where it says nothing, the head.
        model_kwargs: what `generate` has prepared for the target's forward.

    Returns:
        [`JetSpecGenerateOutput`] if `return_dict_in_generate`, else `torch.LongTensor` of shape `(1, tokens)`.

    Raises:
        ValueError: before the first token, if head, target and options cannot work together.
        RuntimeError: before the first token, if this version of transformers lacks what is needed.
    """
    check_names()
    pair = DecodingPair(assistant_model, model)
    check_call(input_ids, generation_config, model_kwargs, synced_gpus)
    is_static = generation_config.cache_implementation == "static"
    if is_static:
        check_static(pair)
    if options is None:
        options = DraftOptions.of(assistant_model.config, generation_config)
    statistics = DraftStatistics(num_prompt_tokens=input_ids.shape[1])
    emission = Emission(input_ids, logits_processor, stopping_criteria, generation_config, statistics, streamer)
    workers = _static_workers if is_static else _dynamic_workers
    with (
        _evaluating(assistant_model),
        workers(pair, emission, generation_config, model_kwargs, options) as (drafter, verifier),
    ):
        scores, positions = statistics.timed("prefill", verifier.prefill)(input_ids, generation_config)
        drafter.extend(scores.taps, positions)
        drafter.observe(input_ids[0].tolist())
        # The prompt's last token is a tree of one node, already scored.
        tokens = emission.accept(root_tree(emission.anchor), scores.logits).tokens
        drafter.observe(tokens)
        emission.stream(tokens)
        with decoding(model):
            _decode(pair, options, drafter, verifier, emission, statistics, is_static=is_static)
        cache = verifier.result_cache() if generation_config.return_dict_in_generate else None

    statistics.num_new_tokens = emission.input_ids.shape[1] - input_ids.shape[1]
    emission.end()
    if not generation_config.return_dict_in_generate:
        return emission.input_ids
    return JetSpecGenerateOutput(
        sequences=emission.input_ids,
        scores=emission.scores,
        logits=emission.logits,
        statistics=statistics,
        **{CACHE: cache},
    )


def _decode(
    pair: DecodingPair,
    options: DraftOptions,
    drafter: Drafter,
    verifier: Verifier,
    emission: Emission,
    statistics: DraftStatistics,
    *,
    is_static: bool,
) -> None:
    """All rounds after the prompt: draft a tree, score it, accept a path, keep it (paper, section 2)."""
    # Inference mode spares bookkeeping for every small operation. Only what stays within a round runs in it: tokens,
    # scores and the code of others do not. Static caches stay for later calls.
    inner_mode = torch.no_grad if is_static else torch.inference_mode

    def step(phase: str, function: Callable) -> Callable:
        return statistics.timed(phase, inner_mode()(function))

    def keep(num_nodes: int, path: list[int], taps: Tensor) -> None:
        kept = torch.tensor([path], device=taps.device)
        drafter.extend(taps[:, kept[0]], verifier.keep(num_nodes, kept.to(emission.input_ids.device)))

    run_head, grow = step("draft", drafter.run_head), step("build", drafter.grow)
    score, keep_path = step("verify", verifier.score), step("commit", keep)
    accept, observe = statistics.timed("accept", emission.accept), statistics.timed("accept", drafter.observe)
    node_count = _node_count(pair, options, statistics, STATIC_SIZES if is_static else SIZES)

    while not emission.is_finished:
        anchor, num_nodes, max_depth = emission.anchor, node_count.choose(), emission.max_depth
        block = run_head(anchor, num_nodes=num_nodes, max_depth=max_depth, padding_mask=verifier.padding_mask())
        tree = grow(anchor, block, num_nodes=num_nodes, max_depth=max_depth)
        logits, taps = score(tree)
        path, tokens = accept(tree, logits)
        observe(tokens)
        node_count.observe(num_nodes, tree, path)
        keep_path(len(tree), path, taps)
        statistics.drafted_nodes.append(len(tree) - 1)
        statistics.accepted_lengths.append(len(tokens) - 1)
        emission.stream(tokens)


def _node_count(
    pair: DecodingPair, options: DraftOptions, statistics: DraftStatistics, sizes: tuple[int, ...]
) -> FixedCount | TimedCount:
    """What says how many nodes each round drafts: the call, or what rounds are found to cost."""
    if options.num_assistant_tokens is not None:
        return FixedCount(options.num_assistant_tokens)
    return TimedCount(node_count_of(pair, sizes), lambda: statistics.total_seconds)


@contextmanager
def _dynamic_workers(
    pair: DecodingPair,
    emission: Emission,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    options: DraftOptions,
) -> Iterator[tuple[Drafter, Verifier]]:
    """What drafts and what verifies, with caches that grow."""
    with DynamicVerifier(pair, emission.input_ids, model_kwargs) as verifier:
        yield DynamicDrafter(pair, options), verifier


@contextmanager
def _static_workers(
    pair: DecodingPair,
    emission: Emission,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    options: DraftOptions,
) -> Iterator[tuple[Drafter, Verifier]]:
    """What drafts and what verifies, with caches of a fixed size and steps that are compiled."""
    block_size = pair.head.config.block_size
    most_nodes = STATIC_SIZES[-1] if options.num_assistant_tokens is None else options.num_assistant_tokens
    max_depth = max(block_size - 1, options.prompt_lookup_num_tokens)
    # Behind the text: a tree, or what the head reads at once and its block.
    num_slots = max(emission.max_length, generation_config.max_cache_len or 0)
    num_slots += max(1 + most_nodes, 1 + max_depth + block_size)
    compile_step = _step_compiler(pair.target, generation_config, model_kwargs)
    with pair.static_caches(len(holding_layers(model_kwargs[CACHE])), num_slots) as caches:
        shared: dict[str, Any] = {"caches": caches, "compile_step": compile_step, "max_depth": max_depth}
        drafter = StaticDrafter(pair, options, **shared)
        yield drafter, StaticVerifier(pair, emission.input_ids, model_kwargs, **shared, max_length=emission.max_length)


def _step_compiler(
    target: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> CompileStep:
    """Compiles the steps of a round where `generate` would compile the target's forward, and with the same options."""
    if not is_to_compile(target, generation_config, model_kwargs):
        return lambda step: step
    compile_options = (generation_config.compile_config or CompileConfig()).to_dict()
    if compile_options["dynamic"] is None:  # there are few shapes, and they come back
        compile_options["dynamic"] = False

    def compile_step(step: Step) -> Step:
        compiled = torch.compile(step, **compile_options)
        # CUDA graphs write their next results over the last.
        return lambda *args, **kwargs: tuple(one.clone() for one in compiled(*args, **kwargs))

    return compile_step


def decode_with(
    head: PreTrainedModel, *, streamer: BaseStreamer | None = None, options: DraftOptions | None = None
) -> Callable:
    """The loop as a function for `generate(custom_generate=...)`, for those who want nothing patched.

    `generate` passes neither a streamer nor a tokenizer on to such a function: give the streamer here, and stop strings
    as `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`.

    Args:
        head (`JetSpecDraftHead`): the head.
        streamer (`BaseStreamer`, *optional*): gets the prompt, then every token, those of a round when it ends.
        options (`DraftOptions`, *optional*):
            How to draft, whatever call and head say; only the temperature is always the call's.
    """

    def decode(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> JetSpecGenerateOutput | Tensor:
        check_target(model)
        ours: dict[str, Any] = {"assistant_model": head, "streamer": streamer}
        if options is not None:
            asked = DraftOptions.of(head.config, kwargs["generation_config"])
            ours["options"] = replace(options, temperature=asked.temperature)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        return tree_assisted_decoding(model, input_ids, **(kwargs | ours))

    return decode


@contextmanager
def _evaluating(head: PreTrainedModel) -> Iterator[None]:
    """Keep a head that is being trained from dropping out, which would draw from the generator of sampling."""
    if not head.training:
        yield
        return
    head.eval()
    try:
        yield
    finally:
        head.train()
