"""Stored targets: what [`~jetspec_hf.target.extraction.extract`] wrote down of a target, read in its place."""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cmp_to_key
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig

from ..files.records import find_record
from .reading import TargetStates

MANIFEST = "manifest.json"
EMBEDDINGS = "ends.safetensors"  # the target's embedding and LM head
RECORDED = ("target", "texts", "num_texts", "layer_ids", "pad_token_id", "shards")


class StoredTarget(nn.Module):
    """Stands in for a target wherever only texts that were extracted are read: in the trainer and in evaluation.

    It is a [`~jetspec_hf.target.reading.TargetReader`].

    Args:
        folder (`str` or `Path`): what [`~jetspec_hf.target.extraction.extract`] wrote; every file is checked once.

    Raises:
        ValueError: if the states are not complete, or a file is missing, short or corrupted.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        folder = Path(folder)
        manifest = _read_complete(folder)
        files = {EMBEDDINGS: manifest["ends"]} | {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
        for name, digest in tqdm(files.items(), desc="checking", unit="file"):
            _check(folder / name, digest)
        self.config = AutoConfig.from_pretrained(folder)
        weights = load_file(folder / EMBEDDINGS)
        self._embedding = nn.Embedding.from_pretrained(weights["embedding"])
        self._lm_head = _linear(weights.get("lm_head", weights["embedding"]), weights.get("bias"))
        self._layer_ids: list[int] = manifest["layer_ids"]
        self._pad_token_id: int = manifest["pad_token_id"]
        self._shards = [safe_open(folder / shard["file"], framework="pt") for shard in manifest["shards"]]
        self._index = _Index(self._shards)
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

    def read(self, input_ids: Tensor, layer_ids: list[int], position_ids: Tensor | None = None) -> TargetStates:
        """As [`~jetspec_hf.target.reading.read_target`] says; 0 on padding.

        Raises:
            ValueError: for a text, or a layer, whose states are not stored.
        """
        unknown = [layer for layer in layer_ids if layer not in self._layer_ids]
        if unknown:
            raise ValueError(
                f"No states are stored after layer {unknown[0]}, only after {self._layer_ids}; train a head that taps "
                "these layers, or extract again."
            )
        columns = torch.tensor([self._layer_ids.index(layer) for layer in layer_ids], dtype=torch.long)
        documents = [self._read_document(ids) for ids in _documents(input_ids.cpu(), position_ids)]
        taps, last_hidden = (torch.cat(states).unflatten(0, input_ids.shape) for states in zip(*documents, strict=True))
        taps = taps.unflatten(-1, (len(self._layer_ids), -1)).index_select(-2, columns).flatten(-2)
        return TargetStates(taps.to(input_ids.device), last_hidden.to(input_ids.device))

    def _read_document(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Taps of all layers, `(tokens, taps * hidden)`, and last hidden states, `(tokens, hidden)`, of one text."""
        place, length = self._find(ids)
        padding = (0, 0, 0, len(ids) - length)
        slices = (self._shards[place.shard].get_slice(name) for name in ("taps", "last_hidden"))
        taps, last_hidden = (nn.functional.pad(one[place.start : place.start + length], padding) for one in slices)
        return taps, last_hidden

    def _find(self, ids: Tensor) -> tuple["_Place", int]:
        """Where a text is that may be padded, and its own length."""
        length = len(ids)
        while length > 1 and ids[length - 1] == self._pad_token_id:
            length -= 1
        # Padding may be the token that ends texts, so one of it may belong to the text.
        for end in (min(length + 1, len(ids)), length):
            place = self._index.find(ids[:end])
            if place is not None:
                return place, end
        raise ValueError(
            f"No states are stored of a text of {length} tokens that begins with {ids[:8].tolist()}; extract them from "
            "the data that you train on, with the same `max_length`."
        )


class _Place(NamedTuple):
    """Where a text is stored."""

    shard: int
    start: int
    length: int


class _Index:
    """Finds a text, or one that begins with it, among all texts; their tokens stay in the files.

    The places are in the order of the texts, as words in a dictionary.
    """

    def __init__(self, shards: list[Any]) -> None:
        self._ids = [shard.get_tensor("input_ids").numpy() for shard in shards]  # mapped from the files
        places = [place for number, shard in enumerate(shards) for place in _places_in(shard, number)]
        self._places = sorted(places, key=cmp_to_key(self._compare))

    def find(self, ids: Tensor) -> _Place | None:
        text = bytes_of(ids)
        first = bisect_left(self._places, text, key=self._text)
        is_found = first < len(self._places) and self._text(self._places[first]).startswith(text)
        return self._places[first] if is_found else None

    def _text(self, place: _Place) -> bytes:
        return _as_bytes(self._ids[place.shard][place.start : place.start + place.length])

    def _compare(self, one: _Place, other: _Place) -> int:
        ours, theirs = self._text(one), self._text(other)
        return (ours > theirs) - (ours < theirs)


def _places_in(shard: Any, number: int) -> Iterator[_Place]:
    start = 0
    for length in shard.get_tensor("lengths").tolist():
        yield _Place(number, start, length)
        start += length


def bytes_of(ids: Tensor | Sequence[int]) -> bytes:
    """Token ids as bytes, four for each, which sort as they do."""
    return _as_bytes(torch.as_tensor(ids).numpy())


def _as_bytes(ids: Any) -> bytes:
    return ids.astype(">u4").tobytes()


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _documents(input_ids: Tensor, position_ids: Tensor | None) -> Iterator[Tensor]:
    """The documents of each row, `(tokens,)`; the last of a row has the padding."""
    for i, ids in enumerate(input_ids):
        starts = [0] if position_ids is None else (position_ids[i] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[start:end]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear map that has these very weights."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
    return linear


def _read_complete(folder: Path) -> dict[str, Any]:
    """The manifest of an extraction that has come to its end."""
    manifest = find_record(folder / MANIFEST, RECORDED)
    if manifest is None:
        raise ValueError(
            f"{str(folder)!r} has no {MANIFEST} of hidden states; write the states with `jetspec extract` first."
        )
    found = sum(shard["num_texts"] for shard in manifest["shards"])
    if found != manifest["num_texts"]:
        raise ValueError(
            f"{str(folder)!r} holds {found} of {manifest['num_texts']} texts; "
            "call the same `jetspec extract` again to complete it."
        )
    return manifest


def _check(path: Path, digest: str) -> None:
    if not path.exists():
        raise ValueError(f"{str(path)!r} is missing; copy it again, or extract into another folder.")
    found = sha256_of(path)
    if found != digest:
        raise ValueError(
            f"{str(path)!r} is corrupted or short: its sha256 is {found[:12]}… and should be {digest[:12]}…; "
            "copy it again, or extract into another folder."
        )
