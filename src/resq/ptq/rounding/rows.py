"""Rounding a linear some rows at a time: less memory, better use of caches, and work to share among processes.

What a row becomes may depend, in last digits of sums, on how many rows are rounded with it: matrix products of other
sizes add in another order. So rows are cut in one way, whoever rounds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resq.numerics.bands import Bands
from resq.numerics.linear import PackedLinear
from resq.ptq.recipe import InputMoments, Rounded, Rounding

# Rows rounded at once: on a CPU so few that a block of 128 columns in float64 stays in a core's second cache, on a card
# so many that they are worth a kernel's launch.
CACHED, LAUNCHED = 512, 4096


def row_chunks(rows: int, device: torch.device) -> list[slice]:
    """Which rows of a linear are rounded together."""
    size = CACHED if device.type == "cpu" else LAUNCHED
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def joined(parts: Sequence[Rounded]) -> Rounded:
    """The rounded rows of one linear, in order."""
    first, linears = parts[0], [part.linear for part in parts]
    qweight = tuple(torch.cat(rows) for rows in zip(*(linear.qweight for linear in linears), strict=True))
    biases = [linear.bias for linear in linears if linear.bias is not None]
    linear = PackedLinear(
        first.linear.bands,
        qweight,
        torch.cat([linear.scale for linear in linears]),
        torch.cat(biases) if biases else None,
    )
    return Rounded(linear, torch.cat([part.target for part in parts]), first.damping)


def round_rows(
    rounding: Rounding,
    weight: torch.Tensor,
    moments: InputMoments | None,
    bands: Bands,
    bias: torch.Tensor | None,
) -> Rounded:
    """A whole linear, chunk after chunk."""
    return joined(
        [
            rounding(weight[rows], moments, bands, None if bias is None else bias[rows])
            for rows in row_chunks(weight.shape[0], weight.device)
        ]
    )
