"""Affine quantizers: asymmetric per-token activations and KV, symmetric per-channel weights (paper eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.bands import Bands

FLOAT16_MAX = 65504.0
# Candidate shrink factors of a weight's range and the exponent of its error: method.md §1, the authors' setting.
CLIP_SHRINKS = tuple(round(1.0 - 0.01 * step, 2) for step in range(80))
CLIP_NORM = 2.4
# Weights in a block of the search.
CACHED, LAUNCHED = 2**17, 2**25


@dataclass(frozen=True)
class Quantized:
    """Integers of activations [..., n] with one range per band and group: x ≈ scale · (q - zero).

    q uint8 [..., n]; scale float32 [..., bands, groups]; zero uint8 [..., bands, groups].
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    bands: Bands
    groups: int = 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale · (q - zero) in `dtype`, [..., n]."""
        parts = []
        for index, cut in enumerate(self.bands.slices()):
            q = self.q[..., cut].unflatten(-1, (self.groups, -1)).to(dtype)
            zero = self.zero[..., index, :, None].to(dtype)
            parts.append(((q - zero) * self.scale[..., index, :, None].to(dtype)).flatten(-2))
        return torch.cat(parts, dim=-1)


def asymmetric(
    x: Tensor, bits: int, scale_dtype: torch.dtype = torch.float32, clip: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One range per row: s = (max - min) / (2^b - 1), z = round(-min / s), q = clamp(round(x / s) + z, 0, 2^b - 1).

    x float32 [..., n], finite -> q uint8 [..., n], scale float32 [...] (already rounded to `scale_dtype`), zero uint8
    [...]. The range always includes zero, so 0 ≤ z ≤ 2^b - 1 and a zero coordinate is exact; max and min are each
    multiplied by `clip` (float32) where it is below 1, and what lies outside is clamped. Halves round to even.
    Every step is one IEEE float32 operation, divisions are products with a rounded reciprocal (float32(1 / (2^b - 1)),
    1 / s) and no product is followed by a sum, so that a kernel on any device can repeat it bit for bit, contracting or
    not. A row whose scale would have no finite reciprocal quantizes to zeros with scale 1; one wider than the largest
    float32 is clamped to that width.
    """
    top = 2**bits - 1
    if x.shape[-1] == 0:
        raise InputError("a range needs at least one coordinate, got none")
    x = x.to(torch.float32)
    low = x.amin(dim=-1).clamp(max=0.0)
    high = x.amax(dim=-1).clamp(min=0.0)
    if clip != 1.0:
        ratio = torch.tensor(clip, dtype=torch.float32, device=x.device)
        low, high = low * ratio, high * ratio
    # One float32 constant: a division by a Python number is a product with a reciprocal on some devices only.
    reciprocal = torch.tensor(1.0 / top, dtype=torch.float32, device=x.device)
    scale = (high - low).clamp(max=torch.finfo(torch.float32).max) * reciprocal
    if scale_dtype != torch.float32:
        scale = scale.clamp(max=FLOAT16_MAX).to(scale_dtype).to(torch.float32)
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    inverse = 1.0 / scale
    zero = torch.round(-low * inverse).clamp(0, top)
    q = (torch.round(x * inverse[..., None]) + zero[..., None]).clamp(0, top)
    return q.to(torch.uint8), scale, zero.to(torch.uint8)


def quantize(
    x: Tensor,
    bands: Bands,
    *,
    groups: int = 1,
    scale_dtype: torch.dtype = torch.float32,
    clip: tuple[float, ...] | None = None,
) -> Quantized:
    """Per-token, per-band asymmetric quantization of x [..., n]; each band is cut into `groups` equal ranges. clip: of
    every band's ranges, None for 1."""
    if x.shape[-1] != bands.size:
        raise InputError(f"bands cover {bands.size} coordinates, the activation has {x.shape[-1]}")
    qs, scales, zeros = [], [], []
    for band, cut, ratio in zip(bands, bands.slices(), clip or (1.0,) * len(bands), strict=True):
        q, scale, zero = asymmetric(x[..., cut].unflatten(-1, (groups, -1)), band.bits, scale_dtype, ratio)
        qs.append(q.flatten(-2))
        scales.append(scale)
        zeros.append(zero)
    return Quantized(torch.cat(qs, dim=-1), torch.stack(scales, dim=-2), torch.stack(zeros, dim=-2), bands, groups)


def symmetric_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a symmetric b-bit value: -2^(b-1), 2^(b-1) - 1; -1 and 1 of a 1-bit one, which
    has no 0."""
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def round_symmetric(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clamp(round(w / s)) as w's dtype, in 1 bit the sign of w, 1 for 0; w and scale, above 0, broadcast."""
    if bits == 1:
        return (w >= 0).to(w.dtype) * 2 - 1
    low, high = symmetric_limits(bits)
    return torch.round(w / scale).clamp(low, high)


def symmetric_scale(w: Tensor, bits: int, *, clip_search: bool = True) -> Tensor:
    """One scale per row: s = shrink · max|w| / (2^(b-1) - 1), the shrink minimising sum |ŵ - w|^2.4 over the row.

    w [out, n] -> float32 [out]. In 1 bit s = shrink · max|w|. Without the search the shrink is 1. A zero row gets scale
    1, in 1 bit 0, as its integers are not. (method.md §1)
    """
    _, high = symmetric_limits(bits)
    w = w.to(torch.float32)
    full = w.abs().amax(dim=-1) / high
    rest = torch.zeros_like(full) if bits == 1 else torch.ones_like(full)
    full = torch.where(full >= torch.finfo(torch.float32).tiny, full, rest)
    if not clip_search:
        return full
    best = full.clone()
    # Rows in blocks whose temporaries stay in cache, or on a card are worth a kernel's launch; the result of a row
    # depends on that row alone.
    rows = max(1, (CACHED if w.device.type == "cpu" else LAUNCHED) // max(1, w.shape[-1]))
    for start in range(0, w.shape[0], rows):
        block, top = w[start : start + rows], full[start : start + rows]
        least = torch.full_like(top, torch.inf)
        chosen = top.clone()
        for shrink in CLIP_SHRINKS:
            scale = top * shrink
            error = round_symmetric(block, scale[:, None], bits).mul_(scale[:, None]).sub_(block).abs_()
            # A power by way of logarithms: a third of the time, and a relative error of 1e-6 in a sum.
            loss = error.log_().mul_(CLIP_NORM).exp_().sum(dim=-1)
            better = loss < least
            least = torch.where(better, loss, least)
            chosen = torch.where(better, scale, chosen)
        best[start : start + rows] = chosen
    return best
