"""Stored targets: the same training without the target, and nothing trained on bad states."""

from pathlib import Path

import pytest
import torch
from support.training import losses_of, make_rows, make_trainer, write_states

from jetspec_hf.target.extraction import extract
from jetspec_hf.target.reading import read_target
from jetspec_hf.target.stored import StoredTarget, bytes_of
from jetspec_hf.training.evaluation import surprise, tokens_per_round

LAYERS = [1, 2]


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


def texts_in(rows: list[dict]) -> list[list[int]]:
    return [row["input_ids"] for row in rows]


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_training_from_stored_states_is_training_from_the_target(
    tmp_path, make_target, make_head, rows, tie_word_embeddings: bool
) -> None:
    target = make_target(tie_word_embeddings=tie_word_embeddings)
    write_states(target, texts_in(rows), tmp_path / "states")
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
    write_states(target, texts_in(rows), tmp_path)
    stored = StoredTarget(tmp_path)
    ids = torch.tensor([[*rows[0]["input_ids"][:9], 0, 0]])
    found = stored.read(ids, LAYERS)
    for ours, expected in zip(found, read_target(target, ids[:, :9], LAYERS), strict=True):
        torch.testing.assert_close(ours[:, :9], expected, rtol=1e-5, atol=1e-5)
        assert not ours[:, 9:].any()
    with pytest.raises(ValueError, match="No states are stored of a text of 9 tokens"):
        stored.read(ids[:, :9].flip(1), LAYERS)


def test_layers_come_in_the_order_in_which_they_are_asked_for(tmp_path, make_target, rows) -> None:
    write_states(make_target(), texts_in(rows), tmp_path, layer_ids=[0, 1, 3])
    stored, ids = StoredTarget(tmp_path), torch.tensor([rows[0]["input_ids"]])
    first, second, third = stored.read(ids, [0, 1, 3]).taps.chunk(3, dim=-1)
    assert torch.equal(stored.read(ids, [3, 0]).taps, torch.cat([third, first], dim=-1))
    assert torch.equal(stored.read(ids, [1]).taps, second)
    assert stored.read(ids, []).taps.shape == (1, 24, 0)


def test_every_beginning_of_every_text_is_found(tmp_path, make_target) -> None:
    """Texts that share long beginnings, as under one system prompt, against looking through all of them."""
    generator = torch.Generator().manual_seed(0)
    texts = [[7] * 5 + torch.randint(1, 3, (length,), generator=generator).tolist() for length in range(1, 12)] * 3
    target = make_target()
    extract(target, texts, tmp_path, layer_ids=[1], pad_token_id=0, shard_bytes=5_000)
    stored = StoredTarget(tmp_path)
    for text in texts:
        for end in range(1, len(text) + 1):
            ids = torch.tensor([text[:end]])
            expected = read_target(target, ids, [1]).last_hidden
            torch.testing.assert_close(stored.read(ids, [1]).last_hidden, expected, rtol=1e-4, atol=1e-5)
    beginnings = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
    for text in beginnings:
        for token in (1, 2, 3, 60):
            if (*text, token) not in beginnings:
                with pytest.raises(ValueError, match="No states are stored"):
                    stored.read(torch.tensor([[*text, token]]), [1])


def test_texts_are_compared_as_in_files_of_earlier_versions() -> None:
    ids = [0, 1, 255, 256, 151_935, 2**31 - 1]
    expected = b"".join(token.to_bytes(4, "big") for token in ids)
    assert bytes_of(ids) == bytes_of(torch.tensor(ids)) == expected
    texts = [[1, 256], [1], [1, 255], [2**20], [1, 255, 3]]
    assert sorted(texts, key=bytes_of) == sorted(texts)


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
    write_states(make_target(), texts_in(rows), tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=f"{file}.* is {message}"):
        StoredTarget(tmp_path)


def test_a_head_must_tap_what_is_stored_and_fit_the_target(tmp_path, make_target, make_head, rows) -> None:
    target = make_target()
    write_states(target, texts_in(rows), tmp_path / "states")
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
