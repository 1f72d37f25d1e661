"""One call of `generate`, measured from outside."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import BaseStreamer

from ..decoding.outputs import JetSpecGenerateOutput
from ..upstream import compile_everywhere
from .method import Method


@dataclass(frozen=True)
class Measurement:
    """One call of `generate`.

    Args:
        prompts (`str`): name of the prompt set.
        index (`int`): which prompt of the set, from 0; of a batch, its number.
        method (`str`): name of the [`~jetspec_hf.benchmark.method.Method`].
        num_prompt_tokens (`int`): tokens given.
        tokens (`list[int]`): tokens emitted, of a batch those of one row behind those of the other.
        seconds (`float`): the whole call.
        time_to_first_token (`float`): seconds from the start of the call to its first token.
        num_forwards (`int`): forward passes of the target, the one over the prompt counted.
        accepted_lengths (`list[int]`): tokens emitted in each round, its last one, the bonus token, not counted; of a
            batch, in each round of each row. The pass over the prompt is not a round. Plain decoding accepts none.
        phase_seconds (`dict[str, float]`): host time in each phase; empty where the method does not tell.
        peak_memory_bytes (`int`): on a GPU the most allocated in this call, else the most that the process ever held.
    """

    prompts: str
    index: int
    method: str
    num_prompt_tokens: int
    tokens: list[int]
    seconds: float
    time_to_first_token: float
    num_forwards: int
    accepted_lengths: list[int]
    phase_seconds: dict[str, float]
    peak_memory_bytes: int


class _Watch(BaseStreamer):
    """Notes when the first token comes, and how many come at once. Costs all methods alike."""

    def __init__(self) -> None:
        self.first_token_at = 0.0  # seconds
        self.chunk_sizes: list[int] = []  # tokens
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then tokens."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        if not self.chunk_sizes:
            self.first_token_at = time.perf_counter()
        self.chunk_sizes.append(value.numel())

    def end(self) -> None:
        """Nothing to finish."""


class Runner:
    """Decodes one prompt, or a batch of them, with one method.

    Args:
        target (`PreTrainedModel`): the target.
        head (`JetSpecDraftHead`): the head.
        tokenizer (`PreTrainedTokenizerBase`): the target's; a prompt becomes a user turn under its chat template.
        max_new_tokens (`int`): longest answer in tokens.
        temperature (`float`): 0 decodes greedily; above, no other warper is set.
        seed (`int`): sampling prompt `i` starts from `seed + i`.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        head: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self._target, self._head, self._tokenizer = target, head, tokenizer
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self._compiled: dict[str, Any] = {}  # options of `generate`
        eos = target.generation_config.eos_token_id
        self._eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]

    def compile(self, prompts: list[str]) -> None:
        """From now on compile what can be, once for all `prompts`: with static caches that are long enough for each."""
        config = compile_everywhere(CompileConfig())
        longest = max(self._encode([prompt])["input_ids"].shape[1] for prompt in prompts)
        sizes = {"cache_implementation": "static", "max_cache_len": longest + self._max_new_tokens}
        self._compiled = sizes | {"compile_config": config}

    def measure(self, texts: Sequence[str], prompts: str, index: int, method: Method) -> Measurement:
        """Decode prompts at once, number `index` of the set `prompts`, and note what happened."""
        inputs = self._encode(texts)
        num_padded = inputs["input_ids"].shape[1]
        watch = _Watch()
        keywords = self._keywords(method, watch)
        set_seed(self._seed + index)
        if self._target.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        output = self._target.generate(**inputs, **keywords)
        rows = output.sequences[:, num_padded:].tolist()  # waits for a GPU
        seconds = time.perf_counter() - start
        rows = [self._until_end(row) for row in rows]
        rounds = _rounds(output, watch, rows)
        return Measurement(
            prompts=prompts,
            index=index,
            method=method.name,
            num_prompt_tokens=int(inputs["attention_mask"].sum()),
            tokens=[token for row in rows for token in row],
            seconds=seconds,
            time_to_first_token=watch.first_token_at - start,
            num_forwards=1 + max(map(len, rounds)),
            accepted_lengths=[length for row in rounds for length in row],
            phase_seconds=_phase_seconds(output),
            peak_memory_bytes=_peak_memory(self._target.device),
        )

    def _until_end(self, row: list[int]) -> list[int]:
        """A row without what pads it."""
        ends = [row.index(token) + 1 for token in self._eos_ids if token in row]
        return row[: min(ends, default=len(row))]

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        rows = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                enable_thinking=False,
                return_dict=True,
                return_tensors="pt",
            )["input_ids"][0]
            for text in texts
        ]
        longest = max(map(len, rows))
        ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
        mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
        return {"input_ids": ids.to(self._target.device), "attention_mask": mask.to(self._target.device)}

    def _keywords(self, method: Method, streamer: BaseStreamer) -> dict[str, Any]:
        """What `generate` gets beside the prompt."""
        keywords: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "return_dict_in_generate": True}
        if self._temperature > 0:
            keywords |= {"do_sample": True, "temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        else:
            keywords |= {"do_sample": False}
        if method.can_be_static:
            keywords |= self._compiled
        return keywords | method.keywords(self._head, streamer)


def _rounds(output: Any, watch: _Watch, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The accepted lengths of the rounds of each row."""
    if isinstance(output, JetSpecGenerateOutput) and output.statistics is not None:
        statistics = output.statistics
        return [row.accepted_lengths for row in statistics.rows] or [statistics.accepted_lengths]
    if len(rows) == 1:
        return [[size - 1 for size in watch.chunk_sizes[1:]]]  # others put what a pass gives at once
    return [[0] * (len(row) - 1) for row in rows]


def _phase_seconds(output: Any) -> dict[str, float]:
    if isinstance(output, JetSpecGenerateOutput) and output.statistics is not None:
        return dict(output.statistics.seconds)
    return {}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
