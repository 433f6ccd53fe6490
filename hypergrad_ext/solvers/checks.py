"""Checks of settings that all solvers share."""

from __future__ import annotations

import numbers


def check_count(argument: str, value: object, minimum: int) -> None:
    """Refuse anything but an integer of at least ``minimum``.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is too small.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{argument}: expected at least {minimum}, got {value}")


def check_number(argument: str, value: object, *, positive: bool) -> None:
    """Refuse anything but a finite number, positive or at least not negative.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is out of range.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    number = float(value)
    if not (0 < number if positive else 0 <= number) or number == float("inf"):
        raise ValueError(f"{argument}: expected a finite number {'> 0' if positive else '>= 0'}, got {value}")


def check_tolerance(tol: float, steps: str = "max_steps") -> None:
    """Refuse anything but a number between 0 and 1, from which on ``x = 0`` meets it: steps in the wrong place.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is out of range.
    """
    check_number("tol", tol, positive=True)
    if tol >= 1:
        raise ValueError(f"tol: expected a number below 1, which x = 0 already meets, got {tol}; steps are {steps}=")
