"""What a figure of the report is: one finding in words, a drawing, and its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as text, row by row; the first column names the row, the others are numbers unless `words` holds them."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """name: also the id. finding: one sentence that the numbers say. svg: for inlining."""

    name: str
    title: str
    finding: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Missing:
    """Why a figure is not there, in one sentence that says how to get it."""

    name: str
    title: str
    reason: str


Item = Figure | Missing


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on what its figures are about, and the figures."""

    name: str
    title: str
    about: str
    items: tuple[Item, ...]


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, a real minus: −0.0040."""
    return f"{value:+.{digits}f}".replace("-", "−")


def decibels(value: float | None) -> str:
    """25.1, and a dash where nothing is rounded."""
    return "–" if value is None else f"{value:.1f}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
