"""What the tests of backends share: random tensors and packed linears, cuts of rows, attention written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from resq.backends.cpu import native
from resq.numerics.affine import symmetric_limits
from resq.numerics.bands import Bands
from resq.numerics.formats import ActivationFormat
from resq.numerics.linear import PackedLinear


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def weights(bits: int, *shape: int, seed: int = 0) -> Tensor:
    """Random integers of a weight of `bits`."""
    drawn = integers(*symmetric_limits(bits), *shape, seed=seed)
    return drawn.where(drawn != 0, 1) if bits == 1 else drawn


def packed(bands: Bands, out: int, *, bias: bool = True, seed: int = 0) -> PackedLinear:
    """Random integers over each band's whole range, extremes included."""
    parts = [weights(band.bits, out, band.size, seed=seed + index) for index, band in enumerate(bands)]
    scale = normal(out, len(bands), seed=seed).abs() + 0.01
    return PackedLinear.from_integers(torch.cat(parts, dim=1), scale, bands, normal(out, seed=seed) if bias else None)


def stored_format(size: int) -> ActivationFormat:
    return ActivationFormat(bands=Bands.of((4, size * 7 // 8), (8, size // 8)), scale_dtype=torch.float16)


# Bands of the activations, bands of the weights, groups.
CUTS = {
    "one-band": (Bands.of((4, 40)), Bands.of((4, 40)), 1),
    "same-two-bands": (Bands.of((4, 35), (8, 5)), Bands.of((4, 35), (8, 5)), 1),
    "other-widths": (Bands.of((8, 35), (4, 5)), Bands.of((3, 35), (6, 5)), 1),
    "one-8-bit-input-band": (Bands.of((8, 40)), Bands.of((4, 35), (8, 5)), 1),
    "finer-weights": (Bands.of((4, 32), (8, 8)), Bands.of((2, 8), (4, 24), (6, 3), (8, 5)), 1),
    "iso-3-bit": (Bands.of((1, 5), (3, 30), (5, 5)), Bands.of((1, 5), (3, 30), (5, 5)), 1),
    "heads": (Bands.of((4, 32), (8, 8)), Bands.of((4, 32), (8, 8)), 4),
    "one-band-of-heads": (Bands.of((4, 40)), Bands.of((4, 40)), 8),
}


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: list[int], window: int | None) -> Tensor:
    """One query at a time in float64: q [b, t, H, h], k and v [b, length, G, h] -> [b, t, H·h]."""
    q, k, v = q.double(), k.double(), v.double()
    batch, tokens, heads, size = q.shape
    length, kv_heads = k.shape[1], k.shape[2]
    out = torch.empty(batch, tokens, heads, size, dtype=torch.float64)
    for b in range(batch):
        for t in range(tokens):
            here = length - tokens + t
            first = starts[b] if window is None else max(starts[b], here - window + 1)
            slots = slice(min(first, here), here + 1)
            groups = q[b, t].unflatten(0, (kv_heads, -1))  # [G, H / G, h]: which queries share a key
            weights = torch.softmax(torch.einsum("gjh,sgh->gjs", groups, k[b, slots]) * scale, dim=-1)
            out[b, t] = torch.einsum("gjs,sgh->gjh", weights, v[b, slots]).flatten(0, 1)
    return out.flatten(-2)


def instruction_sets() -> list[str]:
    """Those that the CPU backend can use here, fastest first. Raises BackendUnavailable where it was not built: what
    needs it fails with that reason, as it is part of the package."""
    return [each.name for each in native.instruction_sets() if each.missing is None]


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch allocates inside is filled with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
