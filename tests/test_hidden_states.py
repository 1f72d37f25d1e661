"""Stored hidden states: the same training without the target, and nothing trained on bad ones."""

import json
from pathlib import Path

import pytest
import torch
from test_trainer import losses_of, make_rows, make_trainer

from jetspec_hf.evaluation import surprise, tokens_per_round
from jetspec_hf.hidden_states import StoredTarget, extract

LAYERS = [1, 2]


def write(target, rows: list[dict], folder: Path, **options) -> None:
    texts = [row["input_ids"] for row in rows]
    extract(target, texts, folder, **({"layer_ids": LAYERS, "pad_token_id": 0, "shard_bytes": 20_000} | options))


@pytest.fixture
def rows(make_target) -> list[dict]:
    """Texts of several lengths, one the beginning of another."""
    rows = make_rows(make_target(), 6)
    lengths = [24, 20, 24, 12, 7, 24]
    rows = [
        {name: row[name][:length] for name in ("input_ids", "loss_mask")}
        for row, length in zip(rows, lengths, strict=True)
    ]
    return [*rows, {name: values[:15] for name, values in rows[0].items()}]


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_training_from_stored_states_is_training_from_the_target(
    tmp_path, make_target, make_head, rows, tie_word_embeddings: bool
) -> None:
    target = make_target(tie_word_embeddings=tie_word_embeddings)
    write(target, rows, tmp_path / "states")
    assert len(list((tmp_path / "states").glob("shard-*.safetensors"))) > 1
    texts = [(row["input_ids"], 4) for row in rows]
    seen = []
    for source in (target, StoredTarget(tmp_path / "states")):
        head = make_head(target, initializer_range=0.05, target_layer_ids=LAYERS)
        options = {"max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 3}
        trainer = make_trainer(head, source, rows, tmp_path / "run", **options)
        trainer.train()
        seen.append([*losses_of(trainer), *surprise(source, texts), tokens_per_round(head, source, texts, [8])[8]])
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_a_cut_text_is_found_and_another_is_not(tmp_path, make_target, rows) -> None:
    target = make_target()
    write(target, rows, tmp_path)
    decoder = StoredTarget(tmp_path).get_decoder()
    ids = torch.tensor([[*rows[0]["input_ids"][:9], 0, 0]])
    with torch.no_grad():
        expected = target.get_decoder()(ids[:, :9]).last_hidden_state
    found = decoder(ids).last_hidden_state
    torch.testing.assert_close(found[:, :9], expected, rtol=1e-5, atol=1e-5)
    assert not found[:, 9:].any()
    with pytest.raises(ValueError, match="No states are stored of a text of 9 tokens"):
        decoder(ids[:, :9].flip(1))


def test_a_stopped_extraction_goes_on_after_its_last_whole_shard(tmp_path, make_target, rows) -> None:
    target = make_target()
    write(target, rows, tmp_path / "whole")
    passes = []

    def stop(*_) -> None:
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt

    hook = target.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        write(target, rows, tmp_path / "stopped")
    hook.remove()
    with pytest.raises(ValueError, match="of 7 texts; call the same `jetspec extract` again"):
        StoredTarget(tmp_path / "stopped")
    first = (tmp_path / "stopped/shard-00000.safetensors").stat().st_mtime_ns
    write(target, rows, tmp_path / "stopped")
    assert (tmp_path / "stopped/shard-00000.safetensors").stat().st_mtime_ns == first
    manifests = [json.loads((tmp_path / run / "manifest.json").read_text()) for run in ("whole", "stopped")]
    assert manifests[0] == manifests[1]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "ends.safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"), [(flip_a_byte, "corrupted or short"), (cut, "corrupted or short"), (Path.unlink, "missing")]
)
def test_damaged_states_are_refused(tmp_path, make_target, rows, file: str, damage, message: str) -> None:
    write(make_target(), rows, tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=f"{file}.* is {message}"):
        StoredTarget(tmp_path)


def test_states_of_another_run_stay_as_they_are(tmp_path, make_target, rows) -> None:
    write(make_target(), rows, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for target, texts, options, named in [
        (make_target(seed=1), rows, {}, "target"),
        (make_target(), rows[:3], {}, "texts; num_texts: 7 there, 3 now"),
        (make_target(), rows, {"layer_ids": [0, 1]}, "layer_ids"),
    ]:
        with pytest.raises(ValueError, match=f"under other settings \\({named}"):
            write(target, texts, tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("file", ["config.json", "ends.safetensors", "shard-00007.safetensors", "manifest.json"])
def test_files_of_others_stay_as_they_are(tmp_path, make_target, rows, file: str) -> None:
    (tmp_path / file).write_text('{"model_type": "jetspec"}')
    with pytest.raises(ValueError, match=f"{file}' is there already"):
        write(make_target(), rows, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"model_type": "jetspec"}']


def test_an_extraction_that_was_stopped_in_its_first_shard_goes_on(tmp_path, make_target, rows) -> None:
    target = make_target()

    def stop(*_) -> None:
        raise KeyboardInterrupt

    hook = target.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        write(target, rows, tmp_path)
    hook.remove()
    assert (tmp_path / "config.json").exists()
    write(target, rows, tmp_path)
    StoredTarget(tmp_path)


def test_a_head_must_tap_what_is_stored_and_fit_the_target(tmp_path, make_target, make_head, rows) -> None:
    target = make_target()
    write(target, rows, tmp_path / "states")
    stored = StoredTarget(tmp_path / "states")
    head = make_head(target, target_layer_ids=[0, 2])
    with pytest.raises(ValueError, match=r"stored after layer 0, only after \[1, 2\]"):
        make_trainer(head, stored, rows, tmp_path / "run", max_steps=1).train()
    with pytest.raises(ValueError, match="vocab_size 80 and 64"):
        make_trainer(make_head(make_target(vocab_size=80)), stored, rows, tmp_path / "run")


def test_a_folder_without_states_is_refused(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"no manifest\.json of hidden states; write the states with `jetspec extract`"
    ):
        StoredTarget(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "another"}')
    with pytest.raises(ValueError, match=r"no manifest\.json of hidden states"):
        StoredTarget(tmp_path)


def test_an_embedding_that_is_more_than_its_weights_is_refused(tmp_path, make_target, rows) -> None:
    target = make_target()
    target.lm_head = torch.nn.Sequential(target.lm_head)
    with pytest.raises(ValueError, match="are Embedding and Sequential; only a plain"):
        write(target, rows, tmp_path)
