"""Rows on their way to integers: RMSNorm or SiLU · up, a gather, ranges of bands and groups, rounding."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from resq.backends.triton.kernels.affine import affine_integers, affine_range

# What a kernel's input is made of, and what leaves it.
PLAIN = tl.constexpr(0)
NORM = tl.constexpr(1)
SILU = tl.constexpr(2)
FLOATS = tl.constexpr(0)
INTEGERS = tl.constexpr(1)
ROUNDED = tl.constexpr(2)


@triton.jit
def silu(x, ASM: tl.constexpr):
    """x / (1 + e^-x), within about 4 units in the last place: ex2.approx alone would lose |x| of them."""
    if ASM:
        return x / (1.0 + libdevice.exp(-x))
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def sourced(x_ptr, up_ptr, inside, SOURCE: tl.constexpr, ASM: tl.constexpr):
    """Coordinates before their norm and map, 0 where not `inside`: x_ptr and up_ptr are tensors of addresses."""
    x = tl.load(x_ptr, mask=inside, other=0.0)
    if SOURCE == SILU:
        x = silu(x, ASM) * tl.load(up_ptr, mask=inside, other=0.0)
    return x


@triton.jit
def quantize_rows(
    x_ptr,
    x_ld,
    up_ptr,
    up_ld,
    gain_ptr,
    index_ptr,
    out_ptr,
    out_ld,
    scale_ptr,
    zero_ptr,
    n,
    eps,
    eps_rest,
    SOURCE: tl.constexpr,
    OUT: tl.constexpr,
    STARTS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOPS: tl.constexpr,
    RECIPROCALS: tl.constexpr,
    CLIPS: tl.constexpr,
    OFFSETS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    ASM: tl.constexpr,
):
    """One row a program: source, gather, then every band as a tile [groups, coordinates of a group] in registers.

    STARTS, STEPS, BLOCKS, …: per band its first coordinate, the coordinates of a group, the next power of two, the
    largest integer, float32(1 / it), the clip, what is subtracted from a stored integer. OUT: FLOATS as they are, the
    INTEGERS with scale and zero point, or the floats that these stand for (ROUNDED).

    A norm is taken in float64, a few operations a value: embeddings lie on a grid, where float32 would decide otherwise
    at many an exact half. Its epsilon is eps + eps_rest.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_ld
    out_ptr += row * out_ld
    up_ptr = up_ptr + row * up_ld if SOURCE == SILU else x_ptr
    bands: tl.constexpr = len(STARTS)
    g = tl.arange(0, GROUP_BLOCK)
    tiles = ()
    total = tl.full((), 0.0, tl.float64)
    for b in tl.static_range(bands):
        s = tl.arange(0, BLOCKS[b])
        at = STARTS[b] + g[:, None] * STEPS[b] + s[None, :]
        inside = (g < GROUPS)[:, None] & (s < STEPS[b])[None, :]
        # A permutation moves every coordinate once, so that the norm's sum is that of the row.
        source = at if index_ptr is None else tl.load(index_ptr + at, mask=inside, other=0)
        tile = sourced(x_ptr + source, up_ptr + source, inside, SOURCE, ASM)
        if SOURCE == NORM:
            wide = tile.to(tl.float64)
            total += tl.sum(tl.sum(wide * wide, 1), 0)
        tiles = tiles + (tile,)
    if SOURCE == NORM:
        inverse_root = 1.0 / tl.sqrt(total / n + eps + eps_rest)
    for b in tl.static_range(bands):
        s = tl.arange(0, BLOCKS[b])
        at = STARTS[b] + g[:, None] * STEPS[b] + s[None, :]
        inside = (g < GROUPS)[:, None] & (s < STEPS[b])[None, :]
        tile = tiles[b]
        if SOURCE == NORM:
            wide = tile.to(tl.float64) * inverse_root
            if gain_ptr is not None:
                source = at if index_ptr is None else tl.load(index_ptr + at, mask=inside, other=0)
                wide = wide * tl.load(gain_ptr + source, mask=inside, other=0.0).to(tl.float64)
            tile = wide.to(tl.float32)
        if OUT == FLOATS:
            tl.store(out_ptr + at, tile, mask=inside)
        else:
            low = tl.minimum(tl.min(tile, 1), 0.0)
            high = tl.maximum(tl.max(tile, 1), 0.0)
            scale, inverse, zero = affine_range(
                low, high, RECIPROCALS[b], CLIPS[b], TOPS[b], HALF, CLIPS[b] != 1.0, ASM
            )
            q = affine_integers(tile, inverse[:, None], zero[:, None], TOPS[b], ASM)
            if OUT == ROUNDED:
                tl.store(out_ptr + at, (q - zero[:, None]) * scale[:, None], mask=inside)
            else:
                tl.store(out_ptr + at, (q.to(tl.int32) - OFFSETS[b]).to(tl.int8), mask=inside)
                range_at = (row * bands + b) * GROUPS + g
                tl.store(scale_ptr + range_at, scale, mask=g < GROUPS)
                tl.store(zero_ptr + range_at, zero.to(tl.int32).to(tl.uint8), mask=g < GROUPS)
