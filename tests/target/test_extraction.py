"""Extraction: stopped, taken up again, and never over what others wrote."""

import json

import pytest
import torch
from support.training import write_states

from jetspec_hf.target.stored import StoredTarget

TEXTS = [[(3 * start + 7 * i) % 60 for i in range(length)] for start, length in enumerate((24, 20, 24, 12, 7, 24, 15))]


def test_a_stopped_extraction_goes_on_after_its_last_whole_shard(tmp_path, make_target) -> None:
    target = make_target()
    write_states(target, TEXTS, tmp_path / "whole")
    passes = []

    def stop(*_) -> None:
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt

    hook = target.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        write_states(target, TEXTS, tmp_path / "stopped")
    hook.remove()
    with pytest.raises(ValueError, match="of 7 texts; call the same `jetspec extract` again"):
        StoredTarget(tmp_path / "stopped")
    first = (tmp_path / "stopped/shard-00000.safetensors").stat().st_mtime_ns
    write_states(target, TEXTS, tmp_path / "stopped")
    assert (tmp_path / "stopped/shard-00000.safetensors").stat().st_mtime_ns == first
    manifests = [json.loads((tmp_path / run / "manifest.json").read_text()) for run in ("whole", "stopped")]
    assert manifests[0] == manifests[1]


def test_states_of_another_run_stay_as_they_are(tmp_path, make_target) -> None:
    write_states(make_target(), TEXTS, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for target, texts, options, named in [
        (make_target(seed=1), TEXTS, {}, "target"),
        (make_target(), TEXTS[:3], {}, "texts; num_texts: 7 there, 3 now"),
        (make_target(), TEXTS, {"layer_ids": [0, 1]}, "layer_ids"),
    ]:
        with pytest.raises(ValueError, match=f"under other settings \\({named}"):
            write_states(target, texts, tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("file", ["config.json", "ends.safetensors", "shard-00007.safetensors", "manifest.json"])
def test_files_of_others_stay_as_they_are(tmp_path, make_target, file: str) -> None:
    (tmp_path / file).write_text('{"model_type": "jetspec"}')
    with pytest.raises(ValueError, match=f"{file}' is there already"):
        write_states(make_target(), TEXTS, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"model_type": "jetspec"}']


def test_an_extraction_that_was_stopped_in_its_first_shard_goes_on(tmp_path, make_target) -> None:
    target = make_target()

    def stop(*_) -> None:
        raise KeyboardInterrupt

    hook = target.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        write_states(target, TEXTS, tmp_path)
    hook.remove()
    assert (tmp_path / "config.json").exists()
    write_states(target, TEXTS, tmp_path)
    StoredTarget(tmp_path)


def test_an_embedding_that_is_more_than_its_weights_is_refused(tmp_path, make_target) -> None:
    target = make_target()
    target.lm_head = torch.nn.Sequential(target.lm_head)
    with pytest.raises(ValueError, match="are Embedding and Sequential; only a plain"):
        write_states(target, TEXTS, tmp_path)
