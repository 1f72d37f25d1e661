"""From hidden states to the target's logits, with all that the target puts between them."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .spec import TargetSpec


class Unembedding:
    """The target's LM head, for its own hidden states and for those of a draft head.

    Squashes the logits where the target does, and works on quantized, sharded and offloaded targets.

    Args:
        target (`PreTrainedModel`): lends its LM head.
    """

    def __init__(self, target: PreTrainedModel) -> None:
        self._lm_head = target.get_output_embeddings()
        self._softcap = TargetSpec.of(target.config).softcap

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits, `(..., vocab)`, of hidden states, `(..., hidden)`; in float32, on the device of `hidden_states`."""
        inputs = hidden_states
        weight = next((weight for weight in self._lm_head.parameters() if weight.is_floating_point()), None)
        if weight is not None:  # a quantized LM head may have none, and takes what it is given
            # Offloaded weights are nowhere until accelerate fetches them; it then moves the input, too.
            inputs = inputs.to(inputs.device if weight.is_meta else weight.device, weight.dtype)
        logits = self._lm_head(inputs).to(hidden_states.device, torch.float32)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits
