"""Many prompts at once, each answered as if it were alone."""

import random

import pytest
import torch
from support.families import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from jetspec_hf.training.answering import AnswerOptions, Question, answer, can_replace, choose_batch_size

DRAW = random.Random(0)
QUESTIONS = [Question(i, [DRAW.randrange(64) for _ in range(DRAW.randint(1, 20))]) for i in range(14)]
ENDS = [5, 9, 11, 13]


def answers(target, batch_size: int, size: int, questions=QUESTIONS, **options) -> dict[int, tuple[list[int], bool]]:
    groups = [questions[i : i + size] for i in range(0, len(questions), size)]
    steps = list(answer(target, groups, batch_size, AnswerOptions(**({"max_new_tokens": 12} | options))))
    found = {reply.number: (reply.ids, reply.has_ended) for _, replies in steps for reply in replies}
    assert sum(num_tokens for num_tokens, _ in steps) == sum(len(ids) for ids, _ in found.values())
    return found


def alone(target, question: Question, **options) -> tuple[list[int], bool]:
    ids = torch.tensor([question.ids])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    found = target.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(question.ids) :].tolist()
    return found, found[-1] in ENDS


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", "gemma3", "gemma4_sharing", "gpt_oss", "qwen3_vl"])
def test_rows_that_come_and_go_get_the_answers_that_they_get_alone(name: str) -> None:
    target = FAMILIES[name].build(FAMILIES[name].attentions[0])
    target.generation_config.eos_token_id = ENDS
    assert can_replace(target)
    expected = {question.number: alone(target, question) for question in QUESTIONS}
    assert {has_ended for _, has_ended in expected.values()} == {True, False}
    for batch_size, size in [(4, 1), (8, 3), (2, 7)]:
        assert answers(target, batch_size, size) == expected


def test_other_processors_are_left_to_generate(make_target) -> None:
    target = make_target()
    target.generation_config.eos_token_id = ENDS
    target.generation_config.repetition_penalty = 1.5
    assert not can_replace(target)
    expected = {question.number: alone(target, question) for question in QUESTIONS}
    assert answers(target, 1, 1) == expected
    assert choose_batch_size(target, 20, AnswerOptions()) == 16
    drawn = answers(target, 4, 4, temperature=1.0)
    assert drawn == answers(target, 4, 4, temperature=1.0) != expected


def test_what_a_generation_configuration_leaves_as_it_is_does_not_matter(make_target) -> None:
    target = make_target()
    target.generation_config.update(output_attentions=False, repetition_penalty=1.0, num_beams=1, top_k=20)
    assert can_replace(target)


def test_tokens_are_drawn_as_generate_draws_them() -> None:
    """Frequencies of the first token over 4,000 draws, from the 5 tokens that `top_k` leaves."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, initializer_range=0.2, **sizes)).eval()
    target.generation_config.update(top_k=5, eos_token_id=None)
    ids = QUESTIONS[0].ids
    drawn = answers(target, 500, 500, [Question(i, ids) for i in range(4000)], max_new_tokens=1, temperature=0.7)
    counts = torch.bincount(torch.tensor([reply[0] for reply, _ in drawn.values()]), minlength=64)
    top = target(torch.tensor([ids])).logits[0, -1].topk(5)
    expected = torch.zeros(64).scatter(0, top.indices, (top.values / 0.7).softmax(0))
    assert (counts / 4000 - expected).abs().max() < 0.03


def test_memory_bounds_the_batch(make_target, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target()  # 4 layers of 2 heads of 8 numbers: 512 bytes a token
    for free, expected in [(2**40, 64), (2 * 512 * 110 * 10, 10), (5, 1)]:
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: type("Memory", (), {"available": free}))
        assert choose_batch_size(target, 10, AnswerOptions(max_new_tokens=100)) == expected
