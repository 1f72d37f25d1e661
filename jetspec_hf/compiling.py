"""Compiling the steps of a round where `generate` would compile the target's forward, and with the same options."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from .upstream import is_to_compile

# A function of tensors that gives tensors, and what makes a compiled one of it.
Step = Callable[..., tuple[Tensor, ...]]
CompileStep = Callable[[Step], Step]


def step_compiler(
    target: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> CompileStep:
    """What compiles steps, or leaves them as they are.

    Args:
        target (`PreTrainedModel`): the target.
        generation_config (`GenerationConfig`): of the call.
        model_kwargs (`dict`): what `generate` has prepared.
    """
    if not is_to_compile(target, generation_config, model_kwargs):
        return lambda step: step
    options = (generation_config.compile_config or CompileConfig()).to_dict()
    if options["dynamic"] is None:  # there are few shapes, and they come back
        options["dynamic"] = False

    def compile_step(step: Step) -> Step:
        compiled = torch.compile(step, **options)
        # CUDA graphs write their next results over the last.
        return lambda *args, **kwargs: tuple(one.clone() for one in compiled(*args, **kwargs))

    return compile_step
