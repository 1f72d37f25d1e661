"""Knowing one's own files again."""

import json
from pathlib import Path

import pytest

from jetspec_hf.files.records import check_free, check_same, read_own_rows, read_record, write_whole


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    check_free([tmp_path / "b.txt", tmp_path / "new/folder/c.txt"])
    for file in ("a.txt", "a.txt/b/c.txt"):
        with pytest.raises(ValueError, match=r"a\.txt' is there already"):
            check_free([tmp_path / "b.txt", tmp_path / file])
    with pytest.raises(ValueError, match=f"{tmp_path.name}' is there already"):
        check_free([tmp_path])


@pytest.mark.parametrize("content", [None, "{}", "[1]", "no JSON", '{"target": 1}'])
def test_files_are_one_s_own_if_a_record_says_so(tmp_path: Path, content: str | None) -> None:
    record, file = tmp_path / "record.json", tmp_path / "file"
    assert read_record(record, ["target", "length"], [file]) is None
    file.touch()
    if content is not None:
        record.write_text(content)
    with pytest.raises(ValueError, match="is there already"):
        read_record(record, ["target", "length"], [file])
    write_whole(record, json.dumps({"target": 1, "length": 2, "more": 3}).encode())
    assert read_record(record, ["target", "length"], [file]) == {"target": 1, "length": 2, "more": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", "file"}


def test_other_settings_are_named_with_short_values() -> None:
    held = {"length": 2, "target": "a" * 64, "prompts": 1}
    check_same(held, dict(held), Path("o"))
    with pytest.raises(
        ValueError, match=r"'o' was made under other settings \(length: 2 there, 3 now; target\); repeat"
    ):
        check_same(held, held | {"length": 3, "target": "b" * 64}, Path("o"))
    with pytest.raises(ValueError, match="prompts: 1 there, None now"):
        check_same(held, {"length": 2, "target": "a" * 64}, Path("o"))


def test_a_half_written_row_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_own_rows(path, {"a"}) == ([], 0)
    path.write_text('{"a": 1}\n{"a": ')
    assert read_own_rows(path, {"a"}) == ([{"a": 1}], 9)
    with pytest.raises(ValueError, match=r"Row 1 of .* has the columns a, where this command writes b"):
        read_own_rows(path, {"b"})
    assert path.read_text() == '{"a": 1}\n{"a": '
