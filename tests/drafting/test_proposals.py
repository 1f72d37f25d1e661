"""Proposals below every node, against one distribution computed at a time."""

import math

import pytest
import torch
from support.markov import KINDS
from support.proposals import ANCHOR, path_log_prob, path_proposals
from support.trees import paths_of
from torch import Tensor

from jetspec_hf.drafting.grafts import GraftedProposals, stack_grafts
from jetspec_hf.drafting.proposals import DepthProposals, PathProposals
from jetspec_hf.tree.tree import build_tree

DEPTHS, VOCAB = 4, 64  # as `setting` makes them


@pytest.mark.parametrize("num_candidates", [6, VOCAB, 1000])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_tree_holds_the_likeliest_paths(kind: str, num_candidates: int, setting) -> None:
    made = setting(kind)
    logits = made[3]
    proposals = path_proposals(made, num_candidates)
    tree = build_tree(torch.tensor([ANCHOR]), proposals, num_nodes=20, max_depth=DEPTHS)
    found = paths_of(tree)
    assert max(map(len, found)) > 1
    candidates = min(num_candidates, VOCAB)

    # All paths, deeper ones only below what can still be in: nothing is likelier than what it hangs from.
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for depth in range(1, DEPTHS + 1):
        likely = sorted((path for path in scores if len(path) == depth - 1), key=scores.__getitem__)[-20:]
        for path in likely:
            for token in logits[0, depth - 1].topk(candidates).indices.tolist():
                longer = (*path, token)
                scores[longer] = scores[path] + path_log_prob(made, longer, candidates)
    best = sorted((path for path in scores if path), key=scores.__getitem__)[-20:]
    assert set(found) == set(best)
    for path, score in found.items():
        assert score == pytest.approx(scores[path], abs=1e-3)


@torch.no_grad()
def test_a_new_markov_head_changes_no_tree(make_target, make_head) -> None:
    target = make_target()
    markov = make_head(target, markov_rank=5).markov_head
    hidden_states = torch.randn(1, DEPTHS, 32)
    logits = target.lm_head(hidden_states)
    with_path = path_proposals((markov, target, hidden_states, logits), 20)
    trees = [
        build_tree(torch.tensor([ANCHOR]), propose, num_nodes=20, max_depth=DEPTHS)
        for propose in (with_path, DepthProposals(logits, 20))
    ]
    ours, plain = map(paths_of, trees)
    assert ours.keys() == plain.keys()
    for path, score in ours.items():
        assert score == pytest.approx(plain[path], abs=1e-4)


@pytest.mark.parametrize("num_nodes", [1, 7, 40])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["one", "half", "depth", "all"])
@torch.no_grad()
def test_logits_that_are_not_numbers_still_give_a_tree(where: str, poison: float, num_nodes: int, setting) -> None:
    *rest, logits = setting("gated")
    slots = {"one": (0, 1, 2), "half": (0, slice(None), slice(0, 32)), "depth": (0, 1), "all": (slice(None),)}
    logits[slots[where]] = poison
    for proposals in (DepthProposals(logits, 20), path_proposals((*rest, logits), 20)):
        tree = build_tree(torch.tensor([ANCHOR]), proposals, num_nodes=num_nodes, max_depth=4)
        scores = paths_of(tree).values()
        assert 1 <= len(scores) <= num_nodes
        assert not any(math.isnan(score) for score in scores)


@pytest.mark.parametrize("is_markov", [False, True])
@torch.no_grad()
def test_temperatures_divide_the_logits_of_their_depth(is_markov: bool, setting) -> None:
    markov, target, hidden_states, logits = setting("vanilla")
    temperatures = torch.tensor([0.5, 1.0, 2.0, 0.7])

    def proposals(logits, temperatures=None, scale=1.0):
        if not is_markov:
            return DepthProposals(logits, VOCAB, temperatures)
        markov.markov_w2.weight.data *= scale
        made = path_proposals((markov, target, hidden_states, logits), VOCAB, temperatures)
        markov.markov_w2.weight.data /= scale
        return made

    for depth, temperature in enumerate(temperatures.tolist(), start=1):
        softened = proposals(logits, temperatures)
        by_hand = proposals(logits / temperature, scale=1 / temperature)
        assert torch.equal(softened.tokens, by_hand.tokens)
        node = torch.tensor([[7]])
        got, expected = (made(depth, node, torch.tensor([[0]])) for made in (softened, by_hand))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [None, *KINDS])
@torch.no_grad()
def test_proposals_and_tree_compile_as_one_graph(kind: str | None, setting) -> None:
    markov, target, hidden_states, _ = setting(kind or "vanilla")
    modules = (markov, target.get_input_embeddings(), target.lm_head)

    def grow(anchor: Tensor, hidden_states: Tensor, grafts: Tensor, log_probs: Tensor) -> tuple[Tensor, ...]:
        logits = target.lm_head(hidden_states)
        proposals: DepthProposals | PathProposals = DepthProposals(logits, 20)
        if kind is not None:
            proposals = PathProposals(logits, hidden_states, anchor, *modules, 20, grafts=grafts)
        tree = build_tree(anchor, GraftedProposals(proposals, grafts, log_probs), num_nodes=20, max_depth=99)
        return tree.tokens, tree.parents, tree.depths, tree.log_probs

    compiled = torch.compile(grow, backend="eager", fullgraph=True)
    for grafts in ([], [([5, 6, 7, 8, 9, 10], [-0.1] * 6)]):  # one graph for both
        inputs = torch.tensor([ANCHOR]), hidden_states, *stack_grafts(grafts, torch.device("cpu"), (2, 6))
        with torch.compiler.set_stance("default" if not grafts else "fail_on_recompile"):
            assert all(map(torch.equal, compiled(*inputs), grow(*inputs)))
