"""The command line, from its words to the files."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.heads import random_head
from transformers import AutoTokenizer, Qwen3ForCausalLM

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.cli import COMMANDS, main
from jetspec_hf.training import JetSpecTrainingArguments
from jetspec_hf.training import commands as training_commands

TEMPLATE = "{% for m in messages %}t1 {{ m['content'] }} t2 {% endfor %}{% if add_generation_prompt %}t3 {% endif %}"


@pytest.fixture
def pair(tmp_path: Path, golden: Path, make_target: Callable[..., Qwen3ForCausalLM]) -> Path:
    """A folder with `target`, `head` and two files of prompts."""
    target = make_target(vocab_size=256)
    target.save_pretrained(tmp_path / "pair/target")
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "t4"
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
    assert "no method beam; choose from plain, lookup, dflash, chain, auto, tree, and tree-N" in capsys.readouterr().err


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
        (["train", "--help"], ["--states", "--num_anchors", "--learning_rate", "--help_all"]),
        (["train", "--help_all"], ["--states", "--num_anchors", "--learning_rate", "--adam_epsilon"]),
    ]:
        with pytest.raises(SystemExit):
            main(words)
        printed = capsys.readouterr().out
        assert all(word in printed for word in expected)
        assert ("--adam_epsilon" in printed) == ("--help_all" in words)


def test_defaults_of_training_fit_a_cpu_and_give_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        arguments = JetSpecTrainingArguments(str(tmp_path), use_cpu=True, num_anchors=500)
    assert (arguments.num_anchors, arguments.per_device_train_batch_size, arguments.logits_chunk_size) == (500, 4, 128)
    assert not arguments.dataloader_pin_memory
    assert "Chosen to fit a CPU: `per_device_train_batch_size` 4, `logits_chunk_size` 128" in caplog.text


def test_defaults_of_training_are_larger_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    arguments = JetSpecTrainingArguments(str(tmp_path))
    assert (arguments.num_anchors, arguments.per_device_train_batch_size, arguments.logits_chunk_size) == (512, 8, 1024)


def test_from_prompts_to_a_head_that_drafts(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, answers, folder = str(pair / "target"), str(pair / "answers.jsonl"), pair / "runs/head"
    prompts = [json.dumps({"question": f"t{i} t{i + 1} t{i + 2}"}) + "\n" for i in range(20, 44)]
    (pair / "questions.jsonl").write_text("".join(prompts))
    questions = ["--data", str(pair / "questions.jsonl")]
    main(["regenerate", "--target", target, *questions, "--output", answers, "--max_new_tokens", "16"])
    assert f"24 answers written to {answers}" in capsys.readouterr().err
    assert len(Path(answers).read_text().splitlines()) == 24

    config = {
        "target": target,
        "data": [answers],
        "num_hidden_layers": 1,
        "block_size": 4,
        "mask_token_id": 255,
        "output_dir": str(folder),
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "eval_num_assistant_tokens": [7],
    }
    config |= {"run_name": None, "lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 1}}
    (pair / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    main(["train", str(pair / "config.yaml"), "--max_steps", "2", "--learning_rate", "1e-3"])
    assert "Mean log-probability of 8 answers under the target: " in capsys.readouterr().err
    head = JetSpecDraftHead.from_pretrained(folder)
    assert (head.config.num_hidden_layers, head.config.block_size, head.config.mask_token_id) == (1, 4, 255)
    card = (folder / "README.md").read_text()
    assert "Data: answers.jsonl; texts of up to 3072 tokens." in card
    assert "on 2 texts held out" in card
    assert str(pair) not in card
    assert "| tokens_per_round_7 |" in card
    assert (folder / "training.png").exists() == (importlib.util.find_spec("matplotlib") is not None)

    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(
        SystemExit, match=r"choose another `--output_dir`, or go on with `--resume_from_.*checkpoint-2`"
    ):
        main(["train", str(pair / "config.yaml")])
    assert (folder / "model.safetensors").read_bytes() == before
    main(["train", str(pair / "config.yaml"), "--max_steps", "3", "--resume_from_checkpoint", f"{folder}/checkpoint-2"])
    assert (folder / "checkpoint-3").exists()

    capsys.readouterr()
    words = ["--target", target, "--head", str(folder), "--data", answers, "--num_assistant_tokens", "3", "7"]
    main(["evaluate", *words, "--prompt_lookup_num_tokens", "0"])
    printed = capsys.readouterr()
    assert "24 texts\n" in printed.err
    found = json.loads(printed.out)
    counted = found["tokens_per_round"]
    assert sum(bucket["num_nodes"] for bucket in found["scores"]) > 0
    assert list(counted) == ["chain", "3", "7"]
    assert 1 <= counted["chain"] <= 4
    assert 1 <= counted["3"] <= counted["7"] <= 4
    main(["evaluate", *words, "--num_texts", "2"])
    printed = capsys.readouterr()
    assert "drafting: 100%" in printed.err
    assert "2/2" in printed.err
    assert list(json.loads(printed.out)["tokens_per_round"]) == ["chain", "3", "7"]


def test_held_out_texts_are_no_others_than_the_rest() -> None:
    held_out, kept = training_commands._split(100, 10)
    assert sorted(held_out + kept) == list(range(100))
    assert held_out == sorted(held_out) != list(range(90, 100))
    assert (held_out, kept) == training_commands._split(100, 10)
    assert training_commands._split(3, 0) == ([], [0, 1, 2])


def train(pair: Path, *options: str) -> list[str]:
    """A run of one step on one row."""
    answers = pair / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "t9", "response": "t8 t7 t6 t5 t4 t3"}) + "\n")
    words = ["train", "--target", str(pair / "target"), "--data", str(answers), "--mask_token_id", "255", "--use_cpu"]
    shape = "--num_hidden_layers 1 --block_size 4 --max_steps 1 --report_to none --disable_tqdm true"
    return [*words, *shape.split(), *options]


@pytest.mark.parametrize("file", ["README.md", "model.safetensors", "checkpoint-1/config.json"])
def test_training_writes_over_no_file_of_others(pair: Path, file: str) -> None:
    path = pair / "mine" / file
    path.parent.mkdir(parents=True)
    path.write_text('{"model_type": "qwen3"}')
    for options in ([], ["--resume_from_checkpoint", "true"]):
        with pytest.raises(SystemExit):
            main(train(pair, "--output_dir", str(pair / "mine"), *options))
    assert [one.read_text() for one in (pair / "mine").rglob("*") if one.is_file()] == ['{"model_type": "qwen3"}']


def test_training_goes_on_from_its_last_checkpoint(pair: Path) -> None:
    folder = pair / "runs/head"
    words = train(pair, "--output_dir", str(folder), "--save_steps", "1")
    with pytest.raises(SystemExit, match="holds no checkpoint of a head"):
        main([*words, "--resume_from_checkpoint", "true"])
    main([*words, "--resume_from_checkpoint", "false"])
    (folder / "checkpoint-9").mkdir()  # killed while it was written
    main([*words, "--max_steps", "2", "--resume_from_checkpoint", "true"])
    assert json.loads((folder / "checkpoint-2/trainer_state.json").read_text())["global_step"] == 2
    with pytest.raises(SystemExit, match="'elsewhere' holds no checkpoint of a head"):
        main([*words, "--resume_from_checkpoint", "elsewhere"])
    (folder / "README.md").write_text("my own notes")
    with pytest.raises(SystemExit, match=r"README\.md' is there already"):
        main([*words, "--max_steps", "3", "--resume_from_checkpoint", "true"])


def test_stored_states_train_the_same_head(pair: Path) -> None:
    answers = pair / "answers.jsonl"
    lines = [json.dumps({"prompt": f"t{i}", "response": f"t{i + 1} t{i + 2} t{i + 3}"}) + "\n" for i in range(20, 44)]
    answers.write_text("".join(lines))
    common = ["--target", str(pair / "target"), "--data", str(answers), "--target_layer_ids", "0", "1"]
    main(["extract", *common, "--output_dir", str(pair / "states")])
    train = ["train", *common, "--mask_token_id", "255", "--use_cpu", "--max_steps", "2", "--report_to", "none"]
    main([*train, "--output_dir", str(pair / "online")])
    (pair / "target/model.safetensors").unlink()  # not needed any more
    main([*train, "--output_dir", str(pair / "offline"), "--states", str(pair / "states"), "--packing"])
    main([*train, "--output_dir", str(pair / "again"), "--states", str(pair / "states")])
    heads = [JetSpecDraftHead.from_pretrained(pair / run) for run in ("online", "again")]
    assert [head.config.target_layer_ids for head in heads] == [[0, 1]] * 2
    online, again = (head.state_dict() for head in heads)
    for name, value in online.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lines", [[], [{"prompt": "t9", "response": ""}]], ids=["empty", "unlabelled"])
def test_training_on_nothing_is_refused(pair: Path, lines: list[dict[str, str]]) -> None:
    answers = pair / "answers.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--target", str(pair / "target"), "--data", str(answers), "--output_dir", str(pair / "o"), "--use_cpu"]
    with pytest.raises(SystemExit, match=r"is empty|has an answer"):
        main(["train", *words, "--mask_token_id", "255"])
    assert not (pair / "o").exists()


def test_streams_of_conversations_are_packed_and_learned(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": role, "content": f"t{i} t{i + 1}"} for i, role in enumerate(["user", "assistant"] * 2, start=20)]
    (pair / "turns.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 50)
    source = ["--data", str(pair / "turns.jsonl"), "--mask_token_id", "255", "--output_dir", str(pair / "runs/head")]
    shape = "--num_hidden_layers 1 --block_size 4 --max_length 40 --eval_num_assistant_tokens 3"
    steps = "--streaming --packing --max_steps 4 --per_device_train_batch_size 1 --report_to none --use_cpu"
    main(["train", "--target", str(pair / "target"), *source, *shape.split(), *steps.split()])
    assert "| tokens_per_round_3 |" in (pair / "runs/head/README.md").read_text()


def test_a_target_that_runs_past_its_turn_is_noticed(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = Qwen3ForCausalLM.from_pretrained(pair / "target")
    words = ["regenerate", "--target", str(pair / "target"), "--data", str(pair / "a.jsonl"), "--max_new_tokens", "2"]
    for ends, is_noticed in (None, True), ([5, 4], False):
        target.generation_config.eos_token_id = ends
        target.save_pretrained(pair / "target")
        caplog.clear()
        main([*words, "--output", str(pair / f"{is_noticed}.jsonl")])
        assert ("ends turns with 't4'" in caplog.text) == is_noticed


def test_a_trained_head_is_given_a_markov_head(pair: Path) -> None:
    target, answers = str(pair / "target"), str(pair / "answers.jsonl")
    rows = [json.dumps({"prompt": f"t{i}", "response": "t8 t7 t6 t5 t4 t3"}) + "\n" for i in range(12)]
    Path(answers).write_text("".join(rows))
    words = ["--target", target, "--data", answers, "--use_cpu", "--max_steps", "2", "--report_to", "none"]
    words += ["--eval_num_assistant_tokens", "3", "--disable_tqdm", "true"]
    shape = ["--num_hidden_layers", "1", "--block_size", "4", "--mask_token_id", "255", "--markov_rank", "0"]
    main(["train", *words, *shape, "--output_dir", str(pair / "plain")])
    plain = JetSpecDraftHead.from_pretrained(pair / "plain")
    assert plain.markov_head is None
    assert len(plain.config.draft_temperatures) == 3

    more = ["--head", str(pair / "plain"), "--output_dir", str(pair / "markov")]
    main(["train", *words, *more, "--markov_rank", "5", "--markov_only", "--learning_rate", "0.1"])
    markov = JetSpecDraftHead.from_pretrained(pair / "markov")
    assert markov.markov_head.markov_w2.weight.any()
    trained = markov.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in plain.state_dict().items())
    with pytest.raises(SystemExit, match="needs a Markov head"):
        main(["train", *words, *more[:3], str(pair / "none"), "--markov_rank", "0", "--markov_only"])


def test_training_without_a_mask_token_says_what_to_do(pair: Path) -> None:
    answers = pair / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "t9", "response": "t8 t7 t6"}) + "\n")
    words = ["--target", str(pair / "target"), "--data", str(answers), "--output_dir", str(pair / "o"), "--use_cpu"]
    with pytest.raises(SystemExit, match="pass as `mask_token_id`"):
        main(["train", *words])
    assert not (pair / "o/model.safetensors").exists()


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    if ended.value.code == 2:
        return capsys.readouterr().err.splitlines()[-1]
    assert isinstance(ended.value.code, str)
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("regenerate --target {}/target --data {}/a.jsonl --output {}/o --batch_size 0", "`batch_size` must be at l"),
        (
            "regenerate --target {}/target --data {}/a.jsonl --output {}/o --dtype int3",
            "argument --dtype/--target_dtype: invalid",
        ),
        (
            "train --target {}/target --data {}/a.jsonl --target_dtype int3",
            "argument --dtype/--target_dtype: invalid",
        ),
        (
            "regenerate --target {}/target --data {}/a.jsonl --output {}/o --temperature -1",
            "`temperature` must be at l",
        ),
        ("regenerate --target {}/target --data {}/a.jsonl --output {}/o --gguf_file x.gguf", "no `gguf_file` 'x.gguf'"),
        ("regenerate --target {}/target --data {}/none.jsonl --output {}/o", "none.jsonl"),
        ("regenerate --target {}/head --data {}/a.jsonl --output {}/o", "head' is a draft head; pass the model that"),
        ("regenerate --target ./nope --data {}/a.jsonl --output {}/o", "'./nope' is not there; pass the folder"),
        ("regenerate --target {}/a.jsonl --data {}/a.jsonl --output {}/o", "a.jsonl' is a file; pass the folder"),
        ("regenerate --target {}/t5 --data {}/a.jsonl --output {}/o", "t5' is a t5 model, which does not contin"),
        ("regenerate --target {}/cut --data {}/a.jsonl --output {}/o", "cut/model.safetensors' is cut or damaged ("),
        ("extract --target {}/target --data {}/a.jsonl --output_dir {}/o --num_hidden_layers 0", "`num_hidden_layers`"),
        (
            "extract --target {}/target --data {}/a.jsonl --output_dir {}/o --target_layer_ids 0 9",
            "[0, 9] for a target of",
        ),
        ("train --target {}/target --data {}/a.jsonl --block_size 1", "`block_size` must be at least 2; got 1."),
        ("train --target {}/target --data {}/a.jsonl --num_anchors 0 --use_cpu", "`num_anchors` must be at least 1"),
        ("train --target {}/target --data {}/a.jsonl --depth_decay 0 --use_cpu", "`depth_decay` must be above 0"),
        ("train {}/none.yaml", "none.yaml"),
        ("evaluate --target {}/target --head {}/target --data {}/a.jsonl", "not a draft head"),
        (
            "evaluate --target {}/target --head {}/head --data {}/a.jsonl --num_assistant_tokens 3 0",
            "`num_assistant_to",
        ),
        (
            "bench --target {}/target --head {}/head --prompts {}/a.jsonl --output_dir {}/o --threads 0",
            "`threads` must",
        ),
        (
            "bench --target {}/target --head {}/head --prompts {}/a.jsonl --output_dir {}/o --device x",
            "no `device` 'x'",
        ),
        (
            "bench --target {}/target --head {}/head --prompts {}/a.jsonl --output_dir {}/o --gguf_file x.gguf",
            "no `gguf_file` 'x.gguf'",
        ),
        ("bench --target {}/target --head {}/head --prompts {} --output_dir {}/o", "Is a directory"),
    ],
)
def test_what_its_user_can_mend_ends_in_one_line(
    pair: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    for name in ("t5", "cut"):
        (pair / name).mkdir()
    (pair / "t5/config.json").write_text('{"model_type": "t5"}')
    (pair / "cut/config.json").write_text((pair / "target/config.json").read_text())
    (pair / "cut/model.safetensors").write_bytes((pair / "target/model.safetensors").read_bytes()[:5000])
    assert said in refusal(words.replace("{}", str(pair)).split(), capsys)
    assert not (pair / "o").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"targ: x", "unknown option 'targ'; did you mean 'target'?"),
        (b"colour: red", "unknown option 'colour'; `--help` lists"),
        (b"- target", "must hold a line `option: value`"),
        (b"target: [a, b]", "has a list for 'target', which takes one value"),
        (b"a: 1\n- b", "is no YAML"),
        ("target: é".encode("latin-1"), "is no YAML in UTF-8"),
        (b"", "required: --target, --data"),
    ],
)
def test_a_bad_config_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    assert said in refusal(["train", str(tmp_path / "config.yaml")], capsys)


@pytest.mark.parametrize("words", [["--debug", "regenerate"], ["regenerate", "--debug"]])
def test_debug_shows_where_an_error_comes_from(pair: Path, words: list[str]) -> None:
    rest = ["--target", str(pair / "target"), "--data", str(pair / "a.jsonl"), "--output", str(pair / "b.jsonl")]
    with pytest.raises(ValueError, match=r"b\.jsonl' is there already"):
        main([*words, *rest])


def test_the_debug_options_of_transformers_stay(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--debug", "underflow_overflow", "--target", "t", "--data", "d", "--block_size", "1"]
    assert "`block_size` must be" in refusal(words, capsys)


def test_an_error_of_ours_is_not_hidden(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_commands, "load_prompts", lambda data: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        main(["regenerate", "--target", "t", "--data", "d", "--output", str(pair / "o")])


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("regenerate --data d --output {}/a.jsonl", "a.jsonl"),
        ("extract --data d --output_dir {}/head", "head/config.json"),
        ("train --data d --use_cpu --output_dir {}/head", "head/config.json"),
        ("bench --head h --prompts {}/a.jsonl --output_dir {}/a.jsonl", "a.jsonl"),
    ],
)
def test_no_command_loads_a_model_to_find_a_file_of_others(
    pair: Path, capsys: pytest.CaptureFixture[str], command: str, file: str
) -> None:
    before = (pair / file).read_bytes()
    words = command.replace("{}", str(pair)).split()
    assert f"{file}' is there already, and nothing says that this" in refusal([*words, "--target", "nowhere"], capsys)
    assert (pair / file).read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --data {}/answers.jsonl",
        "bench --prompts {}/a.jsonl --output_dir {}/o",
        "train --data {}/answers.jsonl --output_dir {}/o --use_cpu",
    ],
)
def test_a_head_of_another_target_is_refused(
    pair: Path, make_target: Callable[..., Qwen3ForCausalLM], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    random_head(make_target(vocab_size=256, hidden_size=48)).save_pretrained(pair / "other")
    (pair / "answers.jsonl").write_text(json.dumps({"prompt": "t9", "response": "t8 t7 t6"}) + "\n")
    words = command.replace("{}", str(pair)).split()
    said = refusal([*words, "--target", str(pair / "target"), "--head", str(pair / "other")], capsys)
    assert "The head and Qwen3ForCausalLM do not fit: hidden_size 48 and 32" in said
    assert not (pair / "o").exists()
