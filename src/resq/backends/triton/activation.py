"""The operators on activations: source, online map and rounding, in as few passes over a row as its map allows.

Without a map or with a permutation a row is read once and its integers are written once, by one kernel. So it is with
a Hadamard map of one band where a program can hold the row and its dense factor; a larger factor is applied first, into
a float32 tensor. Maps that are matrices, several ranges after a Hadamard map and rounded inputs of maps go through
float32 tensors too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from resq.backends.backend import Activations
from resq.backends.kept import Kept
from resq.backends.triton.device import DEVICE, target
from resq.backends.triton.kernels.activation import quantize_rows
from resq.backends.triton.kernels.hadamard import factor_rows, turn_rows
from resq.backends.triton.launch import launch, power_of_two
from resq.backends.triton.rows import OFFSET, Rows
from resq.errors import InputError
from resq.numerics.bands import Bands
from resq.numerics.device import full_float32
from resq.numerics.formats import ActivationFormat, Norm
from resq.numerics.hadamard import matrix, plan, unscaled_factor
from resq.numerics.maps import Dense, Hadamard, PerHead, Permutation

# kernels/activation.py: what a row is made of, and what leaves a kernel.
PLAIN, NORM, SILU = 0, 1, 2
FLOATS, INTEGERS, ROUNDED = 0, 1, 2
# Every band is a tile of its own, unrolled.
MAX_BANDS = 8
# Coordinates that a program turns at once, four bytes of shared memory each: what every card has, and more where there
# is more. A row of several tiles takes the compiler many times as long.
TILE = 16384
LARGER_TILES = {80: 32768, 90: 32768, 100: 32768}
# Coordinates of one thread above which registers run out.
HELD = 64
# A dense factor up to this order is applied by the program that turns the row.
FUSED = 32
# The largest power of two that two sets of butterflies in registers reach.
TURNED = 32 * 32


@dataclass(frozen=True)
class Ranges:
    """Bands as constants of a kernel: see `quantize_rows`."""

    starts: tuple[int, ...]
    steps: tuple[int, ...]
    tops: tuple[float, ...]
    clips: tuple[float, ...]
    offsets: tuple[int, ...]
    groups: int
    half: bool


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _ranges(bands: Bands, groups: int, clip: tuple[float, ...] | None, half: bool) -> Ranges:
    return Ranges(
        tuple(cut.start for cut in bands.slices()),
        tuple(band.size // groups for band in bands),
        tuple(float(2**band.bits - 1) for band in bands),
        tuple(map(_float32, clip or (1.0,) * len(bands))),
        tuple(OFFSET if band.bits == 8 else 0 for band in bands),
        groups,
        half,
    )


@dataclass(frozen=True)
class Turn:
    """x' = x (H_power ⊗ F ⊗ I_inner) / sqrt(power · order), F [order, order] with F F^T = order · I.

    factor bfloat16 [parts, order, order] whose parts add up to F, one part where its entries are ±1; None for order 1.
    """

    power: int
    order: int
    inner: int
    factor: Tensor | None

    @property
    def size(self) -> int:
        """Coordinates the map acts on."""
        return self.power * self.order * self.inner


@dataclass(frozen=True)
class Form:
    """A format as kernels take it, its tensors on the card. size: coordinates, 0: any; index int32 [n] of a
    permutation; matrix float32 [heads, h, h] of a map that is one."""

    size: int
    ranges: Ranges | None = None
    index: Tensor | None = None
    turn: Turn | None = None
    matrix: Tensor | None = None


def _bfloat16_parts(matrix: Tensor) -> Tensor:
    """bfloat16 [parts, n, n] that add up to float64 [n, n] to float32's accuracy: one part where that is exact."""
    parts = [matrix.to(torch.bfloat16)]
    if not torch.equal(parts[0].to(matrix.dtype), matrix):
        for _ in range(2):
            matrix = matrix - parts[-1].to(matrix.dtype)
            parts.append(matrix.to(torch.bfloat16))
    return torch.stack(parts).to(DEVICE)


def _turn(map: Hadamard) -> Turn:
    power = map.plan.power
    # What the dense factor takes of the power of two: what registers cannot turn, and where there is no other factor at
    # least what tensor cores multiply.
    moved = max(1, power // TURNED)
    if power * map.plan.order * map.inner == power > TURNED:
        moved = max(moved, 16)
    sylvester = (matrix(plan(moved)) * moved**0.5).round()
    order = moved * map.plan.order
    factor = None if order == 1 else _bfloat16_parts(torch.kron(sylvester, unscaled_factor(map.plan)))
    return Turn(power // moved, order, map.inner, factor)


def _matrix(map: Dense | PerHead) -> Tensor:
    if isinstance(map, Dense):
        return map.matrix[None].to(DEVICE, torch.float32)
    whole = map.matrices if map.scales is None else map.matrices.double() * map.scales.double()[:, None, :]
    return whole.to(DEVICE, torch.float32)


def _form(format: ActivationFormat) -> Form:
    bands, map = format.bands, format.map
    if bands is not None and len(bands) > MAX_BANDS:
        raise InputError(f"an activation has {len(bands)} bands; the Triton backend takes up to {MAX_BANDS}")
    sizes = {part.size for part in (bands, map) if part is not None}
    if len(sizes) > 1:
        raise InputError(
            f"bands and map of an activation cover {' and '.join(str(n) for n in sorted(sizes))} coordinates"
        )
    return Form(
        sizes.pop() if sizes else 0,
        None if bands is None else _ranges(bands, format.groups, format.clip, format.scale_dtype == torch.float16),
        map.index.to(DEVICE, torch.int32) if isinstance(map, Permutation) else None,
        _turn(map) if isinstance(map, Hadamard) else None,
        _matrix(map) if isinstance(map, Dense | PerHead) else None,
    )


form_of: Kept[ActivationFormat, Form] = Kept(_form)


def _gain(norm: Norm) -> Tensor | None:
    return None if norm.gain is None else norm.gain.to(DEVICE, torch.float32).contiguous()


gain_of: Kept[Norm, Tensor | None] = Kept(_gain)


@dataclass(frozen=True)
class Source:
    """Rows before their map: x float32 [rows, n], rows contiguous, through RMSNorm, as SiLU(x) · up, or as it is."""

    kind: int
    x: Tensor
    up: Tensor | None = None
    gain: Tensor | None = None
    eps: float = 0.0

    @property
    def addresses(self) -> tuple[Tensor, int, Tensor, int]:
        """What kernels take: x, its row stride, up (x where there is none), its row stride."""
        up = self.x if self.up is None else self.up
        return self.x, self.x.stride(0), up, up.stride(0)


@dataclass(frozen=True)
class Target:
    """Where rows go: floats [rows, n], or the integers of `Rows`."""

    out: Tensor
    kind: int
    scale: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def of(cls, rows: Rows) -> Target:
        """Integers, scales and zero points."""
        return cls(rows.container, INTEGERS, rows.scale, rows.zero)

    @classmethod
    def floats(cls, like: Tensor, kind: int = FLOATS) -> Target:
        """A new float32 tensor of that shape."""
        return cls(torch.empty(like.shape, dtype=torch.float32, device=like.device), kind)


def _warps(values: int, each: int) -> int:
    """Warps for so many values with `each` to twice that of them a thread, 16 at most."""
    return 1 << max(0, min(4, (values // (32 * each)).bit_length() - 1))


def _rows(source: Source, index: Tensor | None, ranges: Ranges, to: Target) -> Target:
    """Source, permutation and rounding in one pass."""
    rows, n = source.x.shape
    blocks = tuple(power_of_two(step) for step in ranges.steps)
    groups = power_of_two(ranges.groups)
    if rows:
        launch(
            quantize_rows,
            (rows,),
            *source.addresses,
            source.gain,
            index,
            to.out,
            to.out.stride(0),
            to.scale,
            to.zero,
            float(n),
            _float32(source.eps),
            source.eps - _float32(source.eps),
            num_warps=_warps(groups * sum(blocks), 16),
            fuse=False,
            SOURCE=source.kind,
            OUT=to.kind,
            STARTS=ranges.starts,
            STEPS=ranges.steps,
            BLOCKS=blocks,
            TOPS=ranges.tops,
            RECIPROCALS=tuple(_float32(1.0 / top) for top in ranges.tops),
            CLIPS=ranges.clips,
            OFFSETS=ranges.offsets,
            GROUPS=ranges.groups,
            GROUP_BLOCK=groups,
            HALF=ranges.half,
            ASM=target().assembly,
        )
    return to


def _floats(source: Source) -> Source:
    """The source's values as a tensor."""
    if source.kind == PLAIN:
        return source
    n = source.x.shape[1]
    ranges = Ranges((0,), (n,), (inf,), (1.0,), (0,), 1, False)
    return Source(PLAIN, _rows(source, None, ranges, Target.floats(source.x)).out)


def _fits(turn: Turn) -> bool:
    """Whether one program applies the dense factor and turns the row."""
    padded = turn.power * max(16, power_of_two(turn.order))
    return turn.inner == 1 and 1 < turn.order <= FUSED and turn.power >= 16 and padded <= TILE


def _factored(source: Source, turn: Turn, multiplier: float) -> Source:
    """multiplier · source (I_power ⊗ F ⊗ I_inner)."""
    assert turn.factor is not None
    rows = source.x.shape[0]
    out = Target.floats(source.x).out
    vectors = turn.power * turn.inner
    block = next((size for size in (16, 32) if 3 * size >= turn.order), 64)
    blocks = min(3, -(-turn.order // block))
    if rows:
        launch(
            factor_rows,
            (-(-rows * vectors // 64), -(-turn.order // (block * blocks))),
            *source.addresses,
            turn.factor,
            out,
            out.stride(0),
            rows * vectors,
            vectors,
            multiplier,
            num_warps=4,
            SOURCE=source.kind,
            ORDER=turn.order,
            INNER=turn.inner,
            SIGNS=turn.factor.shape[0] == 1,
            BLOCK_M=64,
            BLOCK_N=block,
            BLOCKS=blocks,
            BLOCK_K=16,
            ASM=target().assembly,
        )
    return Source(PLAIN, out)


def _radices(power: int) -> tuple[int, int]:
    """Two sets of butterflies, or one where a thread holds all."""
    bits = power.bit_length() - 1
    return (power, 1) if bits <= 5 else (1 << (bits + 1) // 2, 1 << bits // 2)


def _blocks(power: int, columns: int) -> tuple[int, int]:
    """(columns in a block, threads): few padded columns, and no more values a thread than registers hold."""

    def cost(block: int) -> tuple[int, int, int]:
        padded = -(-columns // block) * block
        return max(HELD, power * padded // threads(block)), padded, -block

    def threads(block: int) -> int:
        first, second = _radices(power)
        return max(32, min(512, block * (min(first, second) if second > 1 else 1), power * block // 8))

    whole = power_of_two(columns)
    sizes = [1 << bit for bit in range(whole.bit_length()) if 1 << bit >= 16 or 1 << bit == whole]
    most = LARGER_TILES.get(target().capability, TILE) // power
    best = min([size for size in sizes if size <= most], key=cost)
    return best, threads(best)


def _turned(source: Source, turn: Turn, ranges: Ranges | None, to: Target) -> Target:
    """Source and Hadamard map, rounded where there are ranges: one band, one group."""
    fits = _fits(turn)
    if turn.factor is not None and not fits:
        source = _factored(source, turn, 1.0)
    if fits:
        columns, block = turn.order, max(16, power_of_two(turn.order))
        first, second = 1 << turn.power.bit_length() // 2, 1 << (turn.power.bit_length() - 1) // 2
        threads = turn.power * block // 32
    else:
        columns = turn.order * turn.inner
        block, threads = _blocks(turn.power, columns)
        first, second = _radices(turn.power)
    if source.x.shape[0]:
        launch(
            turn_rows,
            (source.x.shape[0],),
            *source.addresses,
            turn.factor if fits else None,
            to.out,
            to.out.stride(0),
            to.scale,
            to.zero,
            (turn.power * turn.order) ** -0.5,
            num_warps=max(1, min(16, threads // 32)),
            fuse=False,
            SOURCE=source.kind,
            OUT=to.kind,
            R1=first,
            R2=second,
            COLUMNS=columns,
            BLOCK=block,
            BLOCKS=-(-columns // block),
            SIGNS=turn.factor is None or turn.factor.shape[0] == 1,
            TOP=1.0 if ranges is None else ranges.tops[0],
            RECIPROCAL=1.0 if ranges is None else _float32(1.0 / ranges.tops[0]),
            CLIP=1.0 if ranges is None else ranges.clips[0],
            OFFSET=0 if ranges is None else ranges.offsets[0],
            ASM=target().assembly,
        )
    return to


def _multiplied(source: Source, matrix: Tensor) -> Source:
    """Source times a block diagonal matrix [heads, h, h]."""
    x = source.x.unflatten(1, matrix.shape[:2]).transpose(0, 1)
    with full_float32():
        return Source(PLAIN, torch.matmul(x, matrix).transpose(0, 1).flatten(1))


def _activate(source: Source, lead: torch.Size, format: ActivationFormat) -> Activations:
    form, n = form_of(format), source.x.shape[1]
    if form.size not in (0, n):
        raise InputError(f"the bands and map cover {form.size} coordinates, the activation has {n}")
    if format.map_input_bits is not None:
        whole = _ranges(Bands.of((format.map_input_bits, n)), 1, None, False)
        source = Source(PLAIN, _rows(source, None, whole, Target.floats(source.x, ROUNDED)).out)
    ranges = form.ranges
    rows = None if format.bands is None else Rows(lead, n, format.bands, format.groups, source.x.device)
    if form.matrix is not None:
        source = _multiplied(_floats(source), form.matrix)
    if form.turn is not None:
        source = _floats(source) if source.kind == NORM else source
        one = ranges is None or (len(ranges.tops) == 1 and ranges.groups == 1 and not ranges.half)
        if form.turn.power == 1:
            source = _factored(source, form.turn, form.turn.order**-0.5) if form.turn.factor is not None else source
        elif one:
            to = Target.floats(source.x) if rows is None else Target.of(rows)
            _turned(source, form.turn, ranges, to)
            return to.out.view(*lead, n) if rows is None else rows
        else:
            source = Source(PLAIN, _turned(source, form.turn, None, Target.floats(source.x)).out)
    if ranges is None or rows is None:
        ranges = Ranges((0,), (n,), (inf,), (1.0,), (0,), 1, False)
        if form.index is None:
            return _floats(source).x.view(*lead, n)
        return _rows(source, form.index, ranges, Target.floats(source.x)).out.view(*lead, n)
    _rows(source, form.index, ranges, Target.of(rows))
    return rows


def _flat(x: Tensor) -> Tensor:
    """float32 [rows, n] with contiguous rows, a view of x where it can be."""
    flat = x.to(torch.float32).reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def norm_quantize(x: Tensor, norm: Norm, format: ActivationFormat) -> Activations:
    """RMSNorm, online map, rounding: x [b, t, n]."""
    gain = gain_of(norm)
    if gain is not None and gain.numel() != x.shape[-1]:
        raise InputError(f"a norm of {gain.numel()} gains cannot take an activation of {x.shape[-1]} coordinates")
    return _activate(Source(NORM, _flat(x), gain=gain, eps=norm.eps), x.shape[:-1], format)


def gather_quantize(x: Tensor, format: ActivationFormat) -> Activations:
    """Online map and rounding: x [b, t, n]."""
    return _activate(Source(PLAIN, _flat(x)), x.shape[:-1], format)


def act_hadamard_quantize(gate: Tensor, up: Tensor, format: ActivationFormat) -> Activations:
    """SiLU(gate) · up, map, rounding: [b, t, F] each."""
    if gate.shape != up.shape:
        raise InputError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} should have one shape")
    return _activate(Source(SILU, _flat(gate), up=_flat(up)), gate.shape[:-1], format)
