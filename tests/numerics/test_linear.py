"""Properties of resq.numerics.linear."""

import pytest
import torch

from resq.errors import InputError
from resq.numerics.affine import symmetric_limits
from resq.numerics.bands import PACKABLE_BITS, Bands
from resq.numerics.linear import DenseLinear, PackedLinear

CUTS = [[(4, 24)], [(4, 21), (8, 3)], [(2, 5), (4, 13), (6, 5)], [(3, 7), (6, 1)], [(8, 1)], [(1, 5), (3, 13), (5, 6)]]


def random_integers(out: int, bands: Bands) -> torch.Tensor:
    """Signed integers [out, in] over the whole range of each band."""
    generator = torch.Generator().manual_seed(out + bands.size)
    parts = []
    for band in bands:
        low, high = symmetric_limits(band.bits)
        part = torch.randint(low, high + 1, (out, band.size), generator=generator)
        parts.append(part.where(part != 0, 1) if band.bits == 1 else part)
    return torch.cat(parts, dim=1)


def random_scale(out: int, bands: Bands) -> torch.Tensor:
    return torch.rand(out, len(bands), generator=torch.Generator().manual_seed(out)) + 0.01


@pytest.mark.parametrize("pairs", CUTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_integers_survive_packing(pairs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    bands = Bands.of(*pairs)
    integers = random_integers(6, bands)
    linear = PackedLinear.from_integers(integers.to(dtype), random_scale(6, bands), bands)
    assert linear.shape == (6, bands.size)
    assert linear.integers().dtype == torch.int8
    assert torch.equal(linear.integers(), integers.to(torch.int8))


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_extremes_of_each_width_survive_packing(bits: int, count: int) -> None:
    bands = Bands.of((bits, count), (8, 2))
    low, high = symmetric_limits(bits)
    rows = [[value] * count + [-128, 127] for value in {low, -1, 1, high} | ({low + 1, 0} if bits > 1 else set())]
    linear = PackedLinear.from_integers(torch.tensor(rows), torch.ones(len(rows), 2), bands)
    assert linear.integers().tolist() == rows


@pytest.mark.parametrize("pairs", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dequantized_weights_are_scale_times_integers(pairs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    bands = Bands.of(*pairs)
    integers, scale = random_integers(6, bands), random_scale(6, bands)
    weight = PackedLinear.from_integers(integers, scale, bands).dequantize(dtype)
    assert weight.dtype == dtype
    for index, cut in enumerate(bands.slices()):
        expected = integers[:, cut].to(dtype) * scale[:, index, None].to(dtype)
        assert torch.equal(weight[:, cut], expected)


def test_dense_is_the_same_linear_with_plain_weights() -> None:
    bands = Bands.of((4, 21), (8, 3))
    bias = torch.arange(6.0)
    linear = PackedLinear.from_integers(random_integers(6, bands), random_scale(6, bands), bands, bias)
    dense = linear.dense(torch.float64)
    assert dense.shape == linear.shape
    assert torch.equal(dense.weight, linear.dequantize(torch.float64))
    assert dense.bias is not None
    assert torch.equal(dense.bias, bias.double())
    assert PackedLinear.from_integers(random_integers(6, bands), random_scale(6, bands), bands).dense().bias is None


def test_scale_and_bias_are_kept_in_float32() -> None:
    bands = Bands.of((4, 21), (8, 3))
    scale, bias = random_scale(6, bands).double(), torch.arange(6.0, dtype=torch.bfloat16)
    linear = PackedLinear.from_integers(random_integers(6, bands), scale, bands, bias)
    assert linear.bias is not None
    assert (linear.scale.dtype, linear.bias.dtype) == (torch.float32, torch.float32)
    assert torch.equal(linear.scale, scale.float())


def test_a_transposed_view_packs_as_its_copy() -> None:
    bands = Bands.of((3, 14), (6, 6))
    integers, scale = random_integers(9, bands), random_scale(9, bands)
    view = PackedLinear.from_integers(integers.T.contiguous().T, scale, bands)
    copy = PackedLinear.from_integers(integers, scale, bands)
    assert all(torch.equal(a, b) for a, b in zip(view.qweight, copy.qweight, strict=True))
    assert torch.equal(view.dequantize(), copy.dequantize())


def test_a_linear_of_no_outputs_is_accepted() -> None:
    bands = Bands.of((4, 7), (8, 1))
    linear = PackedLinear.from_integers(torch.zeros(0, 8), torch.zeros(0, 2), bands)
    assert linear.shape == (0, 8)
    assert linear.dequantize().shape == (0, 8)


def refused(
    message: str, bands: Bands, parts: tuple[torch.Tensor, ...], scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        PackedLinear(bands, parts, scale, bias)
    assert "\n" not in str(refusal.value)


def test_shapes_that_do_not_fit_the_bands_are_refused() -> None:
    bands = Bands.of((4, 21), (8, 3))
    linear = PackedLinear.from_integers(random_integers(6, bands), random_scale(6, bands), bands)
    low, high = linear.qweight
    scale, message = (
        linear.scale,
        r"do not fit bands \[\(4, 21\), \(8, 3\)\]: expected \[\(6, 11\), \(6, 3\)\] and \(6, 2\)",
    )
    refused(message, bands, (low,), scale, None)
    refused(message, bands, (high, low), scale, None)
    refused(message, bands, (low, high, high), scale, None)
    refused(message, bands, (low[:, :-1], high), scale, None)
    refused(message, bands, (low[:-1], high), scale, None)
    refused("do not fit", bands, (low, high), scale[:-1], None)
    refused("do not fit", bands, (low, high), scale[:, :1], None)
    refused("do not fit", bands, (low, high), scale[:, 0], None)
    refused("do not fit", bands, (low, high), scale[..., None], None)


@pytest.mark.parametrize("shape", [(5,), (6, 1), (1,), ()])
def test_a_bias_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    bands = Bands.of((4, 21), (8, 3))
    linear = PackedLinear.from_integers(random_integers(6, bands), random_scale(6, bands), bands)
    refused(r"bias of shape \(6,\), got", bands, linear.qweight, linear.scale, torch.zeros(shape))


@pytest.mark.parametrize("columns", [7, 9, 20])
def test_integers_of_another_size_than_the_bands_are_refused(columns: int) -> None:
    # 7 and 8 four-bit values take equally many bytes, so the packed shapes alone do not tell.
    with pytest.raises(InputError, match=rf"^bands cover 8 coordinates, the integers have {columns}$"):
        PackedLinear.from_integers(torch.zeros(3, columns), torch.ones(3, 1), Bands.of((4, 8)))


def test_a_dense_linears_shape_is_its_weights() -> None:
    assert DenseLinear(torch.zeros(3, 5)).shape == (3, 5)


def test_one_bit_weights_hold_no_zero() -> None:
    with pytest.raises(InputError, match=r"^integers of band 0 hold 0; those of 1 bit are -1 and 1$"):
        PackedLinear.from_integers(torch.tensor([[1, -1, 0, 1]]), torch.ones(1, 1), Bands.of((1, 4)))
    with pytest.raises(InputError, match=r"^integers of band 0 leave -1 … 1, the range of 1 bits$"):
        PackedLinear.from_integers(torch.tensor([[1, -1, 2, 1]]), torch.ones(1, 1), Bands.of((1, 4)))
