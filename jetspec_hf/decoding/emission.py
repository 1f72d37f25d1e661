"""The text of one call as it grows: how each next token is chosen, when to stop, and who hears of it."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ..tree.acceptance import Acceptance, accept, children_of, greedy_choices
from ..tree.tree import DraftTree
from .outputs import DraftStatistics

NO_LIMIT = 1 << 30  # longer than any text


class Emission:
    """Does to every token what `generate` without a head does, in the same order: processors, choice, criteria.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, tokens)`): the prompt; then the text so far.
        logits_processor (`LogitsProcessorList`): processors and warpers.
        stopping_criteria (`StoppingCriteriaList`): asked after every emitted token.
        generation_config (`GenerationConfig`): of the call.
        statistics (`DraftStatistics`): times the processors, apart from all else.
        streamer (`BaseStreamer`, *optional*): gets every token when [`stream`] is called.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        statistics: DraftStatistics,
        streamer: BaseStreamer | None = None,
    ) -> None:
        config = generation_config
        self.input_ids = input_ids
        self.is_finished = False
        self.scores: tuple[Tensor, ...] | None = _if_wanted(config, config.output_scores)
        self.logits: tuple[Tensor, ...] | None = _if_wanted(config, config.output_logits)
        lengths = [one.max_length for one in stopping_criteria if isinstance(one, MaxLengthCriteria)]
        self.max_length: int = min(lengths, default=NO_LIMIT)
        self._num_tokens = input_ids.shape[1]
        self._process: Callable = statistics.timed("processors", logits_processor)
        self._criteria = stopping_criteria
        self._do_sample = config.do_sample
        self._streamer = streamer
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

    @property
    def anchor(self) -> Tensor:
        """The newest token, `(1,)`."""
        return self.input_ids[:, -1]

    @property
    def max_depth(self) -> int:
        """The deepest node of a tree that can still be emitted; the bonus token takes the last place."""
        return self.max_length - self.input_ids.shape[1] - 1

    def accept(self, tree: DraftTree, logits: Tensor) -> Acceptance:
        """Emit the target's own tokens as far as they run along the tree, and one more."""
        if not self._is_plain:
            return accept(children_of(tree, 0), self._chooser(logits), self._is_last)
        ((children, choose),) = greedy_choices(tree, logits)
        accepted = accept(children, choose, self._is_plainly_last)
        self.input_ids = torch.cat([self.input_ids, self.input_ids.new_tensor([accepted.tokens])], dim=1)
        return accepted

    def stream(self, tokens: list[int]) -> None:
        """Put tokens one by one, as plain decoding does; some streamers tell the prompt by its shape."""
        if self._streamer is not None:
            for token in tokens:
                self._streamer.put(torch.tensor([token]))

    def end(self) -> None:
        """Tell the streamer that no more comes."""
        if self._streamer is not None:
            self._streamer.end()

    def kept(self, name: str) -> tuple[Tensor, ...] | None:
        """`scores` or `logits` of every token, each `(1, vocab)`, where they are wanted."""
        return self.scores if name == "scores" else self.logits

    def _chooser(self, logits: Tensor) -> Callable[[int], int]:
        def choose(node: int) -> int:
            # A copy, since processors may write into it.
            row = logits[:, node].to(torch.float32, copy=True).to(self.input_ids.device)
            scores = self._process(self.input_ids, row)
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

    def _is_plainly_last(self, token: int) -> bool:
        self._num_tokens += 1
        self.is_finished = self._num_tokens >= self.max_length or token in self._eos_ids
        return self.is_finished


def _if_wanted(config: GenerationConfig, is_wanted: bool | None) -> tuple[Tensor, ...] | None:
    return () if config.return_dict_in_generate and is_wanted else None
