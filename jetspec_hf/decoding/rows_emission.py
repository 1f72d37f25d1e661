"""The texts of a call with several prompts as they grow, each at its own pace."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..tree.acceptance import Acceptance, accept, edges_of, greedy_choices
from ..tree.tree import DraftTree
from ..upstream import pad_token_of
from .draws import Draws
from .emission import Wishes
from .outputs import DraftStatistics
from .row_processors import columns, process_row

# What these say of a row depends on that row alone, so they are asked as soon as it grows.
_ROW_BY_ROW = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)


class _Row:
    """One text."""

    def __init__(self, number: int, input_ids: Tensor, process: Callable) -> None:
        self.number, self.input_ids, self.process = number, input_ids, process
        self.num_steps = 0  # tokens emitted
        self.num_wanted: int | None = None  # of these, once a criterion has said stop
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []


class RowsEmission:
    """Does to every token of every row what plain `generate` does, though rows are at different lengths.

    Criteria that know more than one row are asked for whole columns, a token of each row, in the order in which plain
    decoding would ask them; rows that were ahead are then cut.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompts.
        wishes (`Wishes`): of the call; its streamer gets every column when it is complete.
        statistics (`DraftStatistics`): times the processors, apart from all else.

    Raises:
        ValueError: if a processor of which each row needs its own cannot be copied.
    """

    def __init__(self, input_ids: Tensor, wishes: Wishes, statistics: DraftStatistics) -> None:
        config, stopping_criteria = wishes.generation_config, wishes.stopping_criteria
        num_rows, self._num_prompt = input_ids.shape
        self.device = input_ids.device
        self._streamer = wishes.streamer
        processors = [process_row(wishes.logits_processor, i, num_rows, self._batch_at) for i in range(num_rows)]
        self._rows = [
            _Row(i, input_ids[i, None], statistics.timed("processors", process)) for i, process in enumerate(processors)
        ]
        self.going = list(self._rows)  # those that still decode
        self._max_length: int = wishes.max_length
        self._criteria = StoppingCriteriaList(one for one in stopping_criteria if type(one) in _ROW_BY_ROW)
        self._column_criteria = StoppingCriteriaList(one for one in stopping_criteria if type(one) not in _ROW_BY_ROW)
        # Without an end token finished rows go on until all are.
        self._has_eos = any(hasattr(one, "eos_token_id") for one in stopping_criteria)
        self._pad_token_id = pad_token_of(config) if self._has_eos else 0
        self._num_columns = 0  # complete ones, already seen by criteria and streamer
        self._draws = Draws(num_rows, input_ids.device) if config.do_sample else None
        self._keeps_scores, self._keeps_logits = wishes.keeps_scores, wishes.keeps_logits
        self._is_plain, self._eos_ids = wishes.are_plain, wishes.eos_ids

    @property
    def is_finished(self) -> bool:
        """Whether no row decodes any more."""
        return not self.going

    @property
    def anchors(self) -> Tensor:
        """The newest token of each row that still decodes, `(rows,)`."""
        return torch.cat([row.input_ids[:, -1] for row in self.going])

    @property
    def max_depths(self) -> list[int]:
        """The deepest node that can still be emitted in each row that decodes; the bonus token takes the last place."""
        return [self._max_length - row.input_ids.shape[1] - 1 for row in self.going]

    @property
    def num_steps(self) -> int:
        """Steps that plain decoding would have taken to where we are."""
        return max(row.num_steps if row.num_wanted is None else row.num_wanted for row in self._rows)

    @property
    def num_new_tokens(self) -> list[int]:
        """Tokens of each row, padding not counted."""
        ends = map(self._end_of, self._rows)
        return [self.num_steps if end is None else end for end in ends]

    def accept(self, tree: DraftTree, logits: Tensor) -> list[Acceptance]:
        """Emit, for each row that decodes, the target's own tokens as far as they run along its tree, and one more."""
        if self._is_plain:
            choices = greedy_choices(tree, logits)
        else:
            choosers = [self._chooser(row, one) for row, one in zip(self.going, logits, strict=True)]
            choices = list(zip(edges_of(tree), choosers, strict=True))
        accepted = [accept(*choice, self._ender(row)) for row, choice in zip(self.going, choices, strict=True)]
        if self._is_plain:
            for row, one in zip(self.going, accepted, strict=True):
                row.input_ids = torch.cat([row.input_ids, row.input_ids.new_tensor([one.tokens])], dim=1)
        return accepted

    def drop_finished(self) -> list[int]:
        """Let rows that are finished decode no more; the numbers, among those that did, of the rows that do."""
        self._see_columns()
        before, self.going = self.going, [row for row in self.going if not self._is_done(row)]
        return [i for i, row in enumerate(before) if row in self.going]

    def end(self) -> Tensor:
        """The finished texts, `(batch, tokens)`, shorter ones padded."""
        if self._streamer is not None:
            self._streamer.end()
        if self._draws is not None:
            self._draws.end(self.num_steps)
        return self._batch_at(self._num_prompt + self.num_steps)

    def kept(self, name: str) -> tuple[Tensor, ...] | None:
        """`scores` or `logits` of every step, each `(batch, vocab)`, where they are wanted; 0 for finished rows."""
        if not (self._keeps_scores if name == "scores" else self._keeps_logits):
            return None
        rows: list[list[Tensor]] = [
            getattr(row, name)[:num_tokens] for row, num_tokens in zip(self._rows, self.num_new_tokens, strict=True)
        ]
        nothing = torch.zeros_like(max(rows, key=len)[0])
        return tuple(
            torch.cat([row[step] if step < len(row) else nothing for row in rows]) for step in range(self.num_steps)
        )

    def _is_done(self, row: _Row) -> bool:
        if self._num_prompt + row.num_steps >= self._max_length:
            return True
        if row.num_wanted is None:
            return False
        others_go_on = not self._has_eos and any(one.num_wanted is None for one in self._rows)
        return not others_go_on and (self._has_eos or row.num_steps >= self.num_steps)

    def _batch_at(self, length: int) -> Tensor:
        """All texts, as far as they are known, cut or padded to a length."""
        ends = map(self._end_of, self._rows)
        rows = [
            row.input_ids if end is None else row.input_ids[:, : self._num_prompt + end]
            for row, end in zip(self._rows, ends, strict=True)
        ]
        return columns(rows, length, self._pad_token_id)

    def _end_of(self, row: _Row) -> int | None:
        """How many tokens a row has before padding; none where it is not known yet, or nothing is padded."""
        return row.num_wanted if self._has_eos else None

    def _see_columns(self) -> None:
        """Ask what wants whole columns, and stream them, as far as all rows have come."""
        if not self._column_criteria and self._streamer is None:
            return
        num_complete = min((row.num_steps for row in self._rows if self._end_of(row) is None), default=self.num_steps)
        while self._num_columns < num_complete and not self._all_stopped():
            self._num_columns += 1
            batch = self._batch_at(self._num_prompt + self._num_columns)
            if self._streamer is not None:
                self._streamer.put(batch[:, -1].cpu())
            if self._column_criteria:
                self._stop(self._column_criteria(batch, self._scores_so_far()))

    def _all_stopped(self) -> bool:
        """Whether plain decoding would have ended with the columns that were seen."""
        return all(row.num_wanted is not None and row.num_wanted <= self._num_columns for row in self._rows)

    def _stop(self, says_stop: Any) -> None:
        """Finish rows with the column that was seen last."""
        for row, stops in zip(self._rows, says_stop.expand(len(self._rows)).tolist(), strict=True):
            if stops and (row.num_wanted is None or row.num_wanted > self._num_columns):
                row.num_wanted = self._num_columns

    def _scores_so_far(self) -> tuple[Tensor, ...] | None:
        kept = self.kept("scores")
        return None if kept is None else kept[: self._num_columns]

    def _chooser(self, row: _Row, logits: Tensor) -> Callable[[int], int]:
        def choose(node: int) -> int:
            # A copy, since processors may write into it.
            raw = logits[node, None].to(torch.float32, copy=True).to(row.input_ids.device)
            scores = row.process(row.input_ids, raw)
            if self._keeps_logits:
                row.logits.append(raw)
            if self._keeps_scores:
                row.scores.append(scores)
            if self._draws is not None:
                token = self._draws.draw(row.number, row.num_steps, scores.softmax(dim=-1))[None]
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            row.input_ids = torch.cat([row.input_ids, token], dim=1)
            return int(token)

        return choose

    def _ender(self, row: _Row) -> Callable[[int], bool]:
        def is_last(token: int) -> bool:
            row.num_steps += 1
            if self._is_plain:
                ends = self._num_prompt + row.num_steps >= self._max_length or token in self._eos_ids
            else:
                ends = bool(self._criteria(row.input_ids, None).all())
            if ends and row.num_wanted is None:
                row.num_wanted = row.num_steps
            return self._is_done(row)

        return is_last
