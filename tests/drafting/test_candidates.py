import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jetspec_hf.cache import make_head_cache
from jetspec_hf.drafting.candidates import JetSpecCandidateGenerator
from jetspec_hf.head.modeling_jetspec import JetSpecDraftHead
from jetspec_hf.tree.acceptance import children_of
from jetspec_hf.tree.tree import DraftTree

BLOCK = 6
ANCHOR = torch.tensor([5])


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def target(make_target: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_target()


@pytest.fixture
def head(make_head: Callable[..., JetSpecDraftHead], target: PreTrainedModel) -> JetSpecDraftHead:
    return make_head(target, block_size=BLOCK, target_layer_ids=[2, 0], initializer_range=0.1)


def make_generator(head: PreTrainedModel, target: PreTrainedModel, **options: Any) -> JetSpecCandidateGenerator:
    return JetSpecCandidateGenerator(head, target, **({"num_assistant_tokens": 20} | options))


def random_taps(head: JetSpecDraftHead, length: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, length, head.fc.in_features)


def drafted(
    head: PreTrainedModel, target: PreTrainedModel, taps: Tensor, *, max_depth: int = 99, **options: Any
) -> DraftTree:
    """The tree after `taps`, from a generator that has seen nothing before."""
    generator = make_generator(head, target, **options)
    generator.extend(taps, torch.arange(taps.shape[1]).expand(taps.shape[0], -1))
    return generator.draft(ANCHOR.expand(taps.shape[0]), max_depth=max_depth)


def block_logits(head: JetSpecDraftHead, target: PreTrainedModel, taps: Tensor) -> Tensor:
    """The head's logits at each depth, `(depths, vocab)`, straight from their definition."""
    block = torch.full((1, BLOCK), head.config.mask_token_id)
    block[0, 0] = ANCHOR
    states = head(target.get_input_embeddings()(block), taps).last_hidden_state
    return target.lm_head(states[0, 1:])


def assert_same_tree(tree: DraftTree, expected: DraftTree) -> None:
    assert torch.equal(tree.tokens, expected.tokens)
    assert torch.equal(tree.parents, expected.parents)
    torch.testing.assert_close(tree.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)


def test_each_committed_token_is_projected_once(head: JetSpecDraftHead, target: PreTrainedModel) -> None:
    rows, cached = [], []
    head.fc.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    head.register_forward_pre_hook(
        lambda module, args, kwargs: cached.append(kwargs["cache"].get_seq_length()), with_kwargs=True
    )
    generator = make_generator(head, target)
    committed = 0
    for commits in ([7], [1], [2, 3], [1, 1, 1]):  # several may come before one draft
        for count in commits:
            generator.extend(random_taps(head, count), torch.arange(committed, committed + count)[None])
            committed += count
        generator.draft(ANCHOR, max_depth=4)
    assert rows == [7, 1, 5, 3]
    assert cached == [0, 7, 8, 13]  # nothing of a block stays


def test_rounds_draft_what_one_pass_over_the_whole_text_drafts(head: JetSpecDraftHead, target: PreTrainedModel) -> None:
    taps = random_taps(head, 12)
    generator = make_generator(head, target)
    for start, end in ((0, 7), (7, 8), (8, 12)):
        generator.extend(taps[:, start:end], torch.arange(start, end)[None])
        tree = generator.draft(ANCHOR, max_depth=99)
    assert_same_tree(tree, drafted(head, target, taps))


def test_taps_are_dropped_once_they_are_in_the_cache(head: JetSpecDraftHead, target: PreTrainedModel) -> None:
    generator = make_generator(head, target)
    with pytest.raises(RuntimeError, match="call `extend` first"):
        generator.draft(ANCHOR, max_depth=3)
    generator.extend(random_taps(head, 4), torch.arange(4)[None])
    generator.draft(ANCHOR, max_depth=3)
    with pytest.raises(RuntimeError, match="call `extend` first"):
        generator.draft(ANCHOR, max_depth=3)


def test_scores_are_the_heads_log_probabilities_under_the_targets_lm_head(
    head: JetSpecDraftHead, target: PreTrainedModel
) -> None:
    taps = random_taps(head, 4)
    tree = drafted(head, target, taps)
    log_probs = block_logits(head, target, taps).log_softmax(-1)
    assert len(tree) == 21
    for node in range(1, len(tree)):
        parent, depth = tree.parents[0, node], tree.depths[0, node]
        expected = tree.log_probs[0, parent] + log_probs[depth - 1, tree.tokens[0, node]]
        torch.testing.assert_close(tree.log_probs[0, node], expected, rtol=1e-4, atol=1e-4)
    likeliest = log_probs.flatten().max()
    assert likeliest < math.log(0.999), "the distributions are flat enough to tell scores apart"


def test_scores_of_a_target_that_squashes_its_logits_are_squashed_too(
    head: JetSpecDraftHead, target: PreTrainedModel
) -> None:
    taps = random_taps(head, 4)
    logits = block_logits(head, target, taps)[0]
    target.config.final_logit_softcapping = 0.5
    tree = drafted(head, target, taps, num_assistant_tokens=1)
    expected = (0.5 * torch.tanh(logits / 0.5)).log_softmax(-1).max()
    torch.testing.assert_close(tree.log_probs[0, 1], expected, rtol=1e-4, atol=1e-4)
    assert abs(expected - logits.log_softmax(-1).max()) > 0.1


@pytest.mark.parametrize("max_depth", [1, 3, BLOCK - 1, BLOCK, 99])
def test_trees_are_no_deeper_than_asked_nor_than_the_block(
    head: JetSpecDraftHead, target: PreTrainedModel, max_depth: int
) -> None:
    tree = drafted(head, target, random_taps(head, 4), max_depth=max_depth, num_assistant_tokens=4000)
    assert tree.depths.max() == min(max_depth, BLOCK - 1)


def test_no_depth_gives_the_root_and_leaves_the_head_alone(head: JetSpecDraftHead, target: PreTrainedModel) -> None:
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    tree = drafted(head, target, random_taps(head, 4), max_depth=0)
    assert (tree.tokens.tolist(), calls) == ([ANCHOR.tolist()], [])


@pytest.mark.parametrize("num_nodes", [1, 2, 20])
def test_the_number_of_nodes_is_as_asked(head: JetSpecDraftHead, target: PreTrainedModel, num_nodes: int) -> None:
    assert len(drafted(head, target, random_taps(head, 4), num_assistant_tokens=num_nodes)) == 1 + num_nodes


@pytest.mark.parametrize("threshold", [0.02, 0.1])
def test_the_threshold_drops_exactly_the_less_likely_nodes(
    head: JetSpecDraftHead, target: PreTrainedModel, threshold: float
) -> None:
    taps = random_taps(head, 4)
    everything = drafted(head, target, taps, num_assistant_tokens=500)
    kept = drafted(head, target, taps, num_assistant_tokens=500, assistant_confidence_threshold=threshold)
    likely = everything.log_probs.exp() >= threshold
    assert 1 < likely.sum() < len(everything)
    assert torch.equal(kept.tokens[0], everything.tokens[likely])
    assert torch.equal(kept.log_probs[0], everything.log_probs[likely])


def test_each_row_of_a_batch_drafts_what_it_would_alone(head: JetSpecDraftHead, target: PreTrainedModel) -> None:
    taps = random_taps(head, 4, batch=2)
    together = drafted(head, target, taps)
    for row in range(2):
        alone = drafted(head, target, taps[row, None])
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert torch.equal(together.parents[row], alone.parents[0])


def test_left_padding_changes_nothing(head: JetSpecDraftHead, target: PreTrainedModel) -> None:
    taps = random_taps(head, 9)
    generator = make_generator(head, target)
    padded = torch.cat([random_taps(head, 3), taps], dim=1)
    positions = (torch.arange(12)[None] - 3).clamp(min=0)
    for start, end in ((0, 8), (8, 12)):
        generator.extend(padded[:, start:end], positions[:, start:end])
        padding_mask = (torch.arange(end)[None] >= 3).long()
        tree = generator.draft(ANCHOR, max_depth=99, padding_mask=padding_mask)
    assert_same_tree(tree, drafted(head, target, taps))


def test_tokens_that_were_never_tapped_may_stand_in_the_padding_mask(
    head: JetSpecDraftHead, target: PreTrainedModel
) -> None:
    # As where `generate` continues a cache: six earlier tokens, two of them padding.
    taps = random_taps(head, 4)
    trees = []
    for padding_mask in (None, torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])):
        generator = make_generator(head, target)
        generator.extend(taps, torch.arange(4, 8)[None])
        trees.append(generator.draft(ANCHOR, max_depth=99, padding_mask=padding_mask))
    assert_same_tree(*trees)


def test_a_head_of_another_precision_than_its_target_drafts(head: JetSpecDraftHead, target: PreTrainedModel) -> None:
    taps = random_taps(head, 4)
    exact = drafted(head, target, taps, num_assistant_tokens=1)
    tree = drafted(head.bfloat16(), target, taps, num_assistant_tokens=1)
    assert tree.log_probs.dtype == torch.float32
    torch.testing.assert_close(tree.log_probs, exact.log_probs, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("num_nodes", [1, 4, 30])
def test_candidates_are_the_likeliest_chain_of_the_tree(
    head: JetSpecDraftHead, target: PreTrainedModel, num_nodes: int
) -> None:
    taps = random_taps(head, 4)
    input_ids = torch.tensor([[9, 8, 7, 6, int(ANCHOR)]])
    generator = make_generator(head, target, num_assistant_tokens=num_nodes)
    generator.extend(taps, torch.arange(4)[None])
    candidates, scores = generator.get_candidates(input_ids)
    assert scores is None
    assert torch.equal(candidates[:, :5], input_ids)

    likeliest = block_logits(head, target, taps).argmax(-1)
    tree = drafted(head, target, taps, num_assistant_tokens=num_nodes)
    # At each depth that the tree reaches, its first node ends the likeliest chain.
    assert candidates[0, 5:].tolist() == likeliest[: tree.depths.max()].tolist()


def test_a_head_with_sliding_layers_drafts_beyond_its_window(
    make_head: Callable[..., JetSpecDraftHead], target: PreTrainedModel
) -> None:
    head = make_head(
        target,
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=4,
        initializer_range=0.1,
    )
    taps = random_taps(head, 14)
    generator = make_generator(head, target)
    for start, end in ((0, 9), (9, 10), (10, 14)):
        generator.extend(taps[:, start:end], torch.arange(start, end)[None])
        tree = generator.draft(ANCHOR, max_depth=99)
    assert_same_tree(tree, drafted(head, target, taps))
    assert make_head_cache(head.config).layers[0].is_sliding


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.5])
def test_temperatures_of_greedy_texts_are_no_lower_than_that_of_sampling(
    head: JetSpecDraftHead, target: PreTrainedModel, temperature: float
) -> None:
    taps = random_taps(head, 9)
    head.config.draft_temperatures = [0.5, 0.7, 0.9, 1.1, 1.3]
    tree = drafted(head, target, taps, temperature=temperature)
    logits = block_logits(head, target, taps)
    for node in range(1, len(tree)):
        parent, depth = int(tree.parents[0, node]), int(tree.depths[0, node])
        softened = logits[depth - 1] / max(head.config.draft_temperatures[depth - 1], temperature)
        log_prob = tree.log_probs[0, node] - tree.log_probs[0, parent]
        torch.testing.assert_close(log_prob, softened.log_softmax(-1)[tree.tokens[0, node]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [0, 4])
def test_grafts_are_drafted_if_wanted(head: JetSpecDraftHead, target: PreTrainedModel, length: int) -> None:
    generator = make_generator(head, target, prompt_lookup_num_tokens=length)
    words = [40, 41, 42, 43, 44, 45, 40, 41]
    generator.observe([3, 40, int(ANCHOR), *words[2:], 40, int(ANCHOR)])
    taps = random_taps(head, 10)
    generator.extend(taps, torch.arange(10)[None])
    tree = generator.draft(ANCHOR, max_depth=99)
    children, path = children_of(tree, 0), [0]
    for token in words[2:]:
        if (path[-1], token) in children:
            path.append(children[path[-1], token])
    assert (len(path) - 1 == length) if length else (len(path) - 1 < 4)
