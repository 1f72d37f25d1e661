"""Processors and warpers of `generate`, asked for one row of a batch at a time, since rows differ in length."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation import logits_process

# Those that treat every row by itself and keep nothing from call to call: one row is as good as all.
_ROW_BY_ROW = {
    *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "NoRepeatNGramLogitsProcessor"),
    *("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"),
    *("ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "ExponentialDecayLengthPenalty"),
    *("SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor", "InfNanRemoveLogitsProcessor"),
    *("TemperatureLogitsWarper", "TopPLogitsWarper", "TopKLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper"),
    *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization"),
    "WatermarkLogitsProcessor",
}
_GUIDANCE = "UnbatchedClassifierFreeGuidanceLogitsProcessor"


def process_row(
    processors: LogitsProcessorList, row: int, num_rows: int, batch_at: Callable[[int], Tensor]
) -> LogitsProcessorList:
    """The processors of one row, which take its text, `(1, tokens)`, and scores, `(1, vocab)`.

    A row has copies of those that may keep something from call to call, or know rows by their numbers. These see a
    whole batch with that row in its place, and of what they answer only that row is taken; so what they say of a row
    must not depend on the texts of others, which may be ahead or behind.

    Args:
        processors (`LogitsProcessorList`): of the call.
        row (`int`): its number in the batch.
        num_rows (`int`): rows of the batch.
        batch_at (`Callable`): the texts of all rows as far as they are known, cut or padded to a length.
    """
    return LogitsProcessorList([_of_row(processor, row, num_rows, batch_at) for processor in processors])


def _of_row(processor: LogitsProcessor, row: int, num_rows: int, batch_at: Callable[[int], Tensor]) -> LogitsProcessor:
    kind = type(processor)
    if kind is getattr(logits_process, kind.__name__, None):
        if kind is RepetitionPenaltyLogitsProcessor:
            return _penalty_of(processor, row)
        if kind.__name__ in _ROW_BY_ROW:
            return processor
        if kind is PrefixConstrainedLogitsProcessor:
            constrained = copy.copy(processor)
            allowed = processor._prefix_allowed_tokens_fn
            constrained._prefix_allowed_tokens_fn = lambda _, text: allowed(row, text)
            return constrained
        if kind.__name__ == _GUIDANCE:
            return _guidance_of(processor, row, num_rows)
    return _WholeBatch(_copy_of(processor), row, num_rows, batch_at)


def _penalty_of(processor: Any, row: int) -> LogitsProcessor:
    """A penalty that leaves out the row's own padding; since transformers 5.24 it may."""
    penalty = copy.copy(processor)
    if isinstance(processor.prompt_ignore_length, Tensor):
        penalty.prompt_ignore_length = processor.prompt_ignore_length[row, None]
    return penalty


def _guidance_of(processor: Any, row: int, num_rows: int) -> LogitsProcessor:
    """Guidance by the row's own text without its prompt."""
    guidance = copy.copy(processor)
    guidance.unconditional_context = {
        name: value[row, None] if isinstance(value, Tensor) and len(value) == num_rows else value
        for name, value in processor.unconditional_context.items()
    }
    return guidance


def _copy_of(processor: LogitsProcessor) -> LogitsProcessor:
    """A copy that shares models with the original."""
    shared = {id(value): value for value in vars(processor).values() if isinstance(value, nn.Module)}
    try:
        return copy.deepcopy(processor, shared)
    except Exception as error:
        raise ValueError(
            f"Every row needs its own {type(processor).__name__}, and it cannot be copied ({error}); call `generate` "
            "for each prompt, or without `assistant_model`."
        ) from error


class _WholeBatch(LogitsProcessor):
    """Shows a processor the batch that it knows."""

    def __init__(self, processor: LogitsProcessor, row: int, num_rows: int, batch_at: Callable[[int], Tensor]) -> None:
        self._processor, self._row, self._num_rows, self._batch_at = processor, row, num_rows, batch_at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        batch = self._batch_at(input_ids.shape[1])
        batch[self._row] = input_ids[0]
        shown = scores.repeat(self._num_rows, 1)
        processed = self._processor(batch, shown)
        scores.copy_(shown[self._row])  # which it may have written into
        return processed[self._row, None]


def columns(rows: Sequence[Tensor], length: int, pad_token_id: int) -> Tensor:
    """Texts, each `(1, its tokens)`, cut or padded to `(rows, length)`."""
    cut = [row[:, :length] for row in rows]
    return torch.cat([nn.functional.pad(row, (0, length - row.shape[1]), value=pad_token_id) for row in cut])
