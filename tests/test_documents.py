"""What the documents point at is there: links, files, options of commands; and the README's lines run."""

import importlib
import re
import shlex
import typing
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from jetspec_hf.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "model_cards")
    for path in (ROOT / folder).glob("*.md")
)
RENAMED = {"activation_checkpointing", "gradient_checkpointing"}  # in transformers 5.23


def anchors_of(document: Path) -> set[str]:
    """The headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / document).read_text()):
        path, _, anchor = link.partition("#")
        found = (ROOT / document).parent / path if path else ROOT / document
        assert found.exists(), link
        assert not anchor or anchor in anchors_of(found), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document: str) -> None:
    text = (ROOT / document).read_text()
    for path in re.findall(r"\b(?:examples|tests|jetspec_hf)/[\w/]+\.\w+(?:\.gz)?", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?!examples|tests|jetspec_hf)[\w/]+\.py)`", text):
        assert any((ROOT / "jetspec_hf").rglob(path)), path


def commands_in(document: str) -> list[list[str]]:
    """The words of each `jetspec` command in a block of shell."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("jetspec ")]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if commands_in(document)])
def test_commands_have_the_options_that_are_shown(document: str) -> None:
    for _, name, *words in commands_in(document):
        command = COMMANDS[name]
        run = getattr(importlib.import_module(f"jetspec_hf.{command.module}"), command.function)
        hints = typing.get_type_hints(run)
        known = HfArgumentParser([hint for parameter, hint in hints.items() if parameter != "return"])
        options = {option.removeprefix("--") for option in known._option_string_actions}
        if any(isinstance(hint, type) and issubclass(hint, TrainingArguments) for hint in hints.values()):
            options |= RENAMED
        assert {word.removeprefix("--") for word in words if word.startswith("--")} <= options, name


def test_the_readme_s_ten_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)[1]
    pair = ROOT / "examples/demo_pair"
    for shown, here in {
        "Qwen/Qwen3-8B": f"{pair}/target",
        "hao-ai-lab/jetspec-qwen3-8b": f"{pair}/head",
        "=512": "=8",
    }.items():
        assert shown in code
        code = code.replace(shown, here)
    exec(code, {})
    assert "What is 17 * 24?" in capsys.readouterr().out
