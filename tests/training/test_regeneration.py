"""The target's own answers, written down."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from jetspec_hf.training.data import encode, encode_prompt
from jetspec_hf.training.regeneration import check_answers, regenerate

TEMPLATE = "{% for m in messages %}t1 {{ m['content'] }} t2 {% endfor %}{% if add_generation_prompt %}t3 {% endif %}"


@pytest.fixture
def tokenizer(golden):
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token, tokenizer.pad_token = "t4", "t0"
    return tokenizer


MESSAGES = [
    {"role": "user", "content": "t9"},
    {"role": "assistant", "content": "t8"},
    {"role": "user", "content": "t30"},
]
PROMPTS = ["t9 t8 t30 t40", "t7", MESSAGES, "t50 t51"]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_regenerated_answers_are_the_target_s_own(tokenizer, make_target, tmp_path) -> None:
    target = make_target(vocab_size=256)
    regenerate(target, tokenizer, PROMPTS, tmp_path / "answers.jsonl", max_new_tokens=5, batch_size=2)
    rows = read(tmp_path / "answers.jsonl")
    assert sorted(row["index"] for row in rows) == [0, 1, 2, 3]
    for row in rows:
        assert row["prompt"] == PROMPTS[row["index"]]
        ids = torch.tensor([encode_prompt(tokenizer, row["prompt"])])
        alone = target.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert row["response"] == tokenizer.decode(alone, skip_special_tokens=True)


def test_answers_hold_the_tokens_that_train_a_head(tokenizer, make_target, tmp_path) -> None:
    target = make_target(vocab_size=256)
    regenerate(target, tokenizer, PROMPTS, tmp_path / "free.jsonl", max_new_tokens=6)
    target.generation_config.eos_token_id = [read(tmp_path / "free.jsonl")[0]["response_ids"][2]]
    regenerate(target, tokenizer, PROMPTS, tmp_path / "a.jsonl", max_new_tokens=6)
    rows = read(tmp_path / "a.jsonl")
    assert {row["ended"] for row in rows} == {True, False}
    for row in rows:
        assert (row["response_ids"][-1] in target.generation_config.eos_token_id) == row["ended"]
        assert len(row["response_ids"]) == 6 or row["ended"]
        assert row["temperature"] == 0
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        prompt_ids = encode_prompt(tokenizer, row["prompt"])
        assert encode(tokenizer, row, max_length=100)["input_ids"] == prompt_ids + row["response_ids"]


def test_drawn_answers_are_the_same_in_any_batch_and_others_under_another_seed(
    tokenizer, make_target, tmp_path
) -> None:
    target, found = make_target(vocab_size=256), {}
    for name, options in {"a": {"batch_size": 1}, "b": {"batch_size": 16}, "c": {"seed": 1}}.items():
        path = tmp_path / f"{name}.jsonl"
        regenerate(target, tokenizer, PROMPTS, path, max_new_tokens=8, temperature=2.0, **options)
        found[name] = {row["index"]: row["response_ids"] for row in read(path)}
    assert found["a"] == found["b"] != found["c"]
    with pytest.raises(ValueError, match=r"temperature: 2\.0 there, 1\.0 now; seed: 0 there, 3 now"):
        regenerate(target, tokenizer, PROMPTS, tmp_path / "a.jsonl", max_new_tokens=8, temperature=1.0, seed=3)


def test_some_prompts_are_drawn_and_others_may_follow(tokenizer, make_target, tmp_path) -> None:
    target, prompts = make_target(vocab_size=256), [f"t{i} " * (i % 5 + 1) for i in range(20, 40)]
    path = tmp_path / "a.jsonl"
    regenerate(target, tokenizer, prompts, path, max_new_tokens=2, num_prompts=6)
    first = [row["index"] for row in read(path)]
    assert len(first) == 6
    assert first not in (sorted(first), sorted(first, key=lambda index: len(prompts[index])))
    regenerate(target, tokenizer, prompts, path, max_new_tokens=2, seed=1)  # greedy, so the order alone is another
    assert [row["index"] for row in read(path)][:6] == first
    assert sorted(row["index"] for row in read(path)) == list(range(20))


def test_answers_of_earlier_versions_are_not_added_to(tokenizer, make_target, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    regenerate(make_target(vocab_size=256), tokenizer, PROMPTS, path, max_new_tokens=2)
    record = path.with_name(".a.jsonl.manifest")
    settings = json.loads(record.read_text())
    record.write_text(json.dumps({name: settings[name] for name in settings if name not in ("temperature", "seed")}))
    path.write_text(json.dumps({"index": 1, "prompt": "t7", "response": "t8"}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl' holds answers without their tokens.* write to another file"):
        regenerate(make_target(vocab_size=256), tokenizer, PROMPTS, path, max_new_tokens=2)
    assert len(read(path)) == 1


def test_the_folder_for_the_answers_is_made(tokenizer, make_target, tmp_path) -> None:
    regenerate(make_target(vocab_size=256), tokenizer, PROMPTS[:1], tmp_path / "runs/new/a.jsonl", max_new_tokens=1)
    assert len(read(tmp_path / "runs/new/a.jsonl")) == 1


def test_cut_answers_are_counted(tokenizer, make_target, tmp_path, caplog) -> None:
    target = make_target(vocab_size=256)
    regenerate(target, tokenizer, PROMPTS, tmp_path / "cut.jsonl", max_new_tokens=5)
    assert "4 answers written" in caplog.text
    assert "4 of them cut at 5 tokens" in caplog.text
    first = tokenizer(read(tmp_path / "cut.jsonl")[0]["response"])["input_ids"][0]
    target.generation_config.eos_token_id = [first, 300]
    regenerate(target, tokenizer, PROMPTS, tmp_path / "whole.jsonl", max_new_tokens=5)
    num_whole = sum(f"t{first}" in row["response"].split() for row in read(tmp_path / "whole.jsonl"))
    assert f"{4 - num_whole} of them cut" in caplog.text
    assert num_whole > 0


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
        regenerate(target, tokenizer, ["t1", "t2", "t3", "t4"], path, max_new_tokens=2)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ["notes", "notes\nmore", '{"a": 1}\n{"a"', '{"prompt": "t9"}', ""])
def test_a_file_that_is_not_ours_stays_as_it_is(tokenizer, make_target, tmp_path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"notes\.txt' is there already.* write to another place"):
        regenerate(make_target(vocab_size=256), tokenizer, PROMPTS, path, max_new_tokens=2)
    assert path.read_text() == content


@pytest.mark.parametrize("added", ["my notes\n", '{"prompt": "t9"}\n', "[1]\n"])
def test_rows_of_others_are_found_before_a_half_written_one_is_cut(
    tokenizer, make_target, tmp_path, added: str
) -> None:
    target, path = make_target(vocab_size=256), tmp_path / "answers.jsonl"
    regenerate(target, tokenizer, PROMPTS, path, max_new_tokens=2)
    path.write_text(changed := path.read_text() + added + '{"index": 3, "pro')
    with pytest.raises(ValueError, match=r"Row 5 of .*answers\.jsonl"):
        regenerate(target, tokenizer, PROMPTS, path, max_new_tokens=2)
    assert path.read_text() == changed


@pytest.mark.parametrize("source", ["a.jsonl", "link.jsonl", "*.jsonl", "."])
def test_answers_do_not_go_where_the_prompts_come_from(tokenizer, make_target, tmp_path, source: str) -> None:
    path = tmp_path / "a.jsonl"
    regenerate(make_target(vocab_size=256), tokenizer, PROMPTS[:2], path, max_new_tokens=2)
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(ValueError, match="is or belongs to the data"):
        check_answers(path, [tmp_path / source])


def test_answers_that_another_run_made_are_not_kept(tokenizer, make_target, tmp_path) -> None:
    target, path = make_target(vocab_size=256), tmp_path / "answers.jsonl"
    regenerate(target, tokenizer, PROMPTS, path, max_new_tokens=2)
    whole = path.read_bytes()
    stopping = make_target(vocab_size=256)
    stopping.generation_config.eos_token_id = [7]
    for other, options, named in [
        (make_target(seed=1, vocab_size=256), {}, r"target\)"),
        (make_target(vocab_size=256).bfloat16(), {}, r"target; dtype: torch\.float32 there, torch\.bfloat16 now"),
        (target, {"max_new_tokens": 3}, "max_new_tokens: 2 there, 3 now"),
        (target, {"enable_thinking": True}, "enable_thinking: False there, True now"),
        (stopping, {}, "generation_config"),
    ]:
        with pytest.raises(ValueError, match=rf"answers\.jsonl' was made under other settings \({named}"):
            regenerate(other, tokenizer, PROMPTS, path, **({"max_new_tokens": 2} | options))
    tokenizer.chat_template = TEMPLATE.replace("t1", "t5")
    with pytest.raises(ValueError, match="chat_template"):
        regenerate(target, tokenizer, PROMPTS, path, max_new_tokens=2)
    assert path.read_bytes() == whole


def test_a_folder_of_answers_is_still_a_data_set(tokenizer, make_target, tmp_path) -> None:
    regenerate(make_target(vocab_size=256), tokenizer, PROMPTS[:2], tmp_path / "a.jsonl", max_new_tokens=2)
    rows = load_dataset(str(tmp_path), split="train")
    assert rows.to_list() == read(tmp_path / "a.jsonl")


SLOW_RUN = """
import sys, time
from transformers import AutoTokenizer, Qwen3ForCausalLM
from jetspec_hf.training.regeneration import check_answers, regenerate
folder = sys.argv[1]
target = Qwen3ForCausalLM.from_pretrained(folder)
target.register_forward_hook(lambda *_: time.sleep(0.005))
prompts = [f"t{i}" for i in range(20, 50)]
tokenizer = AutoTokenizer.from_pretrained(folder)
regenerate(target, tokenizer, prompts, folder + "/killed.jsonl", max_new_tokens=4, batch_size=2)
"""


def test_a_killed_regeneration_loses_and_doubles_no_row(tokenizer, make_target, tmp_path) -> None:
    target, path = make_target(vocab_size=256), tmp_path / "killed.jsonl"
    target.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # which splits t4 off
    run = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(tmp_path)], stderr=subprocess.DEVNULL)
    while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
        assert run.poll() is None
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    prompts = [f"t{i}" for i in range(20, 50)]
    assert len(read(path)) < len(prompts)
    regenerate(target, tokenizer, prompts, path, max_new_tokens=4, batch_size=2)
    regenerate(target, tokenizer, prompts, tmp_path / "whole.jsonl", max_new_tokens=4, batch_size=2)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
