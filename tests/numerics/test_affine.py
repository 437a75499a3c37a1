"""Properties of resq.numerics.affine."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq.errors import InputError
from resq.numerics import affine
from resq.numerics.affine import (
    CLIP_NORM,
    CLIP_SHRINKS,
    FLOAT16_MAX,
    asymmetric,
    quantize,
    round_symmetric,
    symmetric_limits,
    symmetric_scale,
)
from resq.numerics.bands import PACKABLE_BITS, Bands

WIDTHS = range(1, 9)
DTYPES = (torch.float32, torch.float16)
TINY = torch.finfo(torch.float32).tiny
MAX = torch.finfo(torch.float32).max
# Rows that have broken quantizers: each is quantized alone, so their lengths differ.
EDGE_ROWS = {
    "zeros": [0.0, 0.0, 0.0],
    "negative zero": [-0.0, 0.0],
    "single zero": [0.0],
    "single": [0.37],
    "single negative": [-2.5],
    "constant": [1.7] * 5,
    "constant negative": [-1.7] * 5,
    "subnormal": [1e-45, -1e-42, 3e-39],
    "single subnormal": [1e-45],
    "least normal": [TINY, -TINY],
    "scale just below tiny": [TINY * 3, TINY * 2],
    "scale just above tiny": [TINY * 16, TINY * 255],
    "below float16": [1e-9, -3e-9],
    "float16 subnormal scale": [1e-6, -2e-6, 3e-7],
    "beyond float16": [1e6, -3e7, 10.0],
    "huge": [3e38, -3e38, 1.0],
    "huge positive": [3e38, 1e38],
    "huge negative": [-3e38],
    "largest": [MAX, -MAX, 0.0],
    "largest positive": [MAX, MAX / 3],
    "huge and tiny": [3e38, 1e-45],
    "all positive": [5.0, 6.0, 7.5],
    "all negative": [-5.0, -6.0, -7.5],
    "halves": [0.0, 0.5, 1.5, 2.5, 3.0],
}
repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=120)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
moderate = st.floats(-(2.0**20), 2.0**20, width=32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float32 with outliers: a Gaussian times a log-normal factor per row and coordinate."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator)
    return x * torch.exp(0.7 * torch.randn(shape, generator=generator))


def value(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """scale · (q - zero), exact in float64."""
    return scale.double()[..., None] * (q.double() - zero.double()[..., None])


def half_step(scale: torch.Tensor, bits: int) -> torch.Tensor:
    """scale/2 and what float32 adds in units of scale: 2^-24 of at most 2^b - 1 from each of s's three roundings, from
    1/s and from its product with x, and 2^-22 more where 1/s is subnormal."""
    return scale.double()[..., None] * (0.5 + 2**bits * 2.0**-22)


def check_contract(x: torch.Tensor, bits: int, scale_dtype: torch.dtype) -> None:
    """What asymmetric promises for any finite x [..., n]."""
    q, scale, zero = asymmetric(x, bits, scale_dtype)
    assert (q.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float32, torch.uint8)
    assert (q.shape, scale.shape, zero.shape) == (x.shape, x.shape[:-1], x.shape[:-1])
    top = 2**bits - 1
    assert int(q.max()) <= top
    assert int(zero.max()) <= top
    assert torch.isfinite(scale).all()
    assert torch.isfinite(1 / scale).all()
    assert (scale > 0).all()
    restored = value(q, scale, zero)
    low, high = value(torch.zeros_like(q), scale, zero), value(torch.full_like(q, top), scale, zero)
    assert (low <= 0).all()
    assert (high >= 0).all()
    representable = torch.minimum(torch.maximum(x.double(), low), high)
    assert ((representable - restored).abs() <= half_step(scale, bits)).all()
    if scale_dtype == torch.float32:
        # A scale that was not rounded further spans the whole row: only half a step is ever clamped away. A row wider
        # than the largest float32 is clamped to that width.
        spanned = torch.isfinite(x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0))
        within = (x.double() - restored).abs() <= half_step(scale, bits)
        assert within[spanned].all()
    assert (restored[x == 0] == 0).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_error_is_at_most_half_a_step_inside_the_range(bits: int, scale_dtype: torch.dtype) -> None:
    x = random(40, 65)
    check_contract(x, bits, scale_dtype)
    check_contract(x + 3, bits, scale_dtype)
    check_contract(x * 1e-3 - 0.02, bits, scale_dtype)
    check_contract(x[:, :1], bits, scale_dtype)


@pytest.mark.parametrize("name", EDGE_ROWS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_edge_rows_keep_the_contract(name: str, scale_dtype: torch.dtype) -> None:
    for bits in WIDTHS:
        check_contract(torch.tensor(EDGE_ROWS[name]), bits, scale_dtype)


@repeatable
@given(row=st.lists(st.one_of(finite, moderate), min_size=1, max_size=24), bits=st.sampled_from(WIDTHS))
def test_any_finite_row_keeps_the_contract(row: list[float], bits: int) -> None:
    for scale_dtype in DTYPES:
        check_contract(torch.tensor(row, dtype=torch.float32), bits, scale_dtype)


@repeatable
@given(row=st.lists(finite, min_size=1, max_size=24), bits=st.sampled_from(PACKABLE_BITS))
def test_no_finite_row_becomes_nan(row: list[float], bits: int) -> None:
    x = torch.tensor(row, dtype=torch.float32)
    for scale_dtype in DTYPES:
        restored = quantize(x, Bands.of((bits, len(row))), scale_dtype=scale_dtype)
        assert not restored.dequantize().isnan().any()
        assert torch.isfinite(restored.dequantize(torch.float64)).all()


@pytest.mark.parametrize("name", EDGE_ROWS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_edge_rows_dequantize_to_finite_values(name: str, scale_dtype: torch.dtype) -> None:
    row = torch.tensor(EDGE_ROWS[name])
    for bits in PACKABLE_BITS:
        quantized = quantize(row, Bands.of((bits, row.shape[0])), scale_dtype=scale_dtype)
        # Half a step above float32's largest number is no float32: such a row is finite in float64 only.
        dtype = torch.float64 if row.double().abs().max() + quantized.scale.max().double() / 2 > MAX else torch.float32
        assert torch.isfinite(quantized.dequantize(dtype)).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_range_includes_zero(bits: int) -> None:
    top = 2**bits - 1
    positive, negative = torch.tensor([5.0, 6.0, 7.5]), torch.tensor([-5.0, -6.0, -7.5])
    q, scale, zero = asymmetric(positive, bits)
    assert int(zero) == 0
    assert float(scale) == pytest.approx(7.5 / top, rel=2**-23)
    assert int(q[2]) == top
    q, scale, zero = asymmetric(negative, bits)
    assert int(zero) == top
    assert float(scale) == pytest.approx(7.5 / top, rel=2**-23)
    assert int(q[2]) == 0


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_zero_padding_is_exact_and_changes_nothing(bits: int, scale_dtype: torch.dtype) -> None:
    for x in (random(7, 20), random(7, 20).abs() + 1, -random(7, 20).abs() - 1):
        q, scale, zero = asymmetric(x, bits, scale_dtype)
        padded = asymmetric(torch.nn.functional.pad(x, (0, 3)), bits, scale_dtype)
        assert torch.equal(padded[1], scale)
        assert torch.equal(padded[2], zero)
        assert torch.equal(padded[0], torch.cat([q, zero[:, None].expand(-1, 3)], dim=-1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_halves_round_to_even(bits: int) -> None:
    top = 2**bits - 1
    # Scale 1 exactly, zero point 0: the integers are the rounded inputs.
    x = torch.cat([torch.arange(top) + 0.5, torch.tensor([float(top)])])
    q, scale, zero = asymmetric(x, bits)
    assert (float(scale), int(zero)) == (1.0, 0)
    assert q.tolist() == [round(v) for v in x.tolist()]
    # The coordinate is rounded before the zero point, odd here, is added.
    x = torch.cat([torch.tensor([-1.0]), torch.arange(top) - 0.5, torch.tensor([top - 1.0])])
    q, scale, zero = asymmetric(x, bits)
    assert (float(scale), int(zero)) == (1.0, 1)
    assert q.tolist() == [min(top, round(v) + 1) for v in x.tolist()]


@pytest.mark.parametrize("bits", WIDTHS[1:])
@pytest.mark.parametrize(("low", "expected"), [(-0.5, 0), (-1.5, 2), (-2.5, 2)])
def test_a_zero_point_of_a_half_rounds_to_even(bits: int, low: float, expected: int) -> None:
    _, scale, zero = asymmetric(torch.tensor([low, low + 2**bits - 1]), bits)
    assert (float(scale), int(zero)) == (1.0, expected)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_every_step_is_one_float32_operation(bits: int, scale_dtype: torch.dtype) -> None:
    x = random(50, 33)
    # Half steps, where x / s and x · (1 / s) may round to different integers.
    halves = asymmetric(x, bits, scale_dtype)[1][:, None] * (torch.arange(-(2**bits), 2**bits) + 0.5)
    x = torch.cat([x, torch.minimum(torch.maximum(halves, x.amin(-1, True)), x.amax(-1, True))], dim=-1)
    q, scale, zero = asymmetric(x, bits, scale_dtype)
    top = np.float32(2**bits - 1)
    for row, q_row, s_row, z_row in zip(x.numpy(), q.numpy(), scale.numpy(), zero.numpy(), strict=True):
        s = (max(row.max(), np.float32(0)) - min(row.min(), np.float32(0))) * np.float32(1.0 / top)
        if scale_dtype == torch.float16:
            s = np.float32(np.float16(s))
        inverse = np.float32(1) / s
        z = np.clip(np.rint(-min(row.min(), np.float32(0)) * inverse), 0, top)
        assert s.dtype == inverse.dtype == np.float32
        assert s == s_row
        assert z == z_row
        assert np.array_equal(np.clip(np.rint(row * inverse) + z, 0, top), q_row)


@pytest.mark.parametrize("bits", WIDTHS)
def test_float16_scales_are_rounded_before_the_integers(bits: int) -> None:
    x = random(60, 64)
    q, scale, zero = asymmetric(x, bits, torch.float16)
    exact = asymmetric(x, bits)[1]
    assert torch.equal(scale, exact.to(torch.float16).to(torch.float32))
    assert (scale != exact).any()
    inverse = 1 / scale[:, None]
    assert torch.equal(zero, torch.round(-x.amin(-1) * inverse[:, 0]).clamp(0, 2**bits - 1).to(torch.uint8))
    assert torch.equal(q, (torch.round(x * inverse) + zero[:, None]).clamp(0, 2**bits - 1).to(torch.uint8))


def test_float16_scales_stop_at_the_largest_float16() -> None:
    q, scale, zero = asymmetric(torch.tensor([[1e6, -3e7, 10.0], [3e38, -3e38, 0.0]]), 4, torch.float16)
    assert scale.tolist() == [FLOAT16_MAX, FLOAT16_MAX]
    assert zero.tolist() == [15, 15]
    assert q.tolist() == [[15, 0, 15], [15, 0, 15]]
    assert asymmetric(torch.tensor([1e-9, -3e-9]), 4, torch.float16)[1] == 1.0


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_rows_result_depends_on_that_row_alone(scale_dtype: torch.dtype) -> None:
    x = random(37, 48)
    x[5], x[11], x[20] = 0.0, 3e38, 1e-42
    bands = Bands.of((4, 40), (8, 8))
    together = quantize(x, bands, scale_dtype=scale_dtype)
    for row in range(x.shape[0]):
        alone = quantize(x[row], bands, scale_dtype=scale_dtype)
        assert torch.equal(together.q[row], alone.q)
        assert torch.equal(together.scale[row], alone.scale)
        assert torch.equal(together.zero[row], alone.zero)


@pytest.mark.parametrize("pairs", [[(4, 24)], [(4, 18), (8, 6)], [(2, 6), (4, 12), (6, 6)], [(3, 12), (3, 12)]])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_bands_and_groups_equal_quantizing_each_alone(
    pairs: list[tuple[int, int]], groups: int, scale_dtype: torch.dtype
) -> None:
    bands, x = Bands.of(*pairs), random(2, 5, 24)
    together = quantize(x, bands, groups=groups, scale_dtype=scale_dtype)
    assert together.scale.shape == together.zero.shape == (2, 5, len(bands), groups)
    restored = together.dequantize(torch.float64)
    for index, (band, cut) in enumerate(zip(bands, bands.slices(), strict=True)):
        size = band.size // groups
        for group in range(groups):
            part = slice(cut.start + group * size, cut.start + (group + 1) * size)
            q, scale, zero = asymmetric(x[..., part], band.bits, scale_dtype)
            assert torch.equal(together.q[..., part], q)
            assert torch.equal(together.scale[..., index, group], scale)
            assert torch.equal(together.zero[..., index, group], zero)
            assert torch.equal(restored[..., part], value(q, scale, zero))


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (24,), (2, 1, 3, 24)])
def test_leading_axes_are_rows_and_may_be_empty(shape: tuple[int, ...]) -> None:
    quantized = quantize(torch.zeros(shape), Bands.of((4, 18), (8, 6)), groups=3)
    assert quantized.q.shape == shape
    assert quantized.scale.shape == quantized.zero.shape == (*shape[:-1], 2, 3)
    assert quantized.dequantize().shape == shape


def test_memory_layout_and_float_type_of_the_input_are_irrelevant() -> None:
    x, bands = random(24, 6).to(torch.bfloat16), Bands.of((4, 18), (8, 6))
    expected = quantize(x.T.contiguous().to(torch.float32), bands)
    kept = x.clone()
    for same in (x.T, x.T.to(torch.float64), x.repeat_interleave(2, dim=0)[::2].T):
        given = quantize(same, bands)
        assert torch.equal(given.q, expected.q)
        assert torch.equal(given.scale, expected.scale)
        assert torch.equal(given.zero, expected.zero)
    assert torch.equal(x, kept)


def test_dequantizing_rounds_once() -> None:
    quantized = quantize(random(9, 24), Bands.of((4, 18), (8, 6)), groups=2)
    # The product of a 9-bit and a 24-bit integer is exact in float64.
    exact = quantized.dequantize(torch.float64)
    assert torch.equal(quantized.dequantize(), exact.to(torch.float32))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("step", [2.0**-20, 1.0, 2.0**12])
def test_values_on_the_grid_are_exact(bits: int, step: float) -> None:
    # One-sided rows that reach the range's end: scale = top · step / top without a rounding.
    x = torch.arange(2.0**bits).flip(0) * step
    for row in (x, -x):
        assert torch.equal(value(*asymmetric(row, bits)), row.double())


def test_another_size_than_the_bands_is_refused() -> None:
    with pytest.raises(InputError, match=r"^bands cover 24 coordinates, the activation has 23$"):
        quantize(torch.zeros(2, 23), Bands.of((4, 18), (8, 6)))


def test_a_row_of_no_coordinates_is_refused() -> None:
    with pytest.raises(InputError, match=r"^a range needs at least one coordinate, got none$"):
        asymmetric(torch.zeros(3, 0), 4)


# Weights: symmetric, one scale per row.


def losses(w: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum |ŵ - w|^2.4 per row in float64, how far a float32 evaluation of it may be off)."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w, scale = w.double(), scale.double()[:, None]
    q = torch.where(w < 0, -1.0, 1.0) if bits == 1 else (w / scale).round().clamp(low, high)
    error = (q * scale - w).abs()
    loss = error.pow(2.4).sum(-1)
    # The error carries one rounding of ŵ and one of the difference, each 2^-24 of at most 2 max|w|; summing n terms
    # and the power (2 ulp) carry (n + 4) 2^-24 of the loss.
    shift = 2.0**-22 * w.abs().amax(-1)
    return loss, 2.4 * error.pow(1.4).sum(-1) * shift + (w.shape[1] + 4) * 2.0**-24 * loss


@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_symmetric_integers_fit_their_width(bits: int) -> None:
    w = random(20, 50)
    low, high = symmetric_limits(bits)
    assert (low, high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scale = symmetric_scale(w, bits, clip_search=False)
    q = round_symmetric(w, scale[:, None], bits)
    assert torch.equal(scale, w.abs().amax(-1) / high)
    assert float(q.abs().max()) == high
    # 2^-24 of at most `high` steps from s and from w / s.
    assert ((q.double() * scale.double()[:, None] - w).abs() <= scale.double()[:, None] * (0.5 + high * 2.0**-23)).all()
    clipped = round_symmetric(w, symmetric_scale(w, bits)[:, None], bits)
    assert low <= float(clipped.min())
    assert float(clipped.max()) <= high


def test_symmetric_halves_round_to_even_and_clamp() -> None:
    w = torch.tensor([[-9.0, -8.5, -7.5, -0.5, 0.5, 1.5, 6.5, 7.5, 8.0]])
    assert round_symmetric(w, torch.ones(1, 1), 4).tolist() == [[-8, -8, -8, 0, 0, 2, 6, 7, 7]]


def test_one_bit_is_the_sign_and_a_scale() -> None:
    assert symmetric_limits(1) == (-1, 1)
    w = torch.tensor([[-9.0, -0.1, -0.0, 0.0, 0.1, 4.0]])
    assert symmetric_scale(w, 1, clip_search=False).tolist() == [9.0]
    for scale in (0.0, 1e-30, 1.0, 100.0):
        assert round_symmetric(w, torch.tensor([[scale]]), 1).tolist() == [[-1, -1, 1, 1, 1, 1]]
    # Of ±s the least sum of 2.4th powers: near the mean of |w|, far below its largest.
    flat = random(20, 64).clamp(-3, 3)
    ratio = symmetric_scale(flat, 1) / flat.abs().amax(-1)
    assert float(ratio.min()) >= 0.21 - 1e-6
    assert float(ratio.max()) < 0.8
    # A row of zeros has no integer 0.
    for search in (True, False):
        rows = torch.tensor([[0.0, -0.0], [2.0, -2.0], [1e-45, 0.0]])
        assert symmetric_scale(rows, 1, clip_search=search).tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("columns", [1, 2, 7, 96])
def test_clip_search_is_the_best_of_all_shrinks(bits: int, columns: int) -> None:
    w = random(40, columns)
    full, chosen = symmetric_scale(w, bits, clip_search=False), symmetric_scale(w, bits)
    assert chosen.dtype == torch.float32
    candidates = torch.stack([full * round(1.0 - step / 100, 2) for step in range(80)])  # 1.00 … 0.21
    assert (candidates == chosen).any(dim=0).all()
    least, slack = chosen.new_full((40,), torch.inf, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for candidate in candidates:
        loss, off = losses(w, candidate, bits)
        slack = torch.where(loss < least, off, slack)
        least = torch.minimum(loss, least)
    loss, off = losses(w, chosen, bits)
    assert (loss <= least + slack + off).all()


def test_the_clip_searchs_grid_is_the_papers() -> None:
    assert len(CLIP_SHRINKS) == 80
    assert (CLIP_SHRINKS[0], CLIP_SHRINKS[1], CLIP_SHRINKS[-1], CLIP_NORM) == (1.0, 0.99, 0.21, 2.4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_clip_search_is_never_worse_than_no_clipping(bits: int) -> None:
    w = random(60, 64)
    best, slack = losses(w, symmetric_scale(w, bits), bits)
    plain, off = losses(w, symmetric_scale(w, bits, clip_search=False), bits)
    assert (best <= plain + slack + off).all()
    if bits <= 4:
        assert best.sum() < plain.sum()


def test_clip_search_cuts_off_an_outlier() -> None:
    w = torch.cat([random(1, 2000).clamp(-2, 2), torch.tensor([[4.0]])], dim=1)
    assert symmetric_scale(w, 4) < symmetric_scale(w, 4, clip_search=False)


@pytest.mark.parametrize("clip_search", [True, False])
def test_a_zero_row_gets_scale_one(clip_search: bool) -> None:
    w = random(4, 10)
    w[1], w[3] = 0.0, -0.0
    scale = symmetric_scale(w, 4, clip_search=clip_search)
    assert scale[[1, 3]].tolist() == [1.0, 1.0]
    assert (round_symmetric(w, scale[:, None], 4)[[1, 3]] == 0).all()


@pytest.mark.parametrize("clip_search", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_weights_give_finite_scales(bits: int, clip_search: bool) -> None:
    w = torch.tensor([[3e38, -3e38], [MAX, 1.0], [1e-45, 0.0], [TINY, -TINY], [TINY * 200, TINY], [1e-20, 2e-20]])
    scale = symmetric_scale(w, bits, clip_search=clip_search)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.isfinite(round_symmetric(w, scale[:, None], bits)).all()


@pytest.mark.parametrize("clip_search", [True, False])
def test_the_scale_of_a_row_does_not_depend_on_other_rows(clip_search: bool) -> None:
    w = random(30, 41)
    w[3] *= 1e6
    scale = symmetric_scale(w, 4, clip_search=clip_search)
    alone = torch.cat([symmetric_scale(row[None], 4, clip_search=clip_search) for row in w])
    assert torch.equal(scale, alone)
    assert torch.equal(symmetric_scale(w.flip(0), 4, clip_search=clip_search), scale.flip(0))
    assert torch.equal(symmetric_scale(w.T.contiguous().T, 4, clip_search=clip_search), scale)


def test_a_matrix_of_several_blocks_equals_its_rows() -> None:
    columns = 2**14
    w = random(19, columns)
    rows = 2**18 // columns  # one block
    assert w.shape[0] % rows not in (0, w.shape[0])
    kept = w.clone()
    scale = symmetric_scale(w, 4)
    assert torch.equal(w, kept)
    for start in (0, rows - 1, rows, w.shape[0] - 1):
        assert torch.equal(scale[start : start + 1], symmetric_scale(w[start : start + 1], 4))


def test_a_row_longer_than_a_block_and_a_matrix_of_no_rows_are_accepted() -> None:
    assert symmetric_scale(torch.zeros(0, 8), 4).shape == (0,)
    long = torch.zeros(2, 2**18 + 1)
    long[1, -1] = 14.0
    assert symmetric_scale(long, 4).tolist() == [1.0, 2.0]


def test_weights_are_not_written() -> None:
    w = random(5, 9)
    kept = w.clone()
    affine.symmetric_scale(w, 4)
    affine.round_symmetric(w, torch.ones(5, 1), 4)
    assert torch.equal(w, kept)
