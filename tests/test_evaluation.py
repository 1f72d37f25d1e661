"""Evaluation on finished texts against decoding them."""

import pytest
import torch
from heads import oracle_head

from jetspec_hf.evaluation import tokens_per_round

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


def test_texts_without_a_round_are_refused(make_target, make_head) -> None:
    target = make_target()
    with pytest.raises(ValueError, match="longer"):
        tokens_per_round(make_head(target), target, [([3, 4, 5], 2)], [3])
