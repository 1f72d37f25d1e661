"""The decoding loop: draft a tree, score it, accept a path, keep it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..drafting.node_count import FixedCount, TimedCount
from ..drafting.options import DraftOptions
from ..pair import DecodingPair
from ..tree.tree import root_tree
from ..upstream import check_names, decoding
from .compatibility import check_call, check_target
from .emission import Emission, Wishes
from .outputs import DraftStatistics, JetSpecGenerateOutput, make_output
from .rows_loop import decode_rows
from .workers import Workers, inner_mode, make_node_count, open_workers


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
        model (`PreTrainedModel`): the target; [`~jetspec_hf.decoding.compatibility.check_target`] has passed it.
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompts, padded on the left.
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
        [`JetSpecGenerateOutput`] if `return_dict_in_generate`, else `torch.LongTensor` of shape `(batch, tokens)`.

    Raises:
        ValueError: before the first token, if head, target and options cannot work together.
        RuntimeError: before the first token, if this version of transformers lacks what is needed.
    """
    check_names()
    pair = DecodingPair(assistant_model, model)
    check_call(pair, input_ids, generation_config, model_kwargs, synced_gpus)
    if options is None:
        options = DraftOptions.of(assistant_model.config, generation_config)
    decode = _decode_row if len(input_ids) == 1 else decode_rows
    wishes = Wishes(logits_processor, stopping_criteria, generation_config, streamer)
    with _evaluating(assistant_model):
        return decode(pair, input_ids, wishes, options, model_kwargs)


def _decode_row(
    pair: DecodingPair, input_ids: Tensor, wishes: Wishes, options: DraftOptions, model_kwargs: dict[str, Any]
) -> JetSpecGenerateOutput | Tensor:
    generation_config, statistics = wishes.generation_config, DraftStatistics(num_prompt_tokens=input_ids.shape[1])
    emission = Emission(input_ids, wishes, statistics)
    with open_workers(pair, options, emission, generation_config, model_kwargs) as workers:
        _read_prompt(workers, emission, statistics, generation_config)
        node_count = make_node_count(pair, options, generation_config, lambda: statistics.total_seconds)
        with decoding(pair.target):
            _run_rounds(workers, emission, statistics, node_count, inner_mode(generation_config))
        cache = workers.verifier.result_cache() if generation_config.return_dict_in_generate else None
    statistics.num_new_tokens = emission.input_ids.shape[1] - input_ids.shape[1]
    emission.end()
    return make_output(generation_config, emission.input_ids, emission.kept, cache, statistics)


def _read_prompt(
    workers: Workers, emission: Emission, statistics: DraftStatistics, generation_config: GenerationConfig
) -> None:
    """Read the prompt, and emit the first token."""
    (drafter, verifier), prompt = workers, emission.input_ids
    scores, positions = statistics.timed("prefill", verifier.prefill)(prompt, generation_config)
    drafter.extend(scores.taps, positions)
    drafter.observe(prompt[0].tolist())
    # The prompt's last token is a tree of one node, already scored.
    tokens = emission.accept(root_tree(emission.anchor), scores.logits).tokens
    drafter.observe(tokens)
    emission.stream(tokens)


def _run_rounds(
    workers: Workers,
    emission: Emission,
    statistics: DraftStatistics,
    node_count: FixedCount | TimedCount,
    mode: Callable[[], Callable],
) -> None:
    """Draft a tree, score it, accept a path, keep it, until the text is finished (paper, section 2)."""
    drafter, verifier = workers

    def step(phase: str, function: Callable) -> Callable:
        return statistics.timed(phase, mode()(function))

    def keep(num_nodes: int, path: list[int], taps: Tensor) -> None:
        kept = torch.tensor([path], device=taps.device)
        drafter.extend(taps[:, kept[0]], verifier.keep(num_nodes, kept.to(emission.input_ids.device)))

    find, run_head = statistics.timed("draft", drafter.graft_probs), step("draft", drafter.run_head)
    graft, grow = step("build", drafter.graft), step("build", drafter.grow)
    score, keep_path = step("verify", verifier.score), step("commit", keep)
    accept, observe = statistics.timed("accept", emission.accept), statistics.timed("accept", drafter.observe)

    while not emission.is_finished:
        anchor, max_depth = emission.anchor, emission.max_depth
        choice = node_count.choose(partial(find, max_depth))
        sizes = {"num_nodes": choice.num_nodes, "max_depth": max_depth}
        if choice.runs_head:
            tree = grow(anchor, run_head(anchor, **sizes, padding_mask=verifier.padding_mask()), **sizes)
        else:
            tree = graft(anchor, **sizes)
        logits, taps = score(tree)
        accepted = accept(tree, logits)
        observe(accepted.tokens)
        node_count.observe(choice, tree, [accepted.path])
        keep_path(len(tree), accepted.path, taps)
        statistics.count_round(tree, accepted)
        emission.stream(accepted.tokens)


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
