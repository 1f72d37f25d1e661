"""Reading and encoding exchanges."""

import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

from jetspec_hf.data import (
    collate,
    encode_pair,
    encode_prompt,
    find_mask_token,
    load_pairs,
    load_prompts,
    regenerate,
    text_of,
)

TEMPLATE = "{% for m in messages %}t1 {{ m['content'] }} t2 {% endfor %}{% if add_generation_prompt %}t3 {% endif %}"


@pytest.fixture
def tokenizer(golden):
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token, tokenizer.pad_token = "t4", "t0"
    return tokenizer


def write(path, rows) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def test_sources_join_in_order_under_one_pair_of_names(tmp_path) -> None:
    first = write(tmp_path / "a.jsonl", [{"id": 1, "prompt": "p1", "response": "r1"}])
    second = write(tmp_path / "b.jsonl.gz", [{"question": "p2", "answer": "r2", "more": 0}])
    pairs = load_pairs([first, second, first])
    assert pairs.to_list() == [
        {"prompt": "p1", "response": "r1"},
        {"prompt": "p2", "response": "r2"},
        {"prompt": "p1", "response": "r1"},
    ]


def test_a_source_without_responses_is_refused_by_name(tmp_path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p1", "text": "r1"}])
    with pytest.raises(ValueError, match=r"a\.jsonl.*'text'.*response"):
        load_pairs([source])


def test_prompts_need_no_responses(tmp_path) -> None:
    source = write(tmp_path / "a.jsonl", [{"question": "p1", "label": 3}, {"question": "p2", "label": 4}])
    assert load_prompts([source]) == ["p1", "p2"]


def test_the_mask_token_is_one_that_no_text_has(tokenizer) -> None:
    assert find_mask_token(tokenizer, len(tokenizer) + 3) == len(tokenizer)
    with pytest.raises(ValueError, match=r"All \d+ rows.*mask_token_id"):
        find_mask_token(tokenizer, len(tokenizer))
    tokenizer.mask_token = "t99"
    assert find_mask_token(tokenizer, len(tokenizer)) == 99


def test_only_the_answer_and_its_end_are_in_the_loss(tokenizer) -> None:
    row = encode_pair(tokenizer, "t9 t8", "t7 t6", max_length=100)
    assert row["input_ids"] == [1, 9, 8, 2, 3, 7, 6, 4]
    assert row["loss_mask"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert row["length"] == 8
    assert text_of(row) == (row["input_ids"], 5)
    assert encode_pair(tokenizer, "t9 t8", "t7 t6", max_length=6)["input_ids"] == [1, 9, 8, 2, 3, 7]


def test_rows_are_padded_on_the_right(tokenizer) -> None:
    rows = [encode_pair(tokenizer, "t9", answer, max_length=100) for answer in ("t7", "t7 t6 t5")]
    batch = collate(rows, pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 9, 2, 3, 7, 4, 0, 0], [1, 9, 2, 3, 7, 6, 5, 4]]
    assert batch.attention_mask.tolist() == [[1] * 6 + [0] * 2, [1] * 8]
    assert batch.loss_mask.int().tolist() == [[0] * 4 + [1] * 2 + [0] * 2, [0] * 4 + [1] * 4]


PROMPTS = ["t9 t8 t30 t40", "t7", "t50 t51"]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_regenerated_answers_are_the_target_s_own(tokenizer, make_target, tmp_path) -> None:
    target = make_target(vocab_size=256)
    regenerate(target, tokenizer, PROMPTS, tmp_path / "answers.jsonl", max_new_tokens=5, batch_size=2)
    rows = read(tmp_path / "answers.jsonl")
    assert sorted(row["index"] for row in rows) == [0, 1, 2]
    for row in rows:
        assert row["prompt"] == PROMPTS[row["index"]]
        ids = torch.tensor([encode_prompt(tokenizer, row["prompt"])])
        alone = target.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert row["response"] == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_stopped_regeneration_goes_on_where_it_was(tokenizer, make_target, tmp_path, batch_size: int) -> None:
    target, path = make_target(vocab_size=256), tmp_path / "answers.jsonl"
    regenerate(target, tokenizer, PROMPTS, path, max_new_tokens=5, batch_size=batch_size)
    whole = path.read_bytes()
    for num_bytes in (0, 1, len(whole) // 2, whole.find(b"\n"), whole.find(b"\n") + 1, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:num_bytes])
        regenerate(target, tokenizer, PROMPTS, path, max_new_tokens=5, batch_size=batch_size)
        assert path.read_bytes() == whole


def test_answers_to_other_prompts_are_left_alone(tokenizer, make_target, tmp_path) -> None:
    target, path = make_target(vocab_size=256), tmp_path / "answers.jsonl"
    regenerate(target, tokenizer, PROMPTS, path, max_new_tokens=2)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="another file"):
        regenerate(target, tokenizer, ["t1", "t2", "t3"], path, max_new_tokens=2)
    assert path.read_bytes() == whole
