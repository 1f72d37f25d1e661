"""What a command made itself, and under which settings: it goes on with that, and writes over nothing else.

A command that may be stopped first writes a *record*, a JSON file of its settings beside its other files. Called again,
it knows by the record that they are its own, and compares the settings.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from .json_lines import parse_row

_LONGEST_SHOWN = 60  # characters of a setting; digests are longer, and say nothing to a reader


def check_free(files: Iterable[Path]) -> None:
    """Refuse to write files over others, or into what is no folder.

    Raises:
        ValueError: names what is in the way.
    """
    for file in files:
        found = next((path for path in (file, *file.parents) if path.exists()), None)
        if found is not None and (found == file or not found.is_dir()):
            raise ValueError(
                f"{str(found)!r} is there already, and nothing says that this command made it; "
                "write to another place, or move it away."
            )


def read_record(record: Path, settings: Iterable[str], files: Iterable[Path]) -> dict[str, Any] | None:
    """What an earlier run wrote down about `files`.

    Args:
        record (`Path`): where it wrote it.
        settings (`Iterable[str]`): names that its record must hold.
        files (`Iterable[Path]`): all that the command may write.

    Returns:
        `dict` or `None`: its settings; `None` where nothing is written yet.

    Raises:
        ValueError: if one of the files is there, and no record of the same command.
    """
    held = find_record(record, settings)
    if held is None:
        check_free([record, *files])
    return held


def find_record(record: Path, settings: Iterable[str]) -> dict[str, Any] | None:
    """What a file records; `None` if there is none, or it holds something else than these settings."""
    try:
        held = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) and held.keys() >= set(settings) else None


def check_same(held: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Refuse to go on with what was made under other settings.

    Raises:
        ValueError: names what differs, and both values where they are short.
    """
    differing = []
    for name in held | settings:
        values = held.get(name), settings.get(name)
        if values[0] != values[1]:
            is_short = all(len(str(value)) <= _LONGEST_SHOWN for value in values)
            differing.append(f"{name}: {values[0]} there, {values[1]} now" if is_short else name)
    if differing:
        raise ValueError(
            f"{str(path)!r} was made under other settings ({'; '.join(differing)}); "
            "repeat those to go on with it, or write to another place."
        )


def read_own_rows(path: Path, columns: Set[str]) -> tuple[list[dict[str, Any]], int]:
    """The rows of a JSON-lines file that a command wrote, and how many bytes they take.

    What follows them is a row that was being written when a run was killed. Nothing is changed.

    Raises:
        ValueError: if a row has other columns.
    """
    content = path.read_bytes() if path.exists() else b""
    num_bytes = content.rfind(b"\n") + 1
    rows = [parse_row(line, i, path) for i, line in enumerate(content[:num_bytes].splitlines(), start=1)]
    for number, row in enumerate(rows, start=1):
        if row.keys() != columns:
            raise ValueError(
                f"Row {number} of {str(path)!r} has the columns {', '.join(row)}, where this command writes "
                f"{', '.join(sorted(columns))}; write to another place, or move the file away."
            )
    return rows, num_bytes


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def digest_of(parts: Iterable[bytes]) -> str:
    """The sha256 of `parts`, which differs where their borders do."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()
