"""Random sizes, cuts, layouts, rows and threads, on every instruction set: the CPU backend is the reference."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.backends import test_cpu as cpu
from tests.backends.cases import instruction_sets, normal, packed, poisoned
from torch import Tensor

from resq.backends.cpu import CPU, native, operators
from resq.backends.reference import REFERENCE
from resq.numerics.affine import Quantized, quantize
from resq.numerics.bands import PACKABLE_BITS, Bands
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear
from resq.numerics.maps import Dense, LinearMap, PerHead

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before, threads = native.module().active(), torch.get_num_threads()
    native.use(request.param)
    try:
        with poisoned():
            yield request.param
    finally:
        native.use(before)
        torch.set_num_threads(threads)


class Dice(random.Random):
    """Draws that `name` and `number` determine."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(zlib.crc32(f"{name} {number}".encode()))

    def size(self, most: int) -> int:
        """Small sizes, sizes around multiples of 8, 16, 32 and 64, and any."""
        unit = self.choice([1, 1, 8, 16, 32, 64])
        near = unit * self.randint(1, max(1, most // unit)) + self.choice([0, 0, -1, 1])
        return min(most, max(1, self.choice([near, near, self.randint(1, most), self.randint(1, min(most, 9))])))

    def bands(self, size: int, most: int, multiple: int = 1) -> Bands:
        """A cut of `size` coordinates into up to `most` bands, each a multiple of `multiple`."""
        units = size // multiple
        inner = sorted(self.sample(range(1, units), min(self.randint(0, most - 1), units - 1)))
        ends = [0, *inner, units]
        return Bands.of(*((self.choice(PACKABLE_BITS), (b - a) * multiple) for a, b in pairwise(ends)))

    def finer(self, bands: Bands) -> Bands:
        """A cut that lies inside `bands`."""
        return Bands(tuple(part for band in bands for part in self.bands(band.size, self.choice([1, 1, 3]))))

    def widths(self, bands: Bands) -> Bands:
        """The same cut with other widths."""
        return Bands.of(*((self.choice(PACKABLE_BITS), band.size) for band in bands))

    def clip(self, bands: Bands | None) -> tuple[float, ...] | None:
        """None, or what the ranges of each band are multiplied by."""
        if bands is None or self.random() < 0.4:
            return None
        return tuple(self.choice([1.0, 0.93, 0.8, 0.5, self.uniform(1e-3, 1)]) for _ in bands)

    def fresh(self) -> int:
        return self.randint(0, 2**31)


def placed(dice: Dice, q: Tensor) -> Tensor:
    """The same bytes elsewhere: unaligned, in wider rows, columns or rows apart, or at the end of their memory."""
    rows, n = q.shape
    match dice.randint(0, 3):
        case 0:
            left, right = dice.randint(0, 70), dice.randint(0, 140)
            room = torch.full((rows, left + n + right), dice.choice([0, 255]), dtype=torch.uint8)
            room[:, left : left + n] = q
            return room[:, left : left + n]
        case 1:
            apart = torch.full((rows, 2 * n), 255, dtype=torch.uint8)
            apart[:, ::2] = q
            return apart[:, ::2]
        case 2:
            apart = torch.full((3 * rows, n), 255, dtype=torch.uint8)
            apart[::3] = q
            return apart[::3]
        case _:
            return q.clone()


def quantized(dice: Dice, rows: int, bands: Bands, groups: int) -> Quantized:
    x = normal(rows, bands.size, seed=dice.fresh()) * dice.choice([1e-3, 1, 50]) + dice.choice([0, 0, 2])
    made = quantize(x, bands, groups=groups)
    for row in range(rows):
        if dice.random() < 0.2:  # the ends of the integers and of the zero points, together and apart
            top = torch.cat([torch.full((band.size,), 2**band.bits - 1) for band in bands])
            made.q[row] = dice.choice([0, 1]) * top
            tops = torch.tensor([2**band.bits - 1 for band in bands])[:, None]
            made.zero[row] = dice.choice([0, 1]) * tops
    return replace(made, q=placed(dice, made.q))


def one_linear(dice: Dice) -> None:
    groups = dice.choice([1, 1, 1, 2, 5, 8])
    size = max(1, dice.size(dice.choice([64, 300, 1200])) // groups) * groups
    inputs = dice.bands(size, 3, groups)
    weights = dice.widths(inputs) if groups > 1 else dice.finer(inputs)
    linear = packed(weights, dice.size(150), bias=dice.random() < 0.5, seed=dice.fresh())
    rows = dice.choice([0, 1, 2, 4, 5, 12, 13, 16, 17, 31, 32, 33, 40, dice.randint(1, 100)])
    torch.set_num_threads(dice.choice([1, 1, 1, 1, 2, 3]))
    weight, x = (
        cpu.prepacked(linear, ActivationFormat(bands=inputs, groups=groups)),
        quantized(dice, rows, inputs, groups),
    )
    if rows:
        assert torch.equal(operators.accumulate(x, weight), cpu.exact_sums(x, linear))
    onto = normal(rows, linear.shape[0], seed=dice.fresh()) if dice.random() < 0.5 else None
    want = REFERENCE.linear(x, cpu.unpacked(linear), onto)
    cpu.assert_within(CPU.linear(x, weight, onto), want, cpu.quantized_bound(x, linear, onto))
    if rows > 1:
        at = dice.randint(0, rows - 1)
        alone = CPU.linear(cpu.rows_of(x, slice(at, at + 1)), weight, None if onto is None else onto[at : at + 1])
        assert torch.equal(alone[0], CPU.linear(x, weight, onto)[at])


def one_plain_linear(dice: Dice) -> None:
    out, size, rows = dice.size(150), dice.size(600), dice.size(40)
    dtype = dice.choice([torch.float32, torch.bfloat16, torch.float16])
    linear = DenseLinear(normal(out, size, seed=dice.fresh()).to(dtype), normal(out) if dice.random() < 0.5 else None)
    x, onto = normal(rows, size, seed=dice.fresh()), dice.choice([None, normal(rows, out, seed=dice.fresh())])
    torch.set_num_threads(dice.choice([1, 1, 1, 1, 2, 3]))
    got = CPU.linear(
        x, CPU.prepack(replace(linear, weight=dice.choice(list(cpu.placed(linear.weight).values())))), onto
    )
    cpu.assert_within(got, REFERENCE.linear(x, linear, onto), cpu.dense_bound(x, linear, onto))


def drawn_map(dice: Dice, size: int) -> LinearMap | None:
    parts = [n for n in range(2, min(size, 40)) if size % n == 0 and size // n > 1]
    kinds: list[Any] = [None, cpu.shuffled(size), cpu.turned(size)]
    kinds += [cpu.turned(size // n, n) for n in parts[:3]]
    if size <= 300:
        matrix = cpu.orthogonal(size)
        kinds += [Dense(matrix), Dense(matrix.float())]
    kinds += [PerHead(cpu.orthogonal(size // n, n).float()) for n in parts[-1:] if size // n <= 150]
    return dice.choice(kinds)


def one_activation(dice: Dice) -> None:
    groups = dice.choice([1, 1, 1, 2, 4])
    size = max(1, dice.size(dice.choice([64, 200, 700])) // groups) * groups
    map = drawn_map(dice, size)
    bands = dice.choice([None, dice.bands(size, 4, groups)])
    half = dice.choice([torch.float32, torch.float16])
    bits = dice.choice([None, None, 8, 4])
    format = ActivationFormat(map, bands, groups if bands else 1, half, bits, dice.clip(bands))
    source, rows = dice.choice(cpu.SOURCES), dice.choice([1, 2, 7, 8, 9, 17])
    shift = dice.fresh()
    inputs = tuple(
        x + normal(*x.shape, seed=shift + index) * dice.choice([0.1, 3])
        for index, x in enumerate(source.inputs(rows, size))
    )
    torch.set_num_threads(dice.choice([1, 1, 1, 1, 2, 3]))
    cpu.assert_like_the_reference(source, inputs, format, cpu.norm_of(size, dice.randint(0, 3)))


def drawn_format(dice: Dice, size: int) -> ActivationFormat:
    if dice.random() < 0.2:
        return PLAIN
    bands = dice.bands(size, 4)
    scale_dtype = dice.choice([torch.float16, torch.float32])
    return ActivationFormat(bands=bands, scale_dtype=scale_dtype, clip=dice.clip(bands))


def one_attention(dice: Dice) -> None:
    size = dice.choice([2, 4, 6, 8, 16, 20, 34, 64, 80, 96, 128])
    kv_heads = dice.choice([1, 2, 3])
    map = dice.choice([None, cpu.turned(size), cpu.shuffled(size), Dense(cpu.orthogonal(size).float())])
    bits = dice.choice([None, 8])
    norm = dice.choice([None, Norm(1e-6, normal(size, seed=3) + 2), Norm(1e-5)])
    formats = HeadFormats(
        ActivationFormat(map, map_input_bits=bits),
        replace(drawn_format(dice, size), map=map, map_input_bits=bits),
        drawn_format(dice, size),
        norm,
        dice.choice([None, norm]),
    )
    layer = cpu.Heads(size, kv_heads * dice.choice([1, 2, 3, 7]), kv_heads, formats)
    batch = dice.choice([1, 2, 3])
    mine, theirs = cpu.new_cache(layer), REFERENCE.cache(formats)
    for number in range(dice.randint(1, 4)):
        torch.set_num_threads(dice.choice([1, 1, 1, 1, 2, 3]))
        tokens = dice.choice([1, 1, 2, 17, dice.randint(1, 40), dice.choice([100, 520])])
        parts = layer.drawn(batch, tokens, seed=dice.fresh())
        got = cpu.append(layer, mine, parts)
        cpu.append(layer, theirs, parts, REFERENCE)
        cpu.assert_caches_equal(mine, theirs)
        starts = dice.choice([None, [dice.randint(0, mine.length) for _ in range(batch)]])
        window = dice.choice([None, None, dice.randint(1, mine.length + 5)])
        last = min(tokens, dice.choice([1, 3, 8]))
        cpu.check_attention(layer, mine, got[:, -last:], starts, window)
        if number == 1:
            length = dice.randint(1, mine.length)
            rows = torch.tensor([dice.randint(0, batch - 1) for _ in range(batch)])
            for cache in (mine, theirs):
                cache.crop(length)
                cache.select(rows)


# What to draw, and how often: some 10 s for each instruction set on one core.
KINDS: dict[str, tuple[Callable[[Dice], None], int]] = {
    "linear": (one_linear, 200),
    "plain-linear": (one_plain_linear, 150),
    "activation": (one_activation, 200),
    "attention": (one_attention, 80),
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_cases_are_as_in_the_reference(kind: str) -> None:
    check, count = KINDS[kind]
    for number in range(count):
        try:
            check(Dice(kind, number))
        except Exception as error:
            error.add_note(f"{kind} {number}, {native.module().active()}")
            raise
