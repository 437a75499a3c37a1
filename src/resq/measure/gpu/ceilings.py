"""What a card does at most, measured in the run whose figures stand beside it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from resq.measure.gpu.roofline import Ceilings
from resq.measure.gpu.timer import Run, Timer, repeats_for
from resq.measure.gpu.torch_block import fastest_attention

# Seconds of one measurement, and how many there are: the median of each unit's counts.
SECONDS, ROUNDS = 0.1, 5


@dataclass(frozen=True)
class Sizes:
    """product: of the three sides of a matrix product; copied: bytes of a tensor that is copied; attention: heads,
    tokens and coordinates of a head."""

    product: int = 8192
    copied: int = 4 << 30
    attention: tuple[int, int, int] = (32, 8192, 128)


def measure_ceilings(timer: Timer, sizes: Sizes | None = None) -> Ceilings:
    """Rates on random data: data of zeros runs faster than any model."""
    sizes = sizes or Sizes()
    bf16, int8 = _products(timer, sizes.product)
    return Ceilings(bf16, int8, _attention(timer, *sizes.attention), _copy(timer, sizes.copied))


def _products(timer: Timer, n: int) -> tuple[float, float]:
    a, b = (torch.randn(n, n, device=timer.device).to(torch.bfloat16) for _ in range(2))
    x, y = (torch.randint(-127, 128, (n, n), device=timer.device, dtype=torch.int8) for _ in range(2))
    floats = _seconds(timer, lambda: a @ b.t())
    integers = _seconds(timer, lambda: torch._int_mm(x, y.t()))  # pyright: ignore[reportPrivateImportUsage]
    return 2 * n**3 / floats, 2 * n**3 / integers


def _copy(timer: Timer, size: int) -> float:
    source = torch.randint(0, 256, (size,), device=timer.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / _seconds(timer, lambda: target.copy_(source))


def _attention(timer: Timer, heads: int, tokens: int, size: int) -> float:
    shape = 1, heads, tokens, size
    q, k, v = (torch.randn(shape, device=timer.device).to(torch.bfloat16) for _ in range(3))
    _, attend = fastest_attention(timer, q, k, v, causal=True)
    # Half of the pairs are seen; each takes two products of a head's coordinates.
    return 2 * tokens**2 * heads * size / _seconds(timer, lambda: attend(q, k, v))


def _seconds(timer: Timer, run: Run) -> float:
    repeats = repeats_for(timer, run, SECONDS / ROUNDS)
    return statistics.median(timer.seconds(run, repeats) for _ in range(ROUNDS))
