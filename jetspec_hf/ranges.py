"""Checks of the options of commands."""

from typing import Any


def check_at_least(options: Any, **least: float) -> None:
    """Refuse numbers that are too small.

    Args:
        options (`Any`): a dataclass; a field may be `None` or a list.
        least (`float`): for some of its fields, the least number.

    Raises:
        ValueError: names the first option that is below, with its value.
    """
    for name, bound in least.items():
        for value in _values(options, name):
            if not value >= bound:
                raise ValueError(f"`{name}` must be at least {bound}; got {value}.")


def check_above(options: Any, **bounds: float) -> None:
    """As [`check_at_least`], where the bound itself is too small, too."""
    for name, bound in bounds.items():
        for value in _values(options, name):
            if not value > bound:
                raise ValueError(f"`{name}` must be above {bound}; got {value}.")


def _values(options: Any, name: str) -> list[float]:
    value = vars(options)[name]
    return [one for one in (value if isinstance(value, list) else [value]) if one is not None]
