"""The command line, from its words to the files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from heads import random_head
from transformers import AutoTokenizer, Qwen3ForCausalLM

from jetspec_hf.cli import COMMANDS, main

TEMPLATE = "{% for m in messages %}t1 {{ m['content'] }} t2 {% endfor %}{% if add_generation_prompt %}t3 {% endif %}"


@pytest.fixture
def pair(tmp_path: Path, golden: Path, make_target: Callable[..., Qwen3ForCausalLM]) -> Path:
    """A folder with `target`, `head` and two files of prompts."""
    target = make_target(vocab_size=256)
    target.save_pretrained(tmp_path / "pair/target")
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "pair/target")
    random_head(target).save_pretrained(tmp_path / "pair/head")
    for name, prompts in {"a": ["t9 t8", "t7"], "b": ["t30"]}.items():
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        (tmp_path / f"pair/{name}.jsonl").write_text("".join(lines))
    return tmp_path / "pair"


def bench(pair: Path, *options: str) -> list[str]:
    models = ["--target", str(pair / "target"), "--head", str(pair / "head")]
    prompts = ["--prompts", str(pair / "a.jsonl"), str(pair / "b.jsonl")]
    return ["bench", *models, *prompts, "--output_dir", str(pair / "runs/bench"), *options]


def test_bench_writes_its_report_and_shows_it(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--methods plain tree-3 tree-7 --num_prompts 1 --max_new_tokens 6 --temperature 0 --dtype float32"
    main(bench(pair, *options.split(), "--threads", str(torch.get_num_threads()), "--device", "cpu"))
    report = json.loads((pair / "runs/bench/report.json").read_text())
    assert list(report["prompt_sets"]) == ["a", "b"]
    assert report["all"]["num_prompts"] == 2
    assert list(report["all"]["methods"]) == ["plain", "tree-3", "tree-7"]
    assert report["options"]["max_new_tokens"] == 6
    assert (report["target"]["name"], report["head"]["name"]) == ("pair/target", "pair/head")
    assert report["environment"] | {"dtype": "float32", "device": "cpu", "batch_size": 1} == report["environment"]
    assert capsys.readouterr().out.strip() == (pair / "runs/bench/report.md").read_text().strip()


def test_a_bad_method_is_answered_with_the_good_ones(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(bench(pair, "--methods", "plain", "beam"))
    assert "no method beam; choose from plain, lookup, dflash, tree, and tree-N" in capsys.readouterr().err


def test_prompts_must_be_named(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--target", "t", "--head", "h", "--output_dir", "o"])
    assert "required: --prompts" in capsys.readouterr().err


def test_a_bad_command_is_answered_with_the_good_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["benhc"], []):
        with pytest.raises(SystemExit):
            main(words)
        assert "command" in capsys.readouterr().err


def test_help_lists_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in [
        (["--help"], list(COMMANDS)),
        (["bench", "--help"], ["--target", "--methods", "--threads"]),
    ]:
        with pytest.raises(SystemExit):
            main(words)
        printed = capsys.readouterr().out
        assert all(word in printed for word in expected)
