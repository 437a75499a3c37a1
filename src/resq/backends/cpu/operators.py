"""The operators of the CPU backend: shapes and types are checked here, the work is native."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resq.backends.backend import Activations, Backend
from resq.backends.cpu.cache import Cache
from resq.backends.cpu.formats import DenseWeight, PackedWeight, Weight, native_format, native_norm, prepack
from resq.backends.cpu.native import module, unusable
from resq.errors import InputError
from resq.numerics.affine import Quantized
from resq.numerics.formats import ActivationFormat, HeadFormats, Norm

# csrc/kernels.h: Source.
PLAIN_SOURCE, NORM_SOURCE, SILU_SOURCE = 0, 1, 2


def _floats(x: Tensor) -> Tensor:
    """float32 with contiguous rows of one stride: [..., n]."""
    return x.to(torch.float32).contiguous()


def _activate(source: int, x: Tensor, up: Tensor | None, norm: Norm | None, format: ActivationFormat) -> Activations:
    x = _floats(x)
    up = None if up is None else _floats(up)
    native, n = native_format(format), x.shape[-1]
    for what, size in (("bands", format.bands), ("map", format.map)):
        if size is not None and size.size != n:
            raise InputError(f"the {what} cover {size.size} coordinates, the activation has {n}")
    if norm is not None and norm.gain is not None and norm.gain.shape != (n,):
        raise InputError(f"a norm with gains {tuple(norm.gain.shape)} cannot take an activation of {n} coordinates")
    lead, rows = x.shape[:-1], x.numel() // n if n else 0
    threads = torch.get_num_threads()
    upper = 0 if up is None else up.data_ptr()
    normed = None if norm is None else native_norm(norm).argument
    if format.bands is None:
        y = torch.empty_like(x)
        module().activate(
            threads, source, x.data_ptr(), n, upper, n, rows, n, normed, native.handle, 0, 0, 0, 0, y.data_ptr()
        )
        return y
    q, ld = _rows_of_bytes(lead, rows, n)
    scale = torch.empty(*lead, len(format.bands), format.groups)
    zero = torch.empty(*lead, len(format.bands), format.groups, dtype=torch.uint8)
    module().activate(
        threads,
        source,
        x.data_ptr(),
        n,
        upper,
        n,
        rows,
        n,
        normed,
        native.handle,
        q.data_ptr(),
        ld,
        scale.data_ptr(),
        zero.data_ptr(),
        0,
    )
    return Quantized(q, scale, zero, format.bands, format.groups)


def _rows_of_bytes(lead: torch.Size, rows: int, n: int) -> tuple[Tensor, int]:
    """uint8 [*lead, n] whose rows are `ld` bytes apart, with the bytes after the last row that kernels may read."""
    ld = -(-n // 64) * 64 + module().TAIL
    if ld // 64 % 2 == 0:  # rows an even number of lines apart would share few cache sets
        ld += 64
    strides = [ld]
    for size in reversed(lead[1:]):
        strides.insert(0, strides[0] * size)
    # Kernels read whole blocks and multiply what is beyond a row by zero weights: any byte will do.
    return torch.empty(rows * ld, dtype=torch.uint8).as_strided((*lead, n), (*strides[: len(lead)], 1)), ld


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


def _readable(x: Quantized) -> tuple[Tensor, int]:
    """The integers with rows of one stride and readable bytes after the last; a copy where they are not so."""
    q, n = x.q, x.q.shape[-1]
    rows = q.numel() // n
    ld = q.stride(-2) if q.ndim > 1 else n
    regular = q.stride(-1) == 1 and all(q.stride(i) == q.stride(i + 1) * q.shape[i + 1] for i in range(q.ndim - 2))
    if regular and rows:
        room = q.untyped_storage().nbytes() - q.storage_offset()
        if (rows - 1) * ld + n + module().TAIL <= room:
            return q, ld
    copy, ld = _rows_of_bytes(q.shape[:-1], rows, n)
    copy.copy_(q)
    return copy, ld


def _outputs(x_shape: torch.Size, weights: Sequence[Weight], onto: Tensor | None) -> tuple[list[Tensor], list[int]]:
    outs = [torch.empty(*x_shape[:-1], weight.out) for weight in weights]
    if onto is None:
        return outs, [0] * len(outs)
    if onto.shape != outs[0].shape:
        raise InputError(f"a result of shape {tuple(outs[0].shape)} cannot be added to {tuple(onto.shape)}")
    return outs, [onto.data_ptr()] + [0] * (len(outs) - 1)


def linears(x: Activations, weights: Sequence[Weight], onto: Tensor | None = None) -> list[Tensor]:
    """x [b, t, in] times every weight, float32 [b, t, out] each, in one pass over the shared input; the first is added
    to onto [b, t, out] where given."""
    shape = x.q.shape if isinstance(x, Quantized) else x.shape
    for weight in weights:
        if weight.size != shape[-1]:
            raise InputError(f"a linear of {weight.size} inputs cannot take an activation of {shape[-1]} coordinates")
    onto = None if onto is None else _floats(onto)
    threads, rows = torch.get_num_threads(), shape[:-1].numel()
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    if len(packed) != len(weights):
        values = x.dequantize() if isinstance(x, Quantized) else x
        if packed:  # some of the weights are plain: one by one
            return [linears(x, [weight], None if index else onto)[0] for index, weight in enumerate(weights)]
        plain = [weight for weight in weights if isinstance(weight, DenseWeight)]
        return [_dense(_floats(values), weight, None if index else onto) for index, weight in enumerate(plain)]
    outs, under = _outputs(shape, weights, onto)
    targets = [
        (weight.handle, out.data_ptr(), weight.out, base, weight.out)
        for weight, out, base in zip(packed, outs, under, strict=True)
    ]
    if isinstance(x, Tensor):
        values = _floats(x)
        module().float_linears(threads, values.data_ptr(), shape[-1], rows, targets)
        return outs
    q, ld = _readable(x)
    scale, zero = x.scale.contiguous(), x.zero.contiguous()
    for weight in packed:
        _check_cut(x, weight)
    module().linears(
        threads, q.data_ptr(), ld, scale.data_ptr(), zero.data_ptr(), len(x.bands) * x.groups, rows, targets
    )
    return outs


def _check_cut(x: Quantized, weight: PackedWeight) -> None:
    if x.groups != weight.groups or (x.bands is not weight.inputs and x.bands != weight.inputs):
        raise InputError(
            f"this weight was prepacked for activations of bands {weight.inputs.pairs} in {weight.groups} groups, got "
            f"{x.bands.pairs} in {x.groups}; give prepack the format of the activations"
        )


def _dense(x: Tensor, weight: DenseWeight, onto: Tensor | None) -> Tensor:
    (out,), (base,) = _outputs(x.shape, [weight], onto)
    rows, bias = x.shape[:-1].numel(), weight.bias
    module().dense(
        torch.get_num_threads(),
        weight.weight.data_ptr(),
        weight.element,
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
    _check_cut(x, weight)
    q, ld = _readable(x)
    rows, scale, zero = x.q.shape[:-1].numel(), x.scale.contiguous(), x.zero.contiguous()
    sums = torch.empty(rows, weight.handle.segments, weight.out, dtype=torch.int32)
    ranges = len(x.bands) * x.groups
    module().accumulate(
        torch.get_num_threads(),
        q.data_ptr(),
        ld,
        scale.data_ptr(),
        zero.data_ptr(),
        ranges,
        rows,
        weight.handle,
        sums.data_ptr(),
    )
    return sums


def rope_project_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, formats: HeadFormats, cache: Cache
) -> Tensor:
    """Each head's norm, RoPE, maps, rounding, append: q [b, t, H, h], k and v [b, t, G, h] -> projected q."""
    q, k, v, cos, sin = (_floats(each) for each in (q, k, v, cos, sin))
    (batch, tokens, heads, size), kv_heads = q.shape, k.shape[2]
    if k.shape != v.shape or k.shape != (batch, tokens, kv_heads, size) or cos.shape != (batch, tokens, size):
        raise InputError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and cos {tuple(cos.shape)} do not fit together"
        )
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
        None if formats.query_norm is None else native_norm(formats.query_norm).argument,
        None if formats.key_norm is None else native_norm(formats.key_norm).argument,
        native_format(formats.query).handle,
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
    if keys is None or tokens > cache.length or keys.shape[0] != batch or heads % keys.shape[1]:
        raise InputError(f"queries {tuple(q.shape)} do not fit a cache of {cache.length} tokens")
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
    unusable=unusable,
    prepack=prepack,
    norm_quantize=norm_quantize,
    linears=linears,
    rope_project_append=rope_project_append,
    attend=attend,
    gather_quantize=gather_quantize,
    act_hadamard_quantize=act_hadamard_quantize,
    cache=Cache,
)
