"""The embedded pair on real prompts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.heads import oracle_head, random_head
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.training.data import encode_prompt

EXAMPLES = Path(__file__).parent.parent / "examples"
SETS = ("gsm8k", "math500", "mbpp", "humaneval", "mt_bench")


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EXAMPLES / "demo_pair/target")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EXAMPLES / "demo_pair/target")


@pytest.fixture(scope="module")
def head() -> JetSpecDraftHead:
    return JetSpecDraftHead.from_pretrained(EXAMPLES / "demo_pair/head")


def prompts(name: str, number: int) -> list[str]:
    lines = (EXAMPLES / f"prompts/{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:number]]


def generate(target: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, **options) -> list[int]:
    return target.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, **options)[0].tolist()


def heads_for(target: PreTrainedModel, head: JetSpecDraftHead, text: list[int]) -> list[JetSpecDraftHead]:
    return [head, random_head(target, num_assistant_tokens=15), oracle_head(target, torch.tensor([text]))]


@pytest.mark.parametrize("name", SETS)
def test_answers_are_the_target_s_own(name: str, target, tokenizer, head) -> None:
    for prompt in prompts(name, 1):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        plain = generate(target, ids, 48)
        for one in heads_for(target, head, plain):
            assert generate(target, ids, 48, assistant_model=one) == plain


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_forty_answers_are_the_target_s_own(name: str, target, tokenizer, head) -> None:
    for prompt in prompts(name, 40):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        plain = generate(target, ids, 256)
        for one in heads_for(target, head, plain):
            assert generate(target, ids, 256, assistant_model=one) == plain, prompt


def test_the_head_accepts_several_tokens_a_round(target, tokenizer, head) -> None:
    rounds: list[float] = []
    for prompt in prompts("gsm8k", 8):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        output = target.generate(
            ids,
            assistant_model=head,
            num_assistant_tokens=63,
            max_new_tokens=256,
            do_sample=False,
            return_dict_in_generate=True,
        )
        rounds += [length + 1 for length in output.statistics.accepted_lengths]
    assert sum(rounds) / len(rounds) >= 2.5


def test_the_mask_token_never_occurs_in_text(tokenizer, head) -> None:
    assert head.config.mask_token_id == tokenizer.mask_token_id
    assert tokenizer.mask_token_id not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for prompt in prompts("gsm8k", 20):
        assert tokenizer.mask_token_id not in encode_prompt(tokenizer, prompt)


def test_the_quickstart_answers_twice_alike() -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--num_prompts", "2"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "same tokens      2 of 2 answers" in printed
    assert "ratio" in printed
