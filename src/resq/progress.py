"""How long work says how far it is: a callback (phase, done, total)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """Shows nothing."""
