"""Properties of resq.numerics.formats."""

import pytest
import torch

from resq.errors import InputError
from resq.numerics import hadamard
from resq.numerics.affine import quantize
from resq.numerics.bands import Bands
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats
from resq.numerics.maps import Dense, Hadamard, LinearMap, Permutation, random_orthogonal

SIZE = 16
MAPS: list[LinearMap | None] = [
    None,
    Dense(random_orthogonal(SIZE, torch.Generator().manual_seed(1))),
    Permutation(torch.arange(SIZE).flip(0)),
    Hadamard(hadamard.plan(SIZE)),
]
every_map = pytest.mark.parametrize("map", MAPS, ids=["none", "dense", "permutation", "hadamard"])
computes = pytest.mark.parametrize("compute", [torch.float32, torch.float64, torch.bfloat16])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def plain(map: LinearMap | None, x: torch.Tensor) -> torch.Tensor:
    return x if map is None else map.apply(x)


@every_map
@computes
def test_projecting_applies_the_map_in_the_compute_dtype(map: LinearMap | None, compute: torch.dtype) -> None:
    x = random(2, 5, SIZE)
    out = ActivationFormat(map).project(x, compute)
    assert out.dtype == compute
    assert torch.equal(out, plain(map, x.to(compute)))


@every_map
@computes
@pytest.mark.parametrize("bits", [4, 8])
def test_the_maps_input_is_rounded_only_when_asked(map: LinearMap | None, compute: torch.dtype, bits: int) -> None:
    x = random(2, 5, SIZE)
    format = ActivationFormat(map, map_input_bits=bits)
    rounded = quantize(x, Bands.of((bits, SIZE))).dequantize(compute)
    assert not torch.equal(rounded, x.to(compute))
    assert torch.equal(format.project(x, compute), plain(map, rounded))
    assert torch.equal(format.project(x, compute, rounded=True), plain(map, rounded))
    assert torch.equal(format.project(x, compute, rounded=False), plain(map, x.to(compute)))


@every_map
def test_without_map_input_bits_rounded_changes_nothing(map: LinearMap | None) -> None:
    x = random(3, SIZE)
    format = ActivationFormat(map, Bands.of((4, SIZE)))
    assert torch.equal(format.project(x, torch.float32), format.project(x, torch.float32, rounded=False))


def test_a_plain_format_changes_nothing() -> None:
    x = random(3, SIZE)
    assert PLAIN.bands is None
    assert torch.equal(PLAIN.project(x, torch.float32), x)
    assert HeadFormats() == HeadFormats(PLAIN, PLAIN, PLAIN)


def test_projecting_does_not_write_its_input() -> None:
    x = random(3, SIZE)
    kept = x.clone()
    for map in MAPS:
        ActivationFormat(map, map_input_bits=8).project(x, torch.float32)
        ActivationFormat(map).project(x, torch.float32)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_quantizing_uses_the_formats_bands_groups_and_scales(groups: int, scale_dtype: torch.dtype) -> None:
    bands, x = Bands.of((4, 12), (8, 4)), random(2, 5, SIZE)
    given = ActivationFormat(None, bands, groups, scale_dtype).quantize(x)
    expected = quantize(x, bands, groups=groups, scale_dtype=scale_dtype)
    assert (given.bands, given.groups) == (bands, groups)
    assert given.scale.shape == (2, 5, 2, groups)
    assert torch.equal(given.q, expected.q)
    assert torch.equal(given.scale, expected.scale)
    assert torch.equal(given.zero, expected.zero)


def test_quantizing_does_not_apply_the_map_again() -> None:
    bands, x = Bands.of((4, 12), (8, 4)), random(5, SIZE)
    for map in MAPS:
        format = ActivationFormat(map, bands, map_input_bits=8)
        assert torch.equal(format.quantize(x).q, quantize(x, bands).q)


@pytest.mark.parametrize(("pairs", "groups"), [([(4, 12), (8, 4)], 3), ([(4, 14), (8, 2)], 4), ([(4, 16)], 5)])
def test_groups_must_divide_every_band(pairs: list[tuple[int, int]], groups: int) -> None:
    with pytest.raises(InputError, match=rf"cannot be cut into {groups} equal groups$") as refusal:
        ActivationFormat(bands=Bands.of(*pairs), groups=groups)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8])
def test_other_scale_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"^scales are float32 or float16, got {dtype}$"):
        ActivationFormat(bands=Bands.of((4, 8)), scale_dtype=dtype)
