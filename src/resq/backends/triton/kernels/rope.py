"""Heads on their way to attention: norm, RoPE, map, then out as floats, or rounded into the cache.

What becomes of queries, keys or values is a constant tuple `HOW`:
(coordinates of a head, the next power of two, whether there is a norm, whether they turn, bits of the map's rounded
inputs or 0, inputs that a step of the map takes, whether scales are float16).
A tile of them is a tuple `heads`: (addresses [rows], which exist [rows], where their tokens' angles are in cos and sin
[rows], cos, sin, the norm's gain or None).
"""

import triton
import triton.language as tl

from resq.backends.triton.kernels.affine import affine_integers, affine_range
from resq.backends.triton.kernels.attention import places


@triton.jit
def turned(heads, inverse, column, HOW: tl.constexpr):
    """Coordinates `column` of heads after norm and RoPE, float32 [rows, columns]. inverse: 1 / root mean square."""
    x, inside, angles, cos, sin, gain = heads
    HEAD: tl.constexpr = HOW[0]
    here = inside[:, None] & (column < HEAD)[None, :]
    value = tl.load(x[:, None] + column[None, :], mask=here, other=0.0)
    if HOW[2]:
        value = value * inverse[:, None]
        if gain is not None:
            value = value * tl.load(gain + column, mask=column < HEAD, other=0.0)[None, :]
    if HOW[3]:
        HALF: tl.constexpr = HEAD // 2
        first = column < HALF
        across = tl.where(first, column + HALF, column - HALF)
        other = tl.load(x[:, None] + across[None, :], mask=here, other=0.0)
        if HOW[2]:
            other = other * inverse[:, None]
            if gain is not None:
                other = other * tl.load(gain + across, mask=column < HEAD, other=0.0)[None, :]
        place = angles[:, None] + column[None, :]
        c = tl.load(cos + place, mask=here, other=0.0)
        s = tl.load(sin + place, mask=here, other=0.0)
        value = value * c + tl.where(first[None, :], -other, other) * s
    return value


@triton.jit
def projected(heads, inverse, map, ranges, column, HOW: tl.constexpr, ASM: tl.constexpr):
    """Coordinates `column` of `turned` heads, their inputs rounded to `ranges` where they are to be, times the map."""
    HEAD: tl.constexpr = HOW[0]
    BITS: tl.constexpr = HOW[4]
    STEP: tl.constexpr = HOW[5]
    if map is None:
        value = turned(heads, inverse, column, HOW)
        if BITS:
            value = rounded(value, ranges, 2.0**BITS - 1.0, ASM)
    else:
        value = tl.zeros((inverse.shape[0], column.shape[0]), tl.float32)
        for start in tl.range(0, HEAD, STEP):
            inner = start + tl.arange(0, STEP)
            part = turned(heads, inverse, inner, HOW)
            if BITS:
                part = rounded(part, ranges, 2.0**BITS - 1.0, ASM)
            here = (inner < HEAD)[:, None] & (column < HEAD)[None, :]
            matrix = tl.load(map + inner[:, None] * HEAD + column[None, :], mask=here, other=0.0)
            # Three products of 11-bit parts: one alone would move integers.
            value = tl.dot(part, matrix, value, input_precision="tf32x3")
    return value


@triton.jit
def rounded(x, ranges, top, ASM: tl.constexpr):
    """x through the integers of (scale, 1 / scale, zero) [rows] and back."""
    scale, inverse, zero = ranges
    return (affine_integers(x, inverse[:, None], zero[:, None], top, ASM) - zero[:, None]) * scale[:, None]


@triton.jit
def write_heads(
    heads, epsilon, map, clip, out, planes, slot, HOW: tl.constexpr, STORE: tl.constexpr, ASM: tl.constexpr
):
    """Heads to `out` (addresses of rows, floats) where there are no bands, else to slot [rows] of the planes."""
    HEAD: tl.constexpr = HOW[0]
    BITS: tl.constexpr = HOW[4]
    BANDS: tl.constexpr = len(STORE) - 1
    x, inside = heads[0], heads[1]
    every = tl.arange(0, HOW[1])
    inverse = tl.full((x.shape[0],), 1.0, tl.float32)
    if HOW[2]:
        whole = tl.load(x[:, None] + every[None, :], mask=inside[:, None] & (every < HEAD)[None, :], other=0.0)
        mean = tl.sum(whole * whole, axis=1) / HEAD
        inverse = tl.div_rn(inverse, tl.sqrt_rn(mean + epsilon))
    ranges = (inverse, inverse, inverse)
    if BITS:
        whole = turned(heads, inverse, every, HOW)
        low = tl.minimum(tl.min(whole, axis=1), 0.0)
        high = tl.maximum(tl.max(whole, axis=1), 0.0)
        top = 2.0**BITS - 1.0
        ranges = affine_range(low, high, 1.0 / top, 1.0, top, False, False, ASM)
    if BANDS == 0:
        WIDTH: tl.constexpr = min(HOW[1], 64)
        for start in tl.static_range(0, HEAD, WIDTH):
            column = start + tl.arange(0, WIDTH)
            value = projected(heads, inverse, map, ranges, column, HOW, ASM)
            if out.dtype.element_ty == tl.float16:
                value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
            here = inside[:, None] & (column < HEAD)[None, :]
            tl.store(out[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=here)
    for i in tl.static_range(BANDS):
        write_band(heads, inverse, map, ranges, clip, planes, slot, HOW, STORE, i, ASM)


@triton.jit
def write_band(
    heads,
    inverse,
    map,
    ranges,
    clip,
    planes,
    slot,
    HOW: tl.constexpr,
    STORE: tl.constexpr,
    INDEX: tl.constexpr,
    ASM: tl.constexpr,
):
    """One band of `write_heads`. The two halves of a band of nibbles are made apart, so that they lie alike."""
    BAND: tl.constexpr = STORE[1 + INDEX]
    inside = heads[1]
    column = tl.arange(0, BAND[6])
    first = projected(heads, inverse, map, ranges, BAND[1] + column, HOW, ASM)
    # 0 belongs to every range.
    first = tl.where((column < BAND[3])[None, :], first, 0.0)
    low, high = tl.min(first, axis=1), tl.max(first, axis=1)
    if BAND[0] <= 4:
        second = projected(heads, inverse, map, ranges, BAND[2] + column, HOW, ASM)
        second = tl.where((column < BAND[4])[None, :], second, 0.0)
        low, high = tl.minimum(low, tl.min(second, axis=1)), tl.maximum(high, tl.max(second, axis=1))
    ratio = 1.0
    if clip is not None:
        ratio = tl.load(clip + INDEX)
    TOP: tl.constexpr = 2.0 ** BAND[0] - 1.0
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    scale, reciprocal, zero = affine_range(low, high, 1.0 / TOP, ratio, TOP, HOW[6], clip is not None, ASM)
    q = affine_integers(first, reciprocal[:, None], zero[:, None], TOP, ASM).to(tl.int32)
    if BAND[0] <= 4:
        upper = affine_integers(second, reciprocal[:, None], zero[:, None], TOP, ASM).to(tl.int32)
        q = q | (tl.where((column < BAND[4])[None, :], upper, 0) << 4)
    place = places(planes, slot[:, None], column[None, :], STORE, INDEX)
    tl.store(place, q.to(tl.uint8), mask=inside[:, None] & (column < BAND[3])[None, :])
    at = slot * (len(STORE) - 1) + INDEX
    tl.store(planes[2] + at, scale.to(planes[2].dtype.element_ty), mask=inside)
    tl.store(planes[3] + at, zero.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "position"])
def rope_append(
    q, q_batch, q_token, k, k_batch, k_token, v, v_batch, v_token, cos, sin, tokens, rows, position, clock, capacity,
    query_gain, query_epsilon, query_map, key_gain, key_epsilon, key_map, key_clip, value_map, value_clip, out,
    key_half, key_nibbles, key_bytes, key_scales, key_zeros,
    value_half, value_nibbles, value_bytes, value_scales, value_zeros,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    KEY_STORE: tl.constexpr, VALUE_STORE: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS heads: of the queries, or of the keys, or of the values, each with its HOW, and STORE as in
    kernels/attention.py.

    rows: tokens of all batch rows; grid: tiles of rows · HEADS queries, then of rows · KV_HEADS keys, then of values.
    cos, sin float32 [rows, h]; q, k, v float32, rows apart by …_batch and …_token, heads next to each other. out
    float32 [rows, HEADS, h]. The store's planes are [batch, KV_HEADS, capacity, …], or halves where it has no bands;
    tokens go to `position` and after, or where the clock says.
    """
    HEAD: tl.constexpr = QUERIES[0]
    tile = tl.program_id(0)
    query_tiles, kv_tiles = tl.cdiv(rows * HEADS, ROWS), tl.cdiv(rows * KV_HEADS, ROWS)
    if clock is not None:
        position = tl.load(clock)
    if tile < query_tiles:
        line = tile * ROWS + tl.arange(0, ROWS)
        inside, token, head = line < rows * HEADS, line // HEADS, line % HEADS
        batch, step = (token // tokens).to(tl.int64), token % tokens
        at = q + batch * q_batch + step.to(tl.int64) * q_token + head * HEAD
        write_heads(
            (at, inside, token.to(tl.int64) * HEAD, cos, sin, query_gain), query_epsilon, query_map, None,
            out + line.to(tl.int64) * HEAD, None, line, QUERIES, ((0, 0, 1),), ASM,
        )  # fmt: skip
    else:
        line = (tile - query_tiles) % kv_tiles * ROWS + tl.arange(0, ROWS)
        inside, token, head = line < rows * KV_HEADS, line // KV_HEADS, line % KV_HEADS
        batch, step = (token // tokens).to(tl.int64), token % tokens
        slot = (batch * KV_HEADS + head) * capacity + position + step
        angles = token.to(tl.int64) * HEAD
        if tile < query_tiles + kv_tiles:
            at = k + batch * k_batch + step.to(tl.int64) * k_token + head * HEAD
            write_heads(
                (at, inside, angles, cos, sin, key_gain), key_epsilon, key_map, key_clip,
                key_half + slot * HEAD if key_half is not None else None,
                (key_nibbles, key_bytes, key_scales, key_zeros), slot, KEYS, KEY_STORE, ASM,
            )  # fmt: skip
        else:
            at = v + batch * v_batch + step.to(tl.int64) * v_token + head * HEAD
            write_heads(
                (at, inside, angles, cos, sin, None), 0.0, value_map, value_clip,
                value_half + slot * HEAD if value_half is not None else None,
                (value_nibbles, value_bytes, value_scales, value_zeros), slot, VALUES, VALUE_STORE, ASM,
            )  # fmt: skip
