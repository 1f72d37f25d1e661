"""Reading: what a target says about finished texts, all that a head learns from and is evaluated on."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .taps import HiddenStateTaps


class TargetStates(NamedTuple):
    """What a target says about finished texts."""

    taps: Tensor  # (batch, length, taps * hidden), after the layers that a head taps
    last_hidden: Tensor  # (batch, length, hidden), each predicts the token behind it


@runtime_checkable
class TargetReader(Protocol):
    """Stands in for a target where texts are read and none is continued: in the trainer and in evaluation.

    Beside `read` it has what a head borrows from a target, and is checked against, under the names of
    [`~transformers.PreTrainedModel`].
    """

    config: PreTrainedConfig

    @property
    def device(self) -> torch.device:
        """Where it takes token ids."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """The target's embedding."""
        ...

    def get_output_embeddings(self) -> nn.Module:
        """The target's LM head."""
        ...

    def read(self, input_ids: Tensor, layer_ids: list[int], position_ids: Tensor | None = None) -> TargetStates:
        """As [`read_target`] says."""
        ...


@torch.no_grad()
def read_target(
    target: PreTrainedModel | TargetReader,
    input_ids: Tensor,
    layer_ids: list[int],
    position_ids: Tensor | None = None,
) -> TargetStates:
    """What a target says about finished texts, on the device of `input_ids`.

    Args:
        target (`PreTrainedModel` or `TargetReader`): the target, or what reads in its place.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): texts, padded on the right.
        layer_ids (`list[int]`): decoder layers to tap, as in the `target_layer_ids` of a head; may be empty.
        position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            Positions in the documents of a row; 0 starts a new one, which sees none before it. By default a row is one.

    Raises:
        ValueError: if the target's layers cannot be tapped, or what reads in its place does not know a text or a layer.
    """
    if isinstance(target, TargetReader):
        return target.read(input_ids, layer_ids, position_ids)
    with HiddenStateTaps(target, layer_ids) as taps, taps.recording():
        # Without a mask, transformers lets no document see another, and none sees the padding after it.
        outputs = target.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    # A sharded target gives them on several devices.
    last_hidden = outputs.last_hidden_state.to(input_ids.device)
    tapped = taps.take().to(input_ids.device) if layer_ids else last_hidden[:, :, :0]
    return TargetStates(tapped, last_hidden)
