"""Linear layers as data: packed integers with per-channel scales, or plain 16/32-bit weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.affine import symmetric_limits
from resq.numerics.bands import Bands
from resq.numerics.packing import pack_signed, packed_bytes, unpack_signed


@dataclass(frozen=True)
class DenseLinear:
    """y = x W^T + b with plain weights: weight [out, in] of any float dtype, bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]


@dataclass(frozen=True)
class PackedLinear:
    """y = x W^T + b with W[:, band] = scale[:, band] · integers, symmetric, one scale per output channel and band.

    qweight: one uint8 tensor [out, ceil(size·bits / 8)] per band (see `packing`); scale float32 [out, bands];
    bias float32 [out] or None. Raises InputError when the shapes do not fit the bands.
    """

    bands: Bands
    qweight: tuple[Tensor, ...]
    scale: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        out = self.scale.shape[0]
        want = [(out, packed_bytes(band.size, band.bits)) for band in self.bands]
        got = [tuple(part.shape) for part in self.qweight]
        if got != want or tuple(self.scale.shape) != (out, len(self.bands)):
            raise InputError(
                f"packed weights {got} with scales {tuple(self.scale.shape)} do not fit bands {self.bands.pairs}: "
                f"expected {want} and {(out, len(self.bands))}"
            )
        if self.bias is not None and tuple(self.bias.shape) != (out,):
            raise InputError(f"a linear of {out} outputs needs a bias of shape {(out,)}, got {tuple(self.bias.shape)}")

    @classmethod
    def from_integers(cls, integers: Tensor, scale: Tensor, bands: Bands, bias: Tensor | None = None) -> PackedLinear:
        """Pack signed integers [out, in] (any dtype holding them exactly) with scale [out, bands]."""
        # Rows one value short can pack into the right number of bytes, so the packed shapes do not tell.
        if integers.shape[-1] != bands.size:
            raise InputError(f"bands cover {bands.size} coordinates, the integers have {integers.shape[-1]}")
        q = integers.to(torch.int8)
        for index, (band, cut) in enumerate(zip(bands, bands.slices(), strict=True)):
            low, high = symmetric_limits(band.bits)
            part = integers[:, cut]
            if part.numel() and not (low <= part.min() and part.max() <= high):
                raise InputError(f"integers of band {index} leave {low} … {high}, the range of {band.bits} bits")
            if band.bits == 1 and not part.all():
                raise InputError(f"integers of band {index} hold 0; those of 1 bit are -1 and 1")
        parts = tuple(pack_signed(q[:, cut], band.bits) for band, cut in zip(bands, bands.slices(), strict=True))
        return cls(bands, parts, scale.to(torch.float32), None if bias is None else bias.to(torch.float32))

    @classmethod
    def stacked(cls, parts: Sequence[PackedLinear]) -> PackedLinear:
        """Blocks of rows, one below the other; all have the same bands, and a bias or none."""
        qweight = tuple(torch.cat(each) for each in zip(*(part.qweight for part in parts), strict=True))
        biases = [part.bias for part in parts if part.bias is not None]
        return cls(
            parts[0].bands, qweight, torch.cat([part.scale for part in parts]), torch.cat(biases) if biases else None
        )

    def rows(self, cut: slice) -> PackedLinear:
        """Some rows."""
        qweight = tuple(part[cut] for part in self.qweight)
        return PackedLinear(self.bands, qweight, self.scale[cut], None if self.bias is None else self.bias[cut])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.scale.shape[0], self.bands.size

    def integers(self) -> Tensor:
        """int8 [out, in]."""
        parts = zip(self.bands, self.qweight, strict=True)
        return torch.cat([unpack_signed(part, band.bits, band.size) for band, part in parts], dim=-1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale · integers, [out, in] in `dtype` (the product is taken in `dtype`)."""
        sizes = torch.tensor([band.size for band in self.bands], device=self.scale.device)
        scale = self.scale.to(dtype).repeat_interleave(sizes, dim=1)
        return self.integers().to(dtype) * scale

    def dense(self, dtype: torch.dtype = torch.float32) -> DenseLinear:
        """The same linear map with plain weights."""
        return DenseLinear(self.dequantize(dtype), None if self.bias is None else self.bias.to(dtype))


Linear = DenseLinear | PackedLinear
