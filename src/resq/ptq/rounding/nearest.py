"""Round each weight to the nearest integer of its row and band."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from resq.numerics.affine import round_symmetric, symmetric_scale
from resq.numerics.bands import Bands
from resq.numerics.linear import PackedLinear
from resq.ptq.recipe import InputMoments, Rounded


def scales(weight: Tensor, bands: Bands, *, clip_search: bool) -> Tensor:
    """One scale per row and band, float32 [out, bands]."""
    parts = [
        symmetric_scale(weight[:, cut], band.bits, clip_search=clip_search)
        for band, cut in zip(bands, bands.slices(), strict=True)
    ]
    return torch.stack(parts, dim=1)


@dataclass(frozen=True)
class Nearest:
    """q = clamp(round(w / s)); `clip_search` picks each scale by the error of its row and band."""

    clip_search: bool = True
    needs_moment: ClassVar[bool] = False
    sees_rounded: bool = field(default=False, init=False)
    corrects: bool = field(default=False, init=False)

    def __call__(self, weight: Tensor, moments: InputMoments | None, bands: Bands, bias: Tensor | None) -> Rounded:
        """weight float64 [out, in]; moments are not looked at."""
        scale = scales(weight, bands, clip_search=self.clip_search)
        parts = [
            round_symmetric(weight[:, cut], scale[:, index, None].to(weight.dtype), band.bits)
            for index, (band, cut) in enumerate(zip(bands, bands.slices(), strict=True))
        ]
        return Rounded(PackedLinear.from_integers(torch.cat(parts, dim=1), scale, bands, bias), weight)

    def __str__(self) -> str:
        return f"nearest, clip search {'on' if self.clip_search else 'off'}"
