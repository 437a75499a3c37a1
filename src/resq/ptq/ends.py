"""Embedding, final norm and head, placed and stored in blocks of rows: a vocabulary is larger than a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from resq.checkpoint.files import EndParts
from resq.models.source import Source
from resq.numerics.bands import INT8
from resq.numerics.device import CPU, moved
from resq.numerics.linear import DenseLinear, Linear, PackedLinear
from resq.ptq.layers import stored_map, stored_norm
from resq.ptq.placement import Placement
from resq.ptq.precision import Precision
from resq.ptq.rounding.nearest import Nearest

# Rows of the vocabulary that are placed at once.
BLOCK = 4096


def store_ends(
    placement: Placement, source: Source, precision: Precision, *, keep_tied: bool, device: torch.device = CPU
) -> EndParts:
    """What surrounds the layers as it is written, computed on `device`: tables in 16 bit, the head in the precision
    asked for. keep_tied as for `Placement.head`."""
    ends = source.ends()
    gain = moved(ends.norm, device)
    norm, head_input = placement.head_input(gain, keep_tied=keep_tied)
    embed = in_sixteen_bit(ends.embed, source.dtype, lambda rows: placement.table(rows.to(device)))

    def folded(rows: Tensor) -> Tensor:
        return placement.head(rows.to(device), gain)

    head: Linear
    if keep_tied:
        head = DenseLinear(embed)
    elif precision.head is None:
        head = DenseLinear(in_sixteen_bit(ends.head.weight, source.dtype, folded))
    else:
        bands = precision.lm_head_bands(source.shape)
        assert bands is not None
        blocks = (moved(Nearest()(folded(rows), None, bands, None).linear, CPU) for rows in _blocks(ends.head.weight))
        head = PackedLinear.stacked(list(blocks))
        head_input = replace(head_input, bands=INT8.bands(source.shape.hidden))
    head_input = replace(head_input, map=stored_map(head_input.map))
    return moved(EndParts(embed, stored_norm(norm), head_input, head, keep_tied), CPU)


def _blocks(table: Tensor) -> Iterator[Tensor]:
    return iter(table.split(BLOCK))


def in_sixteen_bit(table: Tensor, source_dtype: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of the table's rows, block by block: bfloat16 for a bfloat16 source and where a value is out of
    float16's range, else float16: more digits."""
    for dtype in (torch.bfloat16,) if source_dtype == "bfloat16" else (torch.float16, torch.bfloat16):
        stored = torch.empty(table.shape, dtype=dtype)
        for rows, place in zip(_blocks(table), _blocks(stored), strict=True):
            changed = change(rows)
            if float(changed.abs().max()) > torch.finfo(dtype).max:
                break
            place.copy_(changed.to(dtype).to(CPU))
        else:
            return stored
    raise AssertionError("bfloat16 has the range of float32")
