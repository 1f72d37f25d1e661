"""One call of `generate`, measured from outside."""

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
        index (`int`): which prompt of the set, from 0.
        method (`str`): name of the [`~jetspec_hf.benchmark.method.Method`].
        num_prompt_tokens (`int`): tokens given.
        tokens (`list[int]`): tokens emitted.
        seconds (`float`): the whole call.
        time_to_first_token (`float`): seconds from the start of the call to its first token.
        num_forwards (`int`): forward passes of the target, the one over the prompt counted.
        accepted_lengths (`list[int]`): tokens emitted in each round, its last one, the bonus token, not counted. The
            pass over the prompt is not a round. Plain decoding accepts none.
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
    """Decodes one prompt with one method.

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

    def compile(self, prompts: list[str]) -> None:
        """From now on compile what can be, once for all `prompts`: with static caches that are long enough for each."""
        config = compile_everywhere(CompileConfig())
        longest = max(self._encode(prompt)["input_ids"].shape[1] for prompt in prompts)
        sizes = {"cache_implementation": "static", "max_cache_len": longest + self._max_new_tokens}
        self._compiled = sizes | {"compile_config": config}

    def measure(self, prompt: str, prompts: str, index: int, method: Method) -> Measurement:
        """Decode the prompt, number `index` of the set `prompts`, and note what happened."""
        inputs = self._encode(prompt)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        watch = _Watch()
        keywords = self._keywords(method, watch)
        set_seed(self._seed + index)
        if self._target.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        output = self._target.generate(**inputs, **keywords)
        tokens = output.sequences[0, num_prompt_tokens:].tolist()  # waits for a GPU
        seconds = time.perf_counter() - start
        accepted_lengths = [size - 1 for size in watch.chunk_sizes[1:]]  # of others, who put what a pass gives at once
        if isinstance(output, JetSpecGenerateOutput) and output.statistics is not None:
            accepted_lengths = output.statistics.accepted_lengths
        return Measurement(
            prompts=prompts,
            index=index,
            method=method.name,
            num_prompt_tokens=num_prompt_tokens,
            tokens=tokens,
            seconds=seconds,
            time_to_first_token=watch.first_token_at - start,
            num_forwards=1 + len(accepted_lengths),
            accepted_lengths=accepted_lengths,
            phase_seconds=_phase_seconds(output),
            peak_memory_bytes=_peak_memory(self._target.device),
        )

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        inputs = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=True,
            return_tensors="pt",
        ).to(self._target.device)
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}

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


def _phase_seconds(output: Any) -> dict[str, float]:
    if isinstance(output, JetSpecGenerateOutput) and output.statistics is not None:
        return dict(output.statistics.seconds)
    return {}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
