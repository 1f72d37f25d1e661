"""Chat examples: read prompts and responses, and turn them into token ids with a loss mask."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Names under which published sets keep the two sides of an exchange.
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "problem")
_RESPONSE_COLUMNS = ("response", "answer", "completion", "output", "solution")


class Batch(NamedTuple):
    """Examples padded on the right to one length."""

    input_ids: Tensor  # (batch, length)
    attention_mask: Tensor  # (batch, length), 1 on real tokens
    loss_mask: Tensor  # (batch, length), true on the tokens that the target answered


def load_pairs(sources: Sequence[str | Path]) -> Dataset:
    """Read prompts with their responses.

    Args:
        sources (`Sequence[str | Path]`):
            JSON-lines files (`.jsonl`, `.jsonl.gz`) or Hub data set ids, such as `openai/gsm8k` or
            `openai/gsm8k:main` with a configuration name. A source listed twice counts double.

    Returns:
        `Dataset`: the string columns `prompt` and `response`, in the order of `sources`.

    Raises:
        ValueError: if a source has no column for prompts or none for responses, or holds no row.
    """
    return _load(sources, {"prompt": _PROMPT_COLUMNS, "response": _RESPONSE_COLUMNS})


def load_prompts(sources: Sequence[str | Path]) -> list[str]:
    """Read prompts alone; as [`load_pairs`], but the sources need no responses."""
    return list(_load(sources, {"prompt": _PROMPT_COLUMNS})["prompt"])


def _load(sources: Sequence[str | Path], wanted: dict[str, Sequence[str]]) -> Dataset:
    parts = []
    for source in map(str, sources):
        if Path(source).is_file() and Path(source).stat().st_size == 0:
            raise ValueError(f"{source!r} is empty; pass a file or data set with at least one row.")
        if ".json" in source:
            rows = load_dataset("json", data_files=source, split="train")
        else:
            repo, _, name = source.partition(":")
            rows = load_dataset(repo, name or None, split="train")
        columns = {name: _find_column(rows, spellings, source) for name, spellings in wanted.items()}
        if len(rows) == 0:
            raise ValueError(f"{source!r} holds no rows; pass a file or data set with at least one.")
        rows = rows.select_columns(list(columns.values()))
        parts.append(rows.rename_columns({old: new for new, old in columns.items() if old != new}))
    return concatenate_datasets(parts)


def _find_column(rows: Dataset, names: Sequence[str], source: str) -> str:
    found = next((name for name in names if name in rows.column_names), None)
    if found is None:
        raise ValueError(f"{source!r} has the columns {rows.column_names}; rename one to any of {', '.join(names)}.")
    return found


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of one user turn under the chat template, up to where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, *, max_length: int) -> dict[str, Any]:
    """Token ids of one exchange, ended by the end-of-sequence token, cut to `max_length` tokens.

    Returns:
        `dict`: `input_ids`, `loss_mask` (1 on the response and its end token), and `length` in tokens.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    input_ids = (prompt_ids + response_ids)[:max_length]
    loss_mask = ([0] * len(prompt_ids) + [1] * len(response_ids))[:max_length]
    return {"input_ids": input_ids, "loss_mask": loss_mask, "length": len(input_ids)}


def text_of(row: dict[str, Any]) -> tuple[list[int], int]:
    """Token ids of an encoded row, and how many of them come before the answer."""
    return list(row["input_ids"]), list(row["loss_mask"]).index(1)


def find_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """A token that never occurs in text, whose embedding can stand for what is to be predicted.

    The tokenizer's own mask token, else the first row of the target's embedding that no token uses.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's tokenizer.
        vocab_size (`int`): rows of the target's embedding.

    Raises:
        ValueError: if every row is in use.
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    raise ValueError(
        f"All {vocab_size} rows of the target's embedding are in use, so none can mark what is to be predicted; "
        "pass as `mask_token_id` the id of a token that does not occur in your texts, never padding or end of sequence."
    )


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> Batch:
    """Pad encoded examples on the right to the longest of them."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return Batch(
        input_ids=torch.tensor([pad(row["input_ids"], pad_token_id) for row in rows]),
        attention_mask=torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        loss_mask=torch.tensor([pad(row["loss_mask"], 0) for row in rows]).bool(),
    )


@torch.no_grad()
def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    output: str | Path,
    *,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
) -> None:
    """Write the target's own greedy answers, to train a head on: on foreign answers it learns half as much.

    A run that was stopped at any moment goes on where it was when called again with the same prompts; no row is lost or
    doubled.

    Args:
        target (`PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[str]`): user turns.
        output (`str` or `Path`): JSON lines of `index`, `prompt` and `response`, shortest prompts first.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer in tokens.
        batch_size (`int`, *optional*, defaults to 16): prompts at once, padded on the left.

    Raises:
        ValueError: if `output` holds answers to other prompts.
    """
    output = Path(output)
    done = _rows_done(output, prompts)
    todo = [(encode_prompt(tokenizer, prompt), index) for index, prompt in enumerate(prompts) if index not in done]
    todo.sort(key=lambda one: len(one[0]))
    with output.open("a") as file, tqdm(total=len(prompts), initial=len(done), desc="answers", unit="row") as progress:
        for start in range(0, len(todo), batch_size):
            chunk = todo[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [ids for ids, _ in chunk]}, padding_side="left", return_tensors="pt")
            outputs = target.generate(**inputs.to(target.device), max_new_tokens=max_new_tokens, do_sample=False)
            answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for (_, index), answer in zip(chunk, answers, strict=True):
                file.write(json.dumps({"index": index, "prompt": prompts[index], "response": answer}) + "\n")
            file.flush()
            progress.update(len(chunk))


def _rows_done(output: Path, prompts: Sequence[str]) -> set[int]:
    """The prompts that `output` answers already; a half-written last row is cut off."""
    if not output.exists():
        return set()
    text = output.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(output, whole)
    rows = [json.loads(line) for line in text[:whole].splitlines()]
    for row in rows:
        if not 0 <= row["index"] < len(prompts) or prompts[row["index"]] != row["prompt"]:
            raise ValueError(
                f"{str(output)!r} answers {row['prompt']!r}, which is not prompt {row['index']} of this run; "
                "write to another file."
            )
    return {row["index"] for row in rows}
