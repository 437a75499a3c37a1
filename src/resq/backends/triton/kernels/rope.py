"""Heads on their way to attention: norm, RoPE, map, then out as floats, or rounded into the cache."""

import triton
import triton.language as tl

from resq.backends.triton.kernels.attention import offsets
from resq.backends.triton.kernels.common import affine_integers, affine_range


@triton.jit
def turned(
    x,
    angles,
    cos,
    sin,
    gain,
    inverse,
    column,
    inside,
    HEAD: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Coordinates `column` of heads after norm and RoPE, float32 [rows, columns].

    x: addresses of the heads [rows]; angles: offsets of their tokens in cos and sin; inverse: 1 / root mean square.
    """
    here = inside[:, None] & (column < HEAD)[None, :]
    value = tl.load(x[:, None] + column[None, :], mask=here, other=0.0)
    if NORM:
        value = value * inverse[:, None]
        if gain is not None:
            value = value * tl.load(gain + column, mask=column < HEAD, other=0.0)[None, :]
    if ROPE:
        HALF: tl.constexpr = HEAD // 2
        first = column < HALF
        across = tl.where(first, column + HALF, column - HALF)
        other = tl.load(x[:, None] + across[None, :], mask=here, other=0.0)
        if NORM:
            other = other * inverse[:, None]
            if gain is not None:
                other = other * tl.load(gain + across, mask=column < HEAD, other=0.0)[None, :]
        place = angles[:, None] + column[None, :]
        c = tl.load(cos + place, mask=here, other=0.0)
        s = tl.load(sin + place, mask=here, other=0.0)
        value = value * c + tl.where(first[None, :], -other, other) * s
    return value


@triton.jit
def projected(
    x,
    angles,
    cos,
    sin,
    gain,
    inverse,
    map,
    ranges,
    column,
    inside,
    HEAD: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    STEP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Coordinates `column` of `turned` heads, their inputs rounded to INPUT_BITS where that is not 0, times the map."""
    if map is None:
        value = turned(x, angles, cos, sin, gain, inverse, column, inside, HEAD, NORM, ROPE)
        if INPUT_BITS:
            value = rounded(value, ranges, 2.0**INPUT_BITS - 1.0, ASM)
    else:
        value = tl.zeros((x.shape[0], column.shape[0]), tl.float32)
        for start in tl.range(0, HEAD, STEP):
            inner = start + tl.arange(0, STEP)
            part = turned(x, angles, cos, sin, gain, inverse, inner, inside, HEAD, NORM, ROPE)
            if INPUT_BITS:
                part = rounded(part, ranges, 2.0**INPUT_BITS - 1.0, ASM)
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
def write_head(
    x,
    angles,
    cos,
    sin,
    gain,
    epsilon,
    map,
    clip,
    inside,
    slot,
    out,
    nibbles,
    bytes,
    scales,
    zeros,
    HEAD: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    HALF_SCALE: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    AT: tl.constexpr,
    PART: tl.constexpr,
    NIBBLES: tl.constexpr,
    BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Heads at addresses x [rows] to `out` (addresses of rows, floats) where there are no bands, else to slot [rows] of
    the planes."""
    every = tl.arange(0, COLUMNS)
    inverse = tl.full((x.shape[0],), 1.0, tl.float32)
    if NORM:
        whole = tl.load(x[:, None] + every[None, :], mask=inside[:, None] & (every < HEAD)[None, :], other=0.0)
        mean = tl.sum(whole * whole, axis=1) / HEAD
        inverse = tl.div_rn(inverse, tl.sqrt_rn(mean + epsilon))
    ranges = (inverse, inverse, inverse)
    if INPUT_BITS:
        whole = turned(x, angles, cos, sin, gain, inverse, every, inside, HEAD, NORM, ROPE)
        low = tl.minimum(tl.min(whole, axis=1), 0.0)
        high = tl.maximum(tl.max(whole, axis=1), 0.0)
        top = 2.0**INPUT_BITS - 1.0
        ranges = affine_range(low, high, 1.0 / top, 1.0, top, False, False, ASM)
    if len(BITS) == 0:
        WIDTH: tl.constexpr = min(COLUMNS, 64)
        for start in tl.static_range(0, HEAD, WIDTH):
            column = start + tl.arange(0, WIDTH)
            value = projected(
                x, angles, cos, sin, gain, inverse, map, ranges, column, inside, HEAD, NORM, ROPE, INPUT_BITS, STEP, ASM
            )
            if out.dtype.element_ty == tl.float16:
                value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
            here = inside[:, None] & (column < HEAD)[None, :]
            tl.store(out[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=here)
    for i in tl.static_range(len(BITS)):
        write_band(
            x,
            angles,
            cos,
            sin,
            gain,
            inverse,
            map,
            ranges,
            clip,
            inside,
            slot,
            nibbles,
            bytes,
            scales,
            zeros,
            HEAD,
            NORM,
            ROPE,
            INPUT_BITS,
            HALF_SCALE,
            i,
            len(BITS),
            BITS[i],
            FIRST[i],
            SIZE[i],
            AT[i],
            PART[i],
            NIBBLES,
            BYTES,
            GROUP,
            STEP,
            ASM,
        )


@triton.jit
def write_band(
    x,
    angles,
    cos,
    sin,
    gain,
    inverse,
    map,
    ranges,
    clip,
    inside,
    slot,
    nibbles,
    bytes,
    scales,
    zeros,
    HEAD: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    HALF_SCALE: tl.constexpr,
    INDEX: tl.constexpr,
    BANDS: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    AT: tl.constexpr,
    PART: tl.constexpr,
    NIBBLES: tl.constexpr,
    BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    ASM: tl.constexpr,
):
    """One band of `write_head`. The two halves of a band of nibbles are made apart, so that they lie alike."""
    COUNT: tl.constexpr = (SIZE + 1) // 2 if BITS <= 4 else SIZE
    column = tl.arange(0, PART)
    first = projected(
        x,
        angles,
        cos,
        sin,
        gain,
        inverse,
        map,
        ranges,
        FIRST + column,
        inside,
        HEAD,
        NORM,
        ROPE,
        INPUT_BITS,
        STEP,
        ASM,
    )
    # 0 belongs to every range.
    first = tl.where((column < COUNT)[None, :], first, 0.0)
    low, high = tl.min(first, axis=1), tl.max(first, axis=1)
    if BITS <= 4:
        second = projected(
            x,
            angles,
            cos,
            sin,
            gain,
            inverse,
            map,
            ranges,
            FIRST + COUNT + column,
            inside,
            HEAD,
            NORM,
            ROPE,
            INPUT_BITS,
            STEP,
            ASM,
        )
        second = tl.where((column < SIZE - COUNT)[None, :], second, 0.0)
        low, high = tl.minimum(low, tl.min(second, axis=1)), tl.maximum(high, tl.max(second, axis=1))
    ratio = 1.0
    if clip is not None:
        ratio = tl.load(clip + INDEX)
    TOP: tl.constexpr = 2.0**BITS - 1.0
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    scale, reciprocal, zero = affine_range(low, high, 1.0 / TOP, ratio, TOP, HALF_SCALE, clip is not None, ASM)
    q = affine_integers(first, reciprocal[:, None], zero[:, None], TOP, ASM).to(tl.int32)
    if BITS <= 4:
        upper = affine_integers(second, reciprocal[:, None], zero[:, None], TOP, ASM).to(tl.int32)
        q = q | (tl.where((column < SIZE - COUNT)[None, :], upper, 0) << 4)
        place = nibbles + offsets(slot[:, None], AT + column[None, :], NIBBLES, GROUP)
    else:
        place = bytes + offsets(slot[:, None], AT + column[None, :], BYTES, GROUP)
    tl.store(place, q.to(tl.uint8), mask=inside[:, None] & (column < COUNT)[None, :])
    tl.store(scales + slot * BANDS + INDEX, scale.to(scales.dtype.element_ty), mask=inside)
    tl.store(zeros + slot * BANDS + INDEX, zero.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "position"])
def rope_append(
    q,
    q_batch,
    q_token,
    k,
    k_batch,
    k_token,
    v,
    v_batch,
    v_token,
    cos,
    sin,
    tokens,
    rows,
    position,
    clock,
    capacity,
    query_gain,
    query_epsilon,
    query_map,
    key_gain,
    key_epsilon,
    key_map,
    key_clip,
    value_map,
    value_clip,
    out,
    key_half,
    key_nibbles,
    key_bytes,
    key_scales,
    key_zeros,
    value_half,
    value_nibbles,
    value_bytes,
    value_scales,
    value_zeros,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    QUERY_INPUT_BITS: tl.constexpr,
    KEY_INPUT_BITS: tl.constexpr,
    VALUE_INPUT_BITS: tl.constexpr,
    KEY_HALF_SCALE: tl.constexpr,
    VALUE_HALF_SCALE: tl.constexpr,
    K_BITS: tl.constexpr,
    K_FIRST: tl.constexpr,
    K_SIZE: tl.constexpr,
    K_AT: tl.constexpr,
    K_PART: tl.constexpr,
    K_NIBBLES: tl.constexpr,
    K_BYTES: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_AT: tl.constexpr,
    V_PART: tl.constexpr,
    V_NIBBLES: tl.constexpr,
    V_BYTES: tl.constexpr,
    V_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ASM: tl.constexpr,
):
    """A tile of ROWS heads: of the queries, or of the keys, or of the values.

    rows: tokens of all batch rows; grid: tiles of rows · HEADS queries, then of rows · KV_HEADS keys, then of values.
    cos, sin float32 [rows, HEAD]; q, k, v float32, rows apart by …_batch and …_token, heads next to each other. out
    float32 [rows, HEADS, HEAD]. The store's planes are [batch, KV_HEADS, capacity, …], or halves where it has no bands;
    tokens go to `position` and after, or where the clock says.
    """
    tile = tl.program_id(0)
    query_tiles, kv_tiles = tl.cdiv(rows * HEADS, ROWS), tl.cdiv(rows * KV_HEADS, ROWS)
    if clock is not None:
        position = tl.load(clock)
    if tile < query_tiles:
        line = tile * ROWS + tl.arange(0, ROWS)
        inside, token, head = line < rows * HEADS, line // HEADS, line % HEADS
        batch, step = (token // tokens).to(tl.int64), token % tokens
        write_head(
            q + batch * q_batch + step.to(tl.int64) * q_token + head * HEAD,
            token.to(tl.int64) * HEAD,
            cos,
            sin,
            query_gain,
            query_epsilon,
            query_map,
            None,
            inside,
            line,
            out + line.to(tl.int64) * HEAD,
            None,
            None,
            None,
            None,
            HEAD,
            QUERY_NORM,
            True,
            QUERY_INPUT_BITS,
            False,
            (),
            (),
            (),
            (),
            (),
            0,
            0,
            1,
            COLUMNS,
            STEP,
            ASM,
        )
    else:
        line = (tile - query_tiles) % kv_tiles * ROWS + tl.arange(0, ROWS)
        inside, token, head = line < rows * KV_HEADS, line // KV_HEADS, line % KV_HEADS
        batch, step = (token // tokens).to(tl.int64), token % tokens
        slot = (batch * KV_HEADS + head) * capacity + position + step
        angles = token.to(tl.int64) * HEAD
        if tile < query_tiles + kv_tiles:
            write_head(
                k + batch * k_batch + step.to(tl.int64) * k_token + head * HEAD,
                angles,
                cos,
                sin,
                key_gain,
                key_epsilon,
                key_map,
                key_clip,
                inside,
                slot,
                key_half + slot * HEAD if key_half is not None else None,
                key_nibbles,
                key_bytes,
                key_scales,
                key_zeros,
                HEAD,
                KEY_NORM,
                True,
                KEY_INPUT_BITS,
                KEY_HALF_SCALE,
                K_BITS,
                K_FIRST,
                K_SIZE,
                K_AT,
                K_PART,
                K_NIBBLES,
                K_BYTES,
                K_GROUP,
                COLUMNS,
                STEP,
                ASM,
            )
        else:
            write_head(
                v + batch * v_batch + step.to(tl.int64) * v_token + head * HEAD,
                angles,
                cos,
                sin,
                None,
                0.0,
                value_map,
                value_clip,
                inside,
                slot,
                value_half + slot * HEAD if value_half is not None else None,
                value_nibbles,
                value_bytes,
                value_scales,
                value_zeros,
                HEAD,
                False,
                False,
                VALUE_INPUT_BITS,
                VALUE_HALF_SCALE,
                V_BITS,
                V_FIRST,
                V_SIZE,
                V_AT,
                V_PART,
                V_NIBBLES,
                V_BYTES,
                V_GROUP,
                COLUMNS,
                STEP,
                ASM,
            )
