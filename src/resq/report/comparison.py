"""What `resq compare` left, as the report looks at it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from resq.cases import BASE, ROW, Plan, Row
from resq.errors import InputError
from resq.measure.ledger import Ledger
from resq.measure.perplexity import Interval, paired_interval
from resq.models.source import read_object

# Recipes whose rank was changed are named so; resq itself is one of the series.
SWEPT = re.compile(r"resq(-rank-.+)?")
LAST = re.compile(r"last (\d+(?:/\d+)?) 8 bit")
# A low band of this width is what the report looks at closest, where it was compared.
USUAL = 4


@dataclass(frozen=True)
class Case:
    """A row that was finished, beside what it left in `directory`."""

    row: Row
    directory: Path

    @property
    def name(self) -> str:
        """The case's."""
        return clean(self.row.case)

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return clean(self.row.recipe)

    @property
    def bits(self) -> int | None:
        """Width of the low band that was asked for; None for the recipe's own."""
        return self.row.bits

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        assert self.row.perplexity is not None
        return self.row.perplexity

    @property
    def delta(self) -> Interval:
        """Loss above 16 bit, nats per token."""
        assert self.row.delta is not None
        return self.row.delta

    @property
    def kl(self) -> float:
        """KL divergence of 16 bit from it, nats per token."""
        assert self.row.kl is not None
        return self.row.kl.mean

    @property
    def book(self) -> Ledger:
        """True bits and bytes."""
        assert self.row.ledger is not None
        return self.row.ledger

    @property
    def true_bits(self) -> tuple[float, float, float, float]:
        """Of weights, inputs, keys, values; scales and zero points included."""
        book = self.book
        return book.weight_bits, book.activation_bits, book.key_bits, book.value_bits

    @property
    def mean_bits(self) -> float:
        """Their mean."""
        return sum(self.true_bits) / 4

    def rank(self, hidden: int) -> float | None:
        """The share of `hidden` coordinates that resq keeps in 8 bit, 0 for none; None for other recipes."""
        if not SWEPT.fullmatch(self.row.recipe):
            return None
        found = LAST.search(self.row.key["recipe"]["precision"]["weights"])
        part = Fraction(found[1]) if found else Fraction(0)
        return float(part if part < 1 else part / hidden)

    @cached_property
    def tokens(self) -> dict[str, Tensor]:
        """nll and kl float32 [windows, length - 1], agreement bool; of 16 bit nll, and tokens int64 [windows, length].
        Raises InputError when they are not there."""
        file = self.directory / "tokens.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read ({error}); run resq compare again") from error

    @property
    def checkpoint(self) -> Path | None:
        """The packed checkpoint where it was kept."""
        path = self.directory / "checkpoint"
        return path if path.is_dir() else None

    def against(self, other: Case) -> Interval:
        """Mean difference in nats per token, paired over windows."""
        ours, theirs = (case.tokens["nll"].double().mean(dim=1) for case in (self, other))
        return paired_interval(ours, theirs)


@dataclass(frozen=True)
class Comparison:
    """base: 16 bit; cases: all others that were finished, in order; failed: names and reasons of those that were not.
    facts: what compare.json says of source, windows and provenance."""

    directory: Path
    plan: Plan
    facts: dict[str, Any]
    base: Case
    cases: tuple[Case, ...]
    failed: dict[str, str]

    @property
    def name(self) -> str:
        """The source's."""
        return clean(str(self.facts["source"]["name"]))

    @property
    def swept(self) -> list[tuple[float, Case]]:
        """resq and its variants of another rank, by the share of coordinates in 8 bit."""
        hidden = self.facts["source"]["shape"]["hidden"]
        found = [(share, case) for case in self.cases if (share := case.rank(hidden)) is not None]
        return sorted(found, key=lambda each: each[0])

    @property
    def width(self) -> int | None:
        """The low band that the report looks at closest: 4 bit where it was asked for, else the first."""
        widths = [case.bits for case in self.cases]
        return USUAL if USUAL in widths else widths[0]

    @property
    def seed(self) -> int:
        """The seed of the cases that the report looks at closest: the first."""
        return self.cases[0].row.seed

    @property
    def focus(self) -> list[Case]:
        """The cases with that low band and seed, one for each recipe."""
        return [case for case in self.cases if case.bits == self.width and case.row.seed == self.seed]


def clean(text: str) -> str:
    """The text on one line, characters that cannot be shown replaced: names come from outside."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def width_name(bits: int | None) -> str:
    """A low band in words."""
    return "the recipe's own width" if bits is None else f"{bits} bit"


def read(directory: Path) -> Comparison:
    """Everything in a directory that `resq compare` wrote. Raises InputError when it is none, or holds no case yet."""
    facts_file, rows_file = directory / "compare.json", directory / "rows.jsonl"
    for file in (facts_file, rows_file):
        if not file.is_file():
            raise InputError(f"{directory} has no {file.name}; give a directory that resq compare wrote")
    facts = read_object(facts_file)
    try:
        known = {field.name for field in fields(Plan)}
        plan = Plan(**{key: _tuples(value) for key, value in facts["plan"].items() if key in known})
        rows = [ROW.validate_json(line) for line in rows_file.read_bytes().splitlines()]
        for topic in ("source", "windows", "provenance"):
            facts[topic].items()
        facts["source"]["shape"]["hidden"].bit_length()
    except (ValidationError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{directory} was not written by this resq's compare ({error!r}); run it again") from error
    if strange := [row.case for row in rows if Path(row.case).name != row.case]:
        raise InputError(f"{rows_file} names a case {clean(strange[0])}, which is no name of a folder; run it again")
    base, *others = [Case(row, directory / "cases" / row.case) for row in rows if row.failed is None] or [None]
    if base is None or base.row.recipe != BASE or not others:
        raise InputError(f"{directory} holds no finished case beside 16 bit; run resq compare on it first")
    failed = {clean(row.case): clean(row.failed) for row in rows if row.failed is not None}
    return Comparison(directory, plan, facts, base, tuple(case for case in others if case is not None), failed)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def widths(cases: Sequence[Case]) -> list[int | None]:
    """The low bands of some cases, widest first, the recipes' own last."""
    return sorted({case.bits for case in cases}, key=lambda bits: -(bits or 0))
