"""Activations of the Triton backend are the reference's: rounding bit for bit, and before it float32's accuracy.

Where float32 sums fall on the other side of a rounding border an integer differs by one: only there, which is checked
coordinate by coordinate. What operators allocate is filled beforehand with NaN, or the largest integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.backends.cases import CUTS, normal, poisoned
from torch import Tensor

from resq.backends.backend import Activations
from resq.backends.reference import REFERENCE, dense
from resq.backends.triton import TRITON
from resq.errors import InputError
from resq.numerics.affine import Quantized
from resq.numerics.bands import Bands
from resq.numerics.formats import PLAIN, ActivationFormat, Norm
from resq.numerics.hadamard import HadamardPlan, plan
from resq.numerics.maps import Dense, Hadamard, OnlineMap, PerHead, Permutation, random_orthogonal

# The interpreter's numpy warns of what a card does silently.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
FLOAT64 = dense(torch.float64)
# A value before it is rounded: sums of float32 in a tree of at most 14 levels and a few products, each within 2^-24,
# relative to the row's largest value. Errors add up as a random walk does, not all in one direction.
CLOSE = 2.0**-20
# The same of a scale that spans the row: two units in the last place.
CLOSE_SCALE = 2.0**-22


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def rows(n: int, seed: int = 0) -> Tensor:
    """Float32 [2, 2, n] as activations are: one token ordinary, one of zeros, one with a massive coordinate, one with a
    range that does not reach zero."""
    x = normal(2, 2, n, seed=seed)
    x[0, 1] = 0
    x[1, 0, n // 3] = 1000
    x[1, 1] = x[1, 1].abs() + 1
    return x


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Views of one tensor with another row stride, as a fused projection leaves them."""
    first, second = torch.cat([x, x.flip(-1), x], dim=-1).split([x.shape[-1], 2 * x.shape[-1]], dim=-1)
    return first, second[..., : x.shape[-1]]


def same(ours: Activations, theirs: Activations) -> None:
    """The same integers, scales and zero points, bit for bit."""
    assert isinstance(ours, Quantized)
    assert isinstance(theirs, Quantized)
    assert torch.equal(ours.q, theirs.q)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.zero, theirs.zero)


def near(ours: Activations, exact: Tensor, theirs: Activations) -> None:
    """Integers of values within CLOSE of `exact`, float64 before rounding; scales, zero points and nearly all integers
    are the reference's."""
    assert isinstance(ours, Quantized)
    assert isinstance(theirs, Quantized)
    tops = torch.tensor([2.0**band.bits - 1 for band in ours.bands])[:, None]
    whole = exact.abs().amax(dim=-1).float()[..., None, None]
    assert ((ours.scale - theirs.scale).abs() <= CLOSE_SCALE * torch.maximum(theirs.scale, whole / tops)).all()
    assert torch.equal(ours.zero, theirs.zero)
    for index, (band, cut) in enumerate(zip(ours.bands, ours.bands.slices(), strict=True)):
        top = 2**band.bits - 1
        step = (ours.groups, -1)
        y, q, other = (x[..., cut].unflatten(-1, step).double() for x in (exact, ours.q, theirs.q))
        scale, zero = (x[..., index, :, None].double() for x in (ours.scale, ours.zero))
        whole = exact.abs().amax(dim=-1)[..., None, None] / scale  # the row's largest value in steps of this range
        allowed = 0.5 + CLOSE * whole.clamp(min=top)
        assert ((q - (y / scale + zero).clamp(0, top)).abs() <= allowed).all()
        # A share of 2 · CLOSE · whole of all coordinates lies that near to a border.
        flips = (q - other).abs()
        assert flips.max() <= 1
        assert flips.sum() <= 2 + 2 * CLOSE * whole.clamp(min=top).expand_as(y).sum()


def check(operator: str, arguments: tuple[Tensor | Norm, ...], format: ActivationFormat) -> None:
    """An operator with this format: rounded, and left in floating point."""
    call: Callable[..., Activations] = getattr(TRITON, operator)
    floats = ActivationFormat(map=format.map, map_input_bits=format.map_input_bits)
    exact = getattr(REFERENCE, operator)(*arguments, floats)
    ours = call(*arguments, floats)
    assert isinstance(ours, Tensor)
    assert ours.shape == exact.shape
    size = exact.abs().amax(dim=-1, keepdim=True)
    assert ((ours - exact).abs() <= CLOSE * size).all()
    if format.bands is not None:
        if format.map_input_bits is None:
            exact = getattr(FLOAT64, operator)(*arguments, floats)
        near(call(*arguments, format), exact, getattr(REFERENCE, operator)(*arguments, format))


def shuffled(n: int) -> Permutation:
    return Permutation(torch.randperm(n, generator=torch.Generator().manual_seed(n)))


def orthogonal(n: int) -> Tensor:
    return random_orthogonal(n, torch.Generator().manual_seed(n))


# --- rounding: bit for bit -------------------------------------------------------------------------------------------

UNEVEN = Bands.of((2, 30), (4, 57), (8, 13))
FORMATS = {
    **{name: ActivationFormat(bands=inputs, groups=groups) for name, (inputs, _, groups) in CUTS.items()},
    "three-uneven-bands": ActivationFormat(bands=UNEVEN),
    "clipped": ActivationFormat(bands=UNEVEN, clip=(0.7, 0.93, 1.0)),
    "clipped-heads": ActivationFormat(bands=Bands.of((3, 96), (8, 32)), groups=8, clip=(0.8, 0.001)),
    "gathered-heads": ActivationFormat(shuffled(160), Bands.of((4, 144), (8, 16)), 8),
    "float16-scales": ActivationFormat(bands=UNEVEN, scale_dtype=torch.float16),
    "rounded-before": ActivationFormat(bands=UNEVEN, map_input_bits=8),
    "one-coordinate": ActivationFormat(bands=Bands.of((4, 1))),
    "every-width": ActivationFormat(bands=Bands.of(*((bits, 9) for bits in (1, 2, 3, 4, 5, 6, 8)))),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_the_references_bit_for_bit(name: str) -> None:
    format = FORMATS[name]
    assert format.bands is not None
    x = torch.cat([rows(format.bands.size) * 3, extremes(format.bands.size)[None].unflatten(1, (-1, 2))[0]])
    for each in (halves(x)[1], x[:, -1:]):
        same(TRITON.gather_quantize(each, format), REFERENCE.gather_quantize(each, format))


def extremes(n: int) -> Tensor:
    """[6, n]: the largest values, subnormal ones, a scale without a reciprocal, negative ones, ties, a constant."""
    x = normal(6, n, seed=5)
    x[0] = x[0].sign() * torch.finfo(torch.float32).max
    x[1] *= 1e-39
    x[2] *= 1e-42
    x[3] = -x[3].abs() - 2
    x[4] = torch.arange(n) % 31 * 0.5  # with 15 as the largest: halves
    x[5] = 0.1
    return x


def test_no_rows_give_no_integers() -> None:
    found = TRITON.gather_quantize(torch.empty(2, 0, 8), ActivationFormat(bands=Bands.of((4, 8))))
    assert isinstance(found, Quantized)
    assert found.q.shape == (2, 0, 8)
    assert found.scale.shape == (2, 0, 1, 1)
    turned = ActivationFormat(Hadamard(plan(12)), Bands.of((4, 12)))
    assert isinstance(TRITON.act_hadamard_quantize(torch.empty(0, 1, 12), torch.empty(0, 1, 12), turned), Quantized)


# --- sources and maps ------------------------------------------------------------------------------------------------

# Powers of two in registers and with a dense part, orders that a program takes with the row and larger ones, no power
# of two at all, random orthogonal factors, blocks of columns; heads of several coordinates.
HADAMARDS = {
    "2": Hadamard(plan(2)),
    "64": Hadamard(plan(64)),
    "128": Hadamard(plan(128)),
    "2048 = 128 · 16": Hadamard(plan(2048)),
    "172 = 1 · 172": Hadamard(plan(172)),
    "112 = 4 · 28": Hadamard(plan(112)),
    "896 = 32 · 28": Hadamard(plan(896)),
    "384 = 32 · 12": Hadamard(plan(384)),
    "144 = 4 · 36": Hadamard(plan(144)),
    "1120 = 32 · 35, random": Hadamard(HadamardPlan(1120, 32, 35, "random-orthogonal")),
    "15, random": Hadamard(plan(15)),
    "112 = 16 · 7, random": Hadamard(HadamardPlan(112, 16, 7, "random-orthogonal")),
    "180 = 4 · 45, random": Hadamard(HadamardPlan(180, 4, 45, "random-orthogonal")),
    "2 heads of 20": Hadamard(plan(2), 20),
    "12 heads of 6": Hadamard(plan(12), 6),
    "64 heads of 17": Hadamard(plan(64), 17),
}


@pytest.mark.parametrize("name", HADAMARDS)
def test_hadamard_maps_after_silu(name: str) -> None:
    map = HADAMARDS[name]
    gate, up = halves(rows(map.size) * 2)
    check("act_hadamard_quantize", (gate, up), ActivationFormat(map, Bands.of((4, map.size)), clip=(0.9,)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "n", [1024, 3072, 4864, 6144, 8192, 8960, 9728, 11008, 12288, 14336, 18944, 28672, 29568, 32768, 36864]
)
def test_hadamard_maps_of_published_sizes(n: int) -> None:
    gate, up = normal(2, 1, n), normal(2, 1, n, seed=1)
    check("act_hadamard_quantize", (gate, up), ActivationFormat(Hadamard(plan(n)), Bands.of((4, n))))


MAPS: dict[str, OnlineMap | None] = {
    "none": None,
    "permutation": shuffled(48),
    "hadamard": Hadamard(plan(48)),
    "heads": Hadamard(plan(8), 6),
    "dense": Dense(orthogonal(48)),
    "per-head": PerHead(torch.stack([orthogonal(12) * sign for sign in (1, -1, 1, -1)])),
    "scaled-heads": PerHead(torch.stack([orthogonal(24), orthogonal(24)]), normal(2, 24).abs() + 0.5),
}
RANGES = {
    "two-bands": ActivationFormat(bands=Bands.of((4, 42), (8, 6)), clip=(0.9, 1.0)),
    "8-bit": ActivationFormat(bands=Bands.of((8, 48))),
    "heads": ActivationFormat(bands=Bands.of((4, 40), (8, 8)), groups=4),
}


@pytest.mark.parametrize(
    ("map", "ranges"), [*((map, "two-bands") for map in MAPS), *(("hadamard", ranges) for ranges in ("8-bit", "heads"))]
)
def test_every_source_with_every_map(map: str, ranges: str) -> None:
    given = RANGES[ranges]
    format = ActivationFormat(MAPS[map], given.bands, given.groups, clip=given.clip)
    x, up = halves(rows(48))
    check("norm_quantize", (x, Norm(1e-5, normal(48, seed=3).double())), format)
    check("gather_quantize", (x,), format)
    check("act_hadamard_quantize", (x, up), format)


@pytest.mark.parametrize("map", ["none", "permutation", "hadamard", "dense", "per-head"])
def test_the_input_of_a_map_may_be_rounded(map: str) -> None:
    # The rounded input is the reference's own, so that nothing before the map can flip. Were one coordinate all that 8
    # bits leave, a Hadamard map would make values of one size, and their zero point a tie.
    format = ActivationFormat(MAPS[map], Bands.of((4, 42), (8, 6)), map_input_bits=8)
    check("gather_quantize", (rows(48).clamp(max=20),), format)


def test_norms_keep_float32_accuracy() -> None:
    format = ActivationFormat(bands=Bands.of((4, 280), (8, 20)))
    for gain, scale in ((None, 1e-18), (normal(300, seed=1), 1e-3), (normal(300, seed=1).to(torch.bfloat16), 1e12)):
        check("norm_quantize", (halves(rows(300) * scale)[1], Norm(1e-6, gain)), format)


def test_gates_far_from_zero_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([[[-1e4, -110.0, -90.0, -30.0, -5.0, -1e-6, 0.0, 1e-6, 5.0, 30.0, 90.0, 1e4]]])
    ours = TRITON.act_hadamard_quantize(gate, torch.ones_like(gate), PLAIN)
    assert isinstance(ours, Tensor)
    exact = torch.nn.functional.silu(gate.double())
    # Below 2^-126 there are few bits left.
    assert ((ours - exact).abs() <= 8 * 2.0**-24 * exact.abs() + 2.0**-120).all()


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said() -> None:
    x = torch.zeros(1, 1, 8)
    with pytest.raises(InputError, match="cover 4 coordinates, the activation has 8"):
        TRITON.gather_quantize(x, ActivationFormat(bands=Bands.of((4, 4))))
    with pytest.raises(InputError, match="bands and map of an activation cover 4 and 8 coordinates"):
        TRITON.gather_quantize(x, ActivationFormat(Hadamard(plan(8)), Bands.of((4, 4))))
    with pytest.raises(InputError, match="a norm of 4 gains cannot take an activation of 8 coordinates"):
        TRITON.norm_quantize(x, Norm(1e-5, torch.ones(4)), PLAIN)
    with pytest.raises(InputError, match=r"gate .* and up .* should have one shape"):
        TRITON.act_hadamard_quantize(x, torch.zeros(1, 2, 8), PLAIN)
    with pytest.raises(InputError, match="9 bands; the Triton backend takes up to 8"):
        TRITON.gather_quantize(torch.zeros(1, 9), ActivationFormat(bands=Bands.of(*[(4, 1)] * 9)))
