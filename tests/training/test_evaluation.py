"""Evaluation on finished texts against decoding them."""

import pytest
import torch
from support.heads import oracle_head

from jetspec_hf.training import evaluation
from jetspec_hf.training.evaluation import CHAIN, measure_drafting, surprise, tokens_per_round

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5]])


@pytest.mark.parametrize("head_name", ["random", "oracle"])
def test_it_counts_what_generate_counts(head_name: str, make_target, make_head) -> None:
    target = make_target()
    text = target.generate(PROMPT, max_new_tokens=40, do_sample=False)
    eos = int(text[0, 33])
    text = target.generate(PROMPT, max_new_tokens=40, do_sample=False, eos_token_id=eos, pad_token_id=0)
    head = make_head(target) if head_name == "random" else oracle_head(target, text)
    counted = tokens_per_round(head, target, [(text[0].tolist(), PROMPT.shape[1])], [3, 17])
    for num_nodes, mean in counted.items():
        statistics = target.generate(
            PROMPT,
            assistant_model=head,
            num_assistant_tokens=num_nodes,
            max_new_tokens=40,
            eos_token_id=eos,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
        ).statistics
        decoded = sum(length + 1 for length in statistics.accepted_lengths) / statistics.num_rounds
        assert mean == pytest.approx(decoded)
    assert counted[17] > (4 if head_name == "oracle" else 1)


def test_scores_are_compared_with_what_is_accepted(make_target, make_head) -> None:
    target = make_target()
    text = target.generate(PROMPT, max_new_tokens=40, do_sample=False)
    texts = [(text[0].tolist(), PROMPT.shape[1])]
    head = make_head(target)
    buckets = measure_drafting(head, target, texts, [CHAIN, 4, 9]).scores
    rounds = tokens_per_round(head, target, texts, [9])[9]
    num_rounds = 39 / rounds  # the first token comes with the prompt
    assert sum(bucket.num_nodes for bucket in buckets) == pytest.approx(9 * num_rounds)
    accepted = sum(bucket.num_nodes * bucket.observed for bucket in buckets)
    # The bonus token of each round is not a node; the last token may be one that is emitted and not accepted.
    assert 39 - num_rounds - accepted == pytest.approx(0, abs=1.01)
    means = [bucket.expected for bucket in buckets]
    assert means == sorted(means)
    certain = measure_drafting(oracle_head(target, text), target, texts, [5]).scores[-1]
    assert certain.expected > 0.9
    assert certain.observed > 0.8  # all but what lies past the end of the text


@pytest.mark.parametrize("options", [{}, {"markov_rank": 5}], ids=["plain", "markov"])
def test_the_vocabulary_is_projected_once_for_each_token(options, make_target, make_head, monkeypatch) -> None:
    target = make_target()
    head = make_head(target, **options)
    text = target.generate(PROMPT, max_new_tokens=40, do_sample=False)
    texts = [(text[0].tolist(), PROMPT.shape[1]), (text[0, :30].tolist(), PROMPT.shape[1])]
    sizes = [CHAIN, 3, 17]
    one_by_one = {num_nodes: tokens_per_round(head, target, texts, [num_nodes])[num_nodes] for num_nodes in sizes}
    seen = []
    target.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[..., 0].numel()))
    monkeypatch.setattr(evaluation, "_ANCHORS_AT_ONCE", 7)  # rounds go on from one group of anchors to the next
    assert tokens_per_round(head, target, texts, sizes) == one_by_one
    assert sum(seen) == (39 + 23) * (head.config.block_size - 1)


def test_texts_without_a_round_are_refused(make_target, make_head) -> None:
    target = make_target()
    with pytest.raises(ValueError, match="longer"):
        tokens_per_round(make_head(target), target, [([3, 4, 5], 2)], [3])


def test_the_target_knows_its_own_texts(make_target) -> None:
    target = make_target(initializer_range=0.1)
    prompts = PROMPT.expand(8, -1)
    sampled = target.generate(prompts, max_new_tokens=60, do_sample=True, top_k=0)
    greedy = target.generate(PROMPT, max_new_tokens=60, do_sample=False)
    foreign = torch.cat([prompts, torch.randint(0, 64, (8, 60))], dim=1)

    def excess(texts: torch.Tensor) -> float:
        return surprise(target, [(text.tolist(), PROMPT.shape[1]) for text in texts]).excess

    assert abs(excess(sampled)) < 0.15
    assert excess(greedy) < -0.2
    assert excess(foreign) > 0.3


def test_surprise_is_its_definition(make_target) -> None:
    target = make_target()
    text = [3, 14, 15, 9, 26]
    logits = target(torch.tensor([text])).logits[0].detach().log_softmax(-1)
    found = surprise(target, [(text, 2)])
    log_probs = [logits[position - 1, text[position]].item() for position in (2, 3, 4)]
    entropies = [-(logits[position - 1].exp() * logits[position - 1]).sum() for position in (2, 3, 4)]
    assert found.log_prob == pytest.approx(float(sum(log_probs) / 3), rel=1e-5)
    assert found.entropy == pytest.approx(float(sum(entropies) / 3), rel=1e-5)


def test_a_head_of_another_target_is_refused(make_target, make_head) -> None:
    head = make_head(make_target(hidden_size=48))
    with pytest.raises(ValueError, match="hidden_size 48 and 32"):
        tokens_per_round(head, make_target(), [([1, 2, 3, 4], 1)], [3])
