"""A target's answers to many prompts at once: rows that have ended leave the batch, and others take their places."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..cache import GrowingCache, can_replace_rows
from ..ranges import check_at_least
from ..target.spec import input_device
from ..upstream import CACHE, filled_in, has_recurrent_state

_MOST_ROWS_ON_CPU, _MOST_ROWS = 64, 256  # beyond, a step takes longer by as much as there are more rows
# What a generation configuration may say and our own loop follows or need not know; with more, `generate` decodes.
_FOLLOWED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p"),
    *("max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config"),
}


@dataclass(frozen=True)
class AnswerOptions:
    """How a target answers.

    Args:
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer in tokens.
        temperature (`float`, *optional*, defaults to 0.0):
            0 for the likeliest tokens; above, they are drawn as `generate` draws them at this temperature, from those
            that the target's `top_k` and `top_p` leave.
        seed (`int`, *optional*, defaults to 0): of what is drawn, for each prompt by itself.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, max_new_tokens=1, temperature=0, seed=0)


class Question(NamedTuple):
    """A prompt to answer."""

    number: int  # of the prompt
    ids: list[int]


class Reply(NamedTuple):
    """An answer."""

    number: int  # of the prompt
    ids: list[int]  # to the token that ends it, where there is one
    has_ended: bool


def can_replace(target: PreTrainedModel) -> bool:
    """Whether a target's answers are decoded here, and not by `generate`, a batch at a time until its longest ends."""
    if not isinstance(target, PreTrainedModel) or target.config.is_encoder_decoder or has_recurrent_state(target):
        return False
    config, usual = target.generation_config, filled_in(target.generation_config)
    asked = {name for name, value in config.to_diff_dict().items() if value not in (None, False, usual.get(name))}
    return asked <= _FOLLOWED and can_replace_rows(target.config)


def choose_batch_size(
    target: PreTrainedModel, longest_prompt: int, options: AnswerOptions, head: PreTrainedModel | None = None
) -> int:
    """The most rows that are of use and whose keys and values, at their longest, take half of the free memory."""
    if head is not None or not can_replace(target):
        return 16
    device = input_device(target)
    cache = GrowingCache(target.config)
    _forward(target, torch.zeros(1, 1, dtype=torch.long, device=device), torch.ones(1, 1, device=device), cache)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    num_bytes = cache.bytes_per_token() * (longest_prompt + options.max_new_tokens)
    return max(1, min(_MOST_ROWS_ON_CPU if device.type == "cpu" else _MOST_ROWS, int(free / 2 / num_bytes)))


def group_size(target: PreTrainedModel, batch_size: int, head: PreTrainedModel | None = None) -> int:
    """How many prompts are read at once: as many rows as are to have left before others join."""
    return max(1, batch_size // 8) if head is None and can_replace(target) else batch_size


def answer(
    target: PreTrainedModel,
    groups: Iterable[Sequence[Question]],
    batch_size: int,
    options: AnswerOptions,
    head: PreTrainedModel | None = None,
) -> Iterator[tuple[int, list[Reply]]]:
    """Answer prompts.

    Each answer is the one that its prompt gets alone: rows do not see each other, and draw by themselves. In half
    precision near-ties may flip, as between any two batches.

    Args:
        target (`PreTrainedModel`): the target.
        groups (`Iterable[Sequence[Question]]`): prompts that are read together; see [`group_size`].
        batch_size (`int`): most rows at once.
        options (`AnswerOptions`): how to answer.
        head (`JetSpecDraftHead`, *optional*): drafts for it; then `generate` decodes.

    Yields:
        `tuple[int, list[Reply]]`: after each step the number of its tokens, and the answers that are whole now.
    """
    if head is not None or not can_replace(target):
        yield from (_generate(target, group, options, head) for group in groups)
        return
    batch, waiting = _Batch(target, options), deque(groups)
    while waiting or batch.num_live:
        if waiting and batch.num_live + len(waiting[0]) <= max(batch_size, len(waiting[0])):
            yield batch.add(waiting.popleft())
        else:
            if not waiting and batch.num_live <= 7 / 8 * batch.num_rows:
                batch.drop_ended()
            yield batch.step()


class _Row:
    """An answer in the making."""

    def __init__(self, number: int, options: AnswerOptions) -> None:
        self.number, self.ids = number, list[int]()
        generator = torch.Generator().manual_seed(_seed_of(number, options))
        # From 1 down to above 0, one for each token.
        self.draws = (1 - torch.rand(options.max_new_tokens, generator=generator)).tolist()


class _Batch:
    """Answers in the making, in rows padded on the left; the last token of each is picked and not yet read."""

    def __init__(self, target: PreTrainedModel, options: AnswerOptions) -> None:
        self._target, self._options, self._device = target, options, input_device(target)
        self._eos = _eos_tokens(target)
        self._warpers = _warpers(target, options.temperature)
        self._rows: list[_Row | None] = []  # `None` where an answer has ended
        self._tokens = torch.zeros(0, dtype=torch.long, device=self._device)  # (rows,)
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)  # (rows, tokens), 0 on padding
        self._cache = GrowingCache(target.config)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def num_live(self) -> int:
        return sum(row is not None for row in self._rows)

    @torch.inference_mode()
    def add(self, questions: Sequence[Question]) -> tuple[int, list[Reply]]:
        """Let prompts take the place of rows that have ended, and pick their first tokens."""
        ids, mask = (tensor.to(self._device) for tensor in _pad(questions))
        cache = GrowingCache(self._target.config)
        logits = _forward(self._target, ids, mask, cache)
        rows: list[_Row | None] = [_Row(question.number, self._options) for question in questions]
        tokens = self._pick(logits, rows)
        self._drop_ended(cache)
        length = self._cache.get_seq_length()
        self._mask = torch.cat([nn.functional.pad(one, (length - one.shape[1], 0)) for one in (self._mask, mask)])
        self._tokens, self._rows = torch.cat([self._tokens, tokens]), self._rows + rows
        return self._take(tokens, first=len(self._rows) - len(rows))

    @torch.inference_mode()
    def drop_ended(self) -> None:
        """Let rows that have ended leave."""
        self._drop_ended(None)

    @torch.inference_mode()
    def step(self) -> tuple[int, list[Reply]]:
        """Read the token of each row, and pick the next."""
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        self._tokens = self._pick(_forward(self._target, self._tokens[:, None], self._mask, self._cache), self._rows)
        return self._take(self._tokens, first=0)

    def _drop_ended(self, newcomers: GrowingCache | None) -> None:
        live = torch.tensor([i for i, row in enumerate(self._rows) if row is not None], device=self._device)
        if len(live):
            mask = self._mask[live]
            start = int(mask.any(dim=0).int().argmax())
            self._cache.replace_rows(live, start, newcomers)
            self._mask, self._tokens = mask[:, start:], self._tokens[live]
        elif newcomers is not None:
            self._cache, self._mask, self._tokens = newcomers, self._mask[:0, :0], self._tokens[:0]
        self._rows = [row for row in self._rows if row is not None]

    def _pick(self, logits: Tensor, rows: Sequence[_Row | None]) -> Tensor:
        """The next token of each row; of those that have ended, any."""
        if self._options.temperature == 0:
            return logits.argmax(dim=-1)
        draws = [1.0 if row is None else row.draws[len(row.ids)] for row in rows]
        below = self._warpers(None, logits).softmax(dim=-1).cumsum(dim=-1)
        return torch.searchsorted(below, torch.tensor(draws, device=below.device)[:, None] * below[:, -1:])[:, 0]

    def _take(self, tokens: Tensor, first: int) -> tuple[int, list[Reply]]:
        """Add a token to each answer from row `first` on; how many these are, and which answers are whole now."""
        num_taken, replies = 0, []
        for i, token in enumerate(tokens.tolist(), start=first):
            row = self._rows[i]
            if row is None:
                continue
            row.ids.append(token)
            num_taken += 1
            if token in self._eos or len(row.ids) == self._options.max_new_tokens:
                replies.append(Reply(row.number, row.ids, has_ended=token in self._eos))
                self._rows[i] = None
        return num_taken, replies


def _pad(questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and the mask that tells them from padding, both `(prompts, tokens)`."""
    longest = max(len(question.ids) for question in questions)
    pads = [longest - len(question.ids) for question in questions]
    ids = torch.tensor([[0] * pad + question.ids for pad, question in zip(pads, questions, strict=True)])
    return ids, (torch.arange(longest) >= torch.tensor(pads)[:, None]).long()


def _eos_tokens(target: PreTrainedModel) -> set[int]:
    eos = target.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _warpers(target: PreTrainedModel, temperature: float) -> LogitsProcessorList:
    """What `generate` puts on logits before it draws, given what [`can_replace`] allows."""
    config = target.generation_config
    top_k, top_p = (
        filled_in(config)[name] if value is None else value
        for name, value in {"top_k": config.top_k, "top_p": config.top_p}.items()
    )
    warpers = [TemperatureLogitsWarper(temperature)] if temperature not in (0, 1) else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList(warpers)


@torch.no_grad()
def _forward(target: PreTrainedModel, input_ids: Tensor, mask: Tensor, cache: GrowingCache) -> Tensor:
    """The logits behind the last token of each row; `mask` tells tokens from padding, those in the cache too."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    output = target(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{CACHE: cache},
    )
    return output.logits[:, -1].float().to(input_ids.device)


def _generate(
    target: PreTrainedModel, questions: Sequence[Question], options: AnswerOptions, head: PreTrainedModel | None
) -> tuple[int, list[Reply]]:
    """The same by `generate`, whose rows stay until the last has ended."""
    device, eos = input_device(target), _eos_tokens(target)
    ids, mask = (tensor.to(device) for tensor in _pad(questions))
    drawing: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        drawing = {"do_sample": True, "temperature": options.temperature}
    if head is not None:
        drawing["assistant_model"] = head
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_seed_of(questions[0].number, options))
        texts = target.generate(ids, attention_mask=mask, max_new_tokens=options.max_new_tokens, **drawing)
    replies = []
    for question, answer_ids in zip(questions, texts[:, ids.shape[1] :].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(answer_ids) if token in eos), None)
        replies.append(Reply(question.number, answer_ids[:end], has_ended=end is not None))
    return sum(len(reply.ids) for reply in replies), replies


def _seed_of(number: int, options: AnswerOptions) -> int:
    return options.seed * 1_000_003 + number
