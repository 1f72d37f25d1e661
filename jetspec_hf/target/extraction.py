"""Extraction: what a target says about finished texts, written down to train a head without it."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files.records import check_same, digest_of, read_record, write_whole
from .digest import digest_of_target
from .reading import read_target
from .spec import input_device
from .stored import EMBEDDINGS, MANIFEST, RECORDED, bytes_of, sha256_of

_SETTINGS = ("target", "texts", "num_texts", "layer_ids", "pad_token_id")


def check_states_folder(folder: str | Path) -> None:
    """Refuse a folder that [`extract`] would not write to, before anything is loaded.

    Raises:
        ValueError: if it holds a file that `extract` would write over and did not make.
    """
    _read_manifest(Path(folder))


def extract(
    target: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    folder: str | Path,
    *,
    layer_ids: list[int],
    pad_token_id: int,
    shard_bytes: int = 1 << 30,
) -> None:
    """Write the hidden states that a head learns from, in shards; a stopped run goes on after its last whole shard.

    A token takes `(taps + 1) * hidden` numbers of the target's type: 48 KiB for Qwen3-8B in bfloat16 with five taps.

    Args:
        target (`PreTrainedModel`): the target, on one device or several.
        texts (`Sequence[Sequence[int]]`): token ids of each text, one document each.
        folder (`str` or `Path`): gets shards, a manifest, and the target's configuration, embedding and LM head.
        layer_ids (`list[int]`): decoder layers to tap, as in the `target_layer_ids` of the head.
        pad_token_id (`int`): the token that batches will be padded with.
        shard_bytes (`int`, *optional*, defaults to 1 GiB): least bytes of a shard but the last.

    Raises:
        ValueError: if `folder` holds states of other texts or another target, or files of the same names that are none,
            which stay as they are, or the target's embedding or LM head is more than its weights.
    """
    folder = Path(folder)
    settings = {
        "target": digest_of_target(target),
        "texts": digest_of(bytes_of(text) for text in texts),
        "num_texts": len(texts),
        "layer_ids": layer_ids,
        "pad_token_id": pad_token_id,
    }
    embeddings = _embeddings_of(target)
    manifest = _open_manifest(folder, settings)
    if not manifest["shards"]:
        target.config.save_pretrained(folder)
        manifest["ends"] = _save(embeddings, folder / EMBEDDINGS)
    done = sum(shard["num_texts"] for shard in manifest["shards"])
    todo = tqdm(range(done, len(texts)), total=len(texts), initial=done, desc="hidden states", unit="text")
    for columns in _read_shards(target, (texts[i] for i in todo), layer_ids, shard_bytes):
        file = f"shard-{len(manifest['shards']):05}.safetensors"
        digest = _save(columns, folder / file)
        manifest["shards"].append({"file": file, "num_texts": len(columns["lengths"]), "sha256": digest})
        _write_manifest(folder, manifest)


def _read_shards(
    target: PreTrainedModel, texts: Iterable[Sequence[int]], layer_ids: list[int], shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """The columns of one shard after the other."""
    pending: list[dict[str, Tensor]] = []
    num_bytes = 0
    for text in texts:
        ids = torch.tensor([list(text)], device=input_device(target))
        states = read_target(target, ids, layer_ids)
        pending.append({name: part[0].cpu() for name, part in {"input_ids": ids, **states._asdict()}.items()})
        num_bytes += sum(part.nbytes for part in pending[-1].values())
        if num_bytes >= shard_bytes:
            yield _joined(pending)
            pending, num_bytes = [], 0
    if pending:
        yield _joined(pending)


def _joined(texts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    columns = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
    return columns | {"lengths": torch.tensor([len(text["input_ids"]) for text in texts])}


def _embeddings_of(target: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of embedding and LM head; a tied LM head is the embedding."""
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or embedding.weight.is_meta:
        raise ValueError(
            f"The target's embedding and LM head are {type(embedding).__name__} and {type(head).__name__}; only a "
            "plain `Embedding` and `Linear` that are in memory can be stored. Train with the target itself."
        )
    weights = {"embedding": embedding.weight}
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        weights["lm_head"] = head.weight
    if head.bias is not None:
        weights["bias"] = head.bias
    return weights


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    files = [folder / name for name in ("config.json", EMBEDDINGS)]
    return read_record(folder / MANIFEST, RECORDED, [*files, *folder.glob("shard-*.safetensors")])


def _open_manifest(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """That of an earlier run, or a new one."""
    manifest = _read_manifest(folder)
    if manifest is None:
        folder.mkdir(parents=True, exist_ok=True)
        manifest = settings | {"shards": []}
        _write_manifest(folder, manifest)
    check_same({name: manifest[name] for name in _SETTINGS}, settings, folder)
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode())


def _save(tensors: dict[str, Tensor], path: Path) -> str:
    """Write a file that is either whole or not there; its sha256."""
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
    os.replace(unfinished, path)
    return sha256_of(path)
