"""Loading heads that are not where, or not what, they should be."""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file
from transformers.utils import hub

from jetspec_hf import JetSpecConfig, JetSpecDraftHead

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n"


def half(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A published head, with its weights in both formats."""
    shutil.copytree(golden / "head_causal", tmp_path / "head")
    torch.save(load_file(tmp_path / "head/model.safetensors"), tmp_path / "head/pytorch_model.bin")
    return tmp_path / "head"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: b"", "is empty"),
        (lambda path: POINTER, "is a git-lfs pointer .*`git lfs pull`"),
        (lambda path: PAGE, "is a web page"),
        (half, "is cut"),
    ],
    ids=["empty", "pointer", "page", "cut"],
)
def test_a_file_that_is_something_else_is_named(
    folder: Path, name: str, content: Callable[[Path], bytes], message: str
) -> None:
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    JetSpecDraftHead.from_pretrained(folder)
    (folder / name).write_bytes(content(folder / name))
    for where in (folder, f"{folder.parent}::head"):
        with pytest.raises(OSError, match=rf"{name}' {message}"):
            JetSpecDraftHead.from_pretrained(where)


def test_a_configuration_that_is_a_list_or_missing_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    with pytest.raises(OSError, match=r"config.json' holds no JSON object"):
        JetSpecDraftHead.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"head' has no config.json, so it holds no head"):
        JetSpecDraftHead.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"::head' has no config.json"):
        JetSpecDraftHead.from_pretrained(f"{folder.parent}::head")


@pytest.mark.parametrize("name", ["./runs/haed", "/runs/head", "runs/new/head", "runs/head/", "no where::head"])
@pytest.mark.parametrize("kind", [JetSpecDraftHead, JetSpecConfig])
def test_a_mistyped_folder_is_called_one(kind: type, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no folder '{name.partition('::')[0]}', and a Hub id it is not"):
        kind.from_pretrained(name)


ORGANISATIONS = ["hao-ai-lab", "JetSpec"]


@pytest.fixture
def fake_hub(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A Hub that knows `jetspec-qwen3-8b` of one organisation; what it answers to all else is chosen."""

    def fake(organisation: str, error: type[Exception]) -> list[str]:
        asked: list[str] = []
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / f"models--{organisation}--jetspec-qwen3-8b"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs/main").write_text(commit)
        shutil.copytree(golden / "head_causal", repo / "snapshots" / commit)

        def download(repo_id: str, filename: str, **kwargs: object) -> None:
            asked.append(repo_id)
            kind = EntryNotFoundError if repo_id == f"{organisation}/jetspec-qwen3-8b" else error
            if kind is error or not (repo / "snapshots" / commit / filename).exists():
                raise kind("no", response=MagicMock()) if issubclass(kind, HfHubHTTPError) else kind("no")

        monkeypatch.setattr(hub, "hf_hub_download", download)
        return asked

    return fake


@pytest.mark.parametrize("known", ORGANISATIONS)
def test_a_head_is_found_in_the_other_organisation(
    fake_hub: Callable, golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, known: str
) -> None:
    fake_hub(known, RepositoryNotFoundError)
    weights = load_file(golden / "head_causal/model.safetensors")
    for organisation in ORGANISATIONS:
        caplog.clear()
        head = JetSpecDraftHead.from_pretrained(f"{organisation}/jetspec-qwen3-8b", cache_dir=tmp_path)
        assert torch.equal(head.fc.weight, weights["fc.weight"])
        told = [record.message for record in caplog.records if "same heads" in record.message]
        assert len(told) == (organisation != known)
        assert organisation == known or f"'{organisation}/jetspec-qwen3-8b'; loading '{known}/" in told[0]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, GatedRepoError, HfHubHTTPError])
def test_the_other_organisation_is_not_asked_for_any_other_reason(
    fake_hub: Callable, tmp_path: Path, error: type[Exception]
) -> None:
    asked = fake_hub("JetSpec", error)
    with pytest.raises(OSError, match=r"."):
        JetSpecDraftHead.from_pretrained("hao-ai-lab/jetspec-qwen3-8b", cache_dir=tmp_path)
    assert set(asked) == {"hao-ai-lab/jetspec-qwen3-8b"}


def test_a_head_that_neither_has_is_not_found(fake_hub: Callable, tmp_path: Path) -> None:
    asked = fake_hub("JetSpec", RepositoryNotFoundError)
    for name in ("hao-ai-lab/other", "someone/jetspec-qwen3-8b"):
        with pytest.raises(OSError, match="is not a local folder and is not a valid model identifier"):
            JetSpecDraftHead.from_pretrained(name, cache_dir=tmp_path)
    assert set(asked) == {"hao-ai-lab/other", "JetSpec/other", "someone/jetspec-qwen3-8b"}
