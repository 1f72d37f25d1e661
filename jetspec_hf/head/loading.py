"""Loading what is published: from which of two places on the Hub, and what is wrong with a file that cannot be read."""

import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)
# Both publish the heads of the paper, under the same names.
_ORGANISATIONS = ("hao-ai-lab/", "JetSpec/")
_FILES = ("config.json", "*.index.json", "*.safetensors", "*.bin")


def is_hub_id(name: str) -> bool:
    """Whether a name, maybe with `:` and more behind it, belongs to the Hub and not to a local file or folder."""
    try:
        validate_repo_id(name.partition(":")[0])
    except HFValidationError:
        return False
    return not Path(name).exists()


def split_subfolder(name: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn `repo::subfolder` into the repository and the keyword `subfolder`.

    Raises:
        FileNotFoundError: if the repository is neither a local folder nor a Hub id.
    """
    if isinstance(name, str) and "::" in name:
        name, subfolder = name.split("::", 1)
        kwargs = kwargs | {"subfolder": subfolder}
    if name is not None and not Path(name).exists() and not is_hub_id(str(name)):
        raise FileNotFoundError(f"There is no folder {str(name)!r}, and a Hub id it is not; check the path.")
    return name, kwargs


def load_published(load: Callable[[Any], Any], name: Any, subfolder: str = "") -> Any:
    """Call `load` with a folder or Hub id; where the Hub does not know it, with the id in the other organisation.

    Raises:
        OSError: names the file if one of a local folder is not what it should be.
    """
    try:
        return load(name)
    except Exception as error:
        other = _other_id(str(name))
        if other is not None and _is_unknown(error):
            logger.warning(f"The Hub knows no {name!r}; loading {other!r}, where the same heads are published.")
            return load(other)
        for path in _files_in(Path(str(name)) / subfolder):
            if (fault := _fault_of(path)) is not None:
                raise OSError(f"{str(path)!r} {fault}.") from error
        raise


def _other_id(name: str) -> str | None:
    """The id under which the other organisation publishes a head."""
    for one, other in (_ORGANISATIONS, _ORGANISATIONS[::-1]):
        if name.startswith(one):
            return other + name.removeprefix(one)
    return None


def _is_unknown(error: Exception) -> bool:
    """Whether the Hub was asked and has no such repository; transformers says so in an error of its own."""
    return isinstance(error.__cause__, RepositoryNotFoundError) and not isinstance(error.__cause__, GatedRepoError)


def _files_in(folder: Path) -> list[Path]:
    return [path for pattern in _FILES for path in sorted(folder.glob(pattern))]


def _fault_of(path: Path) -> str | None:
    """What a file is instead of what its name says."""
    with path.open("rb") as file:
        start = file.read(200)
    text = start.strip().lower()
    if not text:
        return "is empty; get it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer and not the file itself; run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page and not the file itself; download it again"
    try:
        if path.suffix == ".json":
            return None if isinstance(json.loads(path.read_bytes()), dict) else "holds no JSON object; get it again"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return None
    except (ValueError, SafetensorError) as error:
        return f"is cut or damaged ({error}); get it again"
    # An archive ends with its table of contents; a file of weights from an old torch is a pickle.
    is_whole = zipfile.is_zipfile(path) or start.startswith(b"\x80")
    return None if is_whole else "is cut, or no file of weights; get it again"
