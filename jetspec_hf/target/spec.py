"""What is known of a target before it runs, whatever its family calls it or leaves out."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class TargetSpec:
    """The shape of a target: what its configuration says of the text model, and no call changes.

    Args:
        vocab_size (`int`): rows of its embedding.
        hidden_size (`int`): width of its hidden states.
        num_layers (`int`): its decoder layers.
        layer_types (`tuple[str, ...]`): the attention type of each decoder layer.
        window (`int`, *optional*): of its sliding layers, in tokens, the query counted.
        softcap (`float`, *optional*): what it squashes its logits to.
        rope_types (`frozenset[str]`): the kinds of its rotary embeddings.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    layer_types: tuple[str, ...]
    window: int | None
    softcap: float | None
    rope_types: frozenset[str]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "TargetSpec":
        """Read a target's configuration, of the text alone or of what has text as a part."""
        text = config.get_text_config()

        def optional(name: str) -> Any:
            return getattr(text, name, None)  # some families lack a field that others have

        window = optional("sliding_window")
        # Families without types have one throughout.
        uniform = (FULL if window is None else SLIDING,) * text.num_hidden_layers
        return cls(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            layer_types=uniform if optional("layer_types") is None else tuple(text.layer_types),
            window=window,
            softcap=optional("final_logit_softcapping"),
            rope_types=_rope_types(optional("rope_parameters") or {}),
        )

    def window_of(self, layer_type: str) -> int | None:
        """The window of the layers of a type, in tokens, the query counted; `None` where they see all."""
        return self.window if layer_type == SLIDING else None


def _rope_types(parameters: dict[str, Any]) -> frozenset[str]:
    """The kinds of rotary embedding; families with several layer types have one entry for each."""
    entries = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return frozenset(entry["rope_type"] for entry in entries if "rope_type" in entry)


def input_device(target: PreTrainedModel) -> torch.device:
    """Where a target takes its inputs; where weights are fetched when they are needed, inputs are, too."""
    return torch.device("cpu") if target.device.type == "meta" else target.device
