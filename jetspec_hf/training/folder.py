"""The folder that a training run writes, and goes on from."""

from pathlib import Path

from transformers import PreTrainedConfig

from ..files.records import check_free
from ..head.configuration_jetspec import JetSpecConfig
from .arguments import JetSpecTrainingArguments
from .model_card import may_replace

TRAINING_PLOT = "training.png"
_FILES_OF_A_HEAD = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "training_args.bin",
    "README.md",
    TRAINING_PLOT,
)


def open_output_dir(training: JetSpecTrainingArguments) -> None:
    """Refuse to write over what someone trained, or over any other file; find the checkpoint to go on from.

    Args:
        training (`JetSpecTrainingArguments`): its `resume_from_checkpoint` is a folder afterwards, or `None`.

    Raises:
        ValueError: if the folder holds a head or checkpoints that nobody asked to go on with, or files of others under
            the names of ours, or no checkpoint to go on from.
    """
    folder = Path(training.output_dir)
    own = [path for path in folder.glob("checkpoint-[0-9]*") if _is_of_a_head(path)]
    others = [path for path in folder.glob("checkpoint-[0-9]*") if path not in own]
    # What a killed run was still writing has no state yet.
    finished = [path for path in own if (path / "trainer_state.json").exists()]
    last = max(finished, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    training.resume_from_checkpoint = _checkpoint_of(training, last)
    if last is None:
        check_free([folder / name for name in _FILES_OF_A_HEAD] + [*folder.glob("model-*.safetensors"), *others])
    elif training.resume_from_checkpoint is None:
        raise ValueError(
            f"{training.output_dir!r} already holds a trained head; choose another `--output_dir`, or go on with "
            f"`--resume_from_checkpoint {last}`."
        )
    else:
        card = folder / "README.md"
        check_free(others if may_replace(card) else [card, *others])


def _is_of_a_head(checkpoint: Path) -> bool:
    """Whether a checkpoint is a head's, or was left before it said what it is."""
    config = checkpoint / "config.json"
    if not config.exists():
        return checkpoint.is_dir()
    return PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type") == JetSpecConfig.model_type


def _checkpoint_of(training: JetSpecTrainingArguments, last: Path | None) -> str | None:
    """The checkpoint to go on from: `true` means the last, `false` none."""
    given = training.resume_from_checkpoint
    if given is None or str(given).lower() == "false":
        return None
    checkpoint = last if str(given).lower() == "true" else Path(given)
    if checkpoint is None or not (checkpoint / "trainer_state.json").exists() or not _is_of_a_head(checkpoint):
        raise ValueError(
            f"{training.output_dir if checkpoint is None else given!r} holds no checkpoint of a head to go on from; "
            "name one, or leave out `--resume_from_checkpoint`."
        )
    return str(checkpoint)
