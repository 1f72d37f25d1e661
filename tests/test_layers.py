"""The plan of the package: what may import what, and how large its parts are."""

import ast
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import jetspec_hf

ROOT = Path(jetspec_hf.__file__).parent
# Each folder, or module outside of one, and what else it may import of the package: only what stands above it here.
MODELS = {"upstream", "tree", "head", "cache", "target", "pair", "compiling"}
LAYERS: dict[str, set[str]] = {
    "version": set(),
    "upstream": set(),
    "tree": set(),
    "head": set(),  # travels to the Hub
    "files": set(),
    "ranges": set(),
    "compiling": {"upstream"},
    "cache": {"upstream"},
    "target": {"upstream", "head", "files", "cache"},
    "pair": {"cache", "target"},
    "drafting": MODELS,
    "verification": MODELS,
    "decoding": MODELS | {"drafting", "verification"},
    "training": MODELS | {"files", "ranges", "drafting", "decoding"},
    "benchmark": MODELS | {"version", "files", "ranges", "drafting", "decoding"},
    "cli": set(),  # imports a command when it is called
    "__main__": {"cli"},
}
LAYERS["__init__"] = set(LAYERS)
# What may be imported of others, where that is not everything.
OTHERS: dict[str, set[str]] = {
    "version": set(),
    "ranges": set(),
    "tree": {"torch"},
    "head": {"torch", "transformers", "huggingface_hub", "safetensors"},
}
# Imports inside of functions: of modules that need an optional package.
LAZY = {("benchmark/folder.py", "benchmark/plots.py"), ("training/commands.py", "training/plots.py")}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    return name_of(path).partition("/")[0].removesuffix(".py")


def file_of(dotted: list[str]) -> Path | None:
    """The file of a module of the package, by its name within the package."""
    place = ROOT.joinpath(*dotted)
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def imports_of(path: Path) -> Iterator[tuple[ast.stmt, Path | str]]:
    """Every import statement of a file, with the file of ours, or the package of others, that it names."""
    folder = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.partition(".")[0] != "jetspec_hf", f"{name_of(path)}: imports of our own are relative"
                yield node, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            assert node.module.partition(".")[0] != "jetspec_hf", f"{name_of(path)}: imports of our own are relative"
            yield node, node.module.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                found = file_of([*start, alias.name]) or file_of(start)
                assert found is not None, f"{name_of(path)} imports {alias.name} from nowhere"
                yield node, found


def ours_of(path: Path) -> set[Path]:
    return {found for _, found in imports_of(path) if isinstance(found, Path)}


def test_every_module_has_its_place() -> None:
    assert {layer_of(path) for path in modules()} == set(LAYERS)


def test_no_layer_may_import_what_stands_below_it() -> None:
    above: set[str] = set()
    for layer, allowed in LAYERS.items():
        assert allowed <= above, layer
        above.add(layer)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_follow_the_plan(path: Path) -> None:
    layer = layer_of(path)
    for found in ours_of(path):
        is_sibling = layer_of(found) == layer and found.parent == path.parent != ROOT
        assert is_sibling or layer_of(found) in LAYERS[layer], f"{name_of(path)} may not import {name_of(found)}"
    others = {found for _, found in imports_of(path) if isinstance(found, str)} - sys.stdlib_module_names
    assert others <= OTHERS.get(layer, others), f"{name_of(path)} may not import {others - OTHERS[layer]}"


def test_no_imports_go_in_a_circle() -> None:
    left = {path: ours_of(path) - {path} for path in modules()}
    while left:
        free = {path for path, needs in left.items() if not needs & left.keys()}
        assert free, f"in a circle: {', '.join(sorted(map(name_of, left)))}"
        left = {path: needs for path, needs in left.items() if path not in free}


def test_imports_stand_at_the_top_of_a_file() -> None:
    inside = set()
    for path in modules():
        at_the_top = set(parsed(path).body)
        for node, found in imports_of(path):
            if isinstance(found, Path) and node not in at_the_top:
                inside.add((name_of(path), name_of(found)))
    assert inside == LAZY


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_functions_fit_on_a_screen_and_half_of_them_are_short() -> None:
    sizes = {
        f"{name_of(path)}:{one.name}:{one.lineno}": lines_of(one) for path in modules() for one in functions_of(path)
    }
    assert [name for name, size in sizes.items() if size > 60] == []
    assert statistics.median(sizes.values()) <= 9


def test_few_attributes_are_probed_for() -> None:
    probes = [
        f"{name_of(path)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    ]
    assert len(probes) <= 0.03 * sum(len(functions_of(path)) for path in modules()), probes
