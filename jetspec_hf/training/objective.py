"""The objective of training, and what is measured at the same slots in evaluation; logits exist a chunk at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .losses import SoftLabels, map_in_chunks, slot_loss, sum_in_chunks
from .slots import Slots


@dataclass(frozen=True)
class Objective:
    """How far the head's distributions are from the target's, slot by slot.

    Args:
        unembed (`Callable`): the target's logits, `(slots, vocab)`, of hidden states, `(slots, hidden)`.
        chunk_size (`int`): slots whose logits are held at once.
        kl_weight (`float`, *optional*, defaults to 1.0): as in [`~jetspec_hf.training.losses.slot_loss`].
        temperature (`float`, *optional*, defaults to 1.0): the same.
        plain_loss_weight (`float`, *optional*, defaults to 1.0): weight of the loss without the Markov head, if any.
    """

    unembed: Callable[[Tensor], Tensor]
    chunk_size: int
    kl_weight: float = 1.0
    temperature: float = 1.0
    plain_loss_weight: float = 1.0

    def sum_losses(self, slots: Slots) -> Tensor:
        """The weighted sum of the losses of all slots."""

        def loss_of(where: slice, hidden_states: Tensor, *codes: Tensor) -> Tensor:
            plain, logits = self._logits(hidden_states, *codes)
            loss = partial(
                slot_loss,
                teacher=self._soft_labels(slots, where) if self.kl_weight > 0 else None,
                labels=slots.labels[where],
                weights=slots.weights[where],
                kl_weight=self.kl_weight,
                temperature=self.temperature,
            )
            if not codes or self.plain_loss_weight <= 0:
                return loss(logits)
            return loss(logits) + self.plain_loss_weight * loss(plain)

        return sum_in_chunks(loss_of, self.chunk_size, *_parts(slots))

    def are_correct(self, slots: Slots) -> Tensor:
        """Whether the head's likeliest token is the text's, `(slots,)`."""

        def measure(where: slice, hidden_states: Tensor, *codes: Tensor) -> Tensor:
            _, logits = self._logits(hidden_states, *codes)
            return logits.argmax(dim=-1) == slots.labels[where]

        return map_in_chunks(measure, self.chunk_size, *_parts(slots))

    def surprisals(self, slots: Slots, temperatures: list[float]) -> Tensor:
        """How unlikely the head finds the text under each temperature, `(slots, temperatures)`, in nats."""

        def measure(where: slice, hidden_states: Tensor, *codes: Tensor) -> Tensor:
            _, logits = self._logits(hidden_states, *codes)
            found = (cross_entropy(logits / one, slots.labels[where], reduction="none") for one in temperatures)
            return torch.stack(list(found), dim=1)

        return map_in_chunks(measure, self.chunk_size, *_parts(slots))

    def _logits(self, hidden_states: Tensor, *codes: Tensor) -> tuple[Tensor, Tensor]:
        """The head's logits of some slots, `(slots, vocab)`, without its Markov head and with it."""
        plain = self.unembed(hidden_states)
        if not codes:
            return plain, plain
        paths, tokens = codes
        return plain, plain + (paths @ tokens.T).float()

    @torch.no_grad()
    def _soft_labels(self, slots: Slots, where: slice) -> SoftLabels:
        """What the target says at some slots; found once where they share a place."""
        places, which = slots.places[where].unique(return_inverse=True)
        return SoftLabels.of(self.unembed(slots.last_hidden[places]), self.temperature).at(which)


def _parts(slots: Slots) -> tuple[list[Tensor], list[Tensor]]:
    """What logits are made of, and what learns: one row for each slot, and what all slots share."""
    if slots.codes is None:
        return [slots.hidden_states], []
    return [slots.hidden_states, slots.codes.paths], [slots.codes.tokens]
