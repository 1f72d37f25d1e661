"""JSON lines: objects, one a line, and errors that name the line that holds none."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file, plain or gzipped, each with its line number; blank lines are passed over.

    Raises:
        ValueError: names the first line that is not UTF-8 text or not a JSON object.
        OSError: if there is no such file, or a gzipped one is broken.
    """
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, parse_row(line, number, path)


def parse_row(line: bytes, number: int, path: str | Path) -> dict[str, Any]:
    """The object on one line.

    Raises:
        ValueError: if there is none; names the line and the file.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"Row {number} of {str(path)!r} is not UTF-8 text; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise _no_object(f"no JSON ({error.msg} at character {error.pos + 1})", number, path) from error
    if not isinstance(row, dict):
        raise _no_object(line.decode().strip()[:40], number, path)
    return row


def _no_object(what: str, number: int, path: str | Path) -> ValueError:
    return ValueError(
        f'Row {number} of {str(path)!r} is {what}; every line must look like {{"prompt": "What is 17 * 24?"}}.'
    )
