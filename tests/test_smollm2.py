"""A real model and its head, where the target lies at hand.

JETSPEC_SMOLLM2=runs/smollm2 pytest -m slow tests/test_smollm2.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.target.loading import load_target
from jetspec_hf.training.data import encode_prompt

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = os.environ.get("JETSPEC_SMOLLM2")
NUM_PROMPTS, MAX_NEW_TOKENS = 20, 96
# What `tokens_per_round` was on these prompts when the card was written, 15 nodes.
ON_THE_CARD = {"gsm8k": 3.22, "humaneval": 4.09, "mt_bench": 2.26}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="JETSPEC_SMOLLM2 names no folder of examples/smollm2_target.py"),
]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return load_target(str(FOLDER), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def head() -> JetSpecDraftHead:
    return JetSpecDraftHead.from_pretrained(EXAMPLES / "smollm2_pair/head", dtype=torch.float32)


@pytest.mark.parametrize("name", ON_THE_CARD)
def test_answers_are_the_target_s_own_and_as_well_drafted_as_the_card_says(name: str, target, tokenizer, head) -> None:
    lines = (EXAMPLES / f"prompts/{name}.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    num_rounds = num_tokens = 0
    for line in lines:
        prompt = json.loads(line)["prompt"]
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), **options)
        drafted = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=head, num_assistant_tokens=15, **options
        )
        assert drafted.sequences.tolist() == plain.sequences.tolist(), prompt
        num_rounds += drafted.statistics.num_rounds
        num_tokens += drafted.statistics.num_accepted_tokens + drafted.statistics.num_rounds
    assert num_tokens / num_rounds >= 0.95 * ON_THE_CARD[name], num_tokens / num_rounds
