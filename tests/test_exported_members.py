"""`__all__` names what the package exports, and nothing else."""

import types

import jetspec_hf


def test_all_names_every_exported_member() -> None:
    exported = [
        name
        for name, member in vars(jetspec_hf).items()
        if not isinstance(member, types.ModuleType) and (name == "__version__" or not name.startswith("_"))
    ]
    assert sorted(exported) == jetspec_hf.__all__


def test_all_is_sorted_and_says_nothing_twice() -> None:
    assert jetspec_hf.__all__ == sorted(set(jetspec_hf.__all__))
