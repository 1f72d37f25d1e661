"""Loading targets by name, and refusing what is none before its weights are read."""

from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_gguf_available

from ..head.configuration_jetspec import JetSpecConfig
from ..head.loading import load_published
from ..head.published import PUBLISHED_ARCHITECTURES
from ..upstream import GGUF_OPTIONS


def check_target_name(name: str, gguf_file: str | None = None) -> None:
    """Refuse a name under which there is no target.

    Args:
        name (`str`): folder or Hub id.
        gguf_file (`str`, *optional*): the file there that holds it, where it is GGUF.

    Raises:
        ValueError: if it is a file, no folder, a head's, or of a model that does not continue text; if a folder does
            not hold `gguf_file`, or GGUF files alone and none is named.
        ImportError: if `gguf_file` cannot be read without another package.
        OSError: if the Hub cannot say.
    """
    path = Path(name)
    if path.is_file() or (not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1)):
        found = "a file" if path.is_file() else "not there"
        also = ", and the name of the file as `gguf_file`" if path.suffix == ".gguf" else ""
        raise ValueError(f"The target {name!r} is {found}; pass the folder or the Hub id of a model{also}.")
    if gguf_file is not None:
        _check_gguf(path, gguf_file)
        return
    held = sorted(file.name for file in path.glob("*.gguf"))
    if held and not (path / "config.json").exists():
        raise ValueError(f"The target {name!r} is GGUF; pass as `gguf_file` one of {', '.join(held)}.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise OSError(f"The target {name!r} cannot be found: {error}") from error
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if kind == JetSpecConfig.model_type or set(architectures) & set(PUBLISHED_ARCHITECTURES):
        raise ValueError(f"The target {name!r} is a draft head; pass the model that it drafts for, and this as `head`.")
    if kind in CONFIG_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"The target {name!r} is a {kind} model, which does not continue text; pass one that does.")


def _check_gguf(folder: Path, gguf_file: str) -> None:
    if folder.is_dir() and not (folder / gguf_file).is_file():
        held = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "no GGUF file"
        raise ValueError(f"There is no `gguf_file` {gguf_file!r} in {str(folder)!r}, which holds {held}.")
    if not is_gguf_available():
        raise ImportError(f"{gguf_file!r} is read by the package gguf; run `pip install jetspec_hf[gguf]`.")


def load_target(name: str, gguf_file: str | None = None, **options: Any) -> PreTrainedModel:
    """A target; see [`check_target_name`] and `AutoModelForCausalLM.from_pretrained` for arguments and further errors.

    What is quantized in a `gguf_file` becomes ordinary numbers, of the type `dtype`.

    Raises:
        ValueError: if its configuration cannot be read.
        OSError: names the file if one with its weights is not what it should be.
    """
    check_target_name(name, gguf_file)
    if gguf_file is not None:
        options = {"gguf_file": gguf_file, **GGUF_OPTIONS, **options}
    try:
        return load_published(partial(AutoModelForCausalLM.from_pretrained, **options), name)
    except StrictDataclassError as error:
        raise ValueError(f"The target {name!r} cannot be read ({error}); fetch or copy it again.") from error
