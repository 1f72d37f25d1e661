"""Grafts: found without searching again, scored by what they were worth, merged into the head's tree."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import by_depth, paths_of, random_logits

from jetspec_hf.grafts import Graft, GraftedProposals, Grafter, MatchScores, stack_grafts
from jetspec_hf.tree import build_tree

ANCHOR = 3


def longest_match(text: list[int]) -> int:
    """The longest end of a text, up to 8 tokens, that also stands before an earlier token; 0 below two."""
    for length in range(min(8, len(text) - 1), 1, -1):
        if any(text[end - length : end] == text[-length:] for end in range(length, len(text))):
            return length
    return 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.lists(st.integers(0, 3), max_size=24), cut=st.integers(0, 24))
def test_the_longest_match_is_found_however_the_text_came(text: list[int], cut: int) -> None:
    grafter = Grafter(5)
    grafter.extend(text[:cut])
    grafter.find()
    grafter.extend(text[cut:])
    found = grafter.find()
    expected = longest_match(text)
    assert bool(found) == (expected > 0)
    assert len(found) <= 2
    first_tokens = [tokens[0] for tokens, _ in found]
    assert len(set(first_tokens)) == len(found)
    for tokens, log_probs in found:
        assert 1 <= len(tokens) == len(log_probs) <= 5
        # It stands in the text after the last two tokens, and where the text ends, it goes on as it began.
        goes_on = text + tokens
        assert any(
            goes_on[i : i + 2] == text[-2:] and goes_on[i + 2 :][: len(tokens)] == tokens for i in range(len(text) - 2)
        )
    # Only the places of late are compared.
    if found and text.count(text[-1]) <= 8:
        tokens = found[0][0]
        assert any(
            text[i - expected : i] == text[-expected:] and (text + tokens)[i:][: len(tokens)] == tokens
            for i in range(expected, len(text))
        )


def test_a_text_that_repeats_itself_is_grafted_past_its_end() -> None:
    grafter = Grafter(8)
    grafter.extend([1, 2, 3, 1, 2])
    ((tokens, _),) = grafter.find()
    assert tokens == [3, 1, 2, 3, 1, 2, 3, 1]


def test_scores_follow_what_was_right_of_late() -> None:
    scores = MatchScores()
    graft = Graft([5, 6, 7], match_length=2)
    before = scores.log_probs(graft)
    assert before == sorted(before), "a longer match is a better one"
    for _ in range(50):
        scores.learn(graft, [5, 9])
    after = scores.log_probs(graft)
    assert after[0] > before[0], "right each time"
    assert after[1] < math.log(0.1), "wrong each time"
    assert after[2] == before[2], "never reached"
    for _ in range(200):
        scores.learn(graft, [5, 6, 7])
    assert scores.log_probs(graft)[1] > math.log(0.9), "the past is forgotten"
    assert all(score < 0 for score in scores.log_probs(graft))


def test_grafts_that_were_wrong_are_cut_short() -> None:
    grafter = Grafter(6)
    for i in range(60):
        grafter.extend([1, 2, 10 + i])
        grafter.extend([1, 2])
        found = grafter.find()
    assert all(sum(log_probs) < math.log(0.2) for _, log_probs in found)


def slow_merge(propose, max_depth: int, grafts: list, path: tuple[int, ...]) -> dict[int, float]:
    """The children of one path: the head's, and the next token of every graft that begins with the path."""
    children: dict[int, float] = {}
    depth = len(path) + 1
    if depth <= max_depth:
        log_probs, tokens = propose(depth, torch.tensor([[0]]), torch.tensor([[0]]))
        children = dict(zip(tokens[0, 0].tolist(), log_probs[0, 0].tolist(), strict=True))
    for tokens, log_probs in grafts:
        if tuple(tokens[: len(path)]) == path and len(tokens) > len(path):
            token = tokens[len(path)]
            children[token] = max(children.get(token, -math.inf), log_probs[len(path)])
    return children


@pytest.mark.parametrize("num_nodes", [1, 5, 12, 30])
@pytest.mark.parametrize("shape", [None, (3, 9)], ids=["as they are", "padded"])
@pytest.mark.parametrize(
    "grafts",
    [
        [([1, 4, 2, 5, 5, 1], [-0.1] * 6)],
        [([1, 4], [-0.1, -3.0]), ([2, 4, 4, 4, 4], [-0.5] * 5)],
        [([1, 4, 5, 5], [-0.1] * 4), ([1, 4, 2], [-0.3] * 3)],
        [([0], [-4.0])],
    ],
    ids=["deeper than the block", "two", "one beginning", "unlikely"],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_tree_holds_the_best_of_both(
    seed: int, grafts: list, shape: tuple[int, int] | None, num_nodes: int
) -> None:
    block_depth, vocab = 3, 6
    propose = by_depth(random_logits(seed, 1, block_depth, vocab))
    grafted = GraftedProposals(propose, block_depth, *stack_grafts(grafts, torch.device("cpu"), shape))
    tree = build_tree(torch.tensor([ANCHOR]), grafted, num_nodes=num_nodes, max_depth=grafted.max_depth)
    found = paths_of(tree)

    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for path in iter(paths := [()]):
        for token, log_prob in slow_merge(propose, block_depth, grafts, path).items():
            scores[(*path, token)] = scores[path] + log_prob
            paths.append((*path, token))
    best = sorted((path for path in scores if path), key=scores.__getitem__, reverse=True)[:num_nodes]
    assert set(found) == set(best)
    for path, score in found.items():
        assert score == pytest.approx(scores[path], abs=1e-5)


@pytest.mark.parametrize("text", [[], [4], [4, 4], [1, 2, 3, 4]])
def test_a_text_that_repeats_nothing_gives_none(text: list[int]) -> None:
    grafter = Grafter(4)
    grafter.extend(text)
    assert grafter.find() == []
