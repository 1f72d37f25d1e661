"""Reading files and data sets."""

import gzip
import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from jetspec_hf.training.sources import load_prompts, load_rows, load_texts

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
def test_what_is_lost_is_said(tmp_path, tokenizer, caplog, streaming: bool) -> None:
    rows = [{"prompt": "t9", "response": " ".join(["t7"] * n)} for n in (1, 3, 20, 30)] * 256
    rows += [{"prompt": " ".join(["t9"] * 10), "response": "t7"}] * 1024
    source = write(tmp_path / "a.jsonl", rows)
    texts = list(load_texts(tokenizer, [source], max_length=12, streaming=streaming))
    assert {name: texts[0][name] for name in ("input_ids", "loss_mask", "length")} == texts[0]
    assert [text["length"] for text in texts] == [6, 8, 12, 12] * 256
    so_far = " so far, repeats counted" if streaming else ""
    said = f"1024 texts{so_far}; 1536 cut to 12 tokens; 1024 left out without an answer to learn from"
    assert said in caplog.text


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_losing_everything_is_an_error(tmp_path, tokenizer, streaming: bool) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "t9 t9 t9", "response": "t7"}] * 1024)
    with pytest.raises(ValueError, match="raise it, or check the data"):
        list(load_texts(tokenizer, [source], max_length=4, streaming=streaming))


FORM = r'messages such as \{"role": "user", "content": "What is 17 \* 24\?"\}'
TEXT_PARTS = [{"type": "text", "text": "t9 "}, {"type": "text", "text": "t8"}]
IMAGE = [{"type": "image", "image": "cat.png"}]


def answered(content, answer="t7 t6") -> dict:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_parts_of_text_are_joined(tmp_path, tokenizer, streaming: bool) -> None:
    source = write(tmp_path / "a.jsonl", [answered(TEXT_PARTS), answered("t9 t8", [{"type": "text", "text": "t7 t6"}])])
    other = write(tmp_path / "b.jsonl", [{"prompt": answered(TEXT_PARTS)["messages"][:1], "response": "t7 t6"}])
    texts = list(load_texts(tokenizer, [source, other], max_length=100, streaming=streaming))
    assert [text["input_ids"] for text in texts] == [[1, 9, 8, 2, 3, 7, 6, 4]] * 3
    assert load_prompts([source]) == [[{"role": "user", "content": "t9 t8"}]]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_conversations_may_be_in_the_form_of_sharegpt(tmp_path, tokenizer, streaming: bool) -> None:
    turns = [{"from": "human", "value": "t9"}, {"from": "gpt", "value": "t7 t6"}]
    source = write(tmp_path / "a.jsonl", [{"conversations": turns}])
    (text,) = load_texts(tokenizer, [source], max_length=100, streaming=streaming)
    assert text["input_ids"] == [1, 9, 2, 3, 7, 6, 4]
    assert load_prompts([source]) == [[{"role": "user", "content": "t9"}]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [answered("t9"), answered(IMAGE)],
            "Row 2 of .*: The content of a message has a part 'image'; a head learns f",
        ),
        ([answered("t9"), answered(5)], f"Row 2 of .*: The message .* needs a `role` and `content`.* as in {FORM}"),
        ([{"messages": [{"content": "t9"}]}], f"Row 1 of .*: The message .* needs a `role`.* as in {FORM}"),
        ([{"messages": "t9"}], f"Row 1 of .*: 't9' stands where {FORM} must be"),
        ([{"messages": ["t9"]}], f"Row 1 of .*: 't9' stands among {FORM}"),
        ([{"prompt": 5, "response": "t7"}], f"Row 1 of .*: 5 stands where a string or {FORM} must be"),
    ],
)
def test_rows_that_are_no_words_are_refused_by_number(tmp_path, tokenizer, rows: list, said: str) -> None:
    source = write(tmp_path / "a.jsonl", [*rows])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=said):
            list(load_texts(tokenizer, [source], max_length=100, streaming=streaming))
    with pytest.raises(ValueError, match=said):
        load_prompts([source])


@pytest.mark.parametrize(("row", "said"), [({"prompt": "t9", "response": 5}, "5 stands"), ({"text": 5}, "5 is no str")])
def test_answers_and_texts_that_are_no_words_are_refused(tmp_path, tokenizer, row: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"Row 1 of .*{said}"):
        load_texts(tokenizer, [write(tmp_path / "a.jsonl", [row])], max_length=100)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_answers_are_read_as_the_target_s_own_tokens(tmp_path, tokenizer, streaming: bool) -> None:
    own = {"id": "a", "temperature": 0.0, "ended": True}
    answers = [own | {"prompt": "t9", "response": "t7", "response_ids": ids} for ids in ([7, 6, 5], [8, 4])]
    sources = [write(tmp_path / "a.jsonl.gz", answers), write(tmp_path / "b.jsonl", [answered("t9")])]
    texts = list(load_texts(tokenizer, sources, max_length=100, streaming=streaming))
    assert [text["input_ids"][4:] for text in texts] == [[7, 6, 5], [8, 4], [7, 6, 4]]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([[7], [7, 256]], "Row 2 of .* 0 to 255; got 256"),
        ([[7], [-1]], "Row 2 of .*; got -1"),
        ([[1.5]], "Row 1 of .*; got 1.5"),
        ([["t7"]], "Row 1 of .*; got 't7'"),
        ([7], "Row 1 of .*; got 7"),
    ],
)
def test_tokens_that_are_none_are_refused_with_their_row(tmp_path, tokenizer, answers: list, said: str) -> None:
    rows = [{"prompt": "t9", "response": "t7", "response_ids": ids} for ids in answers]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=said):
        load_texts(tokenizer, [source], max_length=100)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_null_and_empty_rows_are_left_out_and_counted(tmp_path, tokenizer, caplog, streaming: bool) -> None:
    whole = answered("t9")
    lost = [answered(None), answered("t9", None), {"messages": None}, {"messages": []}, {"messages": [None]}, None]
    lacking = [{"prompt": "t9", "response": None}, {"prompt": None, "response": "t8 t7"}]
    sources = [
        write(tmp_path / "a.jsonl", [whole, *lost, whole]),
        write(tmp_path / "b.jsonl", [{"prompt": "t9", "response": "t7 t6"}, *lacking]),
    ]
    texts = list(load_texts(tokenizer, sources, max_length=100, streaming=streaming))
    assert [text["input_ids"] for text in texts] == [[1, 9, 2, 3, 7, 6, 4]] * 3
    if not streaming:  # a short stream says nothing
        assert "3 texts; 8 left out without an answer to learn from" in caplog.text
    assert load_prompts(sources) == [[{"role": "user", "content": "t9"}], "t9"]
    assert "6 rows left out without a prompt" in caplog.text


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b'{"prompt": "p", "response": "r"}\n{"prompt": \n',
            "Row 2 of .* is no JSON .Expecting value at character 1[23]",
        ),
        (b'{"prompt": "p", "response": "r"}\n{"prompt": "p", "resp', "Row 2 of .* is no JSON .Unterminated string"),
        (b"5\n", "Row 1 of .* is 5; every line must look like"),
        (b'null\n{"prompt": "p", "response": "r"}\n', "Row 1 of .* is null; every line must look like"),
        (b'{"text": "p"}\n["p"]\n', "Row 2 of .* is .*; every line must look like"),
        ('{"text": "é"}'.encode("latin-1"), "Row 1 of .* is not UTF-8 text; save the file as UTF-8"),
        (b"\n\n", "is empty"),
    ],
)
def test_files_that_are_no_json_lines_are_refused(tmp_path, content: bytes, said: str, streaming: bool) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_rows([tmp_path / "a.jsonl"], streaming=streaming)


def test_what_cannot_be_data_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "a.parquet").write_text("words")
    for name, said in [
        ("notes.txt", "is neither a JSON-lines file"),
        ("a.parquet", "cannot be read"),
        ("", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=f"{name}' {said}"):
            load_rows([tmp_path / name])
    with pytest.raises(ValueError, match="No row has a prompt"):
        load_prompts([write(tmp_path / "blank.jsonl", [{"prompt": " "}])])
    with pytest.raises(OSError, match=r"none\.jsonl"):
        load_rows([tmp_path / "none.jsonl"])


def test_what_the_chat_template_refuses_is_named(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"Row 1 of .*: The chat template does not take the messages .roles must alt"):
        load_texts(tokenizer, [write(tmp_path / "a.jsonl", [answered("t9")])], max_length=100)
