"""Checks of what users give to optimizers.

Promises that what is refused is named with its value.
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch

from everstep.proto.errors import InvalidConfiguration


def number(group: dict[str, Any], name: str) -> float:
    """An option as a finite number.

    Raises:
        InvalidConfiguration: If it is none.
    """
    value = group.get(name)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise InvalidConfiguration(name, f"{value!r} is not a finite number")
    return float(value)


def not_negative(group: dict[str, Any], *names: str) -> None:
    """Options are numbers that are at least 0.

    Raises:
        InvalidConfiguration: If one is not.
    """
    for name in names:
        if number(group, name) < 0:
            raise InvalidConfiguration(name, f"{group[name]!r} is negative")


def fraction(group: dict[str, Any], name: str) -> None:
    """An option is at least 0 and less than 1.

    Raises:
        InvalidConfiguration: If it is not.
    """
    if not 0 <= number(group, name) < 1:
        raise InvalidConfiguration(name, f"{group[name]!r} is not in [0, 1)")


def betas_of(group: dict[str, Any], count: int) -> None:
    """`betas` are so many numbers in [0, 1).

    Raises:
        InvalidConfiguration: If they are not.
    """
    betas = group.get("betas")
    if not isinstance(betas, Sequence) or len(betas) != count:
        raise InvalidConfiguration("betas", f"{betas!r} is not a sequence of {count} numbers")
    for place, beta in enumerate(betas):
        name = f"betas[{place}]"
        fraction({name: beta}, name)


def whole(group: dict[str, Any], *names: str, least: int = 0) -> None:
    """Options are whole numbers that are not too small.

    Raises:
        InvalidConfiguration: If one is not.
    """
    for name in names:
        value = group.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            problem = f"{value!r} is not a whole number of at least {least}"
            raise InvalidConfiguration(name, problem)


def flag(group: dict[str, Any], *names: str) -> None:
    """Options are True or False.

    Raises:
        InvalidConfiguration: If one is not.
    """
    for name in names:
        if not isinstance(group.get(name), bool):
            raise InvalidConfiguration(name, f"{group.get(name)!r} is neither True nor False")
