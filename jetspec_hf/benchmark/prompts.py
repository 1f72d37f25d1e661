"""What a benchmark asks."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..files.json_lines import read_rows


def read_prompts(paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """Read prompt sets from JSON-lines files (`.jsonl`, `.jsonl.gz`) whose rows have `prompt`.

    Returns:
        `dict[str, list[str]]`: file name without ending -> its prompts.

    Raises:
        ValueError: if a file holds no row or a row that is no JSON object with words as its `prompt`, or if two files
            have the same name.
    """
    sets: dict[str, list[str]] = {}
    for path in map(Path, paths):
        name = Path(path.name.removesuffix(".gz")).stem
        if name in sets:
            raise ValueError(f"Two prompt files are named {name!r}; rename one, since tables go by file name.")
        form = 'every line must look like {"prompt": "What is 17 * 24?"}.'
        sets[name] = []
        for number, row in read_rows(path):
            prompt = row.get("prompt")
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"Row {number} of {str(path)!r} has the `prompt` {json.dumps(prompt)}; {form}")
            sets[name].append(prompt)
        if not sets[name]:
            raise ValueError(f"{str(path)!r} is empty; {form}")
    return sets
