"""RoPE, rounding and append; and attention over the packed cache. Shapes are checked here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from resq.backends.fits import check_heads, check_queries
from resq.backends.kept import Kept
from resq.backends.reference import allowed
from resq.backends.triton.cache import NO_PLACES, Cache, Store
from resq.backends.triton.configs import chosen
from resq.backends.triton.device import DEVICE, target
from resq.backends.triton.kernels.attention import decode, merge
from resq.backends.triton.kernels.rope import rope_append
from resq.backends.triton.launch import launch, power_of_two
from resq.errors import InputError
from resq.numerics.formats import ActivationFormat, HeadFormats, Norm

# Up to this many new tokens, and rows of a tile (tokens times query heads of a kv head), run over packed bytes.
FEW_TOKENS = 8
MOST_ROWS = 32
# The fewest slots that are worth a program of the decode kernel.
LEAST = 64
# Programs of the decode kernel for each multiprocessor.
WAVES = 8
# Parts at most, which one program merges.
MOST_PARTS = 128
# Queries that share a mask, and bytes of dequantized keys and values at a time.
CHUNK = 1024
WORKSPACE = 2**29
# What attention multiplies; the interpreter's CPU has no fast float16.
LARGEST = torch.finfo(torch.float16).max
FLOATS = torch.float16 if DEVICE.type == "cuda" else torch.float32


@dataclass(frozen=True)
class _Made:
    """A format's map [h, h] (None: identity) and clips [bands] (None: 1) on the device, float32; the coordinates it
    takes (0: any)."""

    matrix: Tensor | None
    clip: Tensor | None
    size: int


def _make(format: ActivationFormat) -> _Made:
    sizes = {part.size for part in (format.bands, format.map) if part is not None}
    if len(sizes) > 1:
        raise InputError(f"bands and map of an activation cover {' and '.join(map(str, sorted(sizes)))} coordinates")
    if format.groups != 1:
        raise InputError(f"keys and values have one range per band, got {format.groups} groups")
    size, matrix = sizes.pop() if sizes else 0, None
    if format.map is not None:
        matrix = format.map.apply(torch.eye(size, dtype=torch.float64)).to(DEVICE, torch.float32).contiguous()
    clip = None if format.clip is None else torch.tensor(format.clip, dtype=torch.float32).to(DEVICE)
    return _Made(matrix, clip, size)


_made: Kept[ActivationFormat, _Made] = Kept(_make)


@dataclass(frozen=True)
class _Gain:
    """A norm's gains float32 on the device, None for ones."""

    values: Tensor | None


_gain: Kept[Norm, _Gain] = Kept(
    lambda norm: _Gain(None if norm.gain is None else norm.gain.to(DEVICE, torch.float32).contiguous())
)


def _heads(x: Tensor) -> Tensor:
    """float32 [b, t, heads, h] with each token's heads next to each other."""
    x = x if x.dtype is torch.float32 else x.to(torch.float32)
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _planes(store: Store) -> tuple[Tensor | None, ...]:
    """Halves, nibbles, bytes, scales, zero points; None for what the store has not."""
    return (*store.planes, None, None, None, None) if store.places is None else (None, *store.planes)


def _how(format: ActivationFormat, norm: Norm | None, size: int, *, turn: bool) -> tuple[Any, ...]:
    """kernels/rope.py's `HOW`."""
    columns, half = power_of_two(size, 16), format.scale_dtype == torch.float16
    return size, columns, norm is not None, turn, format.map_input_bits or 0, min(32, columns), half


def _sizes(formats: HeadFormats) -> set[int]:
    norms = (formats.query_norm, formats.key_norm)
    gains = {norm.gain.numel() for norm in norms if norm is not None and norm.gain is not None}
    return gains | {_made(each).size for each in (formats.query, formats.key, formats.value)}


def rope_project_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, formats: HeadFormats, cache: Cache
) -> Tensor:
    """Each head's norm, RoPE, maps, rounding, append: q [b, t, H, h], k and v [b, t, G, h] -> projected q."""
    q, k, v = _heads(q), _heads(k), _heads(v)
    (batch, tokens, heads, size), kv_heads = q.shape, k.shape[2]
    check_heads(q, k, v, cos, sin, _sizes(formats))
    cos, sin = cos.to(torch.float32).contiguous(), sin.to(torch.float32).contiguous()
    position = cache.extend(batch, kv_heads, size, tokens)
    out = torch.empty(batch, tokens, heads, size, device=DEVICE)
    rows = batch * tokens
    norms = (formats.query_norm, formats.key_norm)
    gains = [(None, 0.0) if norm is None else (_gain(norm).values, float(norm.eps)) for norm in norms]
    query, key, value = (_made(each) for each in (formats.query, formats.key, formats.value))
    choice = chosen("rope", heads=rows * heads)
    tile = choice["rows"]
    launch(
        rope_append,
        (-(-rows * heads // tile) + 2 * -(-rows * kv_heads // tile),),
        *(q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1)),
        *(cos, sin, tokens, rows, position, cache.clock, cache.capacity),
        *(*gains[0], query.matrix, *gains[1], key.matrix, key.clip, value.matrix, value.clip),
        out,
        *_planes(cache.keys),
        *_planes(cache.values),
        num_warps=choice["warps"],
        fuse=False,
        HEADS=heads,
        KV_HEADS=kv_heads,
        QUERIES=_how(formats.query, norms[0], size, turn=True),
        KEYS=_how(formats.key, norms[1], size, turn=True),
        VALUES=_how(formats.value, None, size, turn=False),
        KEY_STORE=(cache.keys.places or NO_PLACES).constant,
        VALUE_STORE=(cache.values.places or NO_PLACES).constant,
        ROWS=tile,
        ASM=target().assembly,
    )
    return out


def attend(q: Tensor, cache: Cache, scale: float, starts: Tensor | None, window: int | None) -> Tensor:
    """Causal softmax attention of the last t cached tokens: q [b, t, H, h] -> [b, t, H·h]."""
    q = _heads(q)
    check_queries(q, cache.shape, cache.length, cache.size, starts)
    starts = None if starts is None else starts.to(DEVICE, torch.int64)
    packed = cache.keys.places is not None and cache.values.places is not None
    tokens, share = q.shape[1], q.shape[2] // cache.keys.planes[0].shape[1]
    if packed and tokens <= FEW_TOKENS and tokens * share <= MOST_ROWS:
        return _decode(q, cache, scale, starts, window)
    return _prefill(q, cache, scale, starts, window)


def _decode(q: Tensor, cache: Cache, scale: float, starts: Tensor | None, window: int | None) -> Tensor:
    batch, tokens, heads, size = q.shape
    kv_heads = cache.keys.planes[0].shape[1]
    share = heads // kv_heads
    rows = power_of_two(tokens * share, 8)
    keys, values = cache.keys.places, cache.values.places
    assert keys is not None
    assert values is not None
    choice = chosen("decode", rows=rows, head=size, bands=max(len(keys.bands), len(values.bands)))
    # By the capacity, so that a recorded step has the parts of any other; each takes its share of what is stored.
    most = min(cache.capacity, cache.capacity if window is None else power_of_two(window + tokens, LEAST)) // LEAST
    parts = max(1, min(most, MOST_PARTS, -(-WAVES * target().multiprocessors // (batch * kv_heads))))
    sums = torch.empty(batch, kv_heads, parts, rows, size, device=DEVICE)
    peaks, totals = torch.empty(2, batch, kv_heads, parts, rows, device=DEVICE)
    out = torch.empty(batch, tokens, heads * size, device=DEVICE)
    shapes: dict[str, Any] = {"TOKENS": tokens, "SHARE": share, "HEAD": size, "ROWS": rows}
    launch(
        decode,
        (parts, kv_heads, batch),
        *(q, q.stride(0), q.stride(1)),
        *cache.keys.planes,
        *cache.values.planes,
        *(starts, cache.clock, cache.length, cache.capacity, window, scale * math.log2(math.e)),
        *(sums, peaks, totals),
        **shapes,
        num_warps=choice["warps"],
        BLOCK=choice["block"],
        STAGES=choice["stages"],
        KEYS=keys.constant,
        VALUES=values.constant,
        ASM=target().assembly,
    )
    launch(
        merge,
        (tokens * share, kv_heads, batch),
        *(sums, peaks, totals, out),
        PARTS=parts,
        PADDED=power_of_two(parts, 1),
        STEP=min(16, power_of_two(parts, 1)),
        **shapes,
        COLUMNS=power_of_two(size, 16),
    )
    return out


def _visible(first: int | Tensor, queries: slice, slots: slice, starts: Tensor | None, window: int | None) -> Tensor:
    """`allowed` for queries and slots by number; first: the slot of query 0."""
    query, slot = (torch.arange(each.start, each.stop, device=DEVICE) for each in (queries, slots))
    return allowed(query + first, slot, starts, window)


def _prefill(q: Tensor, cache: Cache, scale: float, starts: Tensor | None, window: int | None) -> Tensor:
    """By torch's attention over dequantized keys and values: as many batch rows at a time as the workspace holds."""
    batch, tokens, heads, size = q.shape
    kv_heads = cache.keys.planes[0].shape[1]
    out = torch.empty(batch, tokens, heads * size, device=DEVICE)
    # A recorded step does not know how much is stored: it masks what is not.
    recorded = cache.clock is not None
    length = cache.capacity if recorded else cache.length
    past = cache.clock if cache.clock is not None else length - tokens
    plain = not recorded and starts is None and window is None
    # torch's kernels that take a mask have a key head for every query head.
    copies = 1 if plain else heads // kv_heads
    lowest = 0 if recorded or window is None else max(0, length - tokens - window + 1)
    step = max(1, WORKSPACE // (2 * kv_heads * copies * (length - lowest) * size * FLOATS.itemsize))
    for start in range(0, batch, step):
        rows = slice(start, min(start + step, batch))
        k, v = (
            store.dense(rows, slice(lowest, length), FLOATS).repeat_interleave(copies, dim=1)
            for store in (cache.keys, cache.values)
        )
        first = None if starts is None else starts[rows]
        for at in range(0, tokens, tokens if plain else CHUNK):
            queries = slice(at, tokens if plain else min(at + CHUNK, tokens))
            seen = slice(lowest, length)
            if not plain and not recorded:
                before = length - tokens
                begin = lowest if window is None else max(lowest, before + at - window + 1)
                seen = slice(begin, before + queries.stop)
            part = F.scaled_dot_product_attention(
                q[rows, queries].clamp(-LARGEST, LARGEST).to(FLOATS).transpose(1, 2),
                k[:, :, seen.start - lowest : seen.stop - lowest],
                v[:, :, seen.start - lowest : seen.stop - lowest],
                _bias(tokens, length) if plain else _visible(past, queries, seen, first, window),
                is_causal=plain and tokens == length,
                scale=scale,
                enable_gqa=plain and heads != kv_heads,
            )
            out[rows, queries] = part.transpose(1, 2).flatten(-2)
    return out


def _bias(tokens: int, length: int) -> Any:
    """Causal for the last `tokens`; None where torch's own flag or no mask says the same."""
    return None if tokens in (1, length) else causal_lower_right(tokens, length)
