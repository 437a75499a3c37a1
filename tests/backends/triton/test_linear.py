"""Linears of the Triton backend: the reference's integers bit for bit however the work is cut, the rest within float32.

What operators allocate is filled beforehand with NaN, or the largest integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.backends.cases import CUTS, normal, packed, poisoned
from tests.backends.test_cpu import (
    LONGER,
    ROUNDING,
    assert_within,
    cut_case,
    dense_bound,
    exact_sums,
    first_outputs,
    quantized_bound,
    rows_of,
    unpacked,
)
from torch import Tensor

from resq.backends.cuts import LONGEST
from resq.backends.dense import DenseWeight
from resq.backends.reference import REFERENCE
from resq.backends.triton import TRITON, linear, rows
from resq.backends.triton.configs import chosen, using
from resq.backends.triton.device import Target, targeting
from resq.backends.triton.linear import PackedWeight, accumulate
from resq.errors import InputError
from resq.numerics.affine import Quantized, quantize, symmetric_limits
from resq.numerics.bands import PACKABLE_BITS, Bands
from resq.numerics.formats import PLAIN, ActivationFormat
from resq.numerics.linear import DenseLinear, PackedLinear

# Tiles and blocks small enough that small shapes have several, and last ones that are not full.
SMALL = {"tokens": 16, "channels": 16, "block": 32}
TWO = Bands.of((4, 420), (8, 60))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def prepacked(each: PackedLinear, inputs: ActivationFormat = PLAIN) -> PackedWeight:
    weight = TRITON.prepack(each, inputs)
    assert isinstance(weight, PackedWeight)
    return weight


def placed(x: Any) -> Any:
    """The same where kernels run, which is the CPU in the interpreter."""
    if isinstance(x, Quantized) and not isinstance(x, rows.Rows):
        return replace(x, q=placed(x.q), scale=placed(x.scale), zero=placed(x.zero))
    return x.to(TRITON.device) if isinstance(x, Tensor) else x


def ours_of_all(x: Any, weights: Sequence[Any], onto: Tensor | None = None) -> list[Tensor]:
    return [y.cpu() for y in TRITON.linears(placed(x), weights, placed(onto))]


def ours(x: Any, weight: Any, onto: Tensor | None = None) -> Tensor:
    return ours_of_all(x, [weight], onto)[0]


def sums(x: Quantized, weight: PackedWeight) -> Tensor:
    return accumulate(placed(x), weight).cpu()


def two_bands(count: int, out: int = 33) -> tuple[Quantized, PackedLinear, ActivationFormat]:
    return quantize(normal(count, TWO.size), TWO), packed(TWO, out), ActivationFormat(bands=TWO)


@pytest.mark.parametrize("name", [*CUTS, "every-width", "one-column", "one-bit", "last-block-of-4"])
def test_accumulated_integers_are_the_references(name: str) -> None:
    x, whole, inputs = cut_case(name, 17)
    want = exact_sums(x, whole)
    for out, count in ((17, 3), (1, 17)):
        weight = prepacked(first_outputs(whole, out), inputs)
        with using("packed_linear", **SMALL):
            assert torch.equal(sums(rows_of(x, slice(count)), weight), want[:count, :, :out])


@pytest.mark.slow
@pytest.mark.parametrize("name", LONGER)
def test_accumulated_integers_of_more_cuts_are_the_references(name: str) -> None:
    x, whole, inputs = cut_case(name, 66)
    weight, want = prepacked(first_outputs(whole, 33), inputs), exact_sums(x, whole)[:, :, :33]
    for count in (66, 40, 20):
        with using("packed_linear", **SMALL | {"tokens": 32}):
            assert torch.equal(sums(rows_of(x, slice(count)), weight), want[:count])


@pytest.mark.parametrize("name", ["finer-weights", "heads", "three-bands"])
def test_integers_and_outputs_have_the_same_bits_however_rows_are_split(name: str) -> None:
    x, whole, inputs = cut_case(name, 5)
    weight, want = prepacked(first_outputs(whole, 19), inputs), exact_sums(x, whole)[:, :, :19]
    onto, outs = normal(5, 19, seed=3), []
    for split in (1, 2, 5):
        with using("packed_linear", **SMALL | {"channels": 32}, split=split):
            assert torch.equal(sums(x, weight), want), split
            outs.append(ours(x, weight, onto))
    assert all(torch.equal(out, outs[0]) for out in outs)
    work, tickets = linear._workspace(TRITON.device)
    assert not work.any()
    assert not tickets.any()


def test_a_split_is_chosen_where_there_are_few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    grids, real = [], linear.launch

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        grids.append(grid)
        real(kernel, grid, *arguments, **named)

    monkeypatch.setattr(linear, "launch", launch)
    bands = Bands.of((4, 2048))
    x, each = quantize(normal(2, 2048), bands), packed(bands, 20)
    weight = prepacked(each, ActivationFormat(bands=bands))
    assert torch.equal(sums(x, weight), exact_sums(x, each))
    assert grids == [(1, 2)]


@pytest.mark.parametrize("w_bits", PACKABLE_BITS)
def test_integers_are_exact_at_the_ends_of_every_width(w_bits: int) -> None:
    size, (low, high) = 150, symmetric_limits(w_bits)
    turns = torch.arange(size) % 2
    weights = torch.stack([torch.full((size,), low), torch.full((size,), high), low + turns * (high - low)])
    each = PackedLinear.from_integers(weights, torch.ones(3, 1), Bands.of((w_bits, size)))
    for q_bits in PACKABLE_BITS:
        top, bands = 2**q_bits - 1, Bands.of((q_bits, size))
        kinds = [torch.zeros(size), torch.full((size,), top), turns * top, (1 - turns) * top]
        q = torch.stack([kind for kind in kinds for _ in range(2)]).to(torch.uint8)
        zero = torch.tensor([0, top] * 4, dtype=torch.uint8)[:, None, None]
        x = Quantized(q, torch.ones(8, 1, 1), zero, bands)
        want = (q.to(torch.int64) - zero[..., 0].to(torch.int64)) @ weights.T.to(torch.int64)
        got = sums(x, prepacked(each, ActivationFormat(bands=bands)))
        assert torch.equal(got[:, 0].to(torch.int64), want), q_bits


@pytest.mark.parametrize(("w_bits", "least"), [(8, -128), (4, -8)])
def test_the_longest_rows_do_not_overflow(w_bits: int, least: int) -> None:
    bands, inputs = Bands.of((w_bits, LONGEST)), Bands.of((8, LONGEST))
    each = PackedLinear.from_integers(torch.full((2, LONGEST), least), torch.ones(2, 1), bands)
    zero = torch.zeros(2, 1, 1, dtype=torch.uint8)
    x = Quantized(torch.full((2, LONGEST), 255, dtype=torch.uint8), torch.ones(2, 1, 1), zero, inputs)
    assert (sums(x, prepacked(each, ActivationFormat(bands=inputs))) == 255 * least * LONGEST).all()
    too_long = PackedLinear.from_integers(torch.ones(1, LONGEST + 1), torch.ones(1, 1), Bands.of((w_bits, LONGEST + 1)))
    with pytest.raises(InputError, match="overflows 32-bit sums"):
        TRITON.prepack(too_long)


@pytest.mark.parametrize("name", ["one-band-of-heads", "three-bands", "last-block-of-4"])
def test_what_lies_beside_the_activations_does_not_count(name: str) -> None:
    x, whole, inputs = cut_case(name, 2)
    weight, found = prepacked(first_outputs(whole, 5), inputs), []
    for value in (-128, 127):
        moved = rows.rows_of(placed(x))
        moved.container[:, moved.size :] = value
        found.append(sums(moved, weight))
        # The last row's slack is all that is read beyond it.
        panels = [(each, 2 * each.length if each.nibbles else each.length) for each in weight.panels]
        furthest = max(each.start + (weight.groups - 1) * each.step + room for each, room in panels)
        assert furthest <= moved.ld
    assert torch.equal(*found)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", CUTS)
def test_a_quantized_linear_is_within_float32_rounding_of_the_reference(name: str, bias: bool) -> None:
    x, whole, inputs = cut_case(name, 17)
    whole = first_outputs(whole if bias else replace(whole, bias=None), 37)
    want, onto, weight = REFERENCE.linear(x, unpacked(whole)), normal(17, 37, seed=5) * 30, prepacked(whole, inputs)
    assert_within(ours(x, weight), want, quantized_bound(x, whole, None))
    assert_within(ours(x, weight, onto), onto + want, quantized_bound(x, whole, onto))


def test_a_row_has_its_bits_whatever_the_rows_beside_it() -> None:
    x, each, inputs = two_bands(70)
    weight, onto = prepacked(each, inputs), normal(70, 33, seed=8)
    every = ours(x, weight, onto)
    for at in (slice(0, 1), slice(3, 20), slice(31, 67)):
        assert torch.equal(ours(rows_of(x, at), weight, onto[at]), every[at]), at


def test_sums_that_wait_in_the_output_give_the_same_bits() -> None:
    x, each, inputs = two_bands(20)
    weight, onto = prepacked(each, inputs), normal(20, 33, seed=2)
    with using("packed_linear", **SMALL, split=1):
        want = ours(x, weight, onto)
    for split in (1, 2):
        with using("packed_linear", **SMALL, apart=True, split=split):
            assert torch.equal(ours(x, weight, onto), want)


def merged(x: Quantized, weight: PackedWeight, onto: Tensor | None = None) -> Tensor:
    with using("packed_linear", **SMALL, merge=True, split=1):
        return ours(x, weight, onto)


def merge_bound(x: Quantized, each: PackedLinear) -> Tensor:
    """What merging may add to `quantized_bound`: the second band's part is rounded to a 16th of the first's unit, by
    half a step at most, after five float32 roundings (its integer, two ratios, two products), 2^-24 of itself each."""
    part = (x.scale[:, 1] * each.scale[:, 1]).double() * exact_sums(x, each)[:, 1].double()
    return (x.scale[:, 0] * each.scale[:, 0]).double() / 32 * (1 + 2**-20) + part.abs() * (5.1 * ROUNDING)


def test_one_accumulator_for_both_bands_is_within_its_bound() -> None:
    x, each, inputs = two_bands(20)
    weight, onto = prepacked(each, inputs), normal(20, 33, seed=2)
    got = merged(x, weight, onto)
    bound = quantized_bound(x, each, onto) + merge_bound(x, each)
    assert_within(got, onto + REFERENCE.linear(x, unpacked(each)), bound)
    # It is another form, and rounds: the exact one has other bits.
    assert not torch.equal(got, ours(x, weight, onto))


@pytest.mark.parametrize("massive", [1e3, 1e6, 1e30])
def test_massive_activations_do_not_overflow_the_one_accumulator(massive: float) -> None:
    values = normal(20, TWO.size)
    values[3, -1] *= massive  # one coordinate of one token, in the band of 8 bits
    values[4, :420] /= massive
    x = quantize(values, TWO)
    each = packed(TWO, 33)
    weight, bound = prepacked(each, ActivationFormat(bands=TWO)), quantized_bound(x, each, None)
    got, want = merged(x, weight), REFERENCE.linear(x, unpacked(each))
    assert_within(got, want, bound + merge_bound(x, each))
    unit = (x.scale[:, 0] * each.scale[:, 0]).double() / 16
    steps = ((x.scale[:, 1] * each.scale[:, 1]).double() * exact_sums(x, each)[:, 1] / unit).abs()
    if massive > 1e3:
        # Beyond int32, and in a tile of its own: the others stay within the same bound.
        assert float(steps[3].max()) > 2**31
    apart = steps[:16].amax() > 2**30
    assert bool(apart) == (massive > 1e3)


def test_several_linears_of_one_input_are_one_launch_and_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    count, real = [0], linear.launch

    def launch(*arguments: Any, **named: Any) -> None:
        count[0] += 1
        real(*arguments, **named)

    monkeypatch.setattr(linear, "launch", launch)
    bands = Bands.of((4, 70), (8, 26))
    inputs = ActivationFormat(bands=bands)
    linears = [packed(bands, 33), packed(bands, 5, bias=False, seed=3), packed(bands, 64, seed=9)]
    weights, onto = [prepacked(each, inputs) for each in linears], normal(3, 2, 33, seed=4)
    x = quantize(normal(3, 2, 96), bands)
    alone = [ours(x, weight, onto if index == 0 else None) for index, weight in enumerate(weights)]
    held, count[0] = sum(weight.nbytes for weight in weights), 0
    got = ours_of_all(x, weights, onto)
    assert count == [1]
    assert [tuple(y.shape) for y in got] == [(3, 2, 33), (3, 2, 5), (3, 2, 64)]
    again = ours_of_all(x, weights, onto)
    for mine, later, want, weight in zip(got, again, alone, weights, strict=True):
        assert torch.equal(mine, want)
        assert torch.equal(later, want)
        assert torch.equal(ours(x, weight, onto if weight is weights[0] else None), want)
    # The weights are held once: views of the joined ones.
    assert len({weight.packed.untyped_storage().data_ptr() for weight in weights}) == 1
    assert sum(weight.nbytes for weight in weights) == held
    swapped = ours_of_all(x, [weights[2], weights[0]])
    assert torch.equal(swapped[0], alone[2])
    floats = normal(3, 2, 96)
    for mine, weight in zip(ours_of_all(floats, weights), weights, strict=True):
        assert torch.equal(mine, ours(floats, weight))


def test_linears_of_other_cuts_and_plain_ones_may_share_an_input() -> None:
    bands, finer = Bands.of((4, 70), (8, 26)), Bands.of((4, 30), (4, 40), (6, 26))
    plain, linears = DenseLinear(normal(7, 96), normal(7, seed=1)), [packed(bands, 33), packed(finer, 5)]
    x, onto = quantize(normal(4, 96), bands), normal(4, 7, seed=2)
    weights = [TRITON.prepack(plain), *(prepacked(each, ActivationFormat(bands=bands)) for each in linears)]
    got = ours_of_all(x, weights, onto)
    want = REFERENCE.linears(x, (plain, *map(unpacked, linears)), onto)
    # Dequantized to float32 first: one more rounding of every product.
    assert_within(got[0], want[0], dense_bound(x.dequantize(torch.float64), plain, onto, extra=96))
    for mine, theirs, each in zip(got[1:], want[1:], linears, strict=True):
        assert_within(mine, theirs, quantized_bound(x, each, None))


@pytest.mark.parametrize("name", ["three-bands", "one-column", "every-width", "last-block-of-4"])
def test_float_activations_times_packed_weights_are_within_float32_rounding(name: str) -> None:
    weights = LONGER[name][1]
    each = packed(weights, 33)
    for count in (1, 17):
        x, onto = normal(count, weights.size, seed=count), normal(count, 33, seed=7)
        assert each.bias is not None
        terms = x.double().abs() @ each.dequantize(torch.float64).abs().T + onto.abs() + each.bias.abs()
        # A sum over a band rounds at most size times, a product at most once; then as for quantized activations.
        bound = terms * (1.01 * (weights.size + len(weights) + 6) * ROUNDING)
        assert_within(ours(x, prepacked(each), onto), REFERENCE.linear(x, unpacked(each), onto), bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_plain_linear_is_within_float32_rounding_of_the_reference(dtype: torch.dtype) -> None:
    for out, size in ((1, 1), (70, 33), (9, 600)):
        weight = normal(out, size, seed=size).to(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
        each = DenseLinear(weight, normal(out, seed=1).to(dtype))
        for count in (1, 3, 5, 17):
            x, onto = normal(count, size, seed=count + 1), normal(count, out, seed=2)
            # Sums of float32 in any order: at most `size` roundings, where the bound counts a 16th.
            bound = dense_bound(x, each, onto, extra=size)
            got = ours(x, TRITON.prepack(replace(each, weight=weight.T.contiguous().T)), onto)
            assert_within(got, onto + REFERENCE.linear(x, each), bound)
    assert ours(normal(0, 600), TRITON.prepack(each)).shape == (0, 9)


def test_inputs_may_lie_anyhow() -> None:
    bands = Bands.of((4, 30), (8, 10))
    onto, wide = normal(3, 2, 33, seed=1), normal(2, 3, 80)
    x = wide[..., ::2].transpose(0, 1)
    views = torch.cat([normal(3, 2, 7), x.contiguous(), normal(3, 2, 50)], dim=-1)[..., 7:47]
    strided = torch.stack([onto, onto], -1)[..., 0]
    for weight in (prepacked(packed(bands, 33)), TRITON.prepack(DenseLinear(normal(33, 40)))):
        want = ours(x.contiguous(), weight, onto)
        assert torch.equal(ours(x, weight, strided), want)
        assert torch.equal(ours(views, weight, onto), want)
        assert ours(x.contiguous()[1, 1], weight, onto[1, 1]).shape == (33,)
        half = ours(x.half(), weight, onto.double())
        assert torch.equal(half, ours(x.half().float(), weight, onto))
    q, weight = quantize(x, bands), prepacked(packed(bands, 33), ActivationFormat(bands=bands))
    want = ours(q, weight, onto)
    assert torch.equal(ours(q, weight, strided), want)
    assert torch.equal(ours(rows_of(q, (1, 1)), weight), ours(q, weight)[1, 1])
    assert ours(rows_of(q, slice(0, 0)), weight).shape == (0, 2, 33)
    assert ours_of_all(q, []) == []


def test_a_weight_holds_little_more_than_its_bits() -> None:
    bands = Bands.of((4, 1792), (8, 256))
    weight = prepacked(packed(bands, 64, bias=False), ActivationFormat(bands=bands))
    integers, scales, sums = 64 * (1792 // 2 + 256), 64 * 2 * 4, 64 * 2 * 4
    assert weight.nbytes == integers + scales + sums
    plain = TRITON.prepack(DenseLinear(normal(8, 40).bfloat16()))
    assert isinstance(plain, DenseWeight)
    assert plain.nbytes == 8 * 40 * 2


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_every_capability_has_a_choice_for_every_shape(capability: int) -> None:
    with targeting(Target(capability, 100, True)):
        for count in (1, 16, 17, 64, 65, 8192):
            found = chosen("packed_linear", rows=count, bands=3, groups=32)
            assert found.keys() == {"tokens", "channels", "block", "warps", "stages", "width", "waves"}
            assert chosen("float_linear", rows=count)["tokens"] >= 16
            assert chosen("dense_tiles", rows=count)["tokens"] >= 16
        with using("packed_linear", tokens=64):
            assert chosen("packed_linear", rows=1) == chosen("packed_linear", rows=1) | {"tokens": 64}
    assert chosen("packed_linear", rows=1)["tokens"] == 16


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    x, each, inputs = two_bands(2)
    weight = prepacked(each, inputs)
    other = quantize(normal(2, TWO.size), Bands.of((4, TWO.size)))
    cases = [
        (lambda: ours(normal(2, 479), weight), "480 inputs cannot take an activation of 479"),
        (lambda: ours(other, weight), "give prepack the format"),
        (lambda: sums(other, weight), "give prepack the format"),
        (lambda: ours(x, weight, normal(3, 33)), "cannot be added"),
        (lambda: TRITON.prepack(packed(Bands.of((4, 400), (8, 80)), 3), inputs), "do not fit activation bands"),
    ]
    for call, said in cases:
        with pytest.raises(InputError, match=said) as raised:
            call()
        assert "\n" not in str(raised.value)
