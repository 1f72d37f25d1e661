"""Where training texts come from: files and Hub data sets, read whole or as a stream."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from .data import Prompt, as_messages, encode, texts_of

# Names under which published sets keep the two sides of an exchange.
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "problem")
_RESPONSE_COLUMNS = ("response", "answer", "completion", "output", "solution")


def load_rows(sources: Sequence[str | Path], *, streaming: bool = False) -> Dataset | IterableDataset:
    """Read conversations and plain text.

    Args:
        sources (`Sequence[str | Path]`):
            JSON-lines files (`.jsonl`, `.jsonl.gz`), Parquet files, or Hub data set ids such as `openai/gsm8k`, with a
            configuration `openai/gsm8k:main`, with a split other than `train` `openai/gsm8k:main:test`. A source listed
            twice counts double.
        streaming (`bool`, *optional*, defaults to `False`): read while training, without a copy on disk.

    Returns:
        `Dataset` or, streaming, `IterableDataset`: what each source has of the columns `messages`, `prompt` and
        `response`, or `text`, in the order of `sources`. A prompt or response is a string or a list of messages.

    Raises:
        ValueError: if a source has none of these columns, or holds no row.
    """
    return concatenate_datasets([_load(str(source), streaming, needs_response=True) for source in sources])


def load_prompts(sources: Sequence[str | Path]) -> list[Prompt]:
    """Read prompts alone, each once, in the order of `sources`.

    As [`load_rows`], but responses may be missing. The prompt of `messages` is all before the last assistant turn.

    Raises:
        ValueError: if a source has no column for prompts, or holds no row.
    """
    prompts = {}
    for source in map(str, sources):
        for row in _load(source, streaming=False, needs_response=False):
            if "text" in row:
                raise ValueError(f"{source!r} holds plain text, which the target cannot answer; train on it as it is.")
            prompt = _before_last_answer(row["messages"]) if "messages" in row else row["prompt"]
            prompt = prompt if isinstance(prompt, str) else as_messages(prompt, "user")
            prompts[prompt if isinstance(prompt, str) else json.dumps(prompt)] = prompt
    return list(prompts.values())


def _load(source: str, streaming: bool, *, needs_response: bool) -> Dataset | IterableDataset:
    if Path(source).is_file() and Path(source).stat().st_size == 0:
        raise ValueError(f"{source!r} is empty; pass a file or data set with at least one row.")
    if ".json" in source or source.endswith(".parquet"):
        kind = "parquet" if source.endswith(".parquet") else "json"
        rows = load_dataset(kind, data_files=source, split="train", streaming=streaming)
    else:
        repo, _, rest = source.partition(":")
        name, _, split = rest.partition(":")
        rows = load_dataset(repo, name or None, split=split or "train", streaming=streaming)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{source!r} holds no rows; pass a file or data set with at least one.")
    columns = _find_columns(list(first), source, needs_response)
    rows = rows.select_columns(list(columns))
    return rows.rename_columns({old: new for old, new in columns.items() if old != new})


def _find_columns(found: list[str], source: str, needs_response: bool) -> dict[str, str]:
    """The columns to read, and what we call them."""
    if "messages" in found:
        return {"messages": "messages"}
    prompt = next((name for name in _PROMPT_COLUMNS if name in found), None)
    response = next((name for name in _RESPONSE_COLUMNS if name in found), None)
    if prompt is not None and not needs_response:
        return {prompt: "prompt"}
    if prompt is not None and response is not None:
        return {prompt: "prompt", response: "response"}
    if prompt is None and "text" in found:
        return {"text": "text"}
    raise ValueError(
        f"{source!r} has the columns {found}; it needs `messages`, `text`, or one of {', '.join(_PROMPT_COLUMNS)}"
        + (f" with one of {', '.join(_RESPONSE_COLUMNS)}." if needs_response else ".")
    )


def _before_last_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
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

    See [`load_rows`] and [`~jetspec_hf.data.encode`] for the arguments, the columns and further errors.

    Raises:
        ValueError: if nothing is left to learn from; streaming, when the stream has ended.
    """
    rows = load_rows(sources, streaming=streaming)
    rows = rows.map(
        lambda row: encode(tokenizer, row, max_length=max_length, enable_thinking=enable_thinking),
        remove_columns=rows.column_names,
    )
    tally = _Tally(max_length, is_stream=streaming)
    if streaming:
        rows = rows.filter(tally.keeps)
    else:
        rows = rows.select([i for i, row in enumerate(rows) if tally.keeps(row)])
        tally.say()
    return rows.select_columns(["input_ids", "loss_mask", "length"])


class _Tally:
    """What became of the texts; said now and then, since a stream does not say when it ends."""

    def __init__(self, max_length: int, *, is_stream: bool) -> None:
        self.max_length, self.is_stream = max_length, is_stream
        self.num_read = self.num_kept = self.num_cut = self.num_rewritten = 0

    def keeps(self, row: dict[str, Any]) -> bool:
        """Count a row of [`~jetspec_hf.data.encode`], and tell whether there is anything to learn from it."""
        is_useful = bool(texts_of(row))
        self.num_read += 1
        self.num_kept += is_useful
        self.num_cut += row["is_cut"]
        self.num_rewritten += row["num_rewritten"]
        if self.num_read >= 1024 and self.num_read.bit_count() == 1 and self.is_stream:
            self.say()
        return is_useful

    def say(self) -> None:
        """Print the counts.

        Raises:
            ValueError: if nothing was kept.
        """
        lost = {
            f"cut to {self.max_length} tokens": self.num_cut,
            "left out without an answer to learn from": self.num_read - self.num_kept,
            "earlier answers left out since the chat template rewrites them": self.num_rewritten,
        }
        kept = f"{self.num_kept} texts" + (" so far, repeats counted" if self.is_stream else "")
        print("; ".join([kept, *(f"{count} {what}" for what, count in lost.items() if count)]))
        if self.num_kept == 0:
            raise ValueError("No text has an answer within `max_length`; raise it, or check the data.")
