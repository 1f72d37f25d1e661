"""The target's own answers, written down to train on."""

import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files.records import check_same, digest_of, read_own_rows, read_record, write_whole
from ..target.digest import digest_of_target
from .data import encode_prompt
from .messages import Prompt

logger = logging.getLogger(__name__)
_COLUMNS = {"index", "prompt", "response"}
_SETTINGS = ("target", "dtype", "chat_template", "generation_config", "enable_thinking", "max_new_tokens")


def check_answers(output: str | Path, sources: Sequence[str | Path]) -> None:
    """Refuse an `output` that [`regenerate`] would not write to, before anything is loaded.

    Args:
        output (`str` or `Path`): where the answers shall go.
        sources (`Sequence[str | Path]`):
            Where the prompts come from, as in [`~jetspec_hf.training.sources.load_prompts`].

    Raises:
        ValueError: if `output` is one of the sources, or holds what `regenerate` did not write.
    """
    output = Path(output)
    for source in (path for pattern in map(str, sources) for path in glob(pattern)):
        is_source = output.exists() and output.samefile(source)
        if is_source or Path(source).resolve() in output.resolve().parents:
            raise ValueError(f"{str(output)!r} is or belongs to the data {source!r}; write the answers elsewhere.")
    _read_answers(output)


@torch.no_grad()
def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    output: str | Path,
    *,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
    enable_thinking: bool = False,
) -> None:
    """Write the target's own greedy answers, to train a head on: on foreign answers it learns half as much.

    A run that was stopped at any moment goes on where it was when called again with the same prompts; no row is lost or
    doubled. What made the answers is recorded beside them, in the hidden file `.{name}.manifest`. How many answers were
    cut at `max_new_tokens` is logged at the end.

    Args:
        target (`PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[str | list[dict]]`): user turns, or messages to answer.
        output (`str` or `Path`):
            JSON lines of `index`, `prompt` and `response`, shortest prompts first. Its folder is made if missing.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer in tokens.
        batch_size (`int`, *optional*, defaults to 16): prompts at once, padded on the left.
        enable_thinking (`bool`, *optional*, defaults to `False`): what to tell the chat template.

    Raises:
        ValueError: if `output` holds anything else than answers to these prompts, or such that another target, chat
            template, generation configuration or length made. It stays as it is.
    """
    output = Path(output)
    settings = _settings_of(target, tokenizer, enable_thinking=enable_thinking, max_new_tokens=max_new_tokens)
    held, rows, num_bytes = _read_answers(output)
    if rows:
        check_same(held, settings, output)
    done = _indices_of(rows, prompts, output)
    encode = partial(encode_prompt, tokenizer, enable_thinking=enable_thinking)
    todo = [(encode(prompt), index) for index, prompt in enumerate(prompts) if index not in done]
    todo.sort(key=lambda one: len(one[0]))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(_record_of(output), json.dumps(settings, indent=2).encode())
    if output.exists():
        os.truncate(output, num_bytes)
    num_cut = 0
    with output.open("a") as file, tqdm(total=len(prompts), initial=len(done), desc="answers", unit="row") as progress:
        for start in range(0, len(todo), batch_size):
            encoded, indices = zip(*todo[start : start + batch_size], strict=True)
            answers, num_cut_here = _answer(target, tokenizer, encoded, max_new_tokens)
            for index, answer in zip(indices, answers, strict=True):
                file.write(json.dumps({"index": index, "prompt": prompts[index], "response": answer}) + "\n")
            file.flush()
            num_cut += num_cut_here
            progress.update(len(indices))
    logger.log(
        logging.WARNING if num_cut else logging.INFO,
        f"{len(todo)} answers written to {output}; {num_cut} of them cut at {max_new_tokens} tokens",
    )


def _answer(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int
) -> tuple[list[str], int]:
    """Greedy answers to encoded prompts, and how many of them were cut."""
    inputs = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(target.device)
    outputs = target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    outputs = outputs[:, inputs["input_ids"].shape[1] :]
    num_cut = 0
    if outputs.shape[1] == max_new_tokens:
        eos = target.generation_config.eos_token_id
        eos = torch.tensor([] if eos is None else eos, device=outputs.device).flatten()
        num_cut = int((~torch.isin(outputs, eos).any(dim=1)).sum())
    return tokenizer.batch_decode(outputs, skip_special_tokens=True), num_cut


def _record_of(output: Path) -> Path:
    # Hidden, since `datasets` takes all else for data where it reads a whole folder.
    return output.with_name(f".{output.name}.manifest")


def _read_answers(output: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The settings of an earlier run, its whole rows, and how many bytes these take."""
    held = read_record(_record_of(output), _SETTINGS, [output])
    return held or {}, *read_own_rows(output, _COLUMNS)


def _settings_of(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, enable_thinking: bool, max_new_tokens: int
) -> dict[str, Any]:
    """What decides the answers."""
    generation = target.generation_config.to_diff_dict() | {"transformers_version": None}
    return {
        "target": digest_of_target(target),
        "dtype": str(target.dtype),
        "chat_template": digest_of([json.dumps(tokenizer.chat_template).encode()]),
        "generation_config": digest_of([json.dumps(generation, sort_keys=True, default=str).encode()]),
        "enable_thinking": enable_thinking,
        "max_new_tokens": max_new_tokens,
    }


def _indices_of(rows: list[dict[str, Any]], prompts: Sequence[Prompt], output: Path) -> set[int]:
    """The prompts that `rows` answer."""
    for row in rows:
        if not 0 <= row["index"] < len(prompts) or prompts[row["index"]] != row["prompt"]:
            raise ValueError(
                f"{str(output)!r} answers {row['prompt']!r}, which is not prompt {row['index']} of this run; "
                "write to another file."
            )
    return {row["index"] for row in rows}
