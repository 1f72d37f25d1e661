"""Where training texts come from: files and Hub data sets, read whole or as a stream."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from ..files.json_lines import read_rows
from .data import answers_of, encode
from .messages import Prompt, as_messages, is_complete

logger = logging.getLogger(__name__)
# Names under which published sets keep conversations, and the two sides of an exchange.
_MESSAGES_COLUMNS = ("messages", "conversations")
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "problem")
_RESPONSE_COLUMNS = ("response", "answer", "completion", "output", "solution")
_IDS_COLUMN = "response_ids"  # a response as the target's own tokens, which `jetspec regenerate` writes


def load_rows(sources: Sequence[str | Path], *, streaming: bool = False) -> Dataset | IterableDataset:
    """Read conversations and plain text.

    Args:
        sources (`Sequence[str | Path]`):
            JSON-lines files (`.jsonl`, `.jsonl.gz`), Parquet files, or Hub data set ids such as `openai/gsm8k`, with a
            configuration `openai/gsm8k:main`, with a split other than `train` `openai/gsm8k:main:test`. A source listed
            twice counts double.
        streaming (`bool`, *optional*, defaults to `False`): read while training, without a copy on disk.

    Returns:
        `Dataset` or, streaming, `IterableDataset`: what each source has of the columns `messages`, `prompt`, `response`
        and `response_ids` (its tokens), or `text`, in the order of `sources`. A prompt or response is a string or a
        list of messages.

    Raises:
        ValueError: if a source has none of these columns, or holds no row.
    """
    return concatenate_datasets([_load(str(source), streaming, needs_response=True) for source in sources])


def load_prompts(sources: Sequence[str | Path]) -> list[Prompt]:
    """Read prompts alone, each once, in the order of `sources`.

    As [`load_rows`], but responses may be missing. The prompt of `messages` is all before the last assistant turn. Rows
    without a prompt are left out, and it is said how many.

    Raises:
        ValueError: if a source has no column for prompts or holds no row, a row is neither words nor messages, or none
            has a prompt.
    """
    prompts, num_empty = {}, 0
    for source in map(str, sources):
        for index, row in enumerate(_load(source, streaming=False, needs_response=False)):
            if "text" in row:
                raise ValueError(f"{source!r} holds plain text, which the target cannot answer; train on it as it is.")
            with _naming_row(source, index):
                prompt = _prompt_of(row)
            if prompt.strip() if isinstance(prompt, str) else is_complete(prompt):
                prompts[prompt if isinstance(prompt, str) else json.dumps(prompt)] = prompt
            else:
                num_empty += 1
    if num_empty:
        logger.warning(f"{num_empty} rows left out without a prompt")
    if not prompts:
        raise ValueError("No row has a prompt; check the data.")
    return list(prompts.values())


def _prompt_of(row: dict[str, Any]) -> Prompt:
    if "messages" in row:
        return _before_last_answer(as_messages(row["messages"], None))
    return row["prompt"] if isinstance(row["prompt"], str) else as_messages(row["prompt"], "user")


@contextmanager
def _naming_row(source: str, index: int) -> Iterator[None]:
    """Say in which row an error is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Row {index + 1} of {source!r}: {error}") from error


def _load(source: str, streaming: bool, *, needs_response: bool) -> Dataset | IterableDataset:
    _check_file(source)
    with _naming_source(source):
        rows = _open(source, streaming)
        first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{source!r} holds no rows; pass a file or data set with at least one.")
    columns = _find_columns(list(first), source, needs_response)
    rows = rows.select_columns(list(columns))
    return rows.rename_columns({old: new for old, new in columns.items() if old != new})


def _has_lines(source: str) -> bool:
    return Path(source).is_file() and source.endswith((".jsonl", ".jsonl.gz"))


def _check_file(source: str) -> None:
    """Refuse a file of a kind that we do not read, or whose first line is not what it should be."""
    if Path(source).is_file() and ".json" not in source and not source.endswith(".parquet"):
        raise ValueError(f"{source!r} is neither a JSON-lines file (.jsonl, .jsonl.gz) nor a Parquet file (.parquet).")
    # The reader of `datasets` may crash on a null in the first line.
    if _has_lines(source) and next(read_rows(source), None) is None:
        raise ValueError(f"{source!r} is empty; pass a file or data set with at least one row.")


@contextmanager
def _naming_source(source: str) -> Iterator[None]:
    """Say which source an error of `datasets` is about, and which line of it."""
    try:
        yield
    except (DatasetsError, ValueError) as error:
        if _has_lines(source):
            for _ in read_rows(source):
                pass
        raise ValueError(f"{source!r} cannot be read: {error.__cause__ or error}") from error


def _open(source: str, streaming: bool) -> Dataset | IterableDataset:
    if ".json" in source or source.endswith(".parquet"):
        kind = "parquet" if source.endswith(".parquet") else "json"
        return load_dataset(kind, data_files=source, split="train", streaming=streaming)
    repo, _, rest = source.partition(":")
    name, _, split = rest.partition(":")
    return load_dataset(repo, name or None, split=split or "train", streaming=streaming)


def _find_columns(found: list[str], source: str, needs_response: bool) -> dict[str, str]:
    """The columns to read, and what we call them."""
    messages = next((name for name in _MESSAGES_COLUMNS if name in found), None)
    if messages is not None:
        return {messages: "messages"}
    prompt = next((name for name in _PROMPT_COLUMNS if name in found), None)
    response = next((name for name in _RESPONSE_COLUMNS if name in found), None)
    if prompt is not None and not needs_response:
        return {prompt: "prompt"}
    if prompt is not None and response is not None:
        ids = {_IDS_COLUMN: _IDS_COLUMN} if _IDS_COLUMN in found else {}
        return {prompt: "prompt", response: "response", **ids}
    if prompt is None and "text" in found:
        return {"text": "text"}
    raise ValueError(
        f"{source!r} has the columns {found}; it needs `messages`, `text`, or one of {', '.join(_PROMPT_COLUMNS)}"
        + (f" with one of {', '.join(_RESPONSE_COLUMNS)}." if needs_response else ".")
    )


def _before_last_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = [i for i, turn in enumerate(messages) if turn.get("role") == "assistant"]
    return messages[: answers[-1]] if answers else messages


def load_texts(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str | Path],
    *,
    max_length: int,
    streaming: bool = False,
    enable_thinking: bool = False,
) -> Dataset | IterableDataset:
    """Read and encode sources, leave out what has no answer to learn from, and say how much was lost.

    See [`load_rows`] and [`~jetspec_hf.training.data.encode`] for the arguments, the columns and further errors.

    Raises:
        ValueError: if nothing is left to learn from; streaming, when the stream has ended. If a row cannot be encoded;
            its source and number are named.
    """
    encode_row = partial(encode, tokenizer, max_length=max_length, enable_thinking=enable_thinking)
    rows = concatenate_datasets([_encode_source(str(source), streaming, encode_row) for source in sources])
    tally = _Tally(max_length, is_stream=streaming)
    if streaming:
        rows = rows.filter(tally.keeps)
    else:
        rows = rows.select([i for i, row in enumerate(rows) if tally.keeps(row)])
        tally.say()
    return rows.select_columns(["input_ids", "loss_mask", "length"])


def _encode_source(
    source: str, streaming: bool, encode_row: Callable[[dict[str, Any]], dict[str, Any]]
) -> Dataset | IterableDataset:
    rows = _load(source, streaming, needs_response=True)

    def encode_named(row: dict[str, Any], index: int) -> dict[str, Any]:
        with _naming_row(source, index):
            return encode_row(row)

    return rows.map(encode_named, with_indices=True, remove_columns=list(next(iter(rows))))


class _Tally:
    """What became of the texts; said now and then, since a stream does not say when it ends."""

    def __init__(self, max_length: int, *, is_stream: bool) -> None:
        self.max_length, self.is_stream = max_length, is_stream
        self.num_read = self.num_kept = self.num_cut = self.num_rewritten = 0

    def keeps(self, row: dict[str, Any]) -> bool:
        """Count a row of [`~jetspec_hf.training.data.encode`], and tell whether there is anything to learn from it."""
        is_useful = bool(answers_of(row))
        self.num_read += 1
        self.num_kept += is_useful
        self.num_cut += row["is_cut"]
        self.num_rewritten += row["num_rewritten"]
        if self.num_read >= 1024 and self.num_read.bit_count() == 1 and self.is_stream:
            self.say()
        return is_useful

    def say(self) -> None:
        """Log the counts, as a warning where something is lost.

        Raises:
            ValueError: if nothing was kept.
        """
        lost = {
            f"cut to {self.max_length} tokens": self.num_cut,
            "left out without an answer to learn from": self.num_read - self.num_kept,
            "earlier answers left out since the chat template rewrites them": self.num_rewritten,
        }
        kept = f"{self.num_kept} texts" + (" so far, repeats counted" if self.is_stream else "")
        said = "; ".join([kept, *(f"{count} {what}" for what, count in lost.items() if count)])
        logger.log(logging.WARNING if any(lost.values()) else logging.INFO, said)
        if self.num_kept == 0:
            raise ValueError("No text has an answer within `max_length`; raise it, or check the data.")
