"""Golden vectors: a small integer input for every linear and the exact sums that it gives (docs/checkpoint.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from resq.errors import CheckpointError
from resq.numerics.affine import Quantized
from resq.numerics.bands import Bands

GOLDEN_FILE = "golden.safetensors"
# Output channels whose sums are stored one by one; the totals see all of them.
CHANNELS = 8


@cache
def golden_input(bands: Bands, groups: int = 1) -> Quantized:
    """Four rows that reach the ends of every range, q uint8 [4, n], zero uint8 [4, bands, groups], scales 1.

    q - z is everywhere the largest in row 0 and the smallest in row 1, so that every weight counts; row 2 has the ends
    of the range at random, row 3 any integer; both have random zero points. The same for equal bands and groups.
    """
    generator = torch.Generator().manual_seed(0)
    qs, zeros = [], []
    for band in bands:
        top = 2**band.bits - 1
        ends = torch.randint(0, 2, (band.size,), generator=generator) * top
        any_q = torch.randint(0, top + 1, (band.size,), generator=generator)
        any_zero = torch.randint(0, top + 1, (2, groups), generator=generator)
        qs.append(torch.stack([torch.full_like(ends, top), torch.zeros_like(ends), ends, any_q]))
        zeros.append(torch.cat([torch.tensor([0, top])[:, None].expand(2, groups), any_zero]))
    q, zero = torch.cat(qs, dim=1).to(torch.uint8), torch.stack(zeros, dim=1).to(torch.uint8)
    return Quantized(q, torch.ones(zero.shape), zero, bands, groups)


def totals_of(sums: Tensor) -> Tensor:
    """Σ_o sums[o] and Σ_o (o + 1) sums[o] over all output channels, modulo 2^64: int64 [..., out] -> [..., 2].

    Together they notice any one wrong channel and say which it is.
    """
    number = torch.arange(1, sums.shape[-1] + 1, device=sums.device)
    return torch.stack([sums.sum(dim=-1), (sums * number).sum(dim=-1)], dim=-1)


@dataclass(frozen=True)
class Golden:
    """The input x of one linear and what is recorded of its exact sums Σ (q_x - z_x) q_w.

    channels int64 [c]; sums int64 [rows, segments, c], of these channels; totals int64 [rows, segments, 2], of all
    channels. Segments are the weight's bands in order, each with its groups in order.
    """

    x: Quantized
    channels: Tensor
    sums: Tensor
    totals: Tensor

    @classmethod
    def of(cls, x: Quantized, sums: Tensor) -> Golden:
        """From the sums of all channels, int64 [rows, segments, out]."""
        out = sums.shape[-1]
        channels = torch.linspace(0, out - 1, min(CHANNELS, out), device=sums.device).to(torch.int64).unique()
        return cls(x, channels, sums[..., channels], totals_of(sums))

    def rows(self, rows: Sequence[int]) -> Golden:
        """What is recorded of these rows, which may repeat."""
        x = self.x
        picked = Quantized(x.q[rows], x.scale[rows], x.zero[rows], x.bands, x.groups)
        return Golden(picked, self.channels, self.sums[rows], self.totals[rows])

    def difference(self, sums: Tensor) -> str | None:
        """How the sums of all channels, int64 [rows, segments, out], differ from what is recorded; None: nowhere."""
        if sums.shape[:2] != self.totals.shape[:2] or int(self.channels.max()) >= sums.shape[2]:
            return f"it gives sums of shape {list(sums.shape)}, those of {list(self.totals.shape[:2])} are recorded"
        off = (sums[..., self.channels] != self.sums).nonzero()
        if len(off):
            row, segment, at = off[0].tolist()
            channel, want = int(self.channels[at]), int(self.sums[row, segment, at])
            return _said(f"channel {channel}", int(sums[row, segment, channel]), want, row, segment)
        totals = totals_of(sums)
        delta = totals - self.totals
        wrong = delta.any(dim=-1).nonzero().tolist()
        if not wrong:
            return None
        row, segment = wrong[0]
        # One wrong channel o moves the totals by (d, (o + 1) d), with another d in every row and segment.
        moves = [delta[at[0], at[1]].tolist() for at in wrong]
        numbers = {divmod(second, first) if first else (0, 0) for first, second in moves}
        number, rest = numbers.pop()
        got, move = int(totals[row, segment, 0]), moves[0][0]
        if numbers or rest or not 1 <= number <= sums.shape[2]:
            return _said("the sum of all channels", got, got - move, row, segment) + "; several channels are wrong"
        got = int(sums[row, segment, number - 1])
        return _said(f"channel {number - 1}", got, got - move, row, segment)


def _said(what: str, got: int, want: int, row: int, segment: int) -> str:
    return f"{what} gives {got}, {want} is recorded (row {row}, segment {segment})"


def _input_name(bands: Bands, groups: int) -> str:
    return f"input.{'+'.join(f'{bits}x{size}' for bits, size in bands.pairs)}.{groups}"


def to_tensors(vectors: Mapping[str, Golden]) -> dict[str, Tensor]:
    """Golden vectors by the names of their linears as tensors of one file; an input is stored once."""
    tensors: dict[str, Tensor] = {}
    for name, golden in vectors.items():
        x = golden.x
        tensors |= {f"{_input_name(x.bands, x.groups)}.q": x.q, f"{_input_name(x.bands, x.groups)}.zero": x.zero}
        tensors |= {f"{name}.channels": golden.channels, f"{name}.sums": golden.sums, f"{name}.totals": golden.totals}
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], name: str, bands: Bands, groups: int) -> Golden:
    """The golden vectors of the linear `name`, whose input has these bands and groups. Raises CheckpointError for a
    tensor that is missing or of another shape."""

    def tensor(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        found = tensors.get(name)
        if found is None:
            raise CheckpointError(f"{GOLDEN_FILE} has no tensor {name}; copy the checkpoint again")
        fits = found.dtype == dtype and found.ndim == len(shape) and found.numel() > 0
        if not fits or any(want not in (-1, size) for want, size in zip(shape, found.shape, strict=True)):
            raise CheckpointError(f"{GOLDEN_FILE}: {name} is {found.dtype} of shape {list(found.shape)}")
        return found

    at = _input_name(bands, groups)
    q = tensor(f"{at}.q", torch.uint8, -1, bands.size)
    zero = tensor(f"{at}.zero", torch.uint8, len(q), len(bands), groups)
    channels = tensor(f"{name}.channels", torch.int64, -1)
    sums = tensor(f"{name}.sums", torch.int64, len(q), -1, len(channels))
    totals = tensor(f"{name}.totals", torch.int64, len(q), sums.shape[1], 2)
    return Golden(Quantized(q, torch.ones(zero.shape), zero, bands, groups), channels, sums, totals)
