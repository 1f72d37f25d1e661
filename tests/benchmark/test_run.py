"""Measuring, going on after a kill, and the numbers in the report."""

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.heads import head_config, oracle_head, random_head
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.benchmark import BenchmarkOptions, read_measurements, read_prompts, run_benchmark
from jetspec_hf.benchmark.measurement import Measurement
from jetspec_hf.drafting.drafter import TreeGrower
from jetspec_hf.tree.tree import DraftTree

TEMPLATE = "{% for m in messages %}t1 {{ m['content'] }} t2 {% endfor %}{% if add_generation_prompt %}t3 {% endif %}"
PROMPTS = {"first": ["t9 t8 t30 t40", "t7", "t50 t51"], "second": ["t9 t9 t9", "t11 t12"]}
METHODS = ["plain", "lookup", "dflash", "chain", "auto", "tree-3", "tree-20"]


@pytest.fixture
def tokenizer(golden: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def target(make_target: Callable[..., Qwen3ForCausalLM]) -> Qwen3ForCausalLM:
    return make_target(vocab_size=256)


@pytest.fixture
def head(target: Qwen3ForCausalLM) -> JetSpecDraftHead:
    return random_head(target)


def options(**overrides: Any) -> BenchmarkOptions:
    return BenchmarkOptions(**({"methods": METHODS, "num_prompts": 2, "max_new_tokens": 8} | overrides))


def without_times(measurement: Measurement) -> tuple:
    one = measurement
    return one.prompts, one.index, one.method, one.tokens, one.accepted_lengths, one.num_forwards


@pytest.mark.parametrize("method", ["beam", "tree-0", "tree-", "tree--3", "tree-1.5"])
def test_an_unknown_method_is_refused_with_the_known_ones(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method};.* plain, lookup, dflash, chain, auto, tree, and tree-N"):
        BenchmarkOptions(methods=["plain", method])


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": []},
        {"methods": ["plain"] * 2},
        {"num_prompts": 0},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"batch_size": 0},
        {"batch_size": 2},
        {"batch_size": 2, "methods": ["plain", "auto"], "compile": True},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"no method|listed twice|at least|lookup and dflash decode one|one prompt at a time"
    ):
        BenchmarkOptions(**wrong)


def test_prompts_come_under_the_names_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p1\u2028", "id": 0}\n\n{"prompt": "p2"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "p3"}', encoding="utf-8-sig")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "p4"}'))
    sets = read_prompts([tmp_path / "a.jsonl", str(tmp_path / "b.jsonl"), tmp_path / "c.jsonl.gz"])
    assert sets == {"a": ["p1\u2028", "p2"], "b": ["p3"], "c": ["p4"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"prompt": "p1"}\n{"question": "p2"}\n', "Row 2 of .* has the `prompt` null"),
        (b'{"prompt": 5}', "Row 1 of .* has the `prompt` 5"),
        (b'{"prompt": ""}', "Row 1 of .* has the `prompt` "),
        (b'{"prompt": "p1"}\n\n{"prompt": ', "Row 3 of .* is no JSON .Expecting value at character 12.;"),
        (b'["p1"]', r"Row 1 of .* is \[\"p1\"\];"),
    ],
)
def test_files_without_prompts_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{said}.*must look like"):
        read_prompts([tmp_path / "a.jsonl"])


def test_prompts_in_another_encoding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"Row 1 of .*a\.jsonl' is not UTF-8 text; save"):
        read_prompts([tmp_path / "a.jsonl"])


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p1"}')
    with pytest.raises(ValueError, match="rename"):
        read_prompts([tmp_path / "a.jsonl"] * 2)


def test_every_method_is_measured_on_every_prompt(tmp_path: Path, target, head, tokenizer) -> None:
    report = run_benchmark(target, head, tokenizer, PROMPTS, options(), output_dir=tmp_path)
    measurements = read_measurements(tmp_path / "results.jsonl")
    assert [(one.prompts, one.index) for one in measurements] == [
        (name, index) for name in PROMPTS for index in (0, 1) for _ in METHODS
    ]
    # Each prompt begins with another method.
    assert [one.method for one in measurements[: len(METHODS)]] == METHODS
    assert [one.method for one in measurements[len(METHODS) : 2 * len(METHODS)]] == METHODS[1:] + METHODS[:1]
    for one in measurements:
        assert len(one.tokens) == 8
        assert 0 < one.time_to_first_token < one.seconds
        assert sum(one.phase_seconds.values()) <= one.seconds
        assert bool(one.phase_seconds) == (one.method in ("chain", "auto") or one.method.startswith("tree"))
        assert len(one.accepted_lengths) == one.num_forwards - 1
        assert one.peak_memory_bytes > 0
        if one.method == "plain":
            assert one.accepted_lengths == [0] * 7

    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["prompt_sets"].keys() == PROMPTS.keys()
    assert report["all"]["num_prompts"] == 4
    for part in (*report["prompt_sets"].values(), report["all"]):
        assert list(part["methods"]) == METHODS
        for summary in part["methods"].values():
            assert summary["num_equal"] == summary["num_compared"] == part["num_prompts"]
            assert summary["ratio"]["low"] <= summary["ratio"]["high"]
            assert summary["break_even"] is None or summary["break_even"] > 0
        assert part["methods"]["plain"]["break_even"] is None
        assert part["methods"]["tree-20"]["break_even"] is not None
    page = (tmp_path / "report.md").read_text()
    assert page.count("| tokens per round | breaks even at |") == 3
    assert page.count("| tree-20 |") == 4  # each set, all sets, the time of a round
    assert "| method | draft | build | verify | accept | commit | other | sum |" in page
    assert str(tmp_path) not in page + (tmp_path / "report.json").read_text()


def test_trees_are_counted_as_the_loop_counts_them(tmp_path: Path, target, tokenizer) -> None:
    ids = torch.tensor([[1, 9, 8, 2, 3]])
    head = oracle_head(target, target.generate(ids, max_new_tokens=8, do_sample=False))
    run_benchmark(target, head, tokenizer, {"a": ["t9 t8"]}, options(methods=["tree-20"]), output_dir=tmp_path)
    (measured,) = read_measurements(tmp_path / "results.jsonl")
    assert measured.num_prompt_tokens == ids.shape[1]
    head.config.num_assistant_tokens = 20  # in the call, 20 would count as not given
    output = target.generate(ids, assistant_model=head, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert measured.tokens == output.sequences[0, 5:].tolist()
    assert measured.accepted_lengths == output.statistics.accepted_lengths
    assert max(measured.accepted_lengths) == 5
    assert measured.num_forwards == output.statistics.num_rounds + 1
    assert measured.phase_seconds.keys() == output.statistics.seconds.keys()


def test_a_chain_is_the_block_of_the_head_alone(tmp_path: Path, target, head, tokenizer, monkeypatch) -> None:
    trees: list[DraftTree] = []
    grow = TreeGrower.grow

    def noting_grow(*args: Any, **kwargs: Any) -> DraftTree:
        trees.append(grow(*args, **kwargs))
        return trees[-1]

    monkeypatch.setattr(TreeGrower, "grow", noting_grow)
    head.config.num_assistant_tokens, head.config.prompt_lookup_num_tokens = 2, 16
    # The prompt repeats itself, which gives grafts.
    prompts, chosen = {"a": ["t9 t8 t9 t8 t9 t8"]}, options(methods=["chain"], max_new_tokens=12)
    run_benchmark(target, head, tokenizer, prompts, chosen, output_dir=tmp_path)
    block = head.config.block_size
    assert max(map(len, trees)) == block
    for tree in trees:
        assert tree.parents[0].tolist() == list(range(-1, len(tree) - 1))


def test_what_can_be_compiled_is_compiled_in_the_warm_up(
    tmp_path: Path, target, head, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    compiled: list[int] = []  # during which call
    generate, compile_as_usual = type(target).generate, torch.compile

    def note(graph: torch.nn.Module, inputs: Any) -> torch.nn.Module:
        compiled.append(len(calls))
        return graph

    options_of_compile = {"backend": note, "mode": None}
    monkeypatch.setattr(torch, "compile", lambda step, **kw: compile_as_usual(step, **kw | options_of_compile))
    monkeypatch.setattr(type(target), "generate", lambda *args, **kw: calls.append(kw) or generate(*args, **kw))
    torch._dynamo.reset()
    prompts = {"set": ["t9 t8 t30 t40", "t7", " ".join(["t50"] * 30)]}
    methods = ["plain", "lookup", "dflash", "chain", "tree-3"]
    report = run_benchmark(
        target, head, tokenizer, prompts, options(methods=methods, num_prompts=3, compile=True), output_dir=tmp_path
    )
    torch._dynamo.reset()
    summaries = report["all"]["methods"]
    assert all(summaries[method]["num_equal"] == 3 for method in methods)
    assert ["cache_implementation" in call for call in calls[:5]] == [True, False, False, True, True]
    assert {call["max_cache_len"] for call in calls if "max_cache_len" in call} == {33 + 8}
    assert 0 < max(compiled) <= 5


def test_batches_are_measured_too(tmp_path: Path, target, head, tokenizer) -> None:
    prompts = {"set": ["t9 t8 t30 t40", "t7", "t50 t51"]}
    for temperature in (0.0, 2.0):
        chosen = options(
            methods=["plain", "chain", "auto", "tree-3"], num_prompts=3, batch_size=2, temperature=temperature
        )
        report = run_benchmark(target, head, tokenizer, prompts, chosen, output_dir=tmp_path / str(temperature))
        assert report["environment"]["batch_size"] == 2
        for summary in report["all"]["methods"].values():
            assert (summary["num_calls"], summary["num_equal"]) == (2, 2)
            # The first token of each of three rows comes with the prompt.
            rounds, tokens = summary["num_rounds"], summary["num_new_tokens"]
            assert summary["tokens_per_round"] == pytest.approx((tokens - 3) / rounds)


def test_the_head_keeps_its_own_options(tmp_path: Path, target, head, tokenizer) -> None:
    chosen = options(methods=["chain", "auto", "tree-3", "tree"])
    run_benchmark(target, head, tokenizer, {"a": ["t9"]}, chosen, output_dir=tmp_path)
    assert head.config.to_dict() == head_config(target).to_dict()


def test_sampled_trees_draw_what_plain_decoding_draws(tmp_path: Path, target, head, tokenizer) -> None:
    report = run_benchmark(target, head, tokenizer, PROMPTS, options(temperature=2.0), output_dir=tmp_path)
    compared = {method: summary["num_compared"] for method, summary in report["all"]["methods"].items()}
    assert compared == {"plain": 4, "lookup": 0, "dflash": 0, "chain": 4, "auto": 4, "tree-3": 4, "tree-20": 4}
    assert report["all"]["methods"]["tree-20"]["num_equal"] == 4
    plain = [one.tokens for one in read_measurements(tmp_path / "results.jsonl") if one.method == "plain"]
    greedy = run_benchmark(target, head, tokenizer, PROMPTS, options(methods=["plain"]), output_dir=tmp_path / "greedy")
    assert greedy["all"]["num_prompts"] == 4
    assert plain != [one.tokens for one in read_measurements(tmp_path / "greedy/results.jsonl")]


@pytest.mark.parametrize("cut", ["between lines", "within a line", "before the first"])
def test_a_killed_run_goes_on_where_it_was(cut: str, tmp_path: Path, target, head, tokenizer) -> None:
    chosen = options(methods=["plain", "tree-3"], num_prompts=1)
    whole = run_benchmark(target, head, tokenizer, PROMPTS, chosen, output_dir=tmp_path)
    results = tmp_path / "results.jsonl"
    uninterrupted = results.read_text().splitlines(keepends=True)
    kept, rest = {
        "between lines": (uninterrupted[:3], ""),
        "within a line": (uninterrupted[:3], uninterrupted[3][:40]),
        "before the first": ([], uninterrupted[0][:40]),
    }[cut]
    results.write_text("".join(kept) + rest)

    resumed = run_benchmark(target, head, tokenizer, PROMPTS, chosen, output_dir=tmp_path)
    lines = results.read_text().splitlines(keepends=True)
    assert lines[: len(kept)] == kept
    expected = [without_times(Measurement(**json.loads(line))) for line in uninterrupted]
    assert [without_times(one) for one in read_measurements(results)] == expected
    for method, summary in resumed["all"]["methods"].items():
        before = whole["all"]["methods"][method]
        assert summary["tokens_per_round"] == before["tokens_per_round"]
        assert summary["num_new_tokens"] == before["num_new_tokens"]
    assert resumed["date"] == whole["date"]


def test_a_finished_run_measures_nothing_again(tmp_path: Path, target, head, tokenizer, monkeypatch) -> None:
    chosen = options(methods=["plain", "tree-3"], num_prompts=1)
    report = run_benchmark(target, head, tokenizer, PROMPTS, chosen, output_dir=tmp_path)
    monkeypatch.setattr(target, "generate", None)
    assert run_benchmark(target, head, tokenizer, PROMPTS, chosen, output_dir=tmp_path) == report


def test_a_folder_of_other_options_is_refused(tmp_path: Path, target, head, tokenizer) -> None:
    chosen = {"methods": ["plain"], "max_new_tokens": 2}
    run_benchmark(target, head, tokenizer, PROMPTS, options(**chosen), output_dir=tmp_path)
    for other, named in [
        ({"temperature": 1.0}, "options temperature: 0.0 there, 1.0 now"),
        ({"methods": ["plain", "tree-3"]}, "options methods"),
    ]:
        with pytest.raises(ValueError, match=f"{named}.*another place"):
            run_benchmark(target, head, tokenizer, PROMPTS, options(**(chosen | other)), output_dir=tmp_path)
    changed = PROMPTS | {"second": ["t5", "t6"]}
    with pytest.raises(ValueError, match="prompts second"):
        run_benchmark(target, head, tokenizer, changed, options(**chosen), output_dir=tmp_path)


@pytest.mark.parametrize("file", ["options.json", "results.jsonl", "report.json", "report.md", "nodes.png"])
def test_files_of_others_stay_as_they_are(file: str, tmp_path: Path, target, head, tokenizer) -> None:
    (tmp_path / file).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"{file}' is there already"):
        run_benchmark(target, head, tokenizer, PROMPTS, options(), output_dir=tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"mine": 1}']


def test_results_that_are_no_measurements_are_not_cut(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"mine": 1}\n{"mine"')
    with pytest.raises(ValueError, match="has the columns mine, where this command writes"):
        read_measurements(results)
    assert results.read_text() == '{"mine": 1}\n{"mine"'


@pytest.mark.parametrize("empty", [{}, {"a": ["t9"], "b": []}])
def test_an_empty_prompt_set_is_refused(empty: dict[str, list[str]], tmp_path: Path, target, head, tokenizer) -> None:
    with pytest.raises(ValueError, match="needs a prompt"):
        run_benchmark(target, head, tokenizer, empty, options(), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_are_drawn(tmp_path: Path, target, head, tokenizer) -> None:
    pytest.importorskip("matplotlib")
    run_benchmark(target, head, tokenizer, PROMPTS, options(), output_dir=tmp_path)
    for name in ("nodes", "phases", "acceptance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_with_nothing_to_show_are_left_out(tmp_path: Path, target, head, tokenizer) -> None:
    pytest.importorskip("matplotlib")
    run_benchmark(target, head, tokenizer, PROMPTS, options(methods=["tree"], max_new_tokens=1), output_dir=tmp_path)
    assert not list(tmp_path.glob("*.png"))
    assert "| tree | - |" in (tmp_path / "report.md").read_text()


def test_without_matplotlib_the_rest_is_written(tmp_path: Path, target, head, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install jetspec_hf\[bench\]"):
        run_benchmark(target, head, tokenizer, PROMPTS, options(methods=["plain", "tree-3"]), output_dir=tmp_path)
    assert (tmp_path / "report.md").exists()
    assert not list(tmp_path.glob("*.png"))
