"""How far the ranges of activations are clipped: searched per layer, place and band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resq.numerics.bands import Bands
from resq.numerics.formats import ActivationFormat

# Bands of this width and more lose nothing that clipping could give back.
FINE = 8


@dataclass(frozen=True)
class ClipSearch:
    """For every layer, input of a linear and band under 8 bit, the ratio with the least Σ (x̂ - x)² over `windows`
    calibration windows; a range is multiplied by it at run time.

    A rotated band is nearly Gaussian: of n values the largest lies at about sqrt(2 ln n) deviations, the best range of
    a uniform quantizer ends at less, 2.3 for 3 bits and 2.7 for 4 (Max, 1960). Keys and values are left alone: a head
    is small, and clipped keys cost more than they give (docs/resq-plus.md).
    """

    ratios: tuple[float, ...] = tuple(round(1 - 0.04 * step, 2) for step in range(15))
    windows: int = 8

    def search(self, format: ActivationFormat, inputs: Sequence[Tensor]) -> ActivationFormat:
        """The format with its clips; inputs [t, n] float32 after the online map, one per window."""
        if format.bands is None or all(band.bits >= FINE for band in format.bands):
            return format
        x = torch.cat(list(inputs))
        clip = [
            self.ratio(x[:, cut], replace(format, map=None, bands=Bands((band,)), clip=None))
            if band.bits < FINE
            else 1.0
            for band, cut in zip(format.bands, format.bands.slices(), strict=True)
        ]
        return replace(format, clip=tuple(clip))

    def ratio(self, x: Tensor, format: ActivationFormat) -> float:
        """The best ratio of one band, x [t, n]."""

        def error(ratio: float) -> float:
            rounded = replace(format, clip=(ratio,)).quantize(x).dequantize(torch.float32)
            return float((rounded - x).square().sum(dtype=torch.float64))

        return min(self.ratios, key=error)

    def __str__(self) -> str:
        return f"activation ranges clipped by the best of {self.ratios[0]:g} … {self.ratios[-1]:g}"
