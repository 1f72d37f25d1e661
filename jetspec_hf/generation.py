"""The decoding loop: draft a tree, score it, accept a path, keep it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .acceptance import Acceptance, accept, accept_greedy, children_of
from .candidates import JetSpecCandidateGenerator
from .compatibility import check_call, check_static, check_target
from .node_count import SIZES, STATIC_SIZES, node_count_of
from .static import static_pair
from .tree import DraftTree, root_tree
from .upstream import CACHE, check_names, decoding, filled_in
from .verification import TargetVerifier

_NO_LIMIT = 1 << 30  # deeper than any tree


@dataclass
class DraftStatistics:
    """What happened in one `generate` call.

    Args:
        num_prompt_tokens (`int`): tokens given.
        num_new_tokens (`int`): tokens emitted.
        drafted_nodes (`list[int]`): nodes drafted in each round, the root not counted; 0 where one decodes plainly.
        accepted_lengths (`list[int]`): tokens emitted in each round, its last one, the bonus token, not counted.
        seconds (`dict[str, float]`):
            Host time in each phase: prefill, draft, build, verify, accept, processors, commit. A device that works on
            while the host goes ahead is waited for in accept. Processors and warpers are counted only where a token
            goes through them.
    """

    num_prompt_tokens: int
    num_new_tokens: int = 0
    drafted_nodes: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def num_rounds(self) -> int:
        """Verification passes; the prefill is not one."""
        return len(self.drafted_nodes)

    @property
    def num_drafted_tokens(self) -> int:
        """Nodes drafted in all rounds."""
        return sum(self.drafted_nodes)

    @property
    def num_accepted_tokens(self) -> int:
        """Drafted tokens emitted in all rounds."""
        return sum(self.accepted_lengths)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens for each forward pass of the target, the prefill counted; plain decoding has 1."""
        return self.num_new_tokens / (self.num_rounds + 1)

    @property
    def total_seconds(self) -> float:
        """Host time in all phases."""
        return sum(self.seconds.values())

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside the block to a phase, less that of phases within it."""
        start, others = time.perf_counter(), self.total_seconds
        try:
            yield
        finally:
            within = self.total_seconds - others
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start - within


@dataclass
class JetSpecGenerateOutput(GenerateDecoderOnlyOutput):
    """The output of `generate(return_dict_in_generate=True)` with a draft head.

    Args:
        statistics (`DraftStatistics`): what was drafted and accepted. The other fields are those of transformers.
    """

    statistics: DraftStatistics | None = None


class _Emission:
    """The text of one call as it grows: how each next token is chosen, and when to stop.

    Does to every token what `generate` without a head does, in the same order: processors, choice, criteria.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        statistics: DraftStatistics,
    ) -> None:
        config = generation_config
        self._statistics = statistics
        self.input_ids = input_ids
        self.is_finished = False
        self.scores: tuple[Tensor, ...] | None = self._if_wanted(config, config.output_scores)
        self.logits: tuple[Tensor, ...] | None = self._if_wanted(config, config.output_logits)
        lengths = [one.max_length for one in stopping_criteria if isinstance(one, MaxLengthCriteria)]
        self.max_length = min(lengths, default=None)
        self._processor = logits_processor
        self._criteria = stopping_criteria
        self._do_sample = config.do_sample
        # The usual case needs no tensor for each token: argmax of untouched logits, end by length or token.
        self._is_plain = (
            not logits_processor
            and not config.do_sample
            and self.scores is None
            and self.logits is None
            and all(type(one) in (MaxLengthCriteria, EosTokenCriteria) for one in stopping_criteria)
        )
        self._eos_ids = {
            token
            for one in stopping_criteria
            if isinstance(one, EosTokenCriteria)
            for token in one.eos_token_id.tolist()
        }

    @staticmethod
    def _if_wanted(config: GenerationConfig, is_wanted: bool | None) -> tuple[Tensor, ...] | None:
        return () if config.return_dict_in_generate and is_wanted else None

    def tokens_left(self) -> int | None:
        """How many tokens may still be emitted; `None` if nothing limits them."""
        return None if self.max_length is None else self.max_length - self.input_ids.shape[1]

    def accept(self, tree: DraftTree, logits: Tensor) -> Acceptance:
        """Emit the target's own tokens as far as they run along the tree, and one more."""
        if not self._is_plain:
            return accept(children_of(tree, 0), self._chooser(logits), self._is_last)
        accepted = accept_greedy(tree, logits, self._is_last_plain())[0]
        self.input_ids = torch.cat([self.input_ids, self.input_ids.new_tensor([accepted.tokens])], dim=1)
        return accepted

    def _chooser(self, logits: Tensor) -> Callable[[int], int]:
        def choose(node: int) -> int:
            # A copy, since processors may write into it.
            row = logits[:, node].to(torch.float32, copy=True).to(self.input_ids.device)
            with self._statistics.timed("processors"):
                scores = self._processor(self.input_ids, row)
            if self.logits is not None:
                self.logits += (row,)
            if self.scores is not None:
                self.scores += (scores,)
            if self._do_sample:
                token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            self.input_ids = torch.cat([self.input_ids, token], dim=1)
            return int(token)

        return choose

    def _is_last(self, token: int) -> bool:
        self.is_finished = bool(self._criteria(self.input_ids, self.scores).all())
        return self.is_finished

    def _is_last_plain(self) -> Callable[[int], bool]:
        left = self.tokens_left()

        def is_last(token: int) -> bool:
            nonlocal left
            left = None if left is None else left - 1
            self.is_finished = token in self._eos_ids or (left is not None and left <= 0)
            return self.is_finished

        return is_last


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
    branching: int | None = None,
    **model_kwargs: Any,
) -> JetSpecGenerateOutput | Tensor:
    """Decode with a target, checking trees that a head drafts (paper, sections 2 and 3).

    The output is the target's own, greedy or sampled: each token is chosen from the target's logits after the true
    prefix, by the processors, random draws and criteria that `generate` would use, in their order.

    Args:
        model (`PreTrainedModel`): the target.
        input_ids (`torch.LongTensor` of shape `(1, tokens)`): the prompt.
        logits_processor (`LogitsProcessorList`): processors and warpers.
        stopping_criteria (`StoppingCriteriaList`): asked after every emitted token.
        generation_config (`GenerationConfig`):
            `num_assistant_tokens`, `assistant_confidence_threshold` and `prompt_lookup_num_tokens` steer the tree.
        assistant_model (`JetSpecDraftHead`): the head.
        synced_gpus (`bool`): not available.
        streamer (`BaseStreamer`, *optional*): gets every token, those of a round when it ends.
        branching (`int`, *optional*): most children of a node; 1 drafts a chain.
        model_kwargs: what `generate` has prepared for the target's forward.

    Returns:
        [`JetSpecGenerateOutput`] if `return_dict_in_generate`, else `torch.LongTensor` of shape `(1, tokens)`.

    Raises:
        ValueError: before the first token, if head, target and options cannot work together.
        RuntimeError: before the first token, if this version of transformers lacks what is needed.
    """
    check_names()
    check_target(assistant_model, model)
    check_call(input_ids, generation_config, model_kwargs, synced_gpus)
    is_static = generation_config.cache_implementation == "static"
    if is_static:
        check_static(assistant_model, model)
    statistics = DraftStatistics(num_prompt_tokens=input_ids.shape[1])
    emission = _Emission(input_ids, logits_processor, stopping_criteria, generation_config, statistics)
    options = _draft_options(assistant_model, generation_config)
    options |= {"branching": branching, "max_length": emission.max_length}
    node_count = None
    if options["num_assistant_tokens"] is None:  # the loop finds out itself how many nodes pay
        node_count = node_count_of(assistant_model, model, STATIC_SIZES if is_static else SIZES)
        options["num_assistant_tokens"] = node_count.sizes[-1]
    pair = static_pair if is_static else _dynamic_pair
    # Inference mode spares bookkeeping for every small operation. Only what stays within a round runs in it: tokens,
    # scores and the code of others do not. Static caches stay for later calls.
    inner_mode = torch.no_grad if is_static else torch.inference_mode
    with (
        _evaluating(assistant_model),
        pair(assistant_model, model, input_ids, generation_config, model_kwargs, **options) as (generator, target),
    ):
        with statistics.timed("prefill"):
            logits, states, positions = target.prefill(input_ids, generation_config)
        generator.extend(states, positions)
        generator.observe(input_ids[0].tolist())
        # The prompt's last token is a tree of one node, already scored.
        tokens = emission.accept(root_tree(input_ids[:, -1]), logits).tokens
        generator.observe(tokens)
        _stream(streamer, tokens)

        seconds = statistics.total_seconds
        with decoding(model):
            while not emission.is_finished:
                if node_count is not None:
                    generator.num_assistant_tokens = node_count.choose()
                with inner_mode():
                    with statistics.timed("draft"):
                        anchor, tokens_left = emission.input_ids[:, -1], emission.tokens_left()
                        # The bonus token takes the last place.
                        max_depth = _NO_LIMIT if tokens_left is None else tokens_left - 1
                        block = generator.draft_block(anchor, max_depth=max_depth, padding_mask=target.padding_mask())
                    with statistics.timed("build"):
                        tree = generator.build(anchor, block, max_depth=max_depth)
                    with statistics.timed("verify"):
                        logits, states = target.score(tree)
                with statistics.timed("accept"):
                    path, tokens = emission.accept(tree, logits)
                    generator.observe(tokens)
                if node_count is not None:
                    seconds, before = statistics.total_seconds, seconds
                    log_probs = tree.log_probs[0].tolist() if len(tree) > 1 else [0.0]
                    node_count.observe(generator.num_assistant_tokens, log_probs, path, seconds - before)
                with inner_mode(), statistics.timed("commit"):
                    kept = torch.tensor([path], device=states.device)
                    generator.extend(states[:, kept[0]], target.keep(len(tree), kept.to(input_ids.device)))
                statistics.drafted_nodes.append(len(tree) - 1)
                statistics.accepted_lengths.append(len(tokens) - 1)
                _stream(streamer, tokens)
        cache = target.result_cache() if generation_config.return_dict_in_generate else None

    statistics.num_new_tokens = emission.input_ids.shape[1] - input_ids.shape[1]
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return emission.input_ids
    return JetSpecGenerateOutput(
        sequences=emission.input_ids,
        scores=emission.scores,
        logits=emission.logits,
        statistics=statistics,
        **{CACHE: cache},
    )


@contextmanager
def _dynamic_pair(
    head: PreTrainedModel,
    target: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    max_length: int | None,
    **options: Any,
) -> Iterator[tuple[JetSpecCandidateGenerator, TargetVerifier]]:
    """What drafts and what verifies, with caches that grow."""
    with TargetVerifier(target, head.config.target_layer_ids, input_ids, model_kwargs) as verifier:
        yield JetSpecCandidateGenerator(head, target, **options), verifier


def decode_with(
    head: PreTrainedModel, *, streamer: BaseStreamer | None = None, branching: int | None = None
) -> Callable:
    """The loop as a function for `generate(custom_generate=...)`, for those who want nothing patched.

    `generate` passes neither a streamer nor a tokenizer on to such a function: give the streamer here, and stop strings
    as `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`.

    Args:
        head (`JetSpecDraftHead`): the head.
        streamer (`BaseStreamer`, *optional*): gets the prompt, then every token, those of a round when it ends.
        branching (`int`, *optional*): most children of a node; 1 drafts a chain.
    """

    def decode(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> JetSpecGenerateOutput | Tensor:
        if streamer is not None:
            streamer.put(input_ids.cpu())
        ours = {"assistant_model": head, "streamer": streamer, "branching": branching}
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


def _draft_options(head: PreTrainedModel, generation_config: GenerationConfig) -> dict[str, Any]:
    """The tree's knobs: the call's where it names them, else the head's.

    By the time that the loop runs, transformers has filled in its own defaults, so a value equal to one of them cannot
    be told from silence, and the head's holds.
    """
    defaults = filled_in(generation_config)
    options = {"temperature": generation_config.temperature if generation_config.do_sample else 0.0}
    for name in ("num_assistant_tokens", "assistant_confidence_threshold", "prompt_lookup_num_tokens"):
        value = getattr(generation_config, name)
        options[name] = getattr(head.config, name) if value in (None, defaults.get(name)) else value
    return options


def _stream(streamer: BaseStreamer | None, tokens: list[int]) -> None:
    """Put tokens one by one, as plain decoding does; some streamers tell the prompt by its shape."""
    if streamer is not None:
        for token in tokens:
            streamer.put(torch.tensor([token]))
