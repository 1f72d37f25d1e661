"""Loading targets by name, and refusing what is none before its weights are read."""

from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..head.configuration_jetspec import JetSpecConfig
from ..head.loading import load_published
from ..head.published import PUBLISHED_ARCHITECTURES


def check_target_name(name: str) -> None:
    """Refuse a name under which there is no target.

    Args:
        name (`str`): folder or Hub id.

    Raises:
        ValueError: if it is a file, no folder, a head's, or of a model that does not continue text.
        OSError: if the Hub cannot say.
    """
    path = Path(name)
    if path.is_file() or (not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1)):
        found = "a file" if path.is_file() else "not there"
        raise ValueError(f"The target {name!r} is {found}; pass the folder or the Hub id of a model.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise OSError(f"The target {name!r} cannot be found: {error}") from error
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if kind == JetSpecConfig.model_type or set(architectures) & set(PUBLISHED_ARCHITECTURES):
        raise ValueError(f"The target {name!r} is a draft head; pass the model that it drafts for, and this as `head`.")
    if kind in CONFIG_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"The target {name!r} is a {kind} model, which does not continue text; pass one that does.")


def load_target(name: str, **options: Any) -> PreTrainedModel:
    """A target; see [`check_target_name`] and `AutoModelForCausalLM.from_pretrained` for arguments and further errors.

    Raises:
        ValueError: if its configuration cannot be read.
        OSError: names the file if one with its weights is not what it should be.
    """
    check_target_name(name)
    try:
        return load_published(partial(AutoModelForCausalLM.from_pretrained, **options), name)
    except StrictDataclassError as error:
        raise ValueError(f"The target {name!r} cannot be read ({error}); fetch or copy it again.") from error
