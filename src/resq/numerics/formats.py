"""What happens to an activation between float and integers: an online map, then rounding in bands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.affine import Quantized, quantize
from resq.numerics.bands import Bands
from resq.numerics.maps import OnlineMap


@dataclass(frozen=True)
class ActivationFormat:
    """x → (round to `map_input_bits`) → `map` → round in `bands`, each with one range per token, band and group.

    map: online map or None. bands: None keeps the activation in floating point. groups: ranges per band (the o_proj
    input ranged per head has one per head). scale_dtype: float16 for the KV cache, else float32.
    map_input_bits: bits of the map's own input, None when it is not rounded (the authors' online U_C rounds it). clip:
    what every band's ranges are multiplied by, above 0 and at most 1, a float32; None for 1.
    """

    map: OnlineMap | None = None
    bands: Bands | None = None
    groups: int = 1
    scale_dtype: torch.dtype = torch.float32
    map_input_bits: int | None = None
    clip: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.groups < 1 or (self.bands is not None and any(band.size % self.groups for band in self.bands)):
            pairs = None if self.bands is None else self.bands.pairs
            raise InputError(f"bands {pairs} cannot be cut into {self.groups} equal groups")
        if self.scale_dtype not in (torch.float32, torch.float16):
            raise InputError(f"scales are float32 or float16, got {self.scale_dtype}")
        if self.clip is not None and (
            self.bands is None or len(self.clip) != len(self.bands) or not all(0 < ratio <= 1 for ratio in self.clip)
        ):
            pairs = None if self.bands is None else self.bands.pairs
            raise InputError(f"bands {pairs} need one clip above 0 and at most 1 each, got {list(self.clip)}")

    def project(self, x: Tensor, compute: torch.dtype, *, rounded: bool = True) -> Tensor:
        """The map's output in `compute`, x [..., n]; `rounded=False` leaves the map's input unrounded."""
        if rounded and self.map_input_bits is not None:
            whole = Bands.of((self.map_input_bits, x.shape[-1]))
            x = quantize(x, whole).dequantize(compute)
        x = x.to(compute)
        return x if self.map is None else self.map.apply(x)

    def quantize(self, x: Tensor) -> Quantized:
        """Round x float32 [..., n] that the map was already applied to."""
        assert self.bands is not None
        return quantize(x, self.bands, groups=self.groups, scale_dtype=self.scale_dtype, clip=self.clip)


PLAIN = ActivationFormat()


@dataclass(frozen=True)
class Norm:
    """RMSNorm: y = x / sqrt(mean(x²) + eps) · gain; gain [n] or None after it was folded into the next linears."""

    eps: float
    gain: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x [..., n] in its own dtype."""
        y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return y if self.gain is None else y * self.gain.to(x)


@dataclass(frozen=True)
class HeadFormats:
    """What becomes of a layer's queries, keys and values: norms of each query and key head (Qwen3), RoPE, then the
    formats' maps and rounding."""

    query: ActivationFormat = PLAIN
    key: ActivationFormat = PLAIN
    value: ActivationFormat = PLAIN
    query_norm: Norm | None = None
    key_norm: Norm | None = None
