"""The folder that a benchmark writes, and goes on from.

It holds

- `options.json`: what was asked for and where it runs, written at the start.
- `results.jsonl`: one [`~jetspec_hf.benchmark.measurement.Measurement`] a line, written as soon as it is taken. A run
  that was killed goes on from here.
- `report.json`: written at the end,

      date             when the run began, UTC
      target, head     name (at most two parts of a path) and num_parameters
      options          the fields of `BenchmarkOptions`
      environment      cpu, cores, gpu, device, dtype, threads, batch_size, torch, transformers, jetspec_hf
      prompts          name of each prompt set -> num_prompts, sha256 of them
      peak_memory_bytes  the most of all methods
      prompt_sets      name of each prompt set -> num_prompts, methods: name -> fields of `Summary`,
                       `ratio` as value, low, high; `tokens_per_round` beside `break_even`, the tokens per round
                       at which the method is as fast as plain decoding
      all              the same over all sets together

- `report.md`: the same as tables.
- `nodes.png`, `phases.png`, `acceptance.png`: where matplotlib is installed.
"""

import importlib.util
import json
import os
import warnings
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..files.records import check_same, read_own_rows, read_record, write_whole
from .measurement import Measurement
from .report import to_markdown

RESULTS = "results.jsonl"
_RECORD = "options.json"
_COLUMNS = {field.name for field in fields(Measurement)}
_SETTINGS = ("target", "head", "options", "environment", "prompts")
_REPORTS = ("report.json", "report.md", "nodes.png", "phases.png", "acceptance.png")


def check_results_folder(folder: str | Path) -> None:
    """Refuse a folder that a benchmark would not write to, before anything is loaded.

    Raises:
        ValueError: if it holds a file that a benchmark would write over and did not make.
    """
    _read_settings(Path(folder))
    read_own_rows(Path(folder) / RESULTS, _COLUMNS)


def claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write down what the folder is for, or check that it is for the same.

    Args:
        folder (`Path`): made if missing.
        settings (`dict`): what [`~jetspec_hf.benchmark.setting.describe`] gives.

    Returns:
        `dict`: the settings with the date of the start.

    Raises:
        ValueError: if the folder is for other settings, or holds files of the same names that are none of a benchmark.
    """
    held = _read_settings(folder)
    if held is None:
        held = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")} | settings
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _RECORD, (json.dumps(held, indent=2) + "\n").encode())
    there, now = (
        {f"{part} {name}": value for part in _SETTINGS for name, value in parts[part].items()}
        for parts in (held, settings)
    )
    check_same(there, now, folder)
    return held


def read_measurements(path: Path) -> list[Measurement]:
    """Read `results.jsonl`, and cut off a line that was being written when its run was killed.

    Raises:
        ValueError: if a line is no measurement; then nothing is cut off.
    """
    rows, num_bytes = read_own_rows(path, _COLUMNS)
    if path.exists():
        os.truncate(path, num_bytes)
    return [Measurement(**row) for row in rows]


def add_measurement(measurement: Measurement, results: Path) -> None:
    """Write a measurement to the end of `results.jsonl`."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(measurement)) + "\n")


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write what [`~jetspec_hf.benchmark.report.make_report`] gives, in all forms."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    _save_plots(report, folder)


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """What the folder is for; `None` if nothing is there."""
    return read_record(folder / _RECORD, _SETTINGS, [folder / name for name in (RESULTS, *_REPORTS)])


def _save_plots(report: dict[str, Any], folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn(
            "The report was written without pictures; `pip install jetspec_hf[bench]` brings what draws them.",
            stacklevel=4,
        )
        return
    from .plots import save_plots  # needs matplotlib, which is optional

    save_plots(report, folder)
