"""Telling targets apart."""

import json

from transformers import PreTrainedModel

from ..files.records import digest_of
from .spec import TargetSpec


def digest_of_target(target: PreTrainedModel) -> str:
    """Of its shape and of the first numbers of each weight."""
    spec = TargetSpec.of(target.config)
    shape = [type(target).__name__, spec.vocab_size, spec.hidden_size, spec.num_layers, str(target.dtype)]
    weights = (
        name.encode() + str(value.flatten()[:8].tolist()).encode()
        for name, value in target.named_parameters()
        if not value.is_meta
    )
    return digest_of([json.dumps(shape).encode(), *weights])
