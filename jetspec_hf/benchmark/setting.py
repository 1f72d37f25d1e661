"""All that must be the same for measurements to belong together."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..version import __version__
from .options import BenchmarkOptions


def describe(
    target: PreTrainedModel, head: PreTrainedModel, prompts: Mapping[str, Sequence[str]], options: BenchmarkOptions
) -> dict[str, Any]:
    """The content of `options.json`, but for the date: models, options, where it runs, and the prompts."""
    return {
        "target": _describe_model(target),
        "head": _describe_model(head),
        "options": asdict(options),
        "environment": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else None,
            "device": target.device.type,
            "dtype": str(target.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": options.batch_size,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "jetspec_hf": __version__,
        },
        "prompts": {
            name: {"num_prompts": len(rows), "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
            for name, rows in prompts.items()
        },
    }


def _describe_model(model: PreTrainedModel) -> dict[str, Any]:
    # Two parts make a Hub id, and of a local folder no more than is needed to know it again.
    return {"name": "/".join(Path(model.name_or_path).parts[-2:]), "num_parameters": model.num_parameters()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
