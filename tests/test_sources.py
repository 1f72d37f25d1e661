"""Reading files and data sets."""

import gzip
import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from jetspec_hf.sources import load_prompts, load_rows, load_texts

TEMPLATE = "{% for m in messages %}t1 {{ m['content'] }} t2 {% endfor %}{% if add_generation_prompt %}t3 {% endif %}"
CONVERSATION = [
    {"role": "system", "content": "t5"},
    {"role": "user", "content": "t9"},
    {"role": "assistant", "content": "t8", "thoughts": "t6"},
    {"role": "user", "content": "t30"},
    {"role": "assistant", "content": "t31"},
]


@pytest.fixture
def tokenizer(golden):
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "t4"
    return tokenizer


def write(path, rows) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_sources_of_all_kinds_join_in_order(tmp_path, streaming: bool) -> None:
    first = write(tmp_path / "a.jsonl", [{"id": 1, "prompt": "p1", "response": "r1"}])
    second = write(tmp_path / "b.jsonl.gz", [{"question": "p2", "answer": "r2", "more": 0}])
    third = write(tmp_path / "c.parquet", [{"text": "t", "url": "u"}])
    fourth = write(tmp_path / "d.jsonl", [{"messages": CONVERSATION, "source": "s"}])
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.parquet", [{"problem": "p3", "solution": "r3"}])
    rows = load_rows([first, second, third, fourth, first, str(tmp_path / "folder")], streaming=streaming)
    found = [{name: value for name, value in row.items() if value is not None} for row in rows]
    found[3]["messages"] = [{name: part for name, part in turn.items() if part} for turn in found[3]["messages"]]
    assert found == [
        {"prompt": "p1", "response": "r1"},
        {"prompt": "p2", "response": "r2"},
        {"text": "t"},
        {"messages": CONVERSATION},
        {"prompt": "p1", "response": "r1"},
        {"prompt": "p3", "response": "r3"},
    ]


def test_a_source_without_responses_is_refused_by_name(tmp_path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p1", "text": "r1"}])
    with pytest.raises(ValueError, match=r"a\.jsonl.*'text'.*response"):
        load_rows([source])
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet.*holds no rows"):
        load_rows([tmp_path / "b.parquet"], streaming=True)


def test_prompts_need_no_responses_and_come_once(tmp_path) -> None:
    first = write(tmp_path / "a.jsonl", [{"question": "p2", "label": 3}, {"question": "p1", "label": 4}])
    second = write(tmp_path / "b.jsonl", [{"messages": CONVERSATION}, {"messages": CONVERSATION[:2]}])
    given = [{"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:3]}]
    third = write(tmp_path / "c.jsonl", given)
    prompts = load_prompts([first, first, second, third])
    assert prompts == ["p2", "p1", CONVERSATION[:4], CONVERSATION[:2]]
    with pytest.raises(ValueError, match=r"d\.jsonl.*cannot answer"):
        load_prompts([write(tmp_path / "d.jsonl", [{"text": "t"}])])


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_what_is_lost_is_said(tmp_path, tokenizer, capsys, streaming: bool) -> None:
    rows = [{"prompt": "t9", "response": " ".join(["t7"] * n)} for n in (1, 3, 20, 30)] * 256
    rows += [{"prompt": " ".join(["t9"] * 10), "response": "t7"}] * 1024
    source = write(tmp_path / "a.jsonl", rows)
    texts = list(load_texts(tokenizer, [source], max_length=12, streaming=streaming))
    assert {name: texts[0][name] for name in ("input_ids", "loss_mask", "length")} == texts[0]
    assert [text["length"] for text in texts] == [6, 8, 12, 12] * 256
    so_far = " so far, repeats counted" if streaming else ""
    said = f"1024 texts{so_far}; 1536 cut to 12 tokens; 1024 left out without an answer to learn from"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_losing_everything_is_an_error(tmp_path, tokenizer, streaming: bool) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "t9 t9 t9", "response": "t7"}] * 1024)
    with pytest.raises(ValueError, match="raise it, or check the data"):
        list(load_texts(tokenizer, [source], max_length=4, streaming=streaming))
