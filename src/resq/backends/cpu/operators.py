"""The operators of the CPU backend: shapes and types are checked here, the work is native."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resq.backends.backend import Activations, Backend
from resq.backends.cpu.cache import Cache
from resq.backends.cpu.formats import (
    PackedWeight,
    Weight,
    native_format,
    native_heads,
    native_norm,
    prepack,
)
from resq.backends.cpu.native import module, unusable
from resq.backends.dense import FLOATS, DenseWeight
from resq.backends.fits import check_cut, check_heads, check_queries
from resq.errors import InputError
from resq.numerics.affine import Quantized
from resq.numerics.bands import Bands
from resq.numerics.formats import ActivationFormat, HeadFormats, Norm

# csrc/kernels.h: kTail, readable bytes after a row's last coordinate.
TAIL = 64
# csrc/kernels.h: Source.
PLAIN_SOURCE, NORM_SOURCE, SILU_SOURCE = 0, 1, 2


def _floats(x: Tensor) -> Tensor:
    """float32 with contiguous rows: [..., n]."""
    # Asking costs a tenth of a conversion that does nothing, and a decode step asks some hundred times.
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


class Rows(Quantized):
    """Quantized activations in one allocation, as the kernels write and read them.

    buffer uint8: `rows` rows of integers `ld` bytes apart, then scales float32 [rows, bands, groups], then zero points
    uint8. q, scale and zero are views, made when asked for. Kernels read whole blocks and multiply what is beyond a row
    by zero weights: any byte will do there.
    """

    lead: torch.Size
    size: int
    buffer: Tensor
    rows: int
    ld: int
    ranges: int
    addresses: tuple[int, int, int]  # of q, scale and zero

    def __init__(self, lead: torch.Size, n: int, bands: Bands, groups: int) -> None:
        rows, ranges = lead.numel(), len(bands) * groups
        # An odd number of lines: rows a power of two apart would share few cache sets.
        ld = (n + 63) // 64 * 64 + TAIL
        ld += 64 * (ld // 64 % 2 == 0)
        buffer = torch.empty(rows * (ld + 5 * ranges), dtype=torch.uint8)
        address = buffer.data_ptr()
        self.__dict__.update(
            lead=lead,
            size=n,
            bands=bands,
            groups=groups,
            buffer=buffer,
            rows=rows,
            ld=ld,
            ranges=ranges,
            addresses=(address, address + rows * ld, address + rows * (ld + 4 * ranges)),
        )

    def __getattr__(self, name: str) -> Tensor:
        """The views of `Quantized`."""
        start, ranges = self.rows * self.ld, self.rows * self.ranges
        if name == "q":
            found = self.buffer[:start].view(*self.lead, self.ld)[..., : self.size]
        elif name == "scale":
            raw = self.buffer[start : start + 4 * ranges]
            found = raw.view(torch.float32).view(*self.lead, len(self.bands), self.groups)
        elif name == "zero":
            found = self.buffer[start + 4 * ranges :].view(*self.lead, len(self.bands), self.groups)
        else:
            raise AttributeError(name)
        self.__dict__[name] = found
        return found


def _activate(source: int, x: Tensor, up: Tensor | None, norm: Norm | None, format: ActivationFormat) -> Activations:
    native, x = native_format(format), _floats(x)
    up = None if up is None else _floats(up)
    shape = x.shape
    n = shape[-1]
    if native.size not in (0, n):
        raise InputError(f"the bands and map cover {native.size} coordinates, the activation has {n}")
    normed = None if norm is None else native_norm(norm)
    if normed is not None and normed.size not in (0, n):
        raise InputError(f"a norm of {normed.size} gains cannot take an activation of {n} coordinates")
    if format.bands is None:
        plain = torch.empty_like(x)
        result: Activations = plain
        target = (0, 0, 0, 0, plain.data_ptr())
    else:
        result = rows = Rows(shape[:-1], n, format.bands, format.groups)
        q, scale, zero = rows.addresses
        target = (q, rows.ld, scale, zero, 0)
    module().activate(
        torch.get_num_threads(),
        source,
        x.data_ptr(),
        n,
        0 if up is None else up.data_ptr(),
        n,
        x.numel() // n if n else 0,
        n,
        None if normed is None else normed.argument,
        native.handle,
        *target,
    )
    return result


def norm_quantize(x: Tensor, norm: Norm, format: ActivationFormat) -> Activations:
    """RMSNorm, online map, rounding: x [b, t, n]."""
    return _activate(NORM_SOURCE, x, None, norm, format)


def gather_quantize(x: Tensor, format: ActivationFormat) -> Activations:
    """Online map and rounding: x [b, t, n]."""
    return _activate(PLAIN_SOURCE, x, None, None, format)


def act_hadamard_quantize(gate: Tensor, up: Tensor, format: ActivationFormat) -> Activations:
    """SiLU(gate) · up, map, rounding: [b, t, F] each."""
    if gate.shape != up.shape:
        raise InputError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} should have one shape")
    return _activate(SILU_SOURCE, gate, up, None, format)


def _rows(x: Quantized) -> Rows:
    """The same integers where kernels can read them."""
    if isinstance(x, Rows):
        return x
    rows = Rows(x.q.shape[:-1], x.q.shape[-1], x.bands, x.groups)
    for ours, theirs in ((rows.q, x.q), (rows.scale, x.scale), (rows.zero, x.zero)):
        ours.copy_(theirs)
    return rows


def _outputs(lead: torch.Size, weights: Sequence[Weight], onto: Tensor | None) -> tuple[list[Tensor], list[int]]:
    outs = [torch.empty(*lead, weight.out) for weight in weights]
    if onto is None:
        return outs, [0] * len(outs)
    if onto.shape != outs[0].shape:
        raise InputError(f"a result of shape {tuple(outs[0].shape)} cannot be added to {tuple(onto.shape)}")
    return outs, [onto.data_ptr()] + [0] * (len(outs) - 1)


def linears(x: Activations, weights: Sequence[Weight], onto: Tensor | None = None) -> list[Tensor]:
    """x [b, t, in] times every weight, float32 [b, t, out] each, in one pass over the shared input; the first is added
    to onto [b, t, out] where given."""
    if isinstance(x, Quantized):
        x = _rows(x)
        lead, n = x.lead, x.size
    else:
        lead, n = x.shape[:-1], x.shape[-1]
    for weight in weights:
        if weight.size != n:
            raise InputError(f"a linear of {weight.size} inputs cannot take an activation of {n} coordinates")
    onto = None if onto is None else _floats(onto)
    threads, rows = torch.get_num_threads(), lead.numel()
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    if len(packed) != len(weights):
        values = x.dequantize() if isinstance(x, Quantized) else x
        if packed:  # some of the weights are plain: one by one
            return [linears(x, [weight], None if index else onto)[0] for index, weight in enumerate(weights)]
        plain = [weight for weight in weights if isinstance(weight, DenseWeight)]
        return [_dense(_floats(values), weight, None if index else onto) for index, weight in enumerate(plain)]
    outs, under = _outputs(lead, weights, onto)
    targets = [
        (weight.handle, out.data_ptr(), weight.out, base, weight.out)
        for weight, out, base in zip(packed, outs, under, strict=True)
    ]
    if isinstance(x, Tensor):
        values = _floats(x)
        module().float_linears(threads, values.data_ptr(), n, rows, targets)
        return outs
    for weight in packed:
        check_cut(x, weight.inputs, weight.groups)
    q, scale, zero = x.addresses
    module().linears(threads, q, x.ld, scale, zero, x.ranges, rows, targets)
    return outs


def _dense(x: Tensor, weight: DenseWeight, onto: Tensor | None) -> Tensor:
    (out,), (base,) = _outputs(x.shape[:-1], [weight], onto)
    rows, bias = x.shape[:-1].numel(), weight.bias
    module().dense(
        torch.get_num_threads(),
        weight.weight.data_ptr(),
        FLOATS.index(weight.weight.dtype),
        weight.weight.stride(0),
        weight.out,
        weight.size,
        0 if bias is None else bias.data_ptr(),
        x.data_ptr(),
        weight.size,
        rows,
        out.data_ptr(),
        weight.out,
        base,
        weight.out,
    )
    return out


def accumulate(x: Quantized, weight: PackedWeight) -> Tensor:
    """Σ (q_x - z_x) q_w of every (weight band, group), int32 [rows, segments, out]: the exact part of a linear."""
    check_cut(x, weight.inputs, weight.groups)
    x = _rows(x)
    q, scale, zero = x.addresses
    sums = torch.empty(x.rows, weight.handle.segments, weight.out, dtype=torch.int32)
    module().accumulate(torch.get_num_threads(), q, x.ld, scale, zero, x.ranges, x.rows, weight.handle, sums.data_ptr())
    return sums


def rope_project_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, formats: HeadFormats, cache: Cache
) -> Tensor:
    """Each head's norm, RoPE, maps, rounding, append: q [b, t, H, h], k and v [b, t, G, h] -> projected q."""
    q, k, v, cos, sin = _floats(q), _floats(k), _floats(v), _floats(cos), _floats(sin)
    (batch, tokens, heads, size), kv_heads = q.shape, k.shape[2]
    heads_of = native_heads(formats)
    check_heads(q, k, v, cos, sin, heads_of.sizes)
    position = cache.extend(batch, kv_heads, size, tokens)
    out = torch.empty_like(q)
    module().rope_append(
        torch.get_num_threads(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        heads * size,
        kv_heads * size,
        kv_heads * size,
        batch,
        tokens,
        heads,
        kv_heads,
        size,
        cos.data_ptr(),
        sin.data_ptr(),
        *heads_of.arguments,
        cache.keys.argument,
        cache.values.argument,
        position,
        out.data_ptr(),
    )
    return out


def attend(q: Tensor, cache: Cache, scale: float, starts: Tensor | None, window: int | None) -> Tensor:
    """Causal softmax attention of the last t cached tokens: q [b, t, H, h] -> [b, t, H·h]."""
    q = _floats(q)
    batch, tokens, heads, size = q.shape
    keys = cache.keys.data
    check_queries(q, None if keys is None else (keys.shape[0], keys.shape[1]), cache.length, cache.size, starts)
    assert keys is not None
    out = torch.empty(batch, tokens, heads * size)
    first = None if starts is None else starts.to(torch.int64).contiguous()
    module().attend(
        torch.get_num_threads(),
        q.data_ptr(),
        batch,
        tokens,
        heads,
        keys.shape[1],
        size,
        cache.keys.argument,
        cache.values.argument,
        cache.length,
        0 if first is None else first.data_ptr(),
        window or 0,
        scale,
        out.data_ptr(),
    )
    return out


CPU = Backend(
    name="cpu",
    dtype=torch.float32,
    device=torch.device("cpu"),
    unusable=unusable,
    prepack=prepack,
    norm_quantize=norm_quantize,
    linears=linears,
    rope_project_append=rope_project_append,
    attend=attend,
    gather_quantize=gather_quantize,
    act_hadamard_quantize=act_hadamard_quantize,
    cache=Cache,
    accumulate=accumulate,
    kernels=lambda: module().active(),
)
