"""Taps: the target's hidden states after chosen layers, taken by hooks while `generate` runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class HiddenStateTaps:
    """Records the residual stream after chosen decoder layers of a target.

    The hooks are there from `__enter__` to `__exit__`. They take only forwards of the thread that entered, and only
    inside [`recording`], so that other threads may use the target, and logits processors may call it, meanwhile.

    Args:
        target (`PreTrainedModel`): the model to tap.
        layer_ids (`list[int]`): decoder layers, counted from 0, in the order in which the head wants them.

    Raises:
        ValueError: in the target's forward, if its layers pass on several streams of hidden states, as Gemma 3n's do.
    """

    def __init__(self, target: PreTrainedModel, layer_ids: list[int]) -> None:
        self._name = type(target).__name__
        self._layers: list[nn.Module] = [target.get_decoder().layers[i] for i in layer_ids]
        self._states: list[list[Tensor]] = [[] for _ in layer_ids]
        self._handles: list[Any] = []
        self._recording_thread: int | None = None

    def __enter__(self) -> "HiddenStateTaps":
        for layer, states in zip(self._layers, self._states, strict=True):
            self._handles.append(layer.register_forward_hook(self._make_hook(states)))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _make_hook(self, states: list[Tensor]) -> Any:
        def record(module: nn.Module, args: tuple, output: Any) -> None:
            if self._recording_thread == threading.get_ident():
                states.append(self._checked(output[0] if isinstance(output, tuple) else output))

        return record

    def _checked(self, states: Tensor) -> Tensor:
        if states.ndim != 3:
            raise ValueError(
                f"The layers of {self._name} give hidden states of shape {tuple(states.shape)}, several streams for "
                "one token, where a draft head reads one; call `generate` without `assistant_model`."
            )
        return states

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Take the states of target forwards made by this thread inside the block."""
        self._recording_thread = threading.get_ident()
        try:
            yield
        finally:
            self._recording_thread = None

    def take(self) -> Tensor:
        """What was recorded since the last call, `(batch, tokens, taps * hidden)`; nothing of it is held here after.

        Raises:
            ValueError: if the target has passed by a layer, or by its hooks.
        """
        if not all(self._states):
            raise ValueError(
                f"The hooks on the layers of {self._name} did not run, as in graphs that were compiled without them; "
                "load it anew, or call `generate` without `assistant_model`."
            )
        # A sharded target keeps layers on several devices; several records are the chunks of one long prompt.
        device = self._states[0][0].device
        chunks = [torch.cat(states, dim=1).to(device) for states in self._states]
        for states in self._states:
            states.clear()
        return torch.cat(chunks, dim=-1)
