"""Formats, norms and weights as the native module wants them: made once, kept while their originals live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resq.backends.cpu.native import module
from resq.backends.cuts import source_bands
from resq.backends.dense import DenseWeight, dense_weight, float_bias
from resq.backends.kept import Kept
from resq.errors import InputError
from resq.numerics.bands import Bands
from resq.numerics.device import CPU
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.hadamard import unscaled_factor
from resq.numerics.linear import DenseLinear, Linear
from resq.numerics.maps import Dense, Hadamard, OnlineMap, PerHead, Permutation


@dataclass(frozen=True)
class NativeFormat:
    """A format's handle, the coordinates it takes (0: any) and the tensors whose addresses it holds."""

    handle: Any
    size: int
    held: tuple[Tensor, ...]


def _wide(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix contiguous, as float64 when it is that and float32 otherwise (which holds 16-bit types exactly)."""
    wide = matrix.dtype == torch.float64
    return (matrix if wide else matrix.to(torch.float32)).contiguous(), wide


def _set_map(handle: Any, map: OnlineMap) -> tuple[Tensor, ...]:
    match map:
        case Permutation():
            index = map.index.to(torch.int32).contiguous()
            handle.permute(map.size, index.data_ptr())
            return (index,)
        case Hadamard():
            plan = map.plan
            if plan.order == 1:
                handle.hadamard(map.size, plan.power, 1, map.inner, 0, True)
                return ()
            factor = unscaled_factor(plan).contiguous()
            signs = bool((factor.abs() == 1).all())
            handle.hadamard(map.size, plan.power, plan.order, map.inner, factor.data_ptr(), signs)
            return (factor,)
        case Dense():
            matrix, wide = _wide(map.matrix)
            handle.multiply(map.size, 1, matrix.data_ptr(), wide)
            return (matrix,)
        case PerHead():
            whole = map.matrices if map.scales is None else map.matrices.double() * map.scales.double()[:, None, :]
            matrix, wide = _wide(whole)
            handle.multiply(map.size, map.matrices.shape[0], matrix.data_ptr(), wide)
            return (matrix,)


def _native_format(format: ActivationFormat) -> NativeFormat:
    pairs = [] if format.bands is None else format.bands.pairs
    most = module().MAX_BANDS
    if len(pairs) > most:
        raise InputError(f"an activation has {len(pairs)} bands; the CPU backend takes up to {most}")
    half = format.scale_dtype == torch.float16
    handle = module().Format(pairs, format.groups, half, format.map_input_bits or 0)
    if format.clip is not None:
        handle.clip(list(format.clip))
    held = () if format.map is None else _set_map(handle, format.map)
    sizes = {part.size for part in (format.bands, format.map) if part is not None}
    if len(sizes) > 1:
        raise InputError(f"bands and map of an activation cover {' and '.join(map(str, sorted(sizes)))} coordinates")
    return NativeFormat(handle, sizes.pop() if sizes else 0, held)


native_format: Kept[ActivationFormat, NativeFormat] = Kept(_native_format)


@dataclass(frozen=True)
class NativeNorm:
    """(eps, address of the float64 gains or 0), the coordinates (0: any), and the gains."""

    argument: tuple[float, int]
    size: int
    gain: Tensor | None


def _native_norm(norm: Norm) -> NativeNorm:
    if norm.gain is None:
        return NativeNorm((norm.eps, 0), 0, None)
    gain = norm.gain.to(torch.float64).contiguous()
    return NativeNorm((norm.eps, gain.data_ptr()), gain.numel(), gain)


native_norm: Kept[Norm, NativeNorm] = Kept(_native_norm)


@dataclass(frozen=True)
class NativeHeads:
    """What rope_append takes of a layer's formats: norms of query and key heads, the query's format; and the
    coordinates of a head that all formats ask for (0: any)."""

    arguments: tuple[tuple[float, int] | None, tuple[float, int] | None, Any]
    sizes: frozenset[int]


def _native_heads(formats: HeadFormats) -> NativeHeads:
    norms = [None if norm is None else native_norm(norm) for norm in (formats.query_norm, formats.key_norm)]
    natives = [native_format(each) for each in (formats.query, formats.key, formats.value)]
    sizes = frozenset([each.size for each in natives] + [norm.size for norm in norms if norm is not None])
    query, key = (None if norm is None else norm.argument for norm in norms)
    return NativeHeads((query, key, natives[0].handle), sizes)


native_heads: Kept[HeadFormats, NativeHeads] = Kept(_native_heads)


@dataclass(frozen=True)
class PackedWeight:
    """A packed linear in panels (csrc/linear.h). inputs, groups: the cut of the activations it was made for."""

    handle: Any
    out: int
    size: int
    inputs: Bands
    groups: int

    @property
    def nbytes(self) -> int:
        """Bytes of panels, scales and column sums, padding included."""
        return self.handle.nbytes


Weight = PackedWeight | DenseWeight


def prepack(linear: Linear, inputs: ActivationFormat = PLAIN) -> Weight:
    """Panels of a packed linear, or a plain linear as it lies. inputs: the format of the activations it will meet.

    Raises InputError when a band of the weights crosses one of the inputs.
    """
    if isinstance(linear, DenseLinear):
        return dense_weight(linear, CPU)
    cut = linear.bands if inputs.bands is None else inputs.bands
    groups = 1 if inputs.bands is None else inputs.groups
    source = source_bands(cut, linear.bands, groups)
    stored = [part.contiguous() for part in linear.qweight]
    bands = [
        (rows.data_ptr(), rows.stride(0), band.bits, band.size) for band, rows in zip(linear.bands, stored, strict=True)
    ]
    scale = linear.scale.contiguous()
    bias = float_bias(linear.bias, CPU)
    out, size = linear.shape
    base = 0 if bias is None else bias.data_ptr()
    threads = torch.get_num_threads()
    handle = module().PackedLinear(threads, out, size, bands, source, groups, scale.data_ptr(), base)
    return PackedWeight(handle, out, size, cut, groups)
