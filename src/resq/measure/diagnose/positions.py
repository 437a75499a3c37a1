"""Error against the position of a token: does a quantized cache lose more, the longer the context?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.errors import InputError


@dataclass(frozen=True)
class Bucket:
    """Predictions made with `first` … `last` tokens of context: how many, and their mean loss above 16 bit (nats) and
    KL divergence of 16 bit from the quantized model (nats)."""

    first: int
    last: int
    count: int
    delta: float
    kl: float


def edges(length: int) -> list[tuple[int, int]]:
    """Context lengths in buckets that double: 1, 2-3, 4-7, … up to `length`."""
    found, first = [], 1
    while first <= length:
        found.append((first, min(2 * first - 1, length)))
        first *= 2
    return found


def by_position(nll: Tensor, base: Tensor, kl: Tensor) -> list[Bucket]:
    """Means of nll - base and of kl, each [windows, length - 1], by context length; column j predicts with j + 1 tokens
    of context. Sums are float64. Raises InputError when the three shapes differ."""
    if not nll.shape == base.shape == kl.shape or nll.ndim != 2:
        shapes = ", ".join(str(tuple(each.shape)) for each in (nll, base, kl))
        raise InputError(f"losses, 16-bit losses and KL should have one shape [windows, length - 1], got {shapes}")
    delta, kl = nll.to(torch.float64) - base.to(torch.float64), kl.to(torch.float64)
    buckets = []
    for first, last in edges(nll.shape[1]):
        cut = slice(first - 1, last)
        buckets.append(
            Bucket(first, last, delta[:, cut].numel(), float(delta[:, cut].mean()), float(kl[:, cut].mean()))
        )
    return buckets
