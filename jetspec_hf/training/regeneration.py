"""The target's own answers, written down to train on."""

import json
import logging
import os
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files.records import check_same, digest_of, read_own_rows, read_record, write_whole
from ..target.digest import digest_of_target
from .answering import AnswerOptions, Question, Reply, answer, choose_batch_size, group_size
from .data import encode_prompt
from .messages import Prompt

logger = logging.getLogger(__name__)
_COLUMNS = {"index", "prompt", "response", "response_ids", "temperature", "ended"}
_POOL = 16  # groups whose questions are sorted by length
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


def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    output: str | Path,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    num_prompts: int | None = None,
    batch_size: int | None = None,
    enable_thinking: bool = False,
    head: PreTrainedModel | None = None,
) -> None:
    """Write the target's own answers, to train a head on: on foreign answers it learns half as much.

    A run that was stopped at any moment goes on where it was when called again with the same prompts; no row is lost or
    doubled. What made the answers is recorded beside them, in the hidden file `.{name}.manifest`. They come in a
    shuffled order, so that those of a stopped run are like the rest. How many were cut at `max_new_tokens` is logged at
    the end.

    Args:
        target (`PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[str | list[dict]]`): user turns, or messages to answer.
        output (`str` or `Path`):
            JSON lines of `index`, `prompt`, `response`, `response_ids` (its tokens, with the one that ends it where it
            has `ended` by itself), `temperature` and `ended`. Its folder is made if missing.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer in tokens.
        temperature (`float`, *optional*, defaults to 0.0): 0 for greedy answers; above, as `generate` draws at it.
        seed (`int`, *optional*, defaults to 0): of the order, and of what is drawn.
        num_prompts (`int`, *optional*): how many prompts to answer, of those that come first in the order; by default
            all.
        batch_size (`int`, *optional*): most prompts at once; by default 64 on a CPU, and 256 on a GPU, or fewer where
            memory is short.
        enable_thinking (`bool`, *optional*, defaults to `False`): what to tell the chat template.
        head (`JetSpecDraftHead`, *optional*): drafts for the target, whose answers stay the same; then rows are 16 by
            default, and none joins before all of them have ended.

    Raises:
        ValueError: if `output` holds anything else than answers to these prompts, or such that another target, chat
            template, generation configuration, length, temperature or seed made, or an earlier version of this package.
            It stays as it is.
    """
    output, options = Path(output), AnswerOptions(max_new_tokens, temperature, seed)
    settings = _settings_of(target, tokenizer, options, enable_thinking=enable_thinking)
    done, num_bytes = _find_done(output, settings, prompts)
    encode = partial(encode_prompt, tokenizer, enable_thinking=enable_thinking)
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))[:num_prompts]
    groups, batch_size = _plan(
        target, [Question(index, encode(prompts[index])) for index in order], batch_size, options, head
    )
    todo = [left for group in groups if (left := [question for question in group if question.number not in done])]
    num_todo = sum(map(len, todo))
    _begin(output, settings, num_bytes)
    replies = _show(answer(target, todo, batch_size, options, head), len(order), len(order) - num_todo)
    written = _write_down(output, _in_order(replies, todo), prompts, tokenizer, temperature)
    num_cut = sum(not reply.has_ended for reply in written)
    said = f"{num_todo} answers written to {output}; {num_cut} of them cut at {max_new_tokens} tokens"
    logger.log(logging.WARNING if num_cut else logging.INFO, said)


def _write_down(
    output: Path,
    replies: Iterable[Reply],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
) -> Iterator[Reply]:
    """Pass answers on once they are in the file."""
    with output.open("a") as file:
        for reply in replies:
            row: dict[str, Any] = {"index": reply.number, "prompt": prompts[reply.number]}
            row |= {"response": tokenizer.decode(reply.ids, skip_special_tokens=True), "response_ids": reply.ids}
            file.write(json.dumps(row | {"temperature": temperature, "ended": reply.has_ended}) + "\n")
            file.flush()
            yield reply


def _plan(
    target: PreTrainedModel,
    questions: list[Question],
    batch_size: int | None,
    options: AnswerOptions,
    head: PreTrainedModel | None,
) -> tuple[list[list[Question]], int]:
    """Which questions are read together, and how many are answered at once."""
    if batch_size is None:
        batch_size = choose_batch_size(target, max((len(one.ids) for one in questions), default=0), options, head)
    return _group(questions, group_size(target, batch_size, head), options.seed), batch_size


def _group(questions: list[Question], size: int, seed: int) -> list[list[Question]]:
    """Questions to read together, of like lengths so that little is padded, yet each group like the rest in length."""
    groups, generator = [], random.Random(seed)
    for start in range(0, len(questions), _POOL * size):
        pool = sorted(questions[start : start + _POOL * size], key=lambda question: len(question.ids))
        drawn = [pool[i : i + size] for i in range(0, len(pool), size)]
        generator.shuffle(drawn)
        for group in drawn:
            generator.shuffle(group)
        groups += drawn
    return groups


def _show(steps: Iterable[tuple[int, list[Reply]]], num_prompts: int, num_done: int) -> Iterator[Reply]:
    """The answers, with a progress bar that moves with each token."""
    num_tokens, start, shown = 0, time.monotonic(), 0.0
    with tqdm(total=num_prompts, initial=num_done, desc="answers", unit="row") as progress:
        for num_new, replies in steps:
            num_tokens += num_new
            passed = time.monotonic() - start
            progress.set_postfix_str(f"{num_tokens} tokens, {num_tokens / passed:.0f} tokens/s", refresh=False)
            if passed > shown + 1:
                shown = passed
                progress.refresh()
            progress.update(len(replies))
            yield from replies


def _in_order(replies: Iterable[Reply], groups: list[list[Question]]) -> Iterator[Reply]:
    """Hold back answers until those before them are there: short ones end first, and would be too many."""
    held: dict[int, Reply] = {}
    waiting = deque(question.number for group in groups for question in group)
    for reply in replies:
        held[reply.number] = reply
        while waiting and waiting[0] in held:
            yield held.pop(waiting.popleft())


def _record_of(output: Path) -> Path:
    # Hidden, since `datasets` takes all else for data where it reads a whole folder.
    return output.with_name(f".{output.name}.manifest")


def _read_answers(output: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The settings of an earlier run, its whole rows, and how many bytes these take."""
    held = read_record(_record_of(output), _SETTINGS, [output])
    if held is not None and "temperature" not in held and output.exists() and output.stat().st_size:
        raise ValueError(
            f"{str(output)!r} holds answers without their tokens, as earlier versions wrote them; "
            "write to another file. Heads can be trained on both."
        )
    return held or {}, *read_own_rows(output, _COLUMNS)


def _settings_of(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: AnswerOptions, *, enable_thinking: bool
) -> dict[str, Any]:
    """What decides the answers."""
    generation = target.generation_config.to_diff_dict() | {"transformers_version": None}
    return {
        "target": digest_of_target(target),
        "dtype": str(target.dtype),
        "chat_template": digest_of([json.dumps(tokenizer.chat_template).encode()]),
        "generation_config": digest_of([json.dumps(generation, sort_keys=True, default=str).encode()]),
        "enable_thinking": enable_thinking,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed if options.temperature else None,
    }


def _find_done(output: Path, settings: dict[str, Any], prompts: Sequence[Prompt]) -> tuple[set[int], int]:
    """The prompts that an earlier run answered under the same settings, and how many bytes its whole rows take."""
    held, rows, num_bytes = _read_answers(output)
    if rows:
        check_same(held, settings, output)
    for row in rows:
        if not 0 <= row["index"] < len(prompts) or prompts[row["index"]] != row["prompt"]:
            raise ValueError(
                f"{str(output)!r} answers {row['prompt']!r}, which is not prompt {row['index']} of this run; "
                "write to another file."
            )
    return {row["index"] for row in rows}, num_bytes


def _begin(output: Path, settings: dict[str, Any], num_bytes: int) -> None:
    """Record the settings, and cut off the row that was being written when a run was killed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(_record_of(output), json.dumps(settings, indent=2).encode())
    if output.exists():
        os.truncate(output, num_bytes)
