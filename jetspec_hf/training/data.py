"""Training texts as token ids with a loss mask: encoded, packed into rows, and collated into batches."""

import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .messages import Prompt, as_messages, is_complete

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Rows padded on the right to one length."""

    input_ids: Tensor  # (batch, length)
    attention_mask: Tensor  # (batch, length), 1 on real tokens
    position_ids: Tensor  # (batch, length), positions in the documents of a row; 0 starts a new one
    loss_mask: Tensor  # (batch, length), true on the tokens that the target answered


class Answer(NamedTuple):
    """An answer with all that its document has before it."""

    ids: Sequence[int]  # to the end of the answer
    num_prompt: int  # how many of them come before the answer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, enable_thinking: bool = False) -> list[int]:
    """Token ids of a prompt under the chat template, up to where the assistant begins to speak.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    text = _render(tokenizer, as_messages(prompt, "user"), True, enable_thinking)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool, enable_thinking: bool
) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template to turn messages into text; set its `chat_template` and save it, or "
            "train on plain text in a column `text`."
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking
        )
    except TemplateError as error:
        raise ValueError(f"The chat template does not take the messages ({error}); check their roles.") from error


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the assistant ends its turn: the special one that the template writes after the words.

    The end-of-sequence token where the template writes none.
    """
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    after = _render(tokenizer, turns, False, False).rpartition("answer")[2]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    written = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((token for token in written if token in special), tokenizer.eos_token_id)


def encode(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], *, max_length: int, enable_thinking: bool = False
) -> dict[str, Any]:
    """Token ids of a row of [`~jetspec_hf.training.sources.load_rows`], cut to `max_length` tokens.

    In the loss are: of `messages`, what the assistant says, each time to the end of its turn; of a `response`, the
    same, and nothing of its prompt; of `response_ids`, which stand for the response where a row has them, these and no
    more, since an answer may have been cut; of `text`, all but the first token. Some templates rewrite earlier turns
    when the next one comes; then only the last that they leave as the assistant wrote it is in the loss, and those that
    follow.

    Returns:
        `dict`: `input_ids`, `loss_mask` (1 on what to learn from), `length` in tokens, `is_cut`, and `num_rewritten`,
        the assistant turns left out of the loss. A row that lacks its prompt, its answer or any of its messages gives
        no tokens.

    Raises:
        ValueError: if the tokenizer has no chat template and the row is no plain text, or the row is neither words nor
            messages, as in [`~jetspec_hf.training.messages.as_messages`], or its `response_ids` are no tokens.
    """
    num_rewritten = 0
    if row.get("text") is not None:
        input_ids, loss_mask = _encode_text(tokenizer, row["text"])
    elif row.get("response_ids") is not None:
        input_ids, loss_mask = _encode_ids(tokenizer, row.get("prompt"), row["response_ids"], enable_thinking)
    else:
        messages, num_given = _messages_of(row)
        input_ids, loss_mask, num_rewritten = _encode_answers(tokenizer, messages, num_given, enable_thinking)
    return {
        "input_ids": input_ids[:max_length],
        "loss_mask": loss_mask[:max_length],
        "length": min(len(input_ids), max_length),
        "is_cut": len(input_ids) > max_length,
        "num_rewritten": num_rewritten,
    }


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: Any) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of plain text."""
    if not isinstance(text, str):
        raise ValueError(f"The `text` {text!r:.60} is no string.")
    input_ids = tokenizer(text)["input_ids"]
    return input_ids, [0] * min(1, len(input_ids)) + [1] * (len(input_ids) - 1)


def _encode_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, response_ids: Any, enable_thinking: bool
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of a prompt and the tokens that answer it."""
    tokens = response_ids if isinstance(response_ids, list) else [response_ids]
    wrong = [token for token in tokens if not (type(token) is int and 0 <= token < len(tokenizer))]
    if wrong or tokens is not response_ids:
        raise ValueError(
            f"The `response_ids` must be a list of whole numbers from 0 to {len(tokenizer) - 1}; "
            f"got {(wrong or tokens)[0]!r:.60}."
        )
    messages = as_messages(prompt, "user")
    if not is_complete(messages):
        return [], []
    prompt_ids = encode_prompt(tokenizer, messages, enable_thinking=enable_thinking)
    return prompt_ids + response_ids, [0] * len(prompt_ids) + [1] * len(response_ids)


def _messages_of(row: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """All messages, or none if something is missing, and how many of them are the prompt of a `response`."""
    if row.get("messages") is not None:
        messages = as_messages(row["messages"], None)
        return (messages if is_complete(messages) else []), 0
    prompt, response = as_messages(row.get("prompt"), "user"), as_messages(row.get("response"), "assistant")
    return (prompt + response if is_complete(prompt) and is_complete(response) else []), len(prompt)


def _encode_answers(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], num_given: int, enable_thinking: bool
) -> tuple[list[int], list[int], int]:
    """Token ids and loss mask, on what the assistant says after the given messages, and how many turns are left out."""
    num_answers, num_rewritten = 0, 0
    input_ids: list[int] = []
    loss_mask: list[int] = []
    for i in range(max(1, num_given), len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        prompt_ids = encode_prompt(tokenizer, messages[:i], enable_thinking=enable_thinking)
        if prompt_ids[: len(input_ids)] != input_ids:
            num_answers, num_rewritten = 0, num_rewritten + num_answers
            input_ids, loss_mask = [], []
        answer_ids = _encode_answer(tokenizer, messages[: i + 1], enable_thinking)
        loss_mask += [0] * (len(prompt_ids) - len(input_ids)) + [1] * len(answer_ids)
        input_ids = prompt_ids + answer_ids
        num_answers += 1
    return input_ids, loss_mask, num_rewritten


def _encode_answer(tokenizer: PreTrainedTokenizerBase, messages: list[dict], enable_thinking: bool) -> list[int]:
    """The last message as the assistant emits it behind the generation prompt, ended by [`turn_end`]."""
    before = _render(tokenizer, messages[:-1], True, enable_thinking)
    whole = _render(tokenizer, messages, False, enable_thinking)
    # Where the generation prompt holds more than the template writes, such as an empty thought, the words alone.
    answer = whole[len(before) :] if whole.startswith(before) else messages[-1]["content"]
    ids, end = tokenizer(answer, add_special_tokens=False)["input_ids"], turn_end(tokenizer)
    return (ids[: ids.index(end)] if end in ids else ids) + [end]


def find_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """A token that never occurs in text, whose embedding can stand for what is to be predicted.

    The tokenizer's own mask token, else the first row of the target's embedding that no token uses, else the first
    special token that has no role and is not in the chat template, such as one for the name of a file; which one is
    logged.

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
    if unused := _unused_special_tokens(tokenizer):
        first = min(unused)
        logger.info(
            f"The token {first}, {unused[first]!r}, marks what is to be predicted, since the chat template does not "
            f"use it and no row of the target's embedding is free; `mask_token_id` chooses another."
        )
        return first
    raise ValueError(
        f"All {vocab_size} rows of the target's embedding are in use, so none can mark what is to be predicted; "
        "pass as `mask_token_id` the id of a token that does not occur in your texts, never padding or end of sequence."
    )


def _unused_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens that are neither padding, end of sequence or the like, nor named in the chat template."""
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    taken = set(tokenizer.all_special_ids)
    return {token: word for token, word in special.items() if token not in taken and word not in template}


def answers_of(row: dict[str, Any]) -> list[Answer]:
    """The answers of two tokens or more in an encoded row."""
    answers, start = [], 0
    for length in document_lengths(row):
        ids, in_loss = row["input_ids"][start : start + length], [*row["loss_mask"][start : start + length], 0]
        begins = [i for i in range(1, length) if in_loss[i] and (i == 1 or not in_loss[i - 1])]
        ends = [i + 1 for i in range(1, length) if in_loss[i] and not in_loss[i + 1]]
        spans = zip(begins, ends, strict=True)
        answers += [Answer(list(ids[:end]), num_prompt=begin) for begin, end in spans if end - begin > 1]
        start += length
    return answers


def document_lengths(row: dict[str, Any]) -> list[int]:
    """Tokens of each document in a row; a row that says nothing is one document."""
    return row.get("document_lengths") or [len(row["input_ids"])]


def pack(rows: dict[str, list], *, max_length: int) -> dict[str, list]:
    """Lay encoded texts side by side in rows of up to `max_length` tokens, the longest first.

    For `map(pack, batched=True)`: nothing is cut, and no text can see another in training.

    Args:
        rows (`dict[str, list]`): the columns `input_ids` and `loss_mask` of [`encode`].
        max_length (`int`): most tokens in a row; a longer text has a row of its own.

    Returns:
        `dict[str, list]`: `input_ids`, `loss_mask`, `length`, and `document_lengths`, the tokens of each text.
    """
    packed: list[list[int]] = []
    free: list[int] = []
    lengths = [len(ids) for ids in rows["input_ids"]]
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((i for i, room in enumerate(free) if room >= lengths[text]), None)
        if place is None:
            place = len(packed)
            packed.append([])
            free.append(max_length)
        packed[place].append(text)
        free[place] -= lengths[text]
    return {
        "input_ids": [[token for i in texts for token in rows["input_ids"][i]] for texts in packed],
        "loss_mask": [[flag for i in texts for flag in rows["loss_mask"][i]] for texts in packed],
        "length": [sum(lengths[i] for i in texts) for texts in packed],
        "document_lengths": [[lengths[i] for i in texts] for texts in packed],
    }


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> Batch:
    """Pad encoded or packed rows on the right to the longest of them."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    position_ids = []
    for row in rows:
        lengths = document_lengths(row)
        lengths = [*lengths[:-1], lengths[-1] + longest - len(row["input_ids"])]
        position_ids.append([position for length in lengths for position in range(length)])
    positions = torch.tensor(position_ids)
    return Batch(
        input_ids=torch.tensor([pad(row["input_ids"], pad_token_id) for row in rows]),
        attention_mask=torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        position_ids=positions,
        # The first token of a document cannot be predicted from within it.
        loss_mask=torch.tensor([pad(row["loss_mask"], 0) for row in rows]).bool() & (positions > 0),
    )
