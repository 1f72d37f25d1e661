"""Grafts: found without searching again, scored by what they were worth, merged into the head's tree."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.markov import KINDS
from support.proposals import ANCHOR, path_log_prob, path_proposals
from support.trees import Paths, paths_of, random_logits

from jetspec_hf.drafting.grafts import (
    Graft,
    GraftedProposals,
    Grafter,
    MatchScores,
    stack_grafts,
    stack_rows_of_grafts,
)
from jetspec_hf.drafting.proposals import DepthProposals
from jetspec_hf.tree.tree import build_tree


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


def slow_merge(log_probs: dict[int, float], grafts: list, path: tuple[int, ...]) -> dict[int, float]:
    """The children of one path: the head's, and the next token of every graft that begins with the path."""
    children = dict(log_probs)
    for tokens, scores in grafts:
        if tuple(tokens[: len(path)]) == path and len(tokens) > len(path):
            token = tokens[len(path)]
            children[token] = max(children.get(token, -math.inf), scores[len(path)])
    return children


def slow_best(head: Callable[[tuple[int, ...]], dict[int, float]], grafts: list, num_nodes: int) -> Paths:
    """The best of all paths, from what the head proposes below a path."""
    scores: Paths = {(): 0.0}
    opened: set[tuple[int, ...]] = set()
    while True:
        best = sorted(scores, key=scores.__getitem__, reverse=True)[: 1 + num_nodes]
        if opened.issuperset(best):
            return {path: scores[path] for path in best if path}
        for path in set(best) - opened:
            opened.add(path)
            for token, log_prob in slow_merge(head(path), grafts, path).items():
                scores[(*path, token)] = scores[path] + log_prob


GRAFTS = {
    "deeper than the block": [([1, 4, 2, 5, 5, 1], [-0.1] * 6)],
    "two": [([1, 4], [-0.1, -3.0]), ([2, 4, 4, 4, 4], [-0.5] * 5)],
    "unlikely": [([0], [-4.0])],
}


@pytest.mark.parametrize("num_nodes", [1, 5, 12, 30])
@pytest.mark.parametrize("shape", [None, (3, 9)], ids=["as they are", "padded"])
@pytest.mark.parametrize("grafts", GRAFTS.values(), ids=GRAFTS)
@pytest.mark.parametrize("num_candidates", [3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_tree_holds_the_best_of_both(
    seed: int, num_candidates: int, grafts: list, shape: tuple[int, int] | None, num_nodes: int
) -> None:
    logits = random_logits(seed, 1, 3, 6)
    grafted = GraftedProposals(
        DepthProposals(logits, num_candidates), *stack_grafts(grafts, torch.device("cpu"), shape)
    )
    found = paths_of(build_tree(torch.tensor([ANCHOR]), grafted, num_nodes=num_nodes, max_depth=99))

    def head(path: tuple[int, ...]) -> dict[int, float]:
        if len(path) >= 3:
            return {}
        best = logits.log_softmax(-1)[0, len(path)].topk(num_candidates)
        return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    assert_close(found, slow_best(head, grafts, num_nodes))


def assert_close(found: Paths, expected: Paths) -> None:
    """The same paths and scores, up to rounding."""
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_nodes", [1, 12, 30])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_below_a_graft_paths_are_scored_as_elsewhere(kind: str, num_nodes: int, setting) -> None:
    # The first tokens of the first graft are candidates of their depths; those of the others are not.
    made = setting(kind)
    likely = made[3][0].topk(6).indices.tolist()
    unlikely = made[3][0].argmin(dim=-1).tolist()
    grafts = [([one[2] for one in likely] + [5, 6], [-0.5] * 6), ([*unlikely[:3], likely[3][1]], [-0.2] * 4)]
    tokens, log_probs = stack_grafts(grafts, torch.device("cpu"))
    grafted = GraftedProposals(path_proposals(made, 6, None, tokens), tokens, log_probs)
    found = paths_of(build_tree(torch.tensor([ANCHOR]), grafted, num_nodes=num_nodes, max_depth=99))

    def head(path: tuple[int, ...]) -> dict[int, float]:
        if len(path) >= len(likely):
            return {}
        return {token: path_log_prob(made, (*path, token), 6) for token in likely[len(path)]}

    assert_close(found, slow_best(head, grafts, num_nodes))


@pytest.mark.parametrize("text", [[], [4], [4, 4], [1, 2, 3, 4]])
def test_a_text_that_repeats_nothing_gives_none(text: list[int]) -> None:
    grafter = Grafter(4)
    grafter.extend(text)
    assert grafter.find() == []


@pytest.mark.parametrize("num_nodes", [1, 5, 12])
@pytest.mark.parametrize("names", [["two", "none", "unlikely"], ["unlikely", "deeper than the block"]])
def test_rows_have_trees_of_their_own_grafts(names: list[str], num_nodes: int) -> None:
    rows = [(GRAFTS | {"none": []})[name] for name in names]
    logits, anchors = random_logits(4, len(rows), 3, 6), torch.arange(len(rows))
    stacked = stack_rows_of_grafts(rows, torch.device("cpu"))
    proposals = GraftedProposals(DepthProposals(logits, 6), *stacked)
    trees = build_tree(anchors, proposals, num_nodes=num_nodes, max_depth=99)
    for row, grafts in enumerate(rows):
        proposals = DepthProposals(logits[row, None], 6)
        if grafts:
            proposals = GraftedProposals(proposals, *stack_grafts(grafts, torch.device("cpu")))
        alone = build_tree(anchors[row, None], proposals, num_nodes=num_nodes, max_depth=99)
        assert_close(paths_of(trees, row), paths_of(alone))


def test_missing_grafts_are_padded() -> None:
    rows = [[], [([1, 2], [-0.5, -1.0])], [([3], [-0.1]), ([4, 5, 6], [-0.2] * 3)]]
    tokens, log_probs = stack_rows_of_grafts(rows, torch.device("cpu"))
    none = [-1, -1, -1]
    assert tokens.tolist() == [[none, none], [[1, 2, -1], none], [[3, -1, -1], [4, 5, 6]]]
    assert ((log_probs == -math.inf) == (tokens == -1)).all()
