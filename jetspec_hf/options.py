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
        value = getattr(options, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not one >= bound:
                raise ValueError(f"`{name}` must be at least {bound}; got {one}.")
