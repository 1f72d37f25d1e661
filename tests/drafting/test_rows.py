"""Drafting for several texts at once, against a drafter for each of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import markov_head, random_head
from support.trees import paths_of
from transformers import PreTrainedModel

from jetspec_hf.drafting.drafter import DynamicDrafter
from jetspec_hf.drafting.options import DraftOptions
from jetspec_hf.drafting.rows import RowsDrafter
from jetspec_hf.pair import DecodingPair

VOCAB = 64


class Texts:
    """Rows that grow, each drafted for together with the others and alone.

    Args:
        pair (`DecodingPair`): the head and its target.
        num_pads (`list[int]`): padding before the prompt of each row.
        num_prompt (`int`): tokens of each prompt, padding among them.
        num_untapped (`int`): of these, those at the start that a cache held already.
        vocab_size (`int`): with few tokens, texts repeat themselves.
    """

    def __init__(
        self, pair: DecodingPair, num_pads: list[int], num_prompt: int, num_untapped: int = 0, vocab_size: int = VOCAB
    ) -> None:
        self.numbers = torch.Generator().manual_seed(sum(num_pads) + num_prompt)
        self.vocab_size, self.width = vocab_size, len(pair.head.config.target_layer_ids) * 32
        num_rows, options = len(num_pads), DraftOptions(9)
        self.together = RowsDrafter(pair, options, num_rows)
        self.alone = [DynamicDrafter(pair, options) for _ in range(num_rows)]
        self.masks = [[0] * pads + [1] * (num_prompt - pads) for pads in num_pads]
        self.is_padded = any(num_pads)
        self.positions = [-pads for pads in num_pads]
        self.texts = [self._tokens(num_prompt) for _ in num_pads]
        self.together.observe(self.texts)
        for one, text in zip(self.alone, self.texts, strict=True):
            one.observe(text)
        self.positions = [num_untapped - pads for pads in num_pads]
        self._commit([num_prompt - num_untapped] * num_rows)

    def grow(self, num_new: list[int]) -> None:
        """Emit some tokens in each row."""
        new = [self._tokens(num) for num in num_new]
        self.together.observe(new)
        for one, text, tokens in zip(self.alone, self.texts, new, strict=True):
            one.observe(tokens)
            text += tokens
        for mask, num in zip(self.masks, num_new, strict=True):
            mask += [1] * num
        self._commit(num_new)

    def select(self, staying: list[int]) -> None:
        """Go on with some rows."""
        self.together.select_rows(staying)
        for name in ("alone", "masks", "positions", "texts"):
            setattr(self, name, [getattr(self, name)[row] for row in staying])

    def assert_same_blocks(self, max_depth: int = 99) -> None:
        """Hidden states, logits, grafts and trees are those of each row alone, whatever stands in the others."""
        sizes = {"num_nodes": 9, "max_depth": max_depth}
        anchors = torch.randint(self.vocab_size, (len(self.texts),), generator=self.numbers)
        longest = max(map(len, self.masks))
        padded = torch.tensor([mask + [1] * (longest - len(mask)) for mask in self.masks])
        block = self.together.run_head(anchors, **sizes, padding_mask=padded if self.is_padded else None)
        tree = self.together.grow(anchors, block, **sizes)
        for row, one in enumerate(self.alone):
            mask = torch.tensor([self.masks[row]]) if self.is_padded else None
            expected = one.run_head(anchors[row, None], **sizes, padding_mask=mask)
            for found, wanted in zip(block[:2], expected[:2], strict=True):
                torch.testing.assert_close(found[row, None], wanted, rtol=1e-4, atol=1e-4)
            wanted = paths_of(one.grow(anchors[row, None], expected, **sizes))
            assert best_of(tree, row) == pytest.approx(wanted, abs=1e-4)

    def assert_same_grafts(self) -> None:
        """The same of trees of grafts alone."""
        sizes = {"num_nodes": 9, "max_depth": 20}
        anchors = torch.randint(self.vocab_size, (len(self.texts),), generator=self.numbers)
        tree = self.together.graft(anchors, **sizes)
        alone = [one.graft_probs(20) for one in self.alone]
        together = self.together.graft_probs(20)
        assert len(together) == max(map(len, alone))
        assert sum(together) == pytest.approx(sum(map(sum, alone)) / len(alone))
        for row, one in enumerate(self.alone):
            assert best_of(tree, row) == pytest.approx(paths_of(one.graft(anchors[row, None], **sizes)), abs=1e-5)
        assert tree.tokens[:, 0].equal(anchors)

    def _tokens(self, num: int) -> list[int]:
        return torch.randint(self.vocab_size, (num,), generator=self.numbers).tolist()

    def _commit(self, num_new: list[int]) -> None:
        taps = torch.randn(len(num_new), max(num_new), self.width, generator=self.numbers)
        start = torch.tensor(self.positions)[:, None]
        places = (start + torch.arange(max(num_new))).clamp(min=0)
        self.together.extend(taps, places, num_new)
        for row, num in enumerate(num_new):
            self.alone[row].extend(taps[row, None, :num], places[row, None, :num])
            self.positions[row] += num


def best_of(tree: Any, row: int) -> dict[tuple[int, ...], float]:
    """The possible nodes of a row; rows with fewer are filled up."""
    paths: list[tuple[int, ...]] = [()]
    found = {}
    for parent, token, score in zip(
        tree.parents[row, 1:].tolist(), tree.tokens[row, 1:].tolist(), tree.log_probs[row, 1:].tolist(), strict=True
    ):
        paths.append((*paths[parent], token))
        if score > -torch.inf:
            found[paths[-1]] = score
    return found


@pytest.fixture(scope="module")
def target(make_target: Callable) -> PreTrainedModel:
    return make_target()


SLIDING = {"use_sliding_window": True, "sliding_window": 4}
HEADS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "causal": random_head,
    "bidirectional": lambda target: random_head(target, is_causal=False),
    "sliding": lambda target: random_head(target, **SLIDING, layer_types=["sliding_attention"] * 2),
    "mixed": lambda target: random_head(
        target, **SLIDING, layer_types=["sliding_attention", "full_attention"], is_causal=False
    ),
    "eager": lambda target: random_head(target, attn_implementation="eager"),
    "markov": markov_head,
}


@pytest.mark.parametrize("num_pads", [[0, 0, 0], [0, 5, 2]], ids=["whole", "padded"])
@pytest.mark.parametrize("num_untapped", [0, 3])
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_each_row_is_drafted_for_as_if_it_were_alone(
    target: PreTrainedModel, name: str, num_untapped: int, num_pads: list[int]
) -> None:
    texts = Texts(DecodingPair(HEADS[name](target), target), num_pads, 7, num_untapped)
    texts.assert_same_blocks()
    texts.grow([1, 4, 2])
    texts.assert_same_blocks(max_depth=3)
    for num_new in ([1, 1, 1], [5, 1, 3]):  # rounds without the head
        texts.grow(num_new)
        texts.assert_same_grafts()
    texts.assert_same_blocks()
    texts.grow([1, 6, 1])
    texts.select([0, 2])  # the longest leaves, before the head has read its last tokens
    texts.assert_same_blocks()
    texts.grow([3, 1])
    texts.assert_same_blocks()
    texts.select([1])
    texts.grow([2])
    texts.assert_same_blocks()


@pytest.fixture(scope="module")
def pairs(target: PreTrainedModel) -> dict[str, DecodingPair]:
    return {name: DecodingPair(HEADS[name](target), target) for name in HEADS}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(HEADS)),
    num_pads=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    rounds=st.lists(st.tuples(st.lists(st.integers(1, 7), min_size=4, max_size=4), st.booleans()), max_size=6),
    vocab_size=st.sampled_from([4, VOCAB]),
)
@torch.no_grad()
def test_any_rounds_are_those_of_each_row(
    pairs: dict[str, DecodingPair], name: str, num_pads: list[int], rounds: list, vocab_size: int
) -> None:
    texts = Texts(pairs[name], num_pads, 6, vocab_size=vocab_size)
    for num_new, runs_head in rounds:
        texts.grow(num_new[: len(num_pads)])
        if runs_head:
            texts.assert_same_blocks()
        else:
            texts.assert_same_grafts()
    texts.select([len(num_pads) - 1])
    texts.grow([2])
    texts.assert_same_blocks()


@pytest.mark.parametrize("sizes", [{"num_nodes": 0, "max_depth": 5}, {"num_nodes": 5, "max_depth": 0}])
def test_where_no_node_could_be_of_use_there_are_roots(target: PreTrainedModel, sizes: dict[str, int]) -> None:
    drafter, anchors = RowsDrafter(DecodingPair(random_head(target), target), DraftOptions(9), 2), torch.tensor([4, 5])
    block = drafter.run_head(anchors, **sizes)
    assert block is None
    assert drafter.grow(anchors, block, **sizes).tokens.tolist() == [[4], [5]]


def test_drafting_before_any_taps_is_refused(target: PreTrainedModel) -> None:
    drafter = RowsDrafter(DecodingPair(random_head(target), target), DraftOptions(9), 2)
    with pytest.raises(RuntimeError, match="call `extend` first"):
        drafter.run_head(torch.tensor([4, 5]), num_nodes=5, max_depth=5)
