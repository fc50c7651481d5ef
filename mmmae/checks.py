"""Checks of numbers and choices that a user gives; each raises ValueError with name, value and what is expected."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

INTERVALS: dict[str, Callable[[float], bool]] = {
    "> 0": lambda number: number > 0,
    ">= 0": lambda number: number >= 0,
    "in [0, 1)": lambda number: 0 <= number < 1,
    "in (0, 1]": lambda number: 0 < number <= 1,
}


def is_whole(value: object, least: int) -> bool:
    """Return whether `value` is an int of at least `least`, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`."""
    if not is_whole(value, least):
        raise ValueError(f"{name} is {value!r}, expected a whole number >= {least}")


def check_number(name: str, value: object, interval: str) -> None:
    """Raise ValueError unless `value` is a finite number in one of the `INTERVALS`."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} has {len(str(abs(value)))} digits, expected a number {interval}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not INTERVALS[interval](value):  # type: ignore[arg-type]
        raise ValueError(f"{name} is {value!r}, expected a number {interval}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(map(str, choices))}")
