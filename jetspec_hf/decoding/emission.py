"""The text of one call as it grows: how each next token is chosen, when to stop, and who hears of it."""

from collections.abc import Callable
from dataclasses import dataclass

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

_NO_LIMIT = 1 << 30  # longer than any text


@dataclass(frozen=True)
class Wishes:
    """What one `generate` call says of its text.

    Args:
        logits_processor (`LogitsProcessorList`): processors and warpers.
        stopping_criteria (`StoppingCriteriaList`): asked after every emitted token.
        generation_config (`GenerationConfig`): of the call.
        streamer (`BaseStreamer`, *optional*): gets every token.
    """

    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    streamer: BaseStreamer | None = None

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that is allowed, its prompt among them."""
        lengths = [one.max_length for one in self.stopping_criteria if isinstance(one, MaxLengthCriteria)]
        return min(lengths, default=_NO_LIMIT)

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a text."""
        ends = [one for one in self.stopping_criteria if isinstance(one, EosTokenCriteria)]
        return {token for one in ends for token in one.eos_token_id.tolist()}

    @property
    def keeps_scores(self) -> bool:
        """Whether processed scores are wanted."""
        return bool(self.generation_config.return_dict_in_generate and self.generation_config.output_scores)

    @property
    def keeps_logits(self) -> bool:
        """Whether raw logits are wanted."""
        return bool(self.generation_config.return_dict_in_generate and self.generation_config.output_logits)

    @property
    def are_plain(self) -> bool:
        """Whether argmax of untouched logits and an end by length or token are all: that needs no tensor a token."""
        is_touched = self.logits_processor or self.generation_config.do_sample or self.keeps_scores or self.keeps_logits
        return not is_touched and all(
            type(one) in (MaxLengthCriteria, EosTokenCriteria) for one in self.stopping_criteria
        )


class Emission:
    """Does to every token what `generate` without a head does, in the same order: processors, choice, criteria.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, tokens)`): the prompt; then the text so far.
        wishes (`Wishes`): of the call; its streamer gets every token when [`stream`] is called.
        statistics (`DraftStatistics`): times the processors, apart from all else.
    """

    def __init__(self, input_ids: Tensor, wishes: Wishes, statistics: DraftStatistics) -> None:
        self.input_ids = input_ids
        self.is_finished = False
        self.scores: tuple[Tensor, ...] | None = () if wishes.keeps_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wishes.keeps_logits else None
        self.max_length: int = wishes.max_length
        self._num_tokens = input_ids.shape[1]
        self._process: Callable = statistics.timed("processors", wishes.logits_processor)
        self._criteria = wishes.stopping_criteria
        self._do_sample = wishes.generation_config.do_sample
        self._streamer = wishes.streamer
        self._is_plain, self._eos_ids = wishes.are_plain, wishes.eos_ids

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
