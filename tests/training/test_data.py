"""Encoding, packing and collating."""

import random

import pytest
import torch
from transformers import AddedToken, AutoTokenizer

from jetspec_hf.training.data import answers_of, collate, encode, find_mask_token, pack, turn_end

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}t3 {{ m['content'] }} t4 t2 {% else %}"
    "t1 {{ m['content'] }} t2 {% endif %}{% endfor %}{% if add_generation_prompt %}t3 {% endif %}"
)
# As Qwen3's: with thinking off, the prompt and the newest answer have an empty thought, earlier answers none.
REWRITING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}t3 {% if loop.last %}t5 {% endif %}{{ m['content'] }} t4 "
    "{% else %}t1 {{ m['content'] }} t2 {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}t3 {% if not enable_thinking %}t5 {% endif %}{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "t9"},
    {"role": "assistant", "content": "t8 t7"},
    {"role": "user", "content": "t30"},
    {"role": "assistant", "content": "t31"},
]


@pytest.fixture
def tokenizer(golden):
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"eos_token": "t4"})
    return tokenizer


def learned(row) -> list[int]:
    return [token for token, in_loss in zip(row["input_ids"], row["loss_mask"], strict=True) if in_loss]


def test_the_mask_token_is_one_that_no_text_has(tokenizer) -> None:
    assert find_mask_token(tokenizer, len(tokenizer) + 3) == len(tokenizer)
    with pytest.raises(ValueError, match=r"All \d+ rows.*mask_token_id"):
        find_mask_token(tokenizer, len(tokenizer))
    tokenizer.mask_token = "t99"
    assert find_mask_token(tokenizer, len(tokenizer)) == 99


def test_a_special_token_without_a_role_may_be_the_mask_token(tokenizer, caplog) -> None:
    tokenizer.add_special_tokens({"pad_token": "t0", "bos_token": "t1"})
    tokenizer.add_tokens([AddedToken("t3", special=True), AddedToken("t50", special=True)])
    with caplog.at_level("INFO"):
        assert find_mask_token(tokenizer, len(tokenizer)) == 50  # the template writes t3
    assert "The token 50, 't50', marks what is to be predicted" in caplog.text


def test_only_the_answer_and_its_end_are_in_the_loss(tokenizer) -> None:
    row = encode(tokenizer, {"prompt": "t9 t8", "response": "t7 t6"}, max_length=100)
    assert row["input_ids"] == [1, 9, 8, 2, 3, 7, 6, 4]
    assert row["loss_mask"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (row["length"], row["is_cut"], row["num_rewritten"]) == (8, False, 0)
    assert answers_of(row) == [(row["input_ids"], 5)]
    row = encode(tokenizer, {"prompt": "t9 t8", "response": "t7 t6"}, max_length=6)
    assert (row["input_ids"], row["length"], row["is_cut"]) == ([1, 9, 8, 2, 3, 7], 6, True)


def test_all_that_the_assistant_says_is_in_the_loss(tokenizer) -> None:
    row = encode(tokenizer, {"messages": CONVERSATION}, max_length=100)
    assert row["input_ids"] == [1, 9, 2, 3, 8, 7, 4, 2, 1, 30, 2, 3, 31, 4]
    assert learned(row) == [8, 7, 4, 31, 4]
    assert answers_of(row) == [(row["input_ids"][:7], 4), (row["input_ids"], 12)]


def test_what_a_prompt_holds_is_not_learned(tokenizer) -> None:
    row = encode(tokenizer, {"prompt": CONVERSATION[:3], "response": CONVERSATION[3:]}, max_length=100)
    assert row["input_ids"] == encode(tokenizer, {"messages": CONVERSATION}, max_length=100)["input_ids"]
    assert learned(row) == [31, 4]
    assert encode(tokenizer, {"prompt": CONVERSATION[:3], "response": "t31"}, max_length=100) == row


def test_tokens_stand_for_the_response_and_need_not_end(tokenizer) -> None:
    text = encode(tokenizer, {"prompt": "t9 t8", "response": "t7 t6"}, max_length=100)
    row = {"prompt": "t9 t8", "response": "t7 t6", "response_ids": [7, 6, 4]}
    assert encode(tokenizer, row, max_length=100) == text
    cut = encode(tokenizer, row | {"response_ids": [7, 6]}, max_length=100)
    assert (cut["input_ids"], cut["loss_mask"]) == (text["input_ids"][:-1], text["loss_mask"][:-1])
    other = encode(tokenizer, row | {"prompt": CONVERSATION[:3], "response_ids": [31, 4]}, max_length=100)
    assert other == encode(tokenizer, {"prompt": CONVERSATION[:3], "response": "t31"}, max_length=100)
    assert encode(tokenizer, row | {"response_ids": None}, max_length=100) == text
    assert encode(tokenizer, row | {"prompt": None}, max_length=100)["input_ids"] == []
    assert answers_of(encode(tokenizer, row | {"response_ids": []}, max_length=100)) == []


def test_a_template_that_rewrites_answers_leaves_the_last_in_the_loss(tokenizer) -> None:
    tokenizer.chat_template = REWRITING
    row = encode(tokenizer, {"messages": CONVERSATION}, max_length=100)
    assert row["input_ids"] == [1, 9, 2, 3, 8, 7, 4, 1, 30, 2, 3, 5, 31, 4]
    assert (learned(row), row["num_rewritten"]) == ([31, 4], 1)


def test_an_answer_stands_behind_the_generation_prompt_whatever_the_template_writes(tokenizer) -> None:
    tokenizer.chat_template = REWRITING
    row = {"prompt": "t9", "response": "t8"}
    assert encode(tokenizer, row, max_length=100)["input_ids"] == [1, 9, 2, 3, 5, 8, 4]
    assert encode(tokenizer, row, max_length=100, enable_thinking=True)["input_ids"] == [1, 9, 2, 3, 5, 8, 4]
    tokenizer.chat_template = REWRITING.replace("{% if loop.last %}t5 {% endif %}", "")
    assert encode(tokenizer, row, max_length=100)["input_ids"] == [1, 9, 2, 3, 5, 8, 4]
    assert encode(tokenizer, row, max_length=100, enable_thinking=True)["input_ids"] == [1, 9, 2, 3, 8, 4]


def test_the_turn_s_end_is_the_template_s(tokenizer) -> None:
    """As Gemma's and Llama's: the end of a turn is not the end-of-sequence token."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["t6"]})
    assert turn_end(tokenizer) == 4
    tokenizer.chat_template = TEMPLATE.replace("t4 t2", "t6 t4")
    assert turn_end(tokenizer) == 6
    assert learned(encode(tokenizer, {"prompt": "t9", "response": "t8"}, max_length=100)) == [8, 6]
    tokenizer.chat_template = TEMPLATE.replace("t4 t2", "")
    assert turn_end(tokenizer) == 4


def test_plain_text_is_learned_but_for_its_first_token(tokenizer) -> None:
    tokenizer.chat_template = None
    row = encode(tokenizer, {"text": "t9 t8 t7", "messages": None}, max_length=100)
    assert (row["input_ids"], row["loss_mask"]) == ([9, 8, 7], [0, 1, 1])
    assert answers_of(row) == [([9, 8, 7], 1)]
    assert encode(tokenizer, {"text": ""}, max_length=100)["input_ids"] == []
    with pytest.raises(ValueError, match=r"no chat template.*`text`"):
        encode(tokenizer, {"prompt": "t9", "response": "t8"}, max_length=100)


def test_rows_are_padded_on_the_right(tokenizer) -> None:
    rows = [encode(tokenizer, {"prompt": "t9", "response": answer}, max_length=100) for answer in ("t7", "t7 t6 t5")]
    batch = collate(rows, pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 9, 2, 3, 7, 4, 0, 0], [1, 9, 2, 3, 7, 6, 5, 4]]
    assert batch.attention_mask.tolist() == [[1] * 6 + [0] * 2, [1] * 8]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.loss_mask.int().tolist() == [[0] * 4 + [1] * 2 + [0] * 2, [0] * 4 + [1] * 4]


def test_packed_rows_keep_their_documents_apart() -> None:
    rows = {"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], "loss_mask": [[0, 1, 1], [1, 1], [0, 0, 1, 1], [1]]}
    packed = pack(rows, max_length=6)
    assert packed["input_ids"] == [[6, 7, 8, 9, 4, 5], [1, 2, 3, 10]]
    assert packed["document_lengths"] == [[4, 2], [3, 1]]
    assert packed["length"] == [6, 4]
    rows = [{name: column[i] for name, column in packed.items()} for i in range(2)]
    batch = collate(rows, pad_token_id=0)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    # Nothing before a document's first token could predict it.
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert [answers_of(row) for row in rows] == [[([6, 7, 8, 9], 2)], [([1, 2, 3], 1)]]


def test_packing_keeps_every_text_and_wastes_little() -> None:
    draw = random.Random(0)
    texts = [[i] * draw.randint(1, 60) for i in range(300)]
    packed = pack({"input_ids": texts, "loss_mask": texts}, max_length=100)
    assert max(packed["length"]) <= 100
    found = []
    for ids, lengths in zip(packed["input_ids"], packed["document_lengths"], strict=True):
        assert len(ids) == sum(lengths)
        found += [list(part) for part in torch.tensor(ids).split(lengths)]
    assert sorted(part[0].item() for part in found) == list(range(300))
    assert all(len(part) == len(texts[part[0]]) for part in found)
    assert sum(packed["length"]) > 0.95 * 100 * len(packed["length"])
