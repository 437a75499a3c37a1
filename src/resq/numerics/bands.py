"""Bands: contiguous ranges of coordinates with one bit width each, least important first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import nan

from resq.errors import InputError

PACKABLE_BITS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Band:
    """`size` coordinates stored with `bits` bits each."""

    bits: int
    size: int

    def __post_init__(self) -> None:
        if self.bits not in PACKABLE_BITS:
            raise InputError(f"a band has {self.bits} bits; accepted are {', '.join(map(str, PACKABLE_BITS))}")
        if self.size < 1:
            raise InputError(f"a band holds {self.size} coordinates; it needs at least 1")


@dataclass(frozen=True)
class Bands:
    """A cut of a dimension: `Bands((Band(4, 224), Band(8, 32)))`; the last band is the most precise."""

    bands: tuple[Band, ...]

    def __post_init__(self) -> None:
        if not self.bands:
            raise InputError("a dimension was cut into no bands; it needs at least one")

    @classmethod
    def of(cls, *pairs: tuple[int, int]) -> Bands:
        """`Bands.of((4, 224), (8, 32))`: pairs of (bits, size)."""
        return cls(tuple(Band(bits, size) for bits, size in pairs))

    def __iter__(self) -> Iterator[Band]:
        return iter(self.bands)

    def __len__(self) -> int:
        return len(self.bands)

    @property
    def size(self) -> int:
        """Coordinates in all bands together."""
        return sum(band.size for band in self.bands)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """[(bits, size), …], the form stored in a manifest."""
        return [(band.bits, band.size) for band in self.bands]

    @property
    def bits_per_value(self) -> float:
        """Mean bits of one coordinate, scales and zero points not counted."""
        return sum(band.bits * band.size for band in self.bands) / self.size

    def slices(self) -> list[slice]:
        """The coordinate range of every band, in order."""
        ranges, start = [], 0
        for band in self.bands:
            ranges.append(slice(start, start + band.size))
            start += band.size
        return ranges

    def repeated(self, times: int) -> Bands:
        """The bands of `times` concatenated groups after their coordinates were gathered band by band."""
        return Bands(tuple(Band(band.bits, band.size * times) for band in self.bands))


@dataclass(frozen=True)
class Layout:
    """Bit widths by fraction of a dimension, or by count; becomes `Bands` at a given size.

    `Layout(4, ((8, Fraction(1, 8)),))`: the last 1/8 in 8 bit, the rest in 4; `Layout(4, ((8, 16),))`: the last 16
    coordinates (of each head, where there are heads). `low` is the width of the coordinates no other part names.
    `first` parts come before the low band (the paper's iso-bit mode: the first 1/8 in 2 bit).
    """

    low: int
    last: tuple[tuple[int, Fraction | int], ...] = ()
    first: tuple[tuple[int, Fraction | int], ...] = ()

    def bands(self, size: int, multiple: int = 1) -> Bands:
        """Bands of a dimension of `size`; each named part is rounded to the nearest positive multiple of `multiple`.

        Raises InputError when the parts leave nothing for the low band.
        """

        def count(part: Fraction | int) -> int:
            wanted = part if isinstance(part, int) else part * size
            return max(1, round(Fraction(wanted, multiple))) * multiple

        first = [(bits, count(fraction)) for bits, fraction in self.first]
        last = [(bits, count(fraction)) for bits, fraction in self.last]
        low = size - sum(n for _, n in first + last)
        if low < 1:
            asked = ", ".join(f"{part} in {bits} bit" for bits, part in self.parts)
            raise InputError(
                f"bands {asked} (in multiples of {multiple}) leave {low} of {size} coordinates for the low band; "
                "it needs at least 1: use smaller fractions"
            )
        return Bands.of(*first, (self.low, low), *last)

    @property
    def parts(self) -> tuple[tuple[int, Fraction | int], ...]:
        """The named parts; none for uniform precision."""
        return self.first + self.last

    @property
    def mean_bits(self) -> float:
        """Bits of a value on average, by the fractions alone; not a number where a part is a count."""
        if any(isinstance(part, int) for _, part in self.parts):
            return nan
        return float(self.low + sum((bits - self.low) * part for bits, part in self.parts))

    @property
    def cut(self) -> tuple[tuple[Fraction | int, ...], tuple[Fraction | int, ...]]:
        """Where the dimension is cut, whatever the widths."""
        return tuple(part for _, part in self.first), tuple(part for _, part in self.last)

    def with_rank(self, rank: Fraction | int) -> Layout:
        """The same with another size of the last part, which has 8 bits where there was none; 0 takes it away."""
        if rank == 0:
            return Layout(self.low, (), self.first)
        bits = self.last[-1][0] if self.last else 8
        return Layout(self.low, (*self.last[:-1], (bits, rank)), self.first)

    def with_low(self, bits: int) -> Layout:
        """The same cut with `bits` bits in the low band (the stress setting `--bits 3`).

        Parts before the low band make up for those after it, so that all move together: 2, 4, 6 become 1, 3, 5 and
        the mean is the low width again.
        """
        step = bits - self.low if self.first else 0
        moved = [tuple((width + step, part) for width, part in parts) for parts in (self.last, self.first)]
        return Layout(bits, *moved)

    def __str__(self) -> str:
        parts = [*(f"first {f} {b} bit" for b, f in self.first), f"{self.low} bit"]
        return ", ".join([*parts, *(f"last {f} {b} bit" for b, f in self.last)])


INT4 = Layout(4)
INT8 = Layout(8)
INT4_INT8 = Layout(4, ((8, Fraction(1, 8)),))


def cuts(size: int, width: int) -> list[slice]:
    """0 … size - 1 in slices of `width`, the last one maybe shorter."""
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]
