"""The objective of training, and what is measured at the same slots in evaluation; logits exist a chunk at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .losses import ChunkLoss, SlotLosses, SoftLabels, map_in_chunks, slot_losses, sum_in_chunks
from .slots import Slots


@dataclass(frozen=True)
class Objective:
    """How far the head's distributions are from the target's, slot by slot.

    Args:
        unembed (`Callable`): the target's logits, `(slots, vocab)`, of hidden states, `(slots, hidden)`.
        chunk_size (`int`): slots whose logits are held at once.
        kl_weight (`float`, *optional*, defaults to 1.0): as in [`~jetspec_hf.training.losses.slot_losses`].
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

        def loss_of(where: slice, hidden_states: Tensor, *codes: Tensor) -> ChunkLoss:
            losses_of = partial(
                slot_losses,
                teacher=self._soft_labels(slots, where) if self.kl_weight > 0 else None,
                labels=slots.labels[where],
                kl_weight=self.kl_weight,
                temperature=self.temperature,
            )
            weights, plain = slots.weights[where], self.unembed(hidden_states)
            if not codes:
                return _weighted(losses_of(plain), weights, [plain])
            added = _added(*codes)
            # No gradient needs what was added: the sum takes its place.
            losses = _weighted(losses_of(added.detach().add_(plain.detach())), weights, [plain, added])
            if self.plain_loss_weight <= 0:
                return losses
            of_plain = _weighted(losses_of(plain), self.plain_loss_weight * weights, [plain])
            (pull,) = of_plain.gradients
            pull += losses.gradients[0]
            return ChunkLoss(losses.value + of_plain.value, [plain, added], [pull, losses.gradients[1]])

        return sum_in_chunks(loss_of, self.chunk_size, *_parts(slots))

    def are_correct(self, slots: Slots) -> Tensor:
        """Whether the head's likeliest token is the text's, `(slots,)`."""

        def measure(where: slice, hidden_states: Tensor, *codes: Tensor) -> Tensor:
            return self._logits(hidden_states, *codes).argmax(dim=-1) == slots.labels[where]

        return map_in_chunks(measure, self.chunk_size, *_parts(slots))

    def surprisals(self, slots: Slots, temperatures: list[float]) -> Tensor:
        """How unlikely the head finds the text under each temperature, `(slots, temperatures)`, in nats."""

        def measure(where: slice, hidden_states: Tensor, *codes: Tensor) -> Tensor:
            logits = self._logits(hidden_states, *codes)
            logits -= logits.amax(dim=1, keepdim=True)
            of_text = logits.gather(1, slots.labels[where, None])[:, 0]
            softened, found = torch.empty_like(logits), []  # one buffer for all temperatures
            for temperature in temperatures:
                total = torch.mul(logits, 1 / temperature, out=softened).exp_().sum(dim=1)
                found.append(total.log() - of_text / temperature)
            return torch.stack(found, dim=1)

        return map_in_chunks(measure, self.chunk_size, *_parts(slots))

    def _logits(self, hidden_states: Tensor, *codes: Tensor) -> Tensor:
        """The head's logits of some slots, `(slots, vocab)`, with its Markov head."""
        plain = self.unembed(hidden_states)
        return plain + _added(*codes) if codes else plain

    @torch.no_grad()
    def _soft_labels(self, slots: Slots, where: slice) -> SoftLabels:
        """What the target says at some slots; found once where they share a place."""
        places, which = slots.places[where].unique(return_inverse=True)
        return SoftLabels.of(self.unembed(slots.last_hidden[places]), self.temperature).at(which)


def _added(paths: Tensor, tokens: Tensor) -> Tensor:
    """What a Markov head adds to logits, `(slots, vocab)`."""
    return (paths @ tokens.T).float()


def _weighted(losses: SlotLosses, weights: Tensor, outputs: list[Tensor]) -> ChunkLoss:
    """The weighted sum over slots, where the logits are the sum of `outputs`."""
    gradient = losses.gradient.mul_(weights[:, None])
    return ChunkLoss(losses.values @ weights, outputs, [gradient] * len(outputs))


def _parts(slots: Slots) -> tuple[list[Tensor], list[Tensor]]:
    """What logits are made of, and what learns: one row for each slot, and what all slots share."""
    if slots.codes is None:
        return [slots.hidden_states], []
    return [slots.hidden_states, slots.codes.paths], [slots.codes.tokens]
