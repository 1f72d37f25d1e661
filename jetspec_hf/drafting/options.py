"""How trees are drafted in one call."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ..upstream import filled_in


@dataclass(frozen=True)
class DraftOptions:
    """How trees are drafted in one `generate` call. None of it can change the text.

    Args:
        num_assistant_tokens (`int`, *optional*): most nodes in a tree, the root not counted; `None` finds out while
            decoding how many are fastest.
        assistant_confidence_threshold (`float`, *optional*, defaults to 0.0): least cumulative probability of a node.
        prompt_lookup_num_tokens (`int`, *optional*, defaults to 0): longest graft in tokens, from what the text said
            before; 0 for none.
        is_chain (`bool`, *optional*, defaults to `False`): draft no tree but one token for each depth, the likeliest.
        temperature (`float`, *optional*, defaults to 0.0): at which the target samples; 0 where it decodes greedily.

    Raises:
        ValueError: if a number of nodes or tokens is no whole number, or below 0.
    """

    num_assistant_tokens: int | None = None
    assistant_confidence_threshold: float = 0.0
    prompt_lookup_num_tokens: int = 0
    is_chain: bool = False
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_assistant_tokens", "prompt_lookup_num_tokens"):
            value: Any = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or value < 0):
                raise ValueError(f"`{name}` counts nodes or tokens and is {value!r}; pass a whole number from 0.")

    @property
    def min_log_prob(self) -> float:
        """Nodes less likely than this are left out."""
        threshold = self.assistant_confidence_threshold
        return math.log(threshold) if threshold > 0 else -math.inf

    @classmethod
    def of(cls, config: PreTrainedConfig, generation_config: GenerationConfig | None = None) -> "DraftOptions":
        """What a call asks for, and where it says nothing, the head.

        By the time that we are asked, transformers has filled in its own defaults, so a value equal to one of them
        cannot be told from silence, and the head's holds.

        Args:
            config (`JetSpecConfig`): the head's.
            generation_config (`GenerationConfig`, *optional*): of the call.
        """
        names = ("num_assistant_tokens", "assistant_confidence_threshold", "prompt_lookup_num_tokens")
        values = {name: getattr(config, name) for name in names}
        if generation_config is None:
            return cls(**values)
        asked, silence = generation_config.to_dict(), filled_in(generation_config)
        values |= {name: asked[name] for name in names if asked.get(name) not in (None, silence.get(name))}
        return cls(**values, temperature=generation_config.temperature if generation_config.do_sample else 0.0)
