"""Stored hidden states: what a target says about finished texts, to train a head without it."""

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .records import check_same, digest_of, digest_of_target, find_record, read_record, write_whole
from .taps import HiddenStateTaps

_MANIFEST, _ENDS = "manifest.json", "ends.safetensors"
_SETTINGS = ("target", "texts", "num_texts", "layer_ids", "pad_token_id")
_RECORDED = (*_SETTINGS, "shards")


def check_states_folder(folder: str | Path) -> None:
    """Refuse a folder that [`extract`] would not write to, before anything is loaded.

    Raises:
        ValueError: if it holds a file that `extract` would write over and did not make.
    """
    _read_manifest(Path(folder))


@torch.no_grad()
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
        "texts": digest_of(_key(text) for text in texts),
        "num_texts": len(texts),
        "layer_ids": layer_ids,
        "pad_token_id": pad_token_id,
    }
    ends = _ends_of(target)
    manifest = _open_manifest(folder, settings)
    if not manifest["shards"]:
        target.config.save_pretrained(folder)
        manifest["ends"] = _save(ends, folder / _ENDS)
    done = sum(shard["num_texts"] for shard in manifest["shards"])
    pending: list[tuple[Tensor, Tensor, Tensor]] = []
    num_bytes = 0
    for i in tqdm(range(done, len(texts)), total=len(texts), initial=done, desc="hidden states", unit="text"):
        ids = torch.tensor([list(texts[i])], device=target.device)
        with HiddenStateTaps(target, layer_ids) as tapped, tapped.recording():
            outputs = target.get_decoder()(input_ids=ids, use_cache=False)
        pending.append((ids[0].cpu(), tapped.take()[0].cpu(), outputs.last_hidden_state[0].cpu()))
        num_bytes += sum(part.nbytes for part in pending[-1])
        if i + 1 == len(texts) or num_bytes >= shard_bytes:
            ids, taps, last_hidden = map(torch.cat, zip(*pending, strict=True))
            columns = {"input_ids": ids, "taps": taps, "last_hidden": last_hidden}
            columns["lengths"] = torch.tensor([len(one[0]) for one in pending])
            file = f"shard-{len(manifest['shards']):05}.safetensors"
            digest = _save(columns, folder / file)
            manifest["shards"].append({"file": file, "num_texts": len(pending), "sha256": digest})
            _write_manifest(folder, manifest)
            pending, num_bytes = [], 0


class StoredTarget(nn.Module):
    """Stands in for a target wherever only texts that [`extract`] has seen are read: in the trainer and in evaluation.

    Args:
        folder (`str` or `Path`): what [`extract`] wrote; every file is checked once.

    Raises:
        ValueError: if the states are not complete, or a file is missing, short or corrupted. In `forward` of its
            decoder: for a text, or a layer, whose states are not stored.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        folder = Path(folder)
        manifest = find_record(folder / _MANIFEST, _RECORDED)
        if manifest is None:
            raise ValueError(
                f"{str(folder)!r} has no {_MANIFEST} of hidden states; write the states with `jetspec extract` first."
            )
        found = sum(shard["num_texts"] for shard in manifest["shards"])
        if found != manifest["num_texts"]:
            raise ValueError(
                f"{str(folder)!r} holds {found} of {manifest['num_texts']} texts; "
                "call the same `jetspec extract` again to complete it."
            )
        files = {_ENDS: manifest["ends"]} | {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
        for name, digest in tqdm(files.items(), desc="checking", unit="file"):
            _check(folder / name, digest)
        self.config = AutoConfig.from_pretrained(folder)
        ends = load_file(folder / _ENDS)
        self._embedding = nn.Embedding.from_pretrained(ends["embedding"])
        head = ends.get("lm_head", ends["embedding"])
        self._lm_head = nn.Linear(head.shape[1], head.shape[0], bias="bias" in ends, device="meta")
        weights = {"weight": head} | ({"bias": ends["bias"]} if "bias" in ends else {})
        self._lm_head.load_state_dict(weights, assign=True)
        self._decoder = _StoredDecoder([folder / shard["file"] for shard in manifest["shards"]], manifest)
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the embedding is."""
        return self._embedding.weight.device

    def get_input_embeddings(self) -> nn.Module:
        """As in [`~transformers.PreTrainedModel`]."""
        return self._embedding

    def get_output_embeddings(self) -> nn.Module:
        """As in [`~transformers.PreTrainedModel`]."""
        return self._lm_head

    def get_decoder(self) -> nn.Module:
        """As in [`~transformers.PreTrainedModel`]; its layers only pass on what is stored."""
        return self._decoder


class _Layers(dict[int, nn.Module]):
    def __missing__(self, layer: int) -> nn.Module:
        raise ValueError(
            f"No states are stored after layer {layer}, only after {list(self)}; train a head that taps these layers, "
            "or extract again."
        )


class _StoredDecoder(nn.Module):
    def __init__(self, files: list[Path], manifest: dict[str, Any]) -> None:
        super().__init__()
        self.layers = _Layers({layer: nn.Identity() for layer in manifest["layer_ids"]})
        self._pad_token_id: int = manifest["pad_token_id"]
        self._shards = [safe_open(file, framework="pt") for file in files]
        # Every text with its place, sorted, so that a text that was cut is found by what it begins with.
        self._index = sorted(self._read_index())

    def _read_index(self) -> Iterator[tuple[bytes, int, int]]:
        for number, shard in enumerate(self._shards):
            start = 0
            for ids in shard.get_tensor("input_ids").split(shard.get_tensor("lengths").tolist()):
                yield _key(ids.tolist()), number, start
                start += len(ids)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> BaseModelOutput:
        """The states of each document in `input_ids`, `(batch, length)`; 0 on padding."""
        rows = []
        for i, ids in enumerate(input_ids.tolist()):
            starts = [0] if position_ids is None else (position_ids[i] == 0).nonzero().flatten().tolist()
            ends = [*starts[1:], len(ids)]
            rows.append(torch.cat([self._find(ids[start:end]) for start, end in zip(starts, ends, strict=True)]))
        states = torch.stack(rows).to(input_ids.device)
        *taps, last_hidden = states.chunk(len(self.layers) + 1, dim=-1)
        for layer, tap in zip(self.layers.values(), taps, strict=True):
            layer(tap)
        return BaseModelOutput(last_hidden_state=last_hidden)

    def _find(self, ids: list[int]) -> Tensor:
        """Taps and last hidden states of a text, `(tokens, (taps + 1) * hidden)`."""
        length = len(ids)
        while length > 1 and ids[length - 1] == self._pad_token_id:
            length -= 1
        # Padding may be the token that ends texts, so one of it may belong to the text.
        for end in (min(length + 1, len(ids)), length):
            key = _key(ids[:end])
            place = bisect_left(self._index, (key,))
            if place < len(self._index) and self._index[place][0].startswith(key):
                _, number, start = self._index[place]
                slices = (self._shards[number].get_slice(name) for name in ("taps", "last_hidden"))
                states = torch.cat([one[start : start + end] for one in slices], dim=-1)
                return nn.functional.pad(states, (0, 0, 0, len(ids) - end))
        raise ValueError(
            f"No states are stored of a text of {length} tokens that begins with {ids[:8]}; extract them from the data "
            "that you train on, with the same `max_length`."
        )


def _key(ids: Sequence[int]) -> bytes:
    return b"".join(token.to_bytes(4, "big") for token in ids)


def _ends_of(target: PreTrainedModel) -> dict[str, Tensor]:
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or embedding.weight.is_meta:
        raise ValueError(
            f"The target's embedding and LM head are {type(embedding).__name__} and {type(head).__name__}; only a "
            "plain `Embedding` and `Linear` that are in memory can be stored. Train with the target itself."
        )
    ends = {"embedding": embedding.weight}
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        ends["lm_head"] = head.weight
    if head.bias is not None:
        ends["bias"] = head.bias
    return ends


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    files = [folder / name for name in ("config.json", _ENDS)]
    return read_record(folder / _MANIFEST, _RECORDED, [*files, *folder.glob("shard-*.safetensors")])


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
    write_whole(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())


def _save(tensors: dict[str, Tensor], path: Path) -> str:
    """Write a file that is either whole or not there; its sha256."""
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
    os.replace(unfinished, path)
    return _sha256(path)


def _check(path: Path, digest: str) -> None:
    if not path.exists():
        raise ValueError(f"{str(path)!r} is missing; copy it again, or extract into another folder.")
    found = _sha256(path)
    if found != digest:
        raise ValueError(
            f"{str(path)!r} is corrupted or short: its sha256 is {found[:12]}… and should be {digest[:12]}…; "
            "copy it again, or extract into another folder."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
