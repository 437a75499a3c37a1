"""Quantized activations as the kernels write and read them."""

from __future__ import annotations

import torch
from torch import Tensor

from resq.numerics.affine import Quantized
from resq.numerics.bands import Bands

# Kernels read blocks: this many readable bytes lie after a row's last coordinate. They are multiplied by zero weights.
SLACK = 256
# What is subtracted from an 8-bit integer so that it fits a signed byte, which tensor cores multiply.
OFFSET = 128


class Rows(Quantized):
    """Integers in signed bytes: container int8 [rows, ld], coordinate j of the activation in column j, less `OFFSET` in
    bands of 8 bits. scale float32 and zero uint8 [rows, bands, groups], contiguous; `zero` is the reference's, without
    the offset. q, as everywhere uint8 [..., n], is made when asked for.
    """

    lead: torch.Size
    size: int
    rows: int
    ld: int
    container: Tensor

    def __init__(self, lead: torch.Size, n: int, bands: Bands, groups: int, device: torch.device) -> None:
        rows = lead.numel()
        ld = -(-(n + SLACK) // 128) * 128
        shape = (*lead, len(bands), groups)
        self.__dict__.update(
            lead=lead,
            size=n,
            bands=bands,
            groups=groups,
            rows=rows,
            ld=ld,
            container=torch.empty(rows, ld, dtype=torch.int8, device=device),
            scale=torch.empty(shape, dtype=torch.float32, device=device),
            zero=torch.empty(shape, dtype=torch.uint8, device=device),
        )

    def __getattr__(self, name: str) -> Tensor:
        """`q` of `Quantized`."""
        if name != "q":
            raise AttributeError(name)
        signed = self.container[:, : self.size]
        parts = [
            (signed[:, cut].to(torch.int16) + OFFSET if band.bits == 8 else signed[:, cut]).to(torch.uint8)
            for band, cut in zip(self.bands, self.bands.slices(), strict=True)
        ]
        found = self.__dict__["q"] = torch.cat(parts, dim=-1).view(*self.lead, self.size)
        return found


def rows_of(x: Quantized) -> Rows:
    """The same integers where kernels can read them."""
    if isinstance(x, Rows):
        return x
    rows = Rows(x.q.shape[:-1], x.q.shape[-1], x.bands, x.groups, x.q.device)
    flat = x.q.reshape(rows.rows, rows.size).to(torch.int16)
    for band, cut in zip(x.bands, x.bands.slices(), strict=True):
        rows.container[:, cut] = (flat[:, cut] - (OFFSET if band.bits == 8 else 0)).to(torch.int8)
    rows.scale.copy_(x.scale)
    rows.zero.copy_(x.zero)
    return rows
