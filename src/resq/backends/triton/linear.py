"""Linears on a card: weights in the layout of kernels/linear.py, and the launches of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from resq.backends.backend import Activations
from resq.backends.cuts import source_bands
from resq.backends.dense import DenseWeight, dense_weight, float_bias
from resq.backends.fits import check_cut
from resq.backends.triton.configs import chosen
from resq.backends.triton.device import DEVICE, target
from resq.backends.triton.kernels.dense import dense_rows, dense_tiles
from resq.backends.triton.kernels.linear import float_linear, packed_linear
from resq.backends.triton.launch import launch, power_of_two
from resq.backends.triton.rows import Rows, rows_of
from resq.errors import InputError
from resq.numerics.affine import Quantized
from resq.numerics.bands import Bands
from resq.numerics.formats import PLAIN, ActivationFormat
from resq.numerics.linear import DenseLinear, Linear, PackedLinear
from resq.numerics.packing import unpack_signed

# A group's bytes are a multiple of one of these, so that no block holds two groups: int8 tensor cores take 32 at once,
# longer blocks are fetched better. The longest one that pads by at most a 32nd more than the shortest is taken.
# A group of nibbles reads up to 2 · 128 - 1 coordinates beyond its end: rows.py's SLACK.
GRANULES = (128, 64, 32)
# Integers of the sums of split rows, and tiles that may wait for their parts. 16 MiB a device.
ROOM, TICKETS = 2**22, 2**14
# A part of a split row has at least this many blocks.
LEAST_BLOCKS = 4
# Weights that are repacked at once; unpacking takes up to 10 bytes for each.
REPACKED = 2**24
# Rows that are multiplied without tensor cores by plain weights.
FEW_ROWS = 4


@dataclass(frozen=True)
class Panel:
    """A weight band in a packed row: its groups of `step` coordinates from `start` on are `length` bytes each from byte
    `base` on. source: the activation band it meets, of `bits` bits."""

    start: int
    step: int
    base: int
    length: int
    granule: int
    nibbles: bool
    source: int
    bits: int


@dataclass(eq=False)
class PackedWeight:
    """State: a packed linear, perhaps as a part of a larger one. packed int8 [out, bytes]; sums int32 [bands · groups,
    out]: of a group's integers; scale float32 [bands, out]; bias float32 [out] or None. Sums and scales of nibbles are
    those of 16 times the integers. inputs, groups: the cut of the activations it was made for. whole, first: the linear
    that holds this one's channels from that one on."""

    packed: Tensor
    sums: Tensor
    scale: Tensor
    bias: Tensor | None
    size: int
    inputs: Bands
    groups: int
    panels: tuple[Panel, ...]
    whole: PackedWeight | None = None
    first: int = 0

    @property
    def out(self) -> int:
        """Outputs."""
        return self.packed.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales and column sums, padding included."""
        held = (self.packed, self.sums, self.scale, *(() if self.bias is None else (self.bias,)))
        return sum(part.numel() * part.element_size() for part in held)


Weight = PackedWeight | DenseWeight


def prepack(linear: Linear, inputs: ActivationFormat = PLAIN) -> Weight:
    """A packed linear repacked on the device, or a plain one as it is. inputs: the format of the activations it will
    meet.

    Raises InputError when a band of the weights crosses one of the inputs.
    """
    if isinstance(linear, DenseLinear):
        return dense_weight(linear, DEVICE)
    cut = linear.bands if inputs.bands is None else inputs.bands
    groups = 1 if inputs.bands is None else inputs.groups
    panels = _panels(linear.bands, cut, source_bands(cut, linear.bands, groups), groups)
    packed, sums = _repacked(linear, panels, groups)
    units = torch.tensor([1 / 16 if panel.nibbles else 1.0 for panel in panels], device=DEVICE)
    scale = linear.scale.to(DEVICE, torch.float32).T * units[:, None]
    return PackedWeight(
        packed, sums, scale.contiguous(), float_bias(linear.bias, DEVICE), linear.shape[1], cut, groups, panels
    )


def _panels(bands: Bands, inputs: Bands, source: list[int], groups: int) -> tuple[Panel, ...]:
    panels, base = [], 0
    for band, cut, outer in zip(bands, bands.slices(), source, strict=True):
        step, nibbles = band.size // groups, band.bits <= 4
        least = -(-step // 2) if nibbles else step
        lengths = [(granule, -(-least // granule) * granule) for granule in GRANULES]
        granule, length = next(each for each in lengths if 32 * each[1] <= 33 * lengths[-1][1])
        panels.append(Panel(cut.start, step, base, length, granule, nibbles, outer, inputs.bands[outer].bits))
        base += groups * length
    return tuple(panels)


def _repacked(linear: PackedLinear, panels: tuple[Panel, ...], groups: int) -> tuple[Tensor, Tensor]:
    """Integers as kernels read them, int8 [out, bytes], and the sums of every group, int32 [segments, out]."""
    out, size = linear.shape
    width = panels[-1].base + groups * panels[-1].length
    packed = torch.empty(out, width, dtype=torch.int8, device=DEVICE)
    sums = torch.empty(len(panels) * groups, out, dtype=torch.int32, device=DEVICE)
    rows = max(1, REPACKED // size)
    for start in range(0, out, rows):
        part = slice(start, start + rows)
        for index, (panel, band, stored) in enumerate(zip(panels, linear.bands, linear.qweight, strict=True)):
            values = unpack_signed(stored[part].to(DEVICE), band.bits, band.size).unflatten(1, (groups, -1))
            total = values.sum(dim=2, dtype=torch.int32).T
            sums[index * groups : (index + 1) * groups, part] = total * 16 if panel.nibbles else total
            room = panel.length * (2 if panel.nibbles else 1)
            values = torch.nn.functional.pad(values, (0, room - panel.step))
            if panel.nibbles:
                low, high = values.split(panel.length, dim=2)
                values = (low & 15) | (high << 4)
            packed[part, panel.base : panel.base + groups * panel.length] = values.flatten(1)
    return packed, sums


@lru_cache
def _constants(panels: tuple[Panel, ...], groups: int, longest: int) -> tuple[tuple[tuple[Any, ...], ...], int]:
    """kernels/linear.py's bands in blocks of up to `longest` bytes, and how many blocks there are."""
    bands, blocks = [], 0
    for index, panel in enumerate(panels):
        block = min(longest, panel.granule)
        count = panel.length // block
        where = (panel.start, panel.step, panel.base, panel.length, block, count)
        bands.append((*where, panel.nibbles, panel.source, panel.bits == 8, blocks, index * groups))
        blocks += groups * count
    return tuple(bands), blocks


def _joined(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """The one linear that holds the channels of all, in order, made when they first meet. None where they cannot be
    held together: their cuts differ, or some are parts of another."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if all(each.whole is None for each in weights):
        same = all(
            (each.panels, each.inputs, each.groups) == (first.panels, first.inputs, first.groups) for each in weights
        )
        if not same or len({id(each) for each in weights}) < len(weights):
            return None
        _join(weights)
    ends = [each.first + each.out for each in weights]
    in_order = [each.first for each in weights] == [0, *ends[:-1]] and all(
        each.whole is first.whole for each in weights
    )
    return first.whole if in_order and first.whole is not None and ends[-1] == first.whole.out else None


def _join(weights: Sequence[PackedWeight]) -> None:
    """Put the weights into one, whose views they become."""
    assert DEVICE.type == "cpu" or not torch.cuda.is_current_stream_capturing(), "run a step before capturing it"
    first = weights[0]
    packed = torch.cat([each.packed for each in weights])
    sums, scale = (torch.cat(parts, dim=1) for parts in ([w.sums for w in weights], [w.scale for w in weights]))
    biases = [torch.zeros(each.out, device=DEVICE) if each.bias is None else each.bias for each in weights]
    bias = None if all(each.bias is None for each in weights) else torch.cat(biases)
    whole = PackedWeight(packed, sums, scale, bias, first.size, first.inputs, first.groups, first.panels)
    at = 0
    for each in weights:
        part, at = slice(at, at + each.out), at + each.out
        each.whole, each.first = whole, part.start
        each.packed, each.sums, each.scale = packed[part], sums[:, part], scale[:, part]
        each.bias = None if each.bias is None or bias is None else bias[part]


def together(weights: Sequence[Weight]) -> None:
    """Hold weights that will share every input as one, where their cuts let it."""
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    if 1 < len(packed) == len(weights):
        _joined(packed)


def linears(x: Activations, weights: Sequence[Weight], onto: Tensor | None = None) -> list[Tensor]:
    """x [b, t, in] times every weight, float32 [b, t, out] each, views of one tensor; the first is added to onto
    [b, t, out] where given."""
    if isinstance(x, Quantized):
        x = rows_of(x)
    lead, n = (x.lead, x.size) if isinstance(x, Rows) else (x.shape[:-1], x.shape[-1])
    for weight in weights:
        if weight.size != n:
            raise InputError(f"a linear of {weight.size} inputs cannot take an activation of {n} coordinates")
        if isinstance(x, Rows) and isinstance(weight, PackedWeight):
            check_cut(x, weight.inputs, weight.groups)
    if not weights:
        return []
    if onto is not None and onto.shape != (*lead, weights[0].out):
        shape = (*lead, weights[0].out)
        raise InputError(f"a result of shape {shape} cannot be added to {tuple(onto.shape)}")
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    whole = _joined(packed) if len(packed) == len(weights) else None
    if whole is None and len(weights) > 1:
        return [linears(x, [weight], None if index else onto)[0] for index, weight in enumerate(weights)]
    onto = None if onto is None else _floats(onto)
    if whole is None:
        (plain,) = weights
        assert isinstance(plain, DenseWeight)
        made = _dense(_floats(x.dequantize() if isinstance(x, Quantized) else x), plain, onto)
    elif isinstance(x, Rows):
        made = torch.empty(x.rows, whole.out, dtype=torch.float32, device=DEVICE)
        _packed(x, whole, made, onto, integers=False)
    else:
        made = _float(_floats(x), whole, onto)
    parts = made.split([weight.out for weight in weights], dim=1)
    return [part.unflatten(0, lead) if lead else part[0] for part in parts]


def _floats(x: Tensor) -> Tensor:
    """float32 [rows, n], contiguous in a row."""
    flat = x.to(torch.float32).flatten(0, -2) if x.dim() != 1 else x.to(torch.float32)[None]
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@lru_cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros where the parts of split rows are added up, and tickets; kernels leave zeros behind. One for a device: what
    runs on two streams at once must not split."""
    return tuple(torch.zeros(count, dtype=torch.int32, device=device) for count in (ROOM, TICKETS))  # type: ignore


def _splits(tiles: int, blocks: int, sums: int, waves: int) -> int:
    """Parts of a row: enough programs for `waves` on every multiprocessor, as far as blocks and room go."""
    if sums > ROOM or tiles > TICKETS:
        return 1
    return max(1, min(waves * target().multiprocessors // tiles, blocks // LEAST_BLOCKS))


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _packed(x: Rows, weight: PackedWeight, out: Tensor, onto: Tensor | None, *, integers: bool) -> None:
    if not x.rows:
        return
    bands, groups = len(weight.panels), weight.groups
    mixed = groups == 1 and [panel.nibbles for panel in weight.panels] == [True, False]
    use = chosen("packed_linear", rows=x.rows, bands=bands, groups=groups)
    constants, blocks = _constants(weight.panels, groups, use["block"])
    tiles = -(-x.rows // use["tokens"]) * -(-weight.out // use["channels"])
    sums = bands * groups * x.rows * weight.out
    split = use.get("split") or _splits(tiles, blocks, sums, use["waves"])
    work, tickets = _workspace(DEVICE) if split > 1 else (None, None)
    launch(
        packed_linear,
        (tiles, split),
        weight.packed,
        weight.sums,
        weight.scale,
        weight.bias,
        x.container,
        x.scale,
        x.zero,
        onto,
        out,
        work,
        tickets,
        x.rows,
        weight.out,
        0 if onto is None else onto.shape[1],
        weight.packed.stride(0),
        weight.sums.stride(0),
        x.ld,
        _stride(onto),
        out.stride(0),
        BANDS=constants,
        GROUPS=groups,
        INPUTS=len(x.bands),
        BLOCKS=blocks,
        SPLIT=split,
        MERGE=bool(use.get("merge")) and mixed and split == 1 and not integers,
        APART=bool(use.get("apart")) and groups == 1 and bands > 1 and not integers,
        INTEGERS=integers,
        ASM=target().assembly,
        BM=use["tokens"],
        BN=use["channels"],
        WIDTH=use["width"],
        STAGES=use["stages"],
        num_warps=use["warps"],
        num_stages=use["stages"],
        fuse=False,
    )


def accumulate(x: Quantized, weight: PackedWeight) -> Tensor:
    """Σ (q_x - z_x) q_w of every (weight band, group), int32 [rows, segments, out]: the exact part of a linear."""
    check_cut(x, weight.inputs, weight.groups)
    x = rows_of(x)
    sums = torch.empty(x.rows, weight.sums.shape[0], weight.out, dtype=torch.int32, device=DEVICE)
    _packed(x, weight, sums, None, integers=True)
    return sums


def _float(x: Tensor, weight: PackedWeight, onto: Tensor | None) -> Tensor:
    rows = x.shape[0]
    out = torch.empty(rows, weight.out, dtype=torch.float32, device=DEVICE)
    if not rows:
        return out
    use = chosen("float_linear", rows=rows)
    launch(
        float_linear,
        (-(-rows // use["tokens"]) * -(-weight.out // use["channels"]),),
        weight.packed,
        weight.scale,
        weight.bias,
        x,
        onto,
        out,
        rows,
        weight.out,
        weight.size,
        0 if onto is None else onto.shape[1],
        weight.packed.stride(0),
        weight.sums.stride(0),
        x.stride(0),
        _stride(onto),
        out.stride(0),
        BANDS=_constants(weight.panels, weight.groups, use["block"])[0],
        GROUPS=weight.groups,
        ASM=target().assembly,
        BM=use["tokens"],
        BN=use["channels"],
        WIDTH=use["width"],
        STAGES=use["stages"],
        num_warps=use["warps"],
        num_stages=use["stages"],
    )
    return out


def _dense(x: Tensor, weight: DenseWeight, onto: Tensor | None) -> Tensor:
    rows = x.shape[0]
    out = torch.empty(rows, weight.out, dtype=torch.float32, device=DEVICE)
    if not rows:
        return out
    few = rows <= FEW_ROWS
    use = chosen("dense_rows" if few else "dense_tiles", rows=rows)
    across, block = -(-weight.out // use["channels"]), use["block"]
    strides = weight.weight.stride(0), x.stride(0), _stride(onto), out.stride(0)
    arguments = weight.weight, weight.bias, x, onto, out, rows, weight.out, weight.size, *strides
    common: dict[str, Any] = {"BN": use["channels"], "BK": block, "ASM": target().assembly, "num_warps": use["warps"]}
    if few:
        launch(dense_rows, (across,), *arguments, BM=power_of_two(rows), **common)
        return out
    tokens, stages = use["tokens"], use["stages"]
    common |= {"BM": tokens, "WIDTH": use["width"], "STAGES": stages, "num_stages": stages}
    launch(dense_tiles, (-(-rows // tokens) * across,), *arguments, **common)
    return out
