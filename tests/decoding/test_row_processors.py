"""Processors asked for one row at a time, against the same ones asked for the whole batch."""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)

from jetspec_hf.decoding.row_processors import columns, process_row

NUM_ROWS, NUM_PROMPT, NUM_STEPS, VOCAB = 3, 5, 6, 64


class Adding(LogitsProcessor):
    """Knows rows by their numbers, sums up their tokens, and writes into what it is given."""

    def __init__(self) -> None:
        self.sums = torch.zeros(NUM_ROWS, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.sums += input_ids[:, -1] + torch.arange(NUM_ROWS)
        scores[torch.arange(NUM_ROWS), self.sums % VOCAB] -= 5
        return scores


class Holding(LogitsProcessor):
    """Holds a model, which is not to be copied."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.num_calls = model, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.num_calls += 1
        return scores + self.num_calls


class AnotherPenalty(RepetitionPenaltyLogitsProcessor):
    """Of another class than what it stems from, it may do anything."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, scores) + torch.arange(len(scores))[:, None]


def guidance(target: PreTrainedModel, **options: Any) -> UnbatchedClassifierFreeGuidanceLogitsProcessor:
    return UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, target, **options)


NEGATIVE = torch.arange(2, 2 + 4 * NUM_ROWS).view(NUM_ROWS, 4)
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
# How to make each anew for a target.
PROCESSORS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "penalty": lambda target: RepetitionPenaltyLogitsProcessor(1.4),
    "ngrams": lambda target: NoRepeatNGramLogitsProcessor(2),
    "warper": lambda target: TopPLogitsWarper(0.7),
    "trie": lambda target: PrefixConstrainedLogitsProcessor(lambda row, text: [row, int(text[-1]), 7 * row + 3], 1),
    "watermark": lambda target: WatermarkLogitsProcessor(VOCAB, "cpu"),
    "watermark with a state": lambda target: SynthIDTextWatermarkLogitsProcessor(
        3, [3, 5, 8, 13], 256, 0, 64, torch.device("cpu")
    ),
    "guidance": guidance,
    "guidance by negative prompts": lambda target: guidance(
        target, unconditional_ids=NEGATIVE, unconditional_attention_mask=MASK
    ),
    "guidance without a cache": lambda target: guidance(target, unconditional_ids=NEGATIVE, use_cache=False),
    "state": lambda target: Adding(),
    "subclass": lambda target: AnotherPenalty(1.4),
    "function": lambda target: lambda ids, scores: scores + (ids[:, -1:] + torch.arange(len(ids))[:, None]),
    "model": Holding,
}


@pytest.fixture
def texts() -> Tensor:
    return torch.randint(VOCAB, (NUM_ROWS, NUM_PROMPT + NUM_STEPS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", ["one row after the other", "in turn"])
@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_a_row_is_treated_as_in_its_batch(make_target: Callable, texts: Tensor, name: str, order: str) -> None:
    target = make_target()
    logits = torch.randn(NUM_STEPS, NUM_ROWS, VOCAB, generator=torch.Generator().manual_seed(2))
    processor = PROCESSORS[name](target)
    raw = logits.clone()
    expected = [
        processor(texts[:, : NUM_PROMPT + step], one).clone() for step, one in enumerate(raw.unbind())
    ]  # which may be written into

    known = [NUM_PROMPT] * NUM_ROWS  # tokens that rows have come to

    def batch_at(length: int) -> Tensor:
        return columns([row[None, :end] for row, end in zip(texts, known, strict=True)], length, 0)

    whole = LogitsProcessorList([PROCESSORS[name](target)])
    rows = [process_row(whole, row, NUM_ROWS, batch_at) for row in range(NUM_ROWS)]
    turns = itertools.product(range(NUM_ROWS), range(NUM_STEPS))
    for row, step in sorted(turns, key=lambda turn: turn[::-1]) if order == "in turn" else turns:
        given = logits[step, row, None].clone()
        known[row] = NUM_PROMPT + step
        found = rows[row](texts[row, None, : known[row]], given)
        torch.testing.assert_close(found, expected[step][row, None], rtol=1e-4, atol=1e-4)
        assert torch.equal(given[0], raw[step, row])


def test_a_penalty_leaves_out_the_padding_of_its_row(texts: Tensor) -> None:
    try:
        penalty = RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=torch.tensor([0, 3, 5]))
    except ValueError:
        pytest.skip("before transformers 5.24 padding is penalized too")
    logits = torch.randn(NUM_ROWS, VOCAB)
    expected = penalty(texts, logits)
    for row in range(NUM_ROWS):
        ours = process_row(LogitsProcessorList([penalty]), row, NUM_ROWS, lambda length: texts[:, :length])
        assert torch.equal(ours(texts[row, None], logits[row, None]), expected[row, None])


def test_models_are_shared_and_states_are_not(make_target: Callable) -> None:
    holding = Holding(make_target())
    (ours,) = process_row(LogitsProcessorList([holding]), 0, NUM_ROWS, lambda length: torch.zeros(NUM_ROWS, length))
    ours(torch.zeros(1, 3), torch.zeros(1, VOCAB))
    assert ours._processor.model is holding.model
    assert (ours._processor.num_calls, holding.num_calls) == (1, 0)


class Locked(LogitsProcessor):
    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"its own Locked, and it cannot be copied \(.*lock.*\); call `generate`"):
        process_row(LogitsProcessorList([Locked()]), 0, NUM_ROWS, lambda length: torch.zeros(NUM_ROWS, length))


def test_columns_cut_and_pad() -> None:
    rows = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5]]), torch.tensor([[6, 7]])]
    assert columns(rows, 3, 9).tolist() == [[1, 2, 3], [5, 9, 9], [6, 7, 9]]
