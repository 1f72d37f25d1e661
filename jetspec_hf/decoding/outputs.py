"""What a `generate` call with a draft head gives beside tokens."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..tree.acceptance import Acceptance
from ..tree.tree import DraftTree
from ..upstream import CACHE


@dataclass
class DraftStatistics:
    """What happened in one `generate` call.

    Args:
        num_prompt_tokens (`int`): tokens given.
        num_new_tokens (`int`): tokens emitted.
        drafted_nodes (`list[int]`): nodes drafted in each round, the root not counted; 0 where one decodes plainly.
        accepted_lengths (`list[int]`): tokens emitted in each round, its last one, the bonus token, not counted.
        rows (`list[DraftStatistics]`):
            Of each row, without seconds, where there are several; the lists above then have an entry for each row of
            each round.
        seconds (`dict[str, float]`):
            Host time in each phase: prefill, draft, build, verify, accept, processors, commit. A device that works on
            while the host goes ahead is waited for in accept. Processors and warpers are counted only where a token
            goes through them.
    """

    num_prompt_tokens: int
    num_new_tokens: int = 0
    drafted_nodes: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    rows: list["DraftStatistics"] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def num_rounds(self) -> int:
        """Verification passes; the prefill is not one."""
        return len(self.drafted_nodes)

    @property
    def num_drafted_tokens(self) -> int:
        """Nodes drafted in all rounds."""
        return sum(self.drafted_nodes)

    @property
    def num_accepted_tokens(self) -> int:
        """Drafted tokens emitted in all rounds."""
        return sum(self.accepted_lengths)

    @property
    def tokens_per_round(self) -> float:
        """New tokens for each round, the one that comes with the prefill not counted; 0 where there was no round."""
        return (self.num_accepted_tokens + self.num_rounds) / self.num_rounds if self.num_rounds else 0.0

    @property
    def total_seconds(self) -> float:
        """Host time in all phases."""
        return sum(self.seconds.values())

    def count_round(self, tree: DraftTree, accepted: Acceptance) -> None:
        """Take in a round of a text."""
        self.drafted_nodes.append(len(tree) - 1)
        self.accepted_lengths.append(len(accepted.tokens) - 1)

    def timed(self, phase: str, step: Callable) -> Callable:
        """A step whose time is added to a phase, less that of steps of other phases within it."""

        @functools.wraps(step)
        def timed_step(*args: Any, **kwargs: Any) -> Any:
            start, others = time.perf_counter(), self.total_seconds
            try:
                return step(*args, **kwargs)
            finally:
                within = self.total_seconds - others
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start - within

        return timed_step


@dataclass
class JetSpecGenerateOutput(GenerateDecoderOnlyOutput):
    """The output of `generate(return_dict_in_generate=True)` with a draft head.

    Args:
        statistics (`DraftStatistics`): what was drafted and accepted. The other fields are those of transformers.
    """

    statistics: DraftStatistics | None = None


def make_output(
    generation_config: GenerationConfig,
    sequences: Tensor,
    kept: Callable[[str], tuple[Tensor, ...] | None],
    cache: Cache | None,
    statistics: DraftStatistics,
) -> JetSpecGenerateOutput | Tensor:
    """What a call returns: the tokens, or a dictionary with all there is.

    Args:
        generation_config (`GenerationConfig`): of the call.
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): the texts.
        kept (`Callable`): gives `scores` and `logits`.
        cache (`Cache`): the target's.
        statistics (`DraftStatistics`): of the call.
    """
    if not generation_config.return_dict_in_generate:
        return sequences
    fields: dict[str, Any] = {name: kept(name) for name in ("scores", "logits")}
    return JetSpecGenerateOutput(sequences=sequences, **fields, **{CACHE: cache}, statistics=statistics)
