"""A draft head with its target: whether they fit, what the head borrows, and what is kept from call to call."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from .cache import StaticCaches
from .target.spec import TargetSpec, input_device
from .target.unembedding import Unembedding

_Kept = TypeVar("_Kept")

# What calls leave behind for later ones, by head and target, as long as both live.
_KEPT: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[PreTrainedModel, dict[Hashable, Any]]]
_KEPT = WeakKeyDictionary()


class DecodingPair:
    """A draft head and the target that it drafts for, whose embedding and LM head it borrows.

    One costs next to nothing to make, so every call makes its own; what they keep is one and the same.

    Args:
        head (`JetSpecDraftHead`): the head, or one wrapped by PEFT or for training.
        target (`PreTrainedModel`): any causal language model; its [`~jetspec_hf.target.spec.TargetSpec`] is `spec`.

    Raises:
        ValueError: if the head was made for another target; names both values where they differ.
    """

    def __init__(self, head: PreTrainedModel, target: PreTrainedModel) -> None:
        self.head, self.target, self.spec = head, target, TargetSpec.of(target.config)
        self._check_fit()
        self.embed = target.get_input_embeddings()
        self.lm_head = target.get_output_embeddings()
        self.unembed = Unembedding(target)

    def _check_fit(self) -> None:
        config, spec, name = self.head.config, self.spec, type(self.target).__name__
        pairs = {
            "vocab_size": (config.vocab_size, spec.vocab_size),
            "hidden_size": (config.hidden_size, spec.hidden_size),
            "number of target layers": (config.num_target_layers, spec.num_layers),
        }
        differing = [f"{what} {ours} and {theirs}" for what, (ours, theirs) in pairs.items() if ours != theirs]
        if differing:
            raise ValueError(
                f"The head and {name} do not fit: {'; '.join(differing)}. Use the target that the head was trained for."
            )
        if self.head.markov_head is not None and self.head.markov_head.is_tied:
            weight = next(self.target.get_output_embeddings().parameters(), None)
            if weight is None or weight.is_meta or not weight.is_floating_point():
                raise ValueError(
                    f"The LM head of {name}, whose rows the Markov head reads, is offloaded or quantized; load the "
                    "target with its LM head in memory and unquantized, or set `head.markov_head = None`."
                )

    @property
    def input_device(self) -> torch.device:
        """Where the target takes its inputs."""
        return input_device(self.target)

    @property
    def place(self) -> tuple[Hashable, ...]:
        """Where both are now, and in which number types."""
        return self.target.device, self.target.dtype, self.head.device, self.head.dtype

    def kept(self, name: Hashable, make: Callable[[], _Kept]) -> _Kept:
        """What this process keeps for the pair under a name; made when it is first asked for.

        It must not hold the models, or they would never be freed.
        """
        kept = _KEPT.setdefault(self.head, WeakKeyDictionary()).setdefault(self.target, {})
        return kept[name] if name in kept else kept.setdefault(name, make())

    @contextmanager
    def static_caches(self, num_layers: int, num_slots: int) -> Iterator[StaticCaches]:
        """Empty caches for one call, of at least `num_slots` tokens. A call that fails does not give them back.

        Calls share them, since a CUDA graph knows its caches by their addresses.
        """
        pools: dict[Hashable, list[StaticCaches]] = self.kept("static caches", dict)
        # Inference tensors must not be written to outside of inference mode.
        key = (*self.place, torch.is_inference_mode_enabled())
        if key not in pools:
            pools.clear()
        free = pools.setdefault(key, [])
        try:
            caches = free.pop()
        except IndexError:
            caches = None
        if caches is None or caches.num_slots < num_slots:
            caches = StaticCaches.of(num_layers, self.head.config.num_hidden_layers, num_slots)
        yield caches
        caches.reset()
        free.append(caches)
