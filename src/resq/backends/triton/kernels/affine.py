"""Rounding to ranges, as numerics/affine.py has it: every float32 step is one IEEE operation, as in the reference."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The smallest normal and the largest finite float32, the largest finite float16.
TINY = tl.constexpr(1.1754943508222875e-38)
LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def round_even(x, ASM: tl.constexpr):
    """Halves to even, |x| < 2^22."""
    if ASM:
        return libdevice.rint(x)
    else:
        return (x + 12582912.0) - 12582912.0


@triton.jit
def affine_range(low, high, reciprocal, clip, top, HALF: tl.constexpr, CLIP: tl.constexpr, ASM: tl.constexpr):
    """(scale, 1 / scale, zero) float32 of a range that includes 0: numerics/affine.py's asymmetric, step by step.

    low ≤ 0 ≤ high float32, reciprocal = float32(1 / top), top = 2^bits - 1 as float32; HALF: a float16 scale.
    """
    if CLIP:
        low = low * clip
        high = high * clip
    scale = tl.minimum(high - low, LARGEST) * reciprocal
    if HALF:
        scale = tl.minimum(scale, LARGEST_HALF).to(tl.float16).to(tl.float32)
    scale = tl.where(scale >= TINY, scale, 1.0)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    zero = tl.minimum(tl.maximum(round_even(-low * inverse, ASM), 0.0), top)
    return scale, inverse, zero


@triton.jit
def affine_integers(x, inverse, zero, top, ASM: tl.constexpr):
    """clamp(round(x / s) + z, 0, top) as float32."""
    # A clipped range may be a thousandth of what it must hold: keep the rounding within its domain.
    scaled = tl.minimum(tl.maximum(x * inverse, -4194303.0), 4194303.0)
    return tl.minimum(tl.maximum(round_even(scaled, ASM) + zero, 0.0), top)
