"""The CPU backend is the reference on every instruction set: integers bit for bit, the rest within float32 rounding.

Every test runs for each instruction set that this machine has. What operators allocate is filled beforehand with NaN,
or the largest integer, so that a value which no kernel wrote shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.backends.cases import (
    CUTS,
    instruction_sets,
    naive_attention,
    normal,
    packed,
    poisoned,
    stored_format,
)
from torch import Tensor

from resq.backends.backend import Activations
from resq.backends.cpu import CPU, native, operators
from resq.backends.cpu.cache import Cache
from resq.backends.cpu.formats import PackedWeight
from resq.backends.reference import REFERENCE, UnpackedLinear
from resq.backends.reference import accumulate as reference_accumulate
from resq.errors import InputError
from resq.numerics import hadamard
from resq.numerics.affine import Quantized, quantize, symmetric_limits
from resq.numerics.bands import PACKABLE_BITS, Bands
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, PackedLinear
from resq.numerics.maps import Dense, Hadamard, LinearMap, PerHead, Permutation, random_orthogonal

# Half the distance between neighbouring float32 numbers around 1: the relative error of one rounding.
ROUNDING = 2.0**-24
# The same for float64.
ROUNDING64 = 2.0**-53


@pytest.fixture(autouse=True, params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the test runs on."""
    before = native.module().active()
    native.use(request.param)
    try:
        with poisoned():
            yield request.param
    finally:
        native.use(before)


# --- linears: integers ---------------------------------------------------------------------------------------------


THREE = Bands.of((2, 30), (4, 57), (8, 13))
HEADS = Bands.of((4, 64), (6, 32), (8, 32))
# Whole steps of 64 columns, a last step of a few blocks, a last block of a few columns, all widths beside each other.
LONGER = CUTS | {
    "whole-steps": (Bands.of((4, 1792), (8, 256)), Bands.of((4, 1792), (8, 256)), 1),
    "last-block-of-4": (Bands.of((4, 1000), (8, 100)), Bands.of((4, 1000), (8, 100)), 1),
    "three-bands": (THREE, THREE, 1),
    "three-bands-of-heads": (HEADS, HEADS, 4),
    "a-coordinate-a-group": (Bands.of((4, 24), (8, 24)), Bands.of((4, 24), (8, 24)), 24),
    "every-width": (Bands.of((8, 80)), Bands.of((2, 7), (3, 9), (4, 11), (6, 13), (8, 15), (1, 12), (5, 13)), 1),
    "one-column": (Bands.of((8, 1)), Bands.of((3, 1)), 1),
    "one-bit": (Bands.of((1, 77)), Bands.of((1, 77)), 1),
    "iso-3-bit-of-heads": (Bands.of((1, 16), (3, 96), (5, 16)), Bands.of((1, 16), (3, 96), (5, 16)), 8),
}
# Around the rows that kernels take together (2, 12, 16, 32) and where they change their ways (5, 13).
ROWS = (0, 1, 2, 3, 4, 5, 12, 13, 17, 33)
OUTS = (1, 31, 33, 64, 100)


def prepacked(linear: PackedLinear, inputs: ActivationFormat = PLAIN) -> PackedWeight:
    weight = CPU.prepack(linear, inputs)
    assert isinstance(weight, PackedWeight)
    return weight


def unpacked(linear: PackedLinear) -> UnpackedLinear:
    weight = REFERENCE.prepack(linear)
    assert isinstance(weight, UnpackedLinear)
    return weight


def rows_of(x: Quantized, at: Any) -> Quantized:
    return replace(x, q=x.q[at], scale=x.scale[at], zero=x.zero[at])


def exact_sums(x: Quantized, linear: PackedLinear) -> Tensor:
    """The reference's integers, int32 [rows, segments, out]."""
    parts = [sums.flatten(0, -2) for sums, _, _ in reference_accumulate(x, unpacked(linear))]
    stacked = torch.stack(parts, dim=1)
    assert float(stacked.abs().max() if stacked.numel() else 0) < 2**31
    return stacked.to(torch.int32)


def cut_case(name: str, rows: int, *, seed: int = 0) -> tuple[Quantized, PackedLinear, ActivationFormat]:
    """Activations of a cut with rows of extremes among them, and 100 outputs."""
    inputs, weights, groups = LONGER[name]
    x = quantize(normal(rows, inputs.size, seed=seed) * 3 + 1, inputs, groups=groups)
    for band, cut in zip(inputs, inputs.slices(), strict=True):
        for row, value in ((1, 2**band.bits - 1), (2, 0)):
            if row < rows:
                x.q[row, cut] = value
    if rows > 4:
        x.zero[3], x.zero[4] = 0, torch.tensor([2**band.bits - 1 for band in inputs], dtype=torch.uint8)[:, None]
    return x, packed(weights, 100, seed=seed), ActivationFormat(bands=inputs, groups=groups)


def first_outputs(linear: PackedLinear, out: int) -> PackedLinear:
    bias = None if linear.bias is None else linear.bias[:out]
    return replace(linear, qweight=tuple(q[:out] for q in linear.qweight), scale=linear.scale[:out], bias=bias)


@pytest.mark.parametrize("name", LONGER)
def test_accumulated_integers_are_the_references(name: str) -> None:
    x, linear, inputs = cut_case(name, max(ROWS))
    want = exact_sums(x, linear)
    for out in OUTS:
        weight = prepacked(first_outputs(linear, out), inputs)
        for rows in ROWS:
            got = operators.accumulate(rows_of(x, slice(rows)), weight)
            assert torch.equal(got, want[:rows, :, :out]), (out, rows)


@pytest.mark.parametrize("w_bits", PACKABLE_BITS)
@pytest.mark.parametrize("q_bits", PACKABLE_BITS)
def test_accumulated_integers_are_exact_at_the_ends_of_every_width(q_bits: int, w_bits: int) -> None:
    size, (low, high), top = 1100, symmetric_limits(w_bits), 2**q_bits - 1
    turns = torch.arange(size) % 2
    weights = torch.stack([torch.full((size,), low), torch.full((size,), high), low + turns * (high - low)] * 12)
    linear = PackedLinear.from_integers(weights, torch.ones(36, 1), Bands.of((w_bits, size)))
    kinds = [torch.zeros(size), torch.full((size,), top), turns * top, (1 - turns) * top]
    q = torch.stack([kind for kind in kinds for _ in range(2)]).to(torch.uint8)
    zero = torch.tensor([0, top] * 4, dtype=torch.uint8)[:, None, None]
    x = Quantized(q, torch.ones(8, 1, 1), zero, Bands.of((q_bits, size)))
    weight = prepacked(linear, ActivationFormat(bands=x.bands))
    want = (x.q.to(torch.int64) - zero[..., 0].to(torch.int64)) @ weights.T.to(torch.int64)
    for rows in (slice(0, 3), slice(3, 8), slice(0, 8)):
        assert torch.equal(operators.accumulate(rows_of(x, rows), weight)[:, 0].to(torch.int64), want[rows])


def test_the_longest_rows_do_not_overflow() -> None:
    size = (2**31 - 1) // (255 * 128)  # 65,793: further sums leave 32 bits
    for w_bits, least in ((8, -128), (4, -8)):
        bands, inputs = Bands.of((w_bits, size)), Bands.of((8, size))
        linear = PackedLinear.from_integers(torch.full((2, size), least), torch.ones(2, 1), bands)
        x = Quantized(torch.full((6, size), 255, dtype=torch.uint8), torch.ones(6, 1, 1), torch.zeros(6, 1, 1), inputs)
        x = replace(x, zero=x.zero.to(torch.uint8))
        sums = operators.accumulate(x, prepacked(linear, ActivationFormat(bands=inputs)))
        assert (sums == 255 * least * size).all()


def laid_out(x: Quantized) -> dict[str, Quantized]:
    """x, [4, 3, n], in other ways of lying in memory."""
    lead, n = x.q.shape[:-1], x.q.shape[-1]
    wide = torch.full((*lead, n + 77), 255, dtype=torch.uint8)
    wide[..., 5 : 5 + n] = x.q
    columns = torch.full((*lead, 2 * n), 255, dtype=torch.uint8)
    columns[..., ::2] = x.q
    spread = torch.full((8, 3, n), 255, dtype=torch.uint8)
    spread[::2] = x.q
    turned = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in (x.q, x.scale, x.zero)]
    return {
        "contiguous, nothing after it": replace(x, q=x.q.clone()),
        "slices of wider rows, unaligned": replace(x, q=wide[..., 5 : 5 + n]),
        "every other column": replace(x, q=columns[..., ::2]),
        "every other batch row": replace(x, q=spread[::2]),
        "transposed batch": replace(x, q=turned[0], scale=turned[1], zero=turned[2]),
        "scales with strides": replace(x, scale=torch.stack([x.scale] * 2, -1)[..., 0], zero=x.zero.mT.clone().mT),
    }


@pytest.mark.parametrize("name", ["three-bands", "last-block-of-4", "heads"])
def test_it_does_not_matter_how_activations_lie_in_memory(name: str) -> None:
    x, linear, inputs = cut_case(name, 12)
    want, weight = exact_sums(x, linear), prepacked(linear, inputs)
    lead = [part.unflatten(0, (4, 3)) for part in (x.q, x.scale, x.zero)]
    for how, moved in laid_out(replace(x, q=lead[0], scale=lead[1], zero=lead[2])).items():
        assert torch.equal(operators.accumulate(moved, weight), want), how
        assert torch.equal(CPU.linear(moved, weight).flatten(0, 1), CPU.linear(x, weight)), how
    one = rows_of(x, slice(5, 6))
    for rows in (3, 6):
        repeated = replace(one, q=one.q.expand(rows, -1), scale=one.scale.expand(rows, -1, -1))
        repeated = replace(repeated, zero=one.zero.expand(rows, -1, -1))
        assert torch.equal(operators.accumulate(repeated, weight), want[5:6].expand(rows, -1, -1))
    alone = rows_of(x, 5)  # no leading dimension at all
    assert torch.equal(operators.accumulate(alone, weight), want[5:6])
    assert torch.equal(CPU.linear(alone, weight), CPU.linear(x, weight)[5])


@pytest.mark.parametrize("groups", [1, 4])
def test_what_lies_beside_the_activations_does_not_count(groups: int) -> None:
    bands = Bands.of((4, 36), (8, 12))
    x = quantize(normal(6, 48), bands, groups=groups)
    weight = prepacked(packed(bands, 33), ActivationFormat(bands=bands, groups=groups))
    sums = []
    for value in (0, 255):
        room = torch.full((6, 200), value, dtype=torch.uint8)
        room[:, 7:55] = x.q
        sums.append(operators.accumulate(replace(x, q=room[:, 7:55]), weight))
    assert torch.equal(*sums)


def test_weights_are_read_where_they_lie() -> None:
    bands = Bands.of((3, 35), (6, 29))
    x, linear = quantize(normal(6, 64), Bands.of((8, 64))), packed(bands, 33)
    strided = tuple(torch.cat([q, q.flip(1)], dim=1)[:, : q.shape[1]] for q in linear.qweight)
    turned = tuple(q.T.contiguous().T for q in linear.qweight)
    inputs = ActivationFormat(bands=x.bands)
    want = exact_sums(x, linear)
    for parts in (strided, turned):
        moved = replace(linear, qweight=parts, scale=linear.scale.T.contiguous().T)
        assert torch.equal(operators.accumulate(x, prepacked(moved, inputs)), want)
        assert torch.equal(CPU.linear(x, prepacked(moved, inputs)), CPU.linear(x, prepacked(linear, inputs)))


# --- linears: outputs ----------------------------------------------------------------------------------------------


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    excess = (got.double() - want.double()).abs() - bound
    assert not excess.isnan().any()
    assert got.numel() == 0 or float(excess.max()) <= 0, float(excess.max())


def quantized_bound(x: Quantized, linear: PackedLinear, onto: Tensor | None) -> Tensor:
    """Largest distance of two float32 evaluations of Σ_segments s_x s_w Σ (q - z) w + b + onto.

    A term has two roundings (its integer, the scales' product); every sum rounds a value no larger than the sum of the
    magnitudes, `segments` times and once each for bias and onto. The reference rounds twice.
    """
    parts = reference_accumulate(x, unpacked(linear))
    total = sum((sums * s.double()[..., None] * w.double()).abs() for sums, s, w in parts)
    assert isinstance(total, Tensor)
    if linear.bias is not None:
        total = total + linear.bias.double().abs()
    if onto is not None:
        total = total + onto.double().abs()
    return total * (1.01 * (len(parts) + 6) * ROUNDING)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", LONGER)
def test_a_quantized_linear_is_within_float32_rounding_of_the_reference(name: str, bias: bool) -> None:
    x, linear, inputs = cut_case(name, 33)
    linear = linear if bias else replace(linear, bias=None)
    want, sums = REFERENCE.linear(x, unpacked(linear)), normal(33, 100, seed=5) * 30
    for out in (1, 33, 64, 100):
        part, onto = first_outputs(linear, out), sums[:, :out]
        weight, bound = prepacked(part, inputs), quantized_bound(x, part, None)
        assert_within(CPU.linear(x, weight), want[:, :out], bound)
        assert_within(CPU.linear(x, weight, onto), onto + want[:, :out], quantized_bound(x, part, onto))


def test_a_quantized_linear_has_the_same_bits_on_every_instruction_set(isa: str) -> None:
    for name in ("three-bands", "last-block-of-4", "heads"):
        x, linear, inputs = cut_case(name, 17)
        weight, onto = prepacked(linear, inputs), normal(17, 100)
        got = CPU.linear(x, weight, onto)
        native.use("scalar")
        want = CPU.linear(x, weight, onto)
        native.use(isa)
        assert torch.equal(got, want), name


def test_several_linears_of_one_input_are_each_alone() -> None:
    bands = Bands.of((4, 70), (8, 26))
    inputs = ActivationFormat(bands=bands)
    finer = Bands.of((4, 30), (4, 40), (6, 26))
    linears = [packed(bands, 33), packed(finer, 5, bias=False, seed=3), packed(bands, 64, seed=9)]
    weights, onto = [prepacked(linear, inputs) for linear in linears], normal(3, 2, 33, seed=4)
    floats = normal(3, 2, 96)
    for x in (quantize(floats, bands), floats):
        got = CPU.linears(x, weights, onto)
        assert [tuple(y.shape) for y in got] == [(3, 2, 33), (3, 2, 5), (3, 2, 64)]
        assert torch.equal(got[0], CPU.linear(x, weights[0], onto))
        for index in (1, 2):
            assert torch.equal(got[index], CPU.linear(x, weights[index]))


def test_packed_and_plain_linears_may_share_an_input() -> None:
    bands = Bands.of((4, 70), (8, 26))
    plain, linear, onto = DenseLinear(normal(7, 96), normal(7, seed=1)), packed(bands, 33), normal(4, 7, seed=2)
    x = quantize(normal(4, 96), bands)
    pair = [CPU.prepack(plain), prepacked(linear, ActivationFormat(bands=bands))]
    got = CPU.linears(x, pair, onto)
    assert torch.equal(got[0], CPU.linear(x, pair[0], onto))
    assert torch.equal(got[1], CPU.linear(x, pair[1]))
    want = REFERENCE.linears(x, (plain, unpacked(linear)), onto)
    # Dequantized to float32 first: one more rounding of every product.
    assert_within(got[0], want[0], dense_bound(x.dequantize(torch.float64), plain, onto, extra=1))
    assert_within(got[1], want[1], quantized_bound(x, linear, None))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", ["three-bands", "last-block-of-4", "whole-steps", "one-column", "every-width"])
def test_float_activations_times_packed_weights_are_within_float32_rounding(name: str, bias: bool) -> None:
    weights = LONGER[name][1]
    linear = packed(weights, 65, bias=bias)
    for rows in (1, 2, 9, 17):
        x, onto = normal(rows, weights.size, seed=rows), normal(rows, 65, seed=7)
        terms = x.double().abs() @ linear.dequantize(torch.float64).abs().T + onto.double().abs()
        terms = terms if linear.bias is None else terms + linear.bias.double().abs()
        # A sum over a segment rounds at most size times, a product at most once; then as for quantized activations.
        bound = terms * (1.01 * (weights.size + len(weights) + 6) * ROUNDING)
        got = CPU.linear(x, prepacked(linear), onto)
        assert_within(got, REFERENCE.linear(x, unpacked(linear), onto), bound)
    assert CPU.linear(normal(0, weights.size), prepacked(linear)).shape == (0, 65)


def dense_bound(x: Tensor, linear: DenseLinear, onto: Tensor | None, extra: int = 0) -> Tensor:
    """Σ x w: products rounded or not, 16 sums of every 16th column, a tree of them, bias and onto; the reference rounds
    twice."""
    total = x.double().abs() @ linear.weight.double().abs().T
    for more in (linear.bias, onto):
        total = total if more is None else total + more.double().abs()
    return total * (1.01 * (-(-x.shape[-1] // 16) + 9 + extra) * ROUNDING)


def placed(weight: Tensor) -> dict[str, Tensor]:
    """The same weights in other ways of lying in memory."""
    wide = torch.full((weight.shape[0], weight.shape[1] + 3), torch.nan, dtype=weight.dtype)
    wide[:, 1:-2] = weight
    return {"contiguous": weight, "slice": wide[:, 1:-2], "transposed": weight.T.contiguous().T}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_plain_linear_is_within_float32_rounding_of_the_reference(dtype: torch.dtype) -> None:
    for out, size in ((1, 1), (7, 33), (64, 100), (130, 512), (5, 15), (3, 16), (6, 17), (4, 48)):
        weight = normal(out, size, seed=size).to(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
        for bias in (None, normal(out, seed=1).to(dtype)):
            linear = DenseLinear(weight, bias)
            for rows in (0, 1, 3, 4, 5, 9):
                x, onto = normal(rows, size, seed=rows + 1), normal(rows, out, seed=2)
                want = REFERENCE.linear(x, linear)
                got = {
                    how: CPU.linear(x, CPU.prepack(replace(linear, weight=moved)))
                    for how, moved in placed(weight).items()
                }
                for how in got:
                    assert torch.equal(got[how], got["contiguous"]), how
                assert_within(got["contiguous"], want, dense_bound(x, linear, None))
                added = CPU.linear(x, CPU.prepack(linear), onto)
                assert_within(added, onto + want, dense_bound(x, linear, onto))


def test_float_inputs_may_lie_anyhow() -> None:
    bands = Bands.of((4, 30), (8, 10))
    onto, wide = normal(3, 2, 33, seed=1), normal(2, 3, 80)
    x = wide[..., ::2].transpose(0, 1)
    strided = torch.stack([onto, onto], -1)[..., 0]
    for weight in (prepacked(packed(bands, 33)), CPU.prepack(DenseLinear(normal(33, 40)))):
        want = CPU.linear(x.contiguous(), weight, onto)
        assert torch.equal(CPU.linear(x, weight, strided), want)
        half = CPU.linear(x.half(), weight, onto.double())
        assert torch.equal(half, CPU.linear(x.half().float(), weight, onto))


# --- a row is a row ------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Changes how many threads torch, and with it the kernels, use."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


LINEARS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "quantized": lambda: (
        quantize(normal(33, 240), Bands.of((4, 210), (8, 30))),
        prepacked(packed(Bands.of((4, 210), (8, 30)), 150), ActivationFormat(bands=Bands.of((4, 210), (8, 30)))),
    ),
    "float": lambda: (normal(33, 240), prepacked(packed(Bands.of((4, 210), (8, 30)), 150))),
    "plain": lambda: (normal(33, 243), CPU.prepack(DenseLinear(normal(150, 243).bfloat16(), normal(150)))),
}


@pytest.mark.parametrize("kind", LINEARS)
def test_a_linears_row_has_its_bits_whatever_the_rows_beside_it_and_the_threads(
    kind: str, threads: Callable[[int], None]
) -> None:
    x, weight = LINEARS[kind]()
    onto = normal(33, 150, seed=8)

    def part(at: slice) -> Any:
        return rows_of(x, at) if isinstance(x, Quantized) else x[at]

    every = CPU.linear(x, weight, onto)
    for count in (1, 2, 3):
        threads(count)
        for begin, end in ((0, 33), (0, 1), (7, 9), (1, 5), (3, 8), (20, 32), (4, 17), (9, 25), (1, 33)):
            at = slice(begin, end)
            assert torch.equal(CPU.linear(part(at), weight, onto[at]), every[at]), (count, at)


# --- activations ---------------------------------------------------------------------------------------------------


def orthogonal(size: int, heads: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(size + heads)
    if not heads:
        return random_orthogonal(size, generator)
    return torch.stack([random_orthogonal(size, generator) for _ in range(heads)])


def turned(size: int, inner: int = 1) -> Hadamard:
    return Hadamard(hadamard.plan(size), inner)


def shuffled(size: int) -> Permutation:
    return Permutation(torch.randperm(size, generator=torch.Generator().manual_seed(size)))


# name: (coordinates, the map). Powers of two, factors of signs of orders 12 … 172 with and without a power beside them,
# a random factor (107), T on all heads' equal coordinates; matrices below and above 64 rows, whole vectors and not.
MAPS: dict[str, tuple[int, LinearMap | None]] = {
    "none-1": (1, None),
    "none-7": (7, None),
    "none-33": (33, None),
    "none-100": (100, None),
    "permutation": (63, shuffled(63)),
    **{f"hadamard-{size}": (size, turned(size)) for size in (2, 8, 64, 512, 12, 20, 28, 172, 24, 80, 344, 107, 7)},
    **{
        f"hadamard-{size}-by-{inner}": (size * inner, turned(size, inner))
        for size, inner in ((8, 5), (4, 64), (12, 16), (28, 3), (7, 6), (1, 9))
    },
    "dense": (40, Dense(orthogonal(40).float())),
    "dense-float64": (33, Dense(orthogonal(33))),
    "dense-bfloat16": (24, Dense(orthogonal(24).bfloat16())),
    "dense-130": (130, Dense(orthogonal(130).float())),
    "dense-1": (1, Dense(orthogonal(1))),
    "per-head": (60, PerHead(orthogonal(12, 5).float())),
    "per-head-float64": (66, PerHead(orthogonal(33, 2))),
    "per-head-scaled": (60, PerHead(orthogonal(12, 5), normal(5, 12).abs() / 2 + 0.5)),
}


def cuts(size: int) -> list[tuple[Bands | None, int]]:
    """(bands, groups) of a row of `size`: none, one, two, three, and ranges of their own for parts."""
    found: list[tuple[Bands | None, int]] = [(None, 1), (Bands.of((4, size)), 1), (Bands.of((8, size)), 1)]
    if size >= 7:
        rest = size - size // 7 - 3
        found += [(Bands.of((4, size - size // 7), (8, size // 7)), 1)]
        found += [(Bands.of((2, size // 7), (3, rest), (6, 3)), 1), (Bands.of((8, size)), size)]
        found += [(Bands.of((1, size // 7), (3, rest), (5, 3)), 1)]
    if size % 8 == 0:
        found += [(Bands.of((4, size // 2), (8, size // 2)), 4)]
    return found


@dataclass(frozen=True)
class Source:
    """One of the three operators that make activations, on inputs of its own."""

    name: str
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    run: Callable[[Any, tuple[Tensor, ...], ActivationFormat, Norm], Activations]


def gathered(ops: Any, x: tuple[Tensor, ...], format: ActivationFormat, norm: Norm) -> Activations:
    return ops.gather_quantize(*x, format)


def normalised(ops: Any, x: tuple[Tensor, ...], format: ActivationFormat, norm: Norm) -> Activations:
    return ops.norm_quantize(*x, norm, format)


def gated(ops: Any, x: tuple[Tensor, ...], format: ActivationFormat, norm: Norm) -> Activations:
    return ops.act_hadamard_quantize(*x, format)


SOURCES = [
    Source("gather", lambda rows, n: (normal(rows, n) * torch.linspace(0.1, 10, n),), gathered),
    Source("norm", lambda rows, n: (normal(rows, n, seed=1) * 5,), normalised),
    Source("act", lambda rows, n: (normal(rows, n, seed=2) * 4, normal(rows, n, seed=3)), gated),
]


def norm_of(size: int, kind: int) -> Norm:
    gain = normal(size, seed=6) + 2
    return (Norm(1e-5), Norm(1e-6, gain), Norm(0.1, gain.double()), Norm(1e-5, gain.bfloat16()))[kind % 4]


def assert_like_the_reference(source: Source, inputs: tuple[Tensor, ...], format: ActivationFormat, norm: Norm) -> None:
    """float32 before its rounding within a unit in the last place; after it, every bit.

    Both take each step in float64 and round to float32 once, so they give the same number or neighbours, the latter
    about once in 10^8 numbers. From the same float32 numbers on, integers, scales and zero points are equal.
    """
    bare = replace(format, bands=None, groups=1, clip=None)
    plain, want = (source.run(ops, inputs, bare, norm) for ops in (CPU, REFERENCE))
    assert isinstance(plain, Tensor)
    assert isinstance(want, Tensor)
    # The map's sums: n terms rounded in float64, none larger than the input's norm. Maps here change a norm by less
    # than 2. The least positive float32 is a distance of its own.
    size = want.shape[-1]
    sums = 4 * (size + 8) * ROUNDING64 * want.double().norm(dim=-1, keepdim=True)
    assert_within(plain, want, want.double().abs() * (2 * ROUNDING) + sums + 2.0**-149)
    # Where a map's input was rounded to a few integers, cancellation leaves zeros or 10^-17.
    same = (plain == want) | ((plain.abs() <= sums) & (want.abs() <= sums))
    assert float(same.double().mean() if same.numel() else 1) >= 0.98
    equal = (plain == want).all(dim=-1)
    if format.bands is None:
        return
    got, theirs = source.run(CPU, inputs, format, norm), source.run(REFERENCE, inputs, format, norm)
    assert isinstance(got, Quantized)
    assert isinstance(theirs, Quantized)
    own = quantize(plain, format.bands, groups=format.groups, scale_dtype=format.scale_dtype, clip=format.clip)
    assert (got.bands, got.groups) == (format.bands, format.groups)
    for part in ("q", "scale", "zero"):
        mine = getattr(got, part)
        assert mine.dtype == getattr(theirs, part).dtype
        assert torch.equal(mine, getattr(own, part)), part
        assert torch.equal(mine[equal], getattr(theirs, part)[equal]), part


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("name", MAPS)
def test_activations_become_the_references_integers(name: str, source: Source) -> None:
    size, map = MAPS[name]
    inputs = source.inputs(11, size)  # dense maps take 8 rows together
    for number, (bands, groups) in enumerate(cuts(size)):
        half = bands is not None and number % 2 == 1
        clip = None if bands is None or number % 3 == 1 else (0.93, 0.8, 0.5)[: len(bands)]
        format = ActivationFormat(map, bands, groups, torch.float16 if half else torch.float32, clip=clip)
        assert_like_the_reference(source, inputs, format, norm_of(size, number))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("name", ["none-33", "permutation", "hadamard-172", "hadamard-8-by-5", "dense", "per-head"])
def test_a_rounded_map_input_is_rounded_as_in_the_reference(name: str, source: Source, bits: int) -> None:
    size, map = MAPS[name]
    for bands in (None, Bands.of((4, size - size // 8), (8, size // 8))):
        format = ActivationFormat(map, bands, map_input_bits=bits)
        assert_like_the_reference(source, source.inputs(11, size), format, norm_of(size, bits))


def awkward(size: int) -> Tensor:
    """Rows of constants, extremes and nearly nothing: [rows, size], finite."""
    x = normal(size)
    rows = [x * scale for scale in (0.0, -0.0, 1e30, 1e-30, 1e-38, 1e-44, 1e5, 6e-5, 6e-8)]
    rows += [torch.full((size,), value) for value in (1.0, -0.3, 3.4e38, -1e38, 1e-45, 65504.0, 7e4)]
    rows += [x.abs(), -x.abs(), x.clamp(-3, 3) * 1e38, torch.arange(size) - size / 2, (torch.arange(size) % 7) / 2 - 1]
    return torch.stack([row.float() for row in rows])


def assert_rounded_alike(x: Tensor, format: ActivationFormat) -> Quantized:
    got, want = CPU.gather_quantize(x, format), REFERENCE.gather_quantize(x, format)
    assert isinstance(got, Quantized)
    assert isinstance(want, Quantized)
    for part in ("q", "scale", "zero"):
        assert torch.equal(getattr(got, part), getattr(want, part)), part
    return got


@pytest.mark.parametrize("size", [1, 5, 16, 33, 64, 100])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_constants_and_extremes_are_rounded_as_in_the_reference(bits: int, scale_dtype: torch.dtype, size: int) -> None:
    x = awkward(size)
    for map in (None, shuffled(size)):
        assert_rounded_alike(x, ActivationFormat(map, Bands.of((bits, size)), scale_dtype=scale_dtype))


# 1e-30: coordinates are 1e32 steps and more, some are infinitely many; 1e-46 is 0 in float32.
CLIPS = (1.0, 0.93, 0.8, 0.5, 1e-3, 1e-6, 1e-30, 1e-46)


@pytest.mark.parametrize("size", [1, 5, 33, 64, 100])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_clipped_ranges_are_rounded_as_in_the_reference(bits: int, scale_dtype: torch.dtype, size: int) -> None:
    x = awkward(size)
    for clip in CLIPS:
        format = ActivationFormat(bands=Bands.of((bits, size)), scale_dtype=scale_dtype, clip=(clip,))
        got = assert_rounded_alike(x, format)
        if clip == 1.0:
            plain = CPU.gather_quantize(x, replace(format, clip=None))
            assert isinstance(plain, Quantized)
            assert torch.equal(got.q, plain.q)
            assert torch.equal(got.scale, plain.scale)
    for clips in ((0.8, 1.0), (0.93, 0.5)):
        pair = Bands.of((bits, 2 * size), (PACKABLE_BITS[-1], 2 * size))
        for groups in {1, 2, size}:
            format = ActivationFormat(None, pair, groups, scale_dtype, clip=clips)
            assert_rounded_alike(torch.cat([x, x.flip(0), x * 0.3, x.roll(1, 0)], dim=1), format)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_coordinates_outside_a_clipped_range_get_its_ends(bits: int) -> None:
    top = 2**bits - 1
    for size in (6, 70, 200):
        for least, most in ((-1.0, 1.0), (-3e38, 1e37), (-1e-30, 1e-36), (-7.0, 0.0), (0.0, 5.0), (-1e4, 1e9)):
            x = torch.stack([torch.linspace(least, most, size), torch.tensor([least, most] * (size // 2))])
            for clip in (0.5, 1e-2, 1e-7, 1e-20):
                got = assert_rounded_alike(x, ActivationFormat(bands=Bands.of((bits, size)), clip=(clip,)))
                scale, zero = got.scale.double()[:, 0], got.zero.double()[:, 0]
                if float(scale.min()) == 1.0:  # a range of nothing
                    continue
                steps = x.double() / scale
                assert (got.q[steps < -zero - 1] == 0).all()
                assert (got.q[steps > top - zero + 1] == top).all()
                assert {0, top} >= set(got.q[1].unique().tolist()) - set(got.zero[1].flatten().tolist())


def test_norms_and_gates_of_constants_and_extremes_stay_near_the_reference() -> None:
    x = awkward(37)
    x = x[x.abs().amax(dim=1) < 1e20]  # products of larger ones leave float32 in the reference too
    norm = normalised(CPU, (x,), PLAIN, Norm(1e-6)), normalised(REFERENCE, (x,), PLAIN, Norm(1e-6))
    gate = gated(CPU, (x, x.flip(0)), PLAIN, Norm(1)), gated(REFERENCE, (x, x.flip(0)), PLAIN, Norm(1))
    for got, want in (norm, gate):
        assert isinstance(got, Tensor)
        assert isinstance(want, Tensor)
        assert_within(got, want, want.double().abs() * (2 * ROUNDING) + 2.0**-149)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("name", ["none-33", "hadamard-172", "hadamard-344", "hadamard-8-by-5", "dense", "per-head"])
def test_an_activations_row_has_its_bits_whatever_the_rows_beside_it_and_the_threads(
    name: str, source: Source, threads: Callable[[int], None]
) -> None:
    size, map = MAPS[name]
    inputs, norm = source.inputs(33, size), norm_of(size, 1)
    format = ActivationFormat(map, Bands.of((4, size - size // 8), (8, size // 8)))

    def results(part: tuple[Tensor, ...]) -> list[Tensor]:
        rounded = source.run(CPU, part, format, norm)
        plain = source.run(CPU, part, replace(format, bands=None), norm)
        assert isinstance(rounded, Quantized)
        assert isinstance(plain, Tensor)
        return [rounded.q, rounded.scale, rounded.zero, plain]

    every = results(inputs)
    for count in (1, 2, 3):
        threads(count)
        for begin, end in ((0, 33), (0, 1), (7, 9), (3, 12), (9, 25), (1, 33)):
            for got, want in zip(results(tuple(x[begin:end] for x in inputs)), every, strict=True):
                assert torch.equal(got, want[begin:end]), (count, begin, end)


def test_activations_may_lie_anyhow_and_there_may_be_none() -> None:
    bands = Bands.of((4, 30), (8, 10))
    format = ActivationFormat(turned(8, 5), bands)
    x = normal(2, 3, 80)[..., ::2].transpose(0, 1)
    for source in SOURCES:
        inputs = tuple(x + index for index in range(len(source.inputs(1, 40))))
        got = source.run(CPU, inputs, format, Norm(1e-5))
        want = source.run(CPU, tuple(each.contiguous() for each in inputs), format, Norm(1e-5))
        assert isinstance(got, Quantized)
        assert isinstance(want, Quantized)
        assert got.q.shape == (3, 2, 40)
        assert got.scale.shape == got.zero.shape == (3, 2, 2, 1)
        assert torch.equal(got.q, want.q)
        for shape in ((0, 40), (2, 0, 40)):
            empty = source.run(CPU, tuple(torch.empty(shape) for _ in inputs), format, Norm(1e-5))
            assert isinstance(empty, Quantized)
            assert empty.q.shape == shape
            linear = prepacked(packed(bands, 3), format)
            assert CPU.linear(empty, linear).shape == (*shape[:-1], 3)


# --- keys and values -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Sizes and formats of a layer's heads."""

    size: int
    heads: int
    kv_heads: int
    formats: HeadFormats

    def drawn(self, batch: int, tokens: int, seed: int = 0) -> list[Tensor]:
        """q [b, t, H, h], k and v [b, t, G, h], cos and sin [b, t, h], as slices of wider rows."""
        widths = (self.heads, self.kv_heads, self.kv_heads)
        wide = normal(batch, tokens, sum(widths) * self.size, seed=seed)
        parts = [part.unflatten(-1, (-1, self.size)) for part in wide.split([n * self.size for n in widths], dim=-1)]
        angle = normal(batch, tokens, self.size // 2, seed=seed + 1) * 3
        return [*parts, angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)]


def stored(size: int) -> ActivationFormat:
    high = max(1, size // 8)
    return ActivationFormat(bands=Bands.of((4, size - high), (8, high)), scale_dtype=torch.float16)


def heads_of(
    size: int,
    heads: int,
    kv_heads: int,
    *,
    map: LinearMap | None = None,
    map_input_bits: int | None = None,
    value_map: LinearMap | None = None,
    norms: bool = False,
    key: ActivationFormat | None = None,
    value: ActivationFormat | None = None,
) -> Heads:
    key, value = stored(size) if key is None else key, stored(size) if value is None else value
    return Heads(
        size,
        heads,
        kv_heads,
        HeadFormats(
            ActivationFormat(map, map_input_bits=map_input_bits),
            replace(key, map=map, map_input_bits=map_input_bits),
            replace(value, map=value_map),
            Norm(1e-6, normal(size, seed=3) + 2) if norms else None,
            Norm(1e-5, normal(size, seed=4) + 2) if norms else None,
        ),
    )


def uneven(size: int) -> ActivationFormat:
    """Bands of odd sizes and of every way of storing, float32 scales."""
    return ActivationFormat(bands=Bands.of((2, 3), (3, 1), (6, 5), (4, size - 14), (8, 5)))


def iso(size: int) -> ActivationFormat:
    """The cut of resq-246 at 3 bits."""
    eighth = size // 8
    return ActivationFormat(bands=Bands.of((1, eighth), (3, size - 2 * eighth), (5, eighth)), scale_dtype=torch.float16)


LAYERS: dict[str, Heads] = {
    "h6-gqa-2": heads_of(6, 4, 2),
    "h16-mha-hadamard": heads_of(16, 4, 4, map=turned(16)),
    "h16-8-to-1-dense-8-bit": heads_of(16, 8, 1, map=Dense(orthogonal(16).float()), map_input_bits=8),
    "h64-gqa-4-dense": heads_of(64, 8, 2, map=Dense(orthogonal(64).float())),
    "h64-norms": heads_of(64, 4, 2, norms=True, map=Dense(orthogonal(64).float())),
    "h80-hadamard-value-map": heads_of(80, 4, 1, map=turned(80), value_map=turned(80), norms=True),
    "h128-gqa-3": heads_of(128, 6, 2, map=Dense(orthogonal(128))),
    "h34-uneven-bands": heads_of(34, 7, 1, key=uneven(34), value=uneven(34), map=shuffled(34)),
    "h20-float16": heads_of(20, 6, 3, key=PLAIN, value=PLAIN),
    "h16-only-values-rounded": heads_of(16, 4, 2, key=PLAIN, map=turned(16)),
    "h16-one-width": heads_of(
        16, 4, 2, key=ActivationFormat(bands=Bands.of((8, 16))), value=ActivationFormat(bands=Bands.of((3, 16)))
    ),
    "h2": heads_of(2, 2, 1, key=PLAIN, value=ActivationFormat(bands=Bands.of((4, 2)))),
    "h64-iso": heads_of(64, 4, 2, key=iso(64), value=iso(64), map=turned(64)),
    "h10-odd-one-and-five-bits": heads_of(
        10,
        2,
        1,
        key=ActivationFormat(bands=Bands.of((1, 7), (5, 3))),
        value=ActivationFormat(bands=Bands.of((5, 3), (1, 7)), scale_dtype=torch.float16),
    ),
    "h64-clipped": heads_of(
        64, 4, 2, key=replace(stored(64), clip=(0.8, 1.0)), value=replace(stored(64), clip=(0.93, 0.5)), map=turned(64)
    ),
}


def new_cache(layer: Heads) -> Cache:
    cache = CPU.cache(layer.formats)
    assert isinstance(cache, Cache)
    return cache


def append(layer: Heads, cache: Any, parts: Sequence[Tensor], ops: Any = CPU) -> Tensor:
    q, k, v, cos, sin = parts
    return ops.rope_project_append(q, k, v, cos, sin, layer.formats, cache)


def assert_caches_equal(got: Any, want: Any) -> None:
    """The same stored integers: a scale times an integer of 9 bits is exact in float64 and rounded once to float32."""
    assert (got.length, got.batch) == (want.length, want.batch)
    for mine, theirs in zip(got.read(), want.read(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())


def attention_bound(cache: Any, q: Tensor, scale: float) -> float:
    """Largest distance of float32 attention from the exact one.

    A score is a sum of h products, so it is off by (h + 4) · 2^-24 of its magnitudes Σ |q k| and scale; that is the
    relative error of a weight, counted twice (the softmax divides by their sum). The weights' exponential and the sums
    over slots, in 16 parts of chunks of 512 and then chunk by chunk, add some 64 roundings.
    """
    keys, values = cache.read()
    share = q.shape[2] // keys.shape[1]
    every = keys.double().abs().repeat_interleave(share, dim=1)
    most = float((q.double().abs().transpose(1, 2) @ every.mT).max()) * scale
    return float(values.double().abs().max()) * ROUNDING * (2 * most * (q.shape[3] + 4) + 128)


def check_attention(layer: Heads, cache: Any, q: Tensor, starts: list[int] | None, window: int | None) -> Tensor:
    scale = layer.size**-0.5
    got = CPU.attend(q, cache, scale, None if starts is None else torch.tensor(starts), window)
    keys, values = (part.transpose(1, 2) for part in cache.read())
    want = naive_attention(q, keys, values, scale, starts or [0] * q.shape[0], window)
    assert got.dtype == torch.float32
    worst = float((got.double() - want).abs().max())
    assert worst <= attention_bound(cache, q, scale), worst
    # Far below a step of the 8-bit rounding that follows.
    assert worst <= 1e-5 * float(values.abs().max()), worst
    return got


@pytest.mark.parametrize("name", LAYERS)
def test_heads_are_stored_as_the_reference_stores_them_and_attended_to_exactly(name: str) -> None:
    layer = LAYERS[name]
    mine, theirs = new_cache(layer), REFERENCE.cache(layer.formats)
    assert mine.length == 0
    # The room grows by blocks of 16 slots: within one, to its end, past it, by several.
    for number, tokens in enumerate((1, 7, 8, 1, 30, 2)):
        parts = layer.drawn(2, tokens, seed=10 * number)
        got, want = append(layer, mine, parts), append(layer, theirs, parts, REFERENCE)
        sums = 4 * (layer.size + 8) * ROUNDING64 * want.double().norm(dim=-1, keepdim=True)
        assert_within(got, want, want.double().abs() * (2 * ROUNDING) + sums + 2.0**-149)
        assert_caches_equal(mine, theirs)
        assert mine.nbytes() > 0
        length = mine.length
        for starts, window in ((None, None), ([0, length // 2], None), ([length, 3], 5), (None, 1), (None, 20)):
            check_attention(layer, mine, got, starts, window)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1025])
def test_contexts_of_every_length_are_attended_to_exactly(length: int) -> None:
    layer = LAYERS["h64-gqa-4-dense"]
    mine, theirs = new_cache(layer), REFERENCE.cache(layer.formats)
    parts = layer.drawn(2, length)
    q = append(layer, mine, parts)
    append(layer, theirs, parts, REFERENCE)
    assert_caches_equal(mine, theirs)
    for tokens in {1, min(length, 5), min(length, 11)}:
        for starts, window in ((None, None), ([0, length // 2], None), (None, 70), ([length // 3, 0], 600)):
            check_attention(layer, mine, q[:, -tokens:], starts, window)


@pytest.mark.slow
def test_a_context_of_8192_tokens_is_attended_to_exactly(threads: Callable[[int], None]) -> None:
    layer = LAYERS["h64-gqa-4-dense"]
    cache, parts = new_cache(layer), layer.drawn(1, 8192)
    q = append(layer, cache, parts)
    for starts, window in ((None, None), ([5000], None), (None, 4096)):
        one = check_attention(layer, cache, q[:, -3:], starts, window)
        threads(3)
        assert torch.equal(check_attention(layer, cache, q[:, -3:], starts, window), one)
        threads(1)


def test_sharp_and_flat_attention_is_exact_too() -> None:
    """One slot with all the weight, scores of hundreds, equal scores, keys of zeros."""
    layer = LAYERS["h20-float16"]
    for size in (0.0, 1e-3, 30.0, 300.0):
        cache, parts = new_cache(layer), layer.drawn(2, 90)
        q = append(layer, cache, [parts[0] * size, parts[1], *parts[2:]])
        got = CPU.attend(q, cache, layer.size**-0.5, None, None)
        keys, values = (part.transpose(1, 2) for part in cache.read())
        want = naive_attention(q, keys, values, layer.size**-0.5, [0, 0], None)
        assert float((got.double() - want).abs().max()) <= attention_bound(cache, q, layer.size**-0.5)


@pytest.mark.parametrize("name", LAYERS)
def test_heads_of_tokens_one_by_one_have_the_bits_of_all_at_once(name: str, threads: Callable[[int], None]) -> None:
    layer, total, scale = LAYERS[name], 70, LAYERS[name].size ** -0.5
    parts, starts = layer.drawn(3, total), torch.tensor([0, 5, 66])
    whole = new_cache(layer)
    q = append(layer, whole, parts)
    cases = [(None, None), (starts, None), (starts, 9), (None, 30)]
    want = [CPU.attend(q, whole, scale, first, window) for first, window in cases]
    for count, steps in ((1, [1] * total), (2, [17, 1, 1, 40, 11]), (3, [69, 1])):
        threads(count)
        cache, at = new_cache(layer), 0
        for step in steps:
            piece = append(layer, cache, [part[:, at : at + step] for part in parts])
            assert torch.equal(piece, q[:, at : at + step])
            if step > 1 or at % 23 == 0 or at > total - 3:
                for (first, window), every in zip(cases, want, strict=True):
                    assert torch.equal(CPU.attend(piece, cache, scale, first, window), every[:, at : at + step])
            at += step
        for mine, theirs in zip(cache.read(), whole.read(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_row_of_heads_has_its_bits_whatever_the_rows_beside_it() -> None:
    layer = LAYERS["h64-gqa-4-dense"]
    parts, starts = layer.drawn(4, 40), torch.tensor([0, 7, 39, 11])
    every = new_cache(layer)
    q = append(layer, every, parts)
    want = CPU.attend(q, every, 0.125, starts, 21)
    for rows in ([0], [2, 1], [3, 0, 1]):
        cache = new_cache(layer)
        mine = append(layer, cache, [part[rows] for part in parts])
        assert torch.equal(mine, q[rows])
        assert torch.equal(CPU.attend(mine, cache, 0.125, starts[rows], 21), want[rows])


@pytest.mark.parametrize("length", [40, 600, 1300])
def test_a_decoded_token_has_the_same_bits_for_any_number_of_threads(
    length: int, threads: Callable[[int], None]
) -> None:
    layer = heads_of(16, 4, 2)
    cache = new_cache(layer)
    q = append(layer, cache, layer.drawn(1, length))
    one = [CPU.attend(q[:, -tokens:], cache, 0.25, None, None) for tokens in (1, 2, 40)]
    for count in (2, 3, 5):
        threads(count)
        for tokens, want in zip((1, 2, 40), one, strict=True):
            assert torch.equal(CPU.attend(q[:, -tokens:], cache, 0.25, None, None), want)


@pytest.mark.parametrize("name", ["h16-mha-hadamard", "h20-float16", "h34-uneven-bands"])
def test_a_cropped_or_reordered_cache_goes_on_as_the_references_does(name: str) -> None:
    layer, rows = LAYERS[name], torch.tensor([2, 0, 2, 2])
    caches = [(CPU, new_cache(layer)), (REFERENCE, REFERENCE.cache(layer.formats))]
    for ops, cache in caches:
        append(layer, cache, layer.drawn(3, 40), ops)
        cache.crop(60)
        assert cache.length == 40
        cache.crop(19)
        append(layer, cache, layer.drawn(3, 4, seed=5), ops)
        cache.select(rows)
        append(layer, cache, layer.drawn(4, 30, seed=6), ops)
    (_, mine), (_, theirs) = caches
    assert mine.length == 53
    assert_caches_equal(mine, theirs)
    mine.crop(0)
    assert (mine.length, mine.nbytes()) == (0, 0)
    append(layer, mine, layer.drawn(4, 3, seed=8))
    theirs.crop(0)
    append(layer, theirs, layer.drawn(4, 3, seed=8), REFERENCE)
    assert_caches_equal(mine, theirs)


def test_float16_keys_and_values_are_clamped_to_what_it_holds() -> None:
    layer = LAYERS["h20-float16"]
    q, k, v, cos, sin = layer.drawn(1, 3)
    caches = [(CPU, new_cache(layer)), (REFERENCE, REFERENCE.cache(layer.formats))]
    for ops, cache in caches:
        append(layer, cache, [q, k * 1e5, v * 1e6, cos, sin], ops)
    mine = caches[0][1].read()
    assert_caches_equal(caches[0][1], caches[1][1])
    assert float(mine[1].abs().max()) == 65504.0


@pytest.mark.parametrize("size", [64, 128])
def test_a_cached_head_takes_little_more_than_its_bits(size: int) -> None:
    layer = replace(
        LAYERS["h6-gqa-2"], size=size, formats=HeadFormats(key=stored_format(size), value=stored_format(size))
    )
    cache = new_cache(layer)
    append(layer, cache, layer.drawn(3, 22))
    # 4 bits of 7/8 and 8 bits of 1/8 of the coordinates, two float16 scales, two bytes of zero points.
    assert cache.nbytes() == 2 * (size * 7 // 16 + size // 8 + 6) * 3 * 22 * 2


@pytest.mark.parametrize("low", range(8, 12))
def test_a_cache_of_one_record_is_read_wherever_its_scales_lie(low: int) -> None:
    """Records are bytes: nothing in them is aligned."""
    bands = Bands.of((4, low), (8, 16 - low))
    for scale_dtype in (torch.float16, torch.float32):
        format = ActivationFormat(bands=bands, scale_dtype=scale_dtype)
        layer = heads_of(16, 2, 1, key=format, value=format)
        mine, theirs = new_cache(layer), REFERENCE.cache(layer.formats)
        append(layer, mine, layer.drawn(1, 1))
        append(layer, theirs, layer.drawn(1, 1), REFERENCE)
        assert_caches_equal(mine, theirs)


def test_a_cache_made_in_inference_mode_goes_on_outside_it() -> None:
    layer = LAYERS["h16-mha-hadamard"]
    cache, theirs = new_cache(layer), REFERENCE.cache(layer.formats)
    parts = layer.drawn(2, 5)
    with torch.inference_mode():
        append(layer, cache, parts)
    append(layer, cache, parts)
    for _ in range(2):
        append(layer, theirs, parts, REFERENCE)
    assert_caches_equal(cache, theirs)


# --- what does not fit ---------------------------------------------------------------------------------------------


SMALL = heads_of(16, 4, 2)


def filled_cache(batch: int = 2, kv_heads: int = 2) -> Cache:
    layer = replace(SMALL, kv_heads=kv_heads)
    cache = new_cache(layer)
    append(layer, cache, layer.drawn(batch, 3))
    return cache


def appended(cache: Cache | None = None, *, formats: HeadFormats | None = None, **changes: Any) -> None:
    """Three tokens of `SMALL` with some tensors replaced."""
    parts = dict(zip(("q", "k", "v", "cos", "sin"), SMALL.drawn(2, 3), strict=True)) | changes
    layer = SMALL if formats is None else replace(SMALL, formats=formats)
    append(layer, new_cache(layer) if cache is None else cache, list(parts.values()))


def attended(q: Tensor, starts: Tensor | None = None, cache: Cache | None = None) -> None:
    CPU.attend(q, filled_cache() if cache is None else cache, 1.0, starts, None)


def packed_for(pairs: Sequence[tuple[int, int]], *, groups: int = 1) -> PackedWeight:
    bands = Bands.of(*pairs)
    return prepacked(packed(bands, 6), ActivationFormat(bands=bands, groups=groups))


def formats_with(**changes: Any) -> HeadFormats:
    return replace(SMALL.formats, **changes)


# Wrong sizes are chosen so that a kernel which were run on them all the same would do no harm.
MISFITS: dict[str, Callable[[], Any]] = {
    "bands-of-another-size": lambda: CPU.gather_quantize(normal(3, 40), ActivationFormat(bands=Bands.of((4, 32)))),
    "map-of-another-size": lambda: CPU.gather_quantize(normal(3, 40), ActivationFormat(turned(32))),
    "norm-of-another-size": lambda: CPU.norm_quantize(normal(3, 40), Norm(1e-5, normal(32)), PLAIN),
    "gate-and-up": lambda: CPU.act_hadamard_quantize(normal(3, 40), normal(4, 40), PLAIN),
    "too-many-bands": lambda: CPU.gather_quantize(
        normal(3, 40), ActivationFormat(bands=Bands.of(*[(4, 1)] * 39, (8, 1)))
    ),
    "inputs-of-a-linear": lambda: CPU.linear(quantize(normal(3, 32), Bands.of((4, 32))), packed_for([(4, 40)])),
    "inputs-of-a-plain-linear": lambda: CPU.linear(normal(3, 32), CPU.prepack(DenseLinear(normal(6, 40)))),
    "another-cut": lambda: CPU.linear(quantize(normal(3, 40), Bands.of((4, 32), (8, 8))), packed_for([(4, 40)])),
    "another-cut-accumulated": lambda: operators.accumulate(
        quantize(normal(3, 40), Bands.of((4, 32), (8, 8))), packed_for([(4, 40)])
    ),
    "other-groups": lambda: CPU.linear(quantize(normal(3, 40), Bands.of((4, 40)), groups=4), packed_for([(4, 40)])),
    "a-weight-band-across-the-cut": lambda: prepacked(
        packed(Bands.of((4, 40)), 6), ActivationFormat(bands=Bands.of((4, 32), (8, 8)))
    ),
    "finer-weights-than-groups": lambda: prepacked(
        packed(Bands.of((4, 32), (8, 8)), 6), ActivationFormat(bands=Bands.of((8, 40)), groups=4)
    ),
    "onto-of-another-size": lambda: CPU.linear(normal(3, 40), packed_for([(4, 40)]), normal(3, 7)),
    "onto-a-plain-linear": lambda: CPU.linear(normal(3, 40), CPU.prepack(DenseLinear(normal(6, 40))), normal(2, 6)),
    "sums-beyond-32-bits": lambda: CPU.linear(
        quantize(torch.ones(1, 70_000), Bands.of((8, 70_000))), packed_for([(8, 70_000)])
    ),
    "keys-and-values": lambda: appended(v=normal(2, 3, 1, 16)),
    "keys-of-fewer-tokens": lambda: appended(k=normal(2, 2, 2, 16), v=normal(2, 2, 2, 16)),
    "cosines": lambda: appended(cos=normal(2, 3, 8)),
    "sines": lambda: appended(sin=normal(2, 3, 8)),
    "key-bands-of-another-size": lambda: appended(formats=formats_with(key=stored(8))),
    "value-bands-of-another-size": lambda: appended(formats=formats_with(value=stored(8))),
    "query-map-of-another-size": lambda: appended(formats=formats_with(query=ActivationFormat(turned(8)))),
    "key-map-of-another-size": lambda: appended(formats=formats_with(key=replace(stored(16), map=turned(8)))),
    "query-norm-of-another-size": lambda: appended(formats=formats_with(query_norm=Norm(1e-5, normal(8)))),
    "key-norm-of-another-size": lambda: appended(formats=formats_with(key_norm=Norm(1e-5, normal(8)))),
    "a-cache-of-more-rows": lambda: appended(filled_cache(batch=3)),
    "a-cache-of-more-kv-heads": lambda: appended(filled_cache(kv_heads=4)),
    "more-queries-than-tokens": lambda: attended(normal(2, 4, 4, 16)),
    "queries-of-another-batch": lambda: attended(normal(1, 3, 4, 16)),
    "heads-no-multiple-of-kv-heads": lambda: attended(normal(2, 3, 3, 16)),
    "queries-of-another-head-size": lambda: attended(normal(2, 3, 4, 8)),
    "starts-of-another-batch": lambda: attended(normal(2, 3, 4, 16), torch.tensor([0])),
    "an-empty-cache": lambda: attended(normal(2, 1, 4, 16), cache=new_cache(SMALL)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as refused:
        MISFITS[name]()
    assert "\n" not in str(refused.value)


def test_what_the_checks_let_through_fits() -> None:
    """The same calls with right sizes: a check that refused everything would pass the test above."""
    appended()
    appended(filled_cache())
    attended(normal(2, 3, 4, 16), torch.tensor([0, 1]))
    CPU.linear(quantize(normal(3, 40), Bands.of((4, 40)), groups=4), packed_for([(4, 40)], groups=4))
    CPU.gather_quantize(normal(3, 40), ActivationFormat(turned(40), Bands.of(*[(4, 5)] * 8)))


def test_no_linears_give_nothing() -> None:
    assert CPU.linears(normal(3, 40), []) == []
