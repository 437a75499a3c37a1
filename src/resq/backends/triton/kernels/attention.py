"""Attention of a few new tokens over packed keys and values, in parts of the cache that are merged; and the cache as
floats.

How keys or values are stored is a constant tuple `STORE`: first (bytes of a token in the plane of nibbles, in that of
bytes, tokens whose equal bytes lie together), then for every band
(bits, the first coordinate in low nibbles or in bytes, that in high nibbles, how many there are in the ones, in the
others, the first byte of a token, columns of a tile of its bytes).
A `HALF` of a band is 0 or 1. `planes` is a tuple: nibbles, bytes, and of every band scale and zero point.
"""

import triton
import triton.language as tl

from resq.backends.triton.kernels.interpreter import loop_bound

# Below every score, and finite, so that what has seen nothing has weight 0.
NOTHING = tl.constexpr(-1.0e38)


# Four bytes to two times four bfloat16: 128 + n for 0 ≤ n < 128 has the bits of 128 with n below, so no integer is
# converted, which cards do slowly; then -(128 + zero), exact, two at a time.
NIBBLES_ASM = tl.constexpr("""{
    .reg .b32 l, h, one;
    mov.b32 one, 0x3f803f80;
    and.b32 l, $4, 0x0f0f0f0f;
    shr.u32 h, $4, 4;
    and.b32 h, h, 0x0f0f0f0f;
    prmt.b32 $0, l, 0x43434343, 0x4140;
    prmt.b32 $1, l, 0x43434343, 0x4342;
    prmt.b32 $2, h, 0x43434343, 0x4140;
    prmt.b32 $3, h, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, $5;
    fma.rn.bf16x2 $1, $1, one, $6;
    fma.rn.bf16x2 $2, $2, one, $5;
    fma.rn.bf16x2 $3, $3, one, $6;
}""")
# The same of both nibbles of a byte, then 16 · high + low - zero: every step is an integer of at most 8 bits.
BYTES_ASM = tl.constexpr("""{
    .reg .b32 l, h, a, b, c, d, one, wide, below, away;
    mov.b32 one, 0x3f803f80;
    mov.b32 wide, 0x41804180;
    mov.b32 below, 0xc300c300;
    mov.b32 away, 0xc500c500;
    and.b32 l, $2, 0x0f0f0f0f;
    shr.u32 h, $2, 4;
    and.b32 h, h, 0x0f0f0f0f;
    prmt.b32 a, l, 0x43434343, 0x4140;
    prmt.b32 b, l, 0x43434343, 0x4342;
    prmt.b32 c, h, 0x43434343, 0x4140;
    prmt.b32 d, h, 0x43434343, 0x4342;
    fma.rn.bf16x2 a, a, one, below;
    fma.rn.bf16x2 b, b, one, below;
    fma.rn.bf16x2 c, c, wide, away;
    fma.rn.bf16x2 d, d, wide, away;
    fma.rn.bf16x2 c, c, one, a;
    fma.rn.bf16x2 d, d, one, b;
    fma.rn.bf16x2 $0, c, one, $3;
    fma.rn.bf16x2 $1, d, one, $4;
}""")


@triton.jit
def nibble_values(byte, zero, ASM: tl.constexpr):
    """(low nibble, high nibble) - zero in bfloat16, exact; in the interpreter, which multiplies no bfloat16, float32.

    byte uint8, zero float32, of one shape."""
    if ASM:
        away = (-128.0 - zero).to(tl.bfloat16)
        low, high = tl.inline_asm_elementwise(
            NIBBLES_ASM, "=&r,=&r,=&r,=&r,r,r,r", [byte, away], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = (byte & 15).to(tl.float32) - zero, (byte >> 4).to(tl.float32) - zero
    return low, high


@triton.jit
def byte_values(byte, zero, ASM: tl.constexpr):
    """byte - zero as `nibble_values` has it."""
    if ASM:
        away = (-zero).to(tl.bfloat16)
        value = tl.inline_asm_elementwise(
            BYTES_ASM, "=&r,=&r,r,r,r", [byte, away], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        value = byte.to(tl.float32) - zero
    return value


@triton.jit
def split_rows(x, second, ASM: tl.constexpr):
    """x float32 [rows, n] as bfloat16: itself, rounded, and in rows where `second` what the rounding left."""
    left = x - x.to(tl.bfloat16).to(tl.float32)
    part = tl.where(second[:, None], left, x).to(tl.bfloat16)
    if ASM:
        return part
    else:
        return part.to(tl.float32)  # the interpreter multiplies no bfloat16


@triton.jit
def zeros(ROWS: tl.constexpr, N: tl.constexpr):
    """float32 [ROWS, N]."""
    return tl.zeros((ROWS, N), tl.float32)


@triton.jit
def both_halves(x, ROWS: tl.constexpr, N: tl.constexpr):
    """[2·ROWS, N] → in both halves the sum of the halves."""
    total = tl.sum(tl.reshape(x, (2, ROWS, N)), axis=0)
    return tl.reshape(tl.broadcast_to(total[None, :, :], (2, ROWS, N)), (2 * ROWS, N))


@triton.jit
def query_part(
    rows, inside, factor, second, STORE: tl.constexpr, INDEX: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr
):
    """The coordinates in a half of a band of the queries times factor, as `split_rows` has them."""
    BAND: tl.constexpr = STORE[1 + INDEX]
    FIRST: tl.constexpr = BAND[1 + HALF]
    COUNT: tl.constexpr = BAND[3 + HALF]
    column = tl.arange(0, BAND[6])
    q = tl.load(rows[:, None] + FIRST + column[None, :], mask=inside[:, None] & (column < COUNT)[None, :], other=0.0)
    return split_rows(q * factor, second, ASM)


@triton.jit
def places(planes, slot, column, STORE: tl.constexpr, INDEX: tl.constexpr):
    """Addresses of a band's bytes `column` of slots: in a plane equal bytes of GROUP tokens lie together."""
    BAND: tl.constexpr = STORE[1 + INDEX]
    WIDTHS: tl.constexpr = STORE[0]
    WIDTH: tl.constexpr = WIDTHS[0] if BAND[0] <= 4 else WIDTHS[1]
    GROUP: tl.constexpr = WIDTHS[2]
    plane = planes[0] if BAND[0] <= 4 else planes[1]
    return plane + ((slot // GROUP * WIDTH + (BAND[5] + column)) * GROUP + slot % GROUP)


@triton.jit
def from_slot(planes, slot, STORE: tl.constexpr):
    """The planes from a slot on that is a multiple of the tokens that lie together."""
    WIDTHS: tl.constexpr = STORE[0]
    BANDS: tl.constexpr = len(STORE) - 1
    nibbles, bytes, scales, zeros = planes
    return nibbles + slot * WIDTHS[0], bytes + slot * WIDTHS[1], scales + slot * BANDS, zeros + slot * BANDS


@triton.jit
def key_scores(scores, queries, planes, slots, STORE: tl.constexpr, INDEX: tl.constexpr, ASM: tl.constexpr):
    """scores [rows, slots] + one band of q · k: scale · Σ q (k - zero)."""
    BAND: tl.constexpr = STORE[1 + INDEX]
    BANDS: tl.constexpr = len(STORE) - 1
    column = tl.arange(0, BAND[6])[:, None]
    scale = tl.load(planes[2] + slots * BANDS + INDEX).to(tl.float32)
    zero = tl.load(planes[3] + slots * BANDS + INDEX).to(tl.float32)
    zero = tl.broadcast_to(zero[None, :], (BAND[6], slots.shape[0]))
    byte = tl.load(places(planes, slots[None, :], column, STORE, INDEX), mask=column < BAND[3], other=0)
    if BAND[0] <= 4:
        first, second = nibble_values(byte, zero, ASM)
        part = tl.dot(queries[2 * INDEX + 1], second, tl.dot(queries[2 * INDEX], first))
    else:
        part = tl.dot(queries[2 * INDEX], byte_values(byte, zero, ASM))
    return scores + part * scale[None, :]


@triton.jit
def value_sums(
    found, weights, second, keep, planes, slots, STORE: tl.constexpr, INDEX: tl.constexpr, ASM: tl.constexpr
):
    """found · keep + one band of Σ weights · scale · (v - zero): its two halves, or what is in bytes and anything."""
    BAND: tl.constexpr = STORE[1 + INDEX]
    BANDS: tl.constexpr = len(STORE) - 1
    column = tl.arange(0, BAND[6])[None, :]
    scale = tl.load(planes[2] + slots * BANDS + INDEX).to(tl.float32)
    zero = tl.load(planes[3] + slots * BANDS + INDEX).to(tl.float32)
    zero = tl.broadcast_to(zero[:, None], (slots.shape[0], BAND[6]))
    shares = split_rows(weights * scale[None, :], second, ASM)
    byte = tl.load(places(planes, slots[:, None], column, STORE, INDEX), mask=column < BAND[3], other=0)
    low, high = found[2 * INDEX], found[2 * INDEX + 1]
    low = low * keep[:, None]
    if BAND[0] <= 4:
        first, other = nibble_values(byte, zero, ASM)
        low = tl.dot(shares, first, low)
        high = tl.dot(shares, other, high * keep[:, None])
    else:
        low = tl.dot(shares, byte_values(byte, zero, ASM), low)
    return low, high


@triton.jit
def store_part(out, sums, inside, ROWS: tl.constexpr, STORE: tl.constexpr, INDEX: tl.constexpr, HALF: tl.constexpr):
    """The coordinates in a half of a band of the result; out: addresses of rows [ROWS]."""
    BAND: tl.constexpr = STORE[1 + INDEX]
    FIRST: tl.constexpr = BAND[1 + HALF]
    COUNT: tl.constexpr = BAND[3 + HALF]
    column = tl.arange(0, BAND[6])
    total = tl.sum(tl.reshape(sums, (2, ROWS, BAND[6])), axis=0)
    tl.store(out[:, None] + FIRST + column[None, :], total, mask=inside[:, None] & (column < COUNT)[None, :])


@triton.jit(do_not_specialize=["length"])
def decode(
    q, q_batch, q_token, key_nibbles, key_bytes, key_scales, key_zeros,
    value_nibbles, value_bytes, value_scales, value_zeros,
    starts, clock, length, capacity, window, factor, sums, most, total,
    TOKENS: tl.constexpr, SHARE: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one kv head and batch row, for its TOKENS · SHARE ≤ ROWS queries.

    Grid (parts, kv heads, batch). q float32, rows apart by q_batch and q_token; factor: the scale times log2(e). Row r
    is query head r % SHARE of token r // SHARE. Tiles have 2 · ROWS rows: the queries (and the weights) rounded to
    bfloat16 above what the rounding left, so that one product on tensor cores has both; integers are exact there.
    sums float32 [batch, kv heads, parts, ROWS, HEAD]: Σ 2^(score - most) v; most and total [batch, kv heads, parts,
    ROWS]. clock: length - TOKENS on the device, or None and `length` holds. KEYS, VALUES: their `STORE`.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if clock is not None:
        length = tl.load(clock) + TOKENS
    row = tl.arange(0, 2 * ROWS)
    second = row >= ROWS
    query = row % ROWS
    inside = query < TOKENS * SHARE
    position = length - TOKENS + query // SHARE

    # The slots that any query sees, dealt out evenly in blocks.
    lowest = 0
    if starts is not None:
        lowest = tl.load(starts + batch).to(tl.int32)
    if window is not None:
        lowest = tl.maximum(lowest, length - TOKENS - window + 1)
    first = tl.maximum(tl.minimum(lowest, length - TOKENS), 0) // BLOCK * BLOCK
    share = tl.cdiv(tl.cdiv(length - first, tl.num_programs(0)), BLOCK) * BLOCK
    begin = first + part * share
    end = tl.minimum(begin + share, length)

    base = (batch.to(tl.int64) * tl.num_programs(1) + head) * capacity
    keys = from_slot((key_nibbles, key_bytes, key_scales, key_zeros), base, KEYS)
    values = from_slot((value_nibbles, value_bytes, value_scales, value_zeros), base, VALUES)

    rows = q + batch.to(tl.int64) * q_batch + (query // SHARE) * q_token + (head * SHARE + query % SHARE) * HEAD
    queries = ()
    for i in tl.static_range(len(KEYS) - 1):
        low = query_part(rows, inside, factor, second, KEYS, i, 0, ASM)
        if KEYS[1 + i][0] <= 4:
            queries = queries + (low, query_part(rows, inside, factor, second, KEYS, i, 1, ASM))
        else:
            queries = queries + (low, low)
    found = ()
    for i in tl.static_range(len(VALUES) - 1):
        nothing = zeros(2 * ROWS, VALUES[1 + i][6])
        found = found + (nothing, nothing)
    top = tl.full((2 * ROWS,), NOTHING, tl.float32)
    mass = tl.zeros((2 * ROWS,), tl.float32)

    for start in tl.range(loop_bound(begin, ASM), loop_bound(end, ASM), BLOCK, num_stages=STAGES):
        slots = start + tl.arange(0, BLOCK)
        scores = tl.zeros((2 * ROWS, BLOCK), tl.float32)
        for i in tl.static_range(len(KEYS) - 1):
            scores = key_scores(scores, queries, keys, slots, KEYS, i, ASM)
        scores = both_halves(scores, ROWS, BLOCK)
        seen = slots[None, :] <= position[:, None]
        if starts is not None:
            seen = seen & (slots >= lowest)[None, :]
        if window is not None:
            seen = seen & (slots[None, :] > position[:, None] - window)
        seen = seen | (slots[None, :] == position[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        keep = tl.exp2(top - higher)
        mass = mass * keep + tl.sum(weights, axis=1)
        top = higher
        going = ()
        for i in tl.static_range(len(VALUES) - 1):
            going = going + value_sums(found, weights, second, keep, values, slots, VALUES, i, ASM)
        found = going

    line = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + part) * ROWS
    tl.store(most + line + query, top, mask=inside & ~second)
    tl.store(total + line + query, mass, mask=inside & ~second)
    row = tl.arange(0, ROWS)
    out = sums + (line + row).to(tl.int64) * HEAD
    used = row < TOKENS * SHARE
    for i in tl.static_range(len(VALUES) - 1):
        store_part(out, found[2 * i], used, ROWS, VALUES, i, 0)
        if VALUES[1 + i][0] <= 4:
            store_part(out, found[2 * i + 1], used, ROWS, VALUES, i, 1)


@triton.jit
def merge(
    sums, most, total, out,
    PARTS: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr, SHARE: tl.constexpr,
    HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the parts of `decode` found, as one: out float32 [batch, TOKENS, heads, HEAD].

    Grid (TOKENS · SHARE, kv heads, batch).
    """
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, COLUMNS)
    line = (batch * tl.num_programs(1) + head) * PARTS * ROWS + row
    every = tl.arange(0, PADDED)
    top = tl.max(tl.load(most + line + every * ROWS, mask=every < PARTS, other=NOTHING), axis=0)
    mass = tl.zeros((STEP,), tl.float32)
    found = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, PARTS, STEP):
        part = start + tl.arange(0, STEP)
        inside = part < PARTS
        place = line + part * ROWS
        share = tl.exp2(tl.load(most + place, mask=inside, other=NOTHING) - top)
        mass += share * tl.load(total + place, mask=inside, other=0.0)
        here = inside[:, None] & (column < HEAD)[None, :]
        part_sums = tl.load(sums + place.to(tl.int64)[:, None] * HEAD + column[None, :], mask=here, other=0.0)
        found += share[:, None] * part_sums
    result = tl.sum(found, axis=0) / tl.sum(mass, axis=0)
    place = ((batch * TOKENS + row // SHARE) * tl.num_programs(1) + head) * SHARE + row % SHARE
    tl.store(out + place.to(tl.int64) * HEAD + column, result, mask=column < HEAD)


@triton.jit
def dequantize_part(byte, scale, zero, out, inside, STORE: tl.constexpr, INDEX: tl.constexpr, HALF: tl.constexpr):
    """Store scale · (byte - zero) [tokens, columns] in the coordinates in a half of a band; out: addresses of rows."""
    BAND: tl.constexpr = STORE[1 + INDEX]
    FIRST: tl.constexpr = BAND[1 + HALF]
    COUNT: tl.constexpr = BAND[3 + HALF]
    column = tl.arange(0, BAND[6])
    value = (byte.to(tl.float32) - zero[:, None]) * scale[:, None]
    if out.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    place = out[:, None] + FIRST + column[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=inside[:, None] & (column < COUNT)[None, :])


@triton.jit(do_not_specialize=["first", "count"])
def dequantize(
    nibbles, bytes, scales, zeros, out, first, count, capacity,
    HEAD: tl.constexpr, TOKENS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Slots first … first + count of every kv head as float32 or float16 [heads, count, HEAD].

    Grid (tiles of TOKENS, batch · kv heads).
    """
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < count
    slot = head * capacity + first + token
    rows = out + (head * count + token) * HEAD
    planes = (nibbles, bytes, scales, zeros)
    for i in tl.static_range(len(STORE) - 1):
        column = tl.arange(0, STORE[1 + i][6])
        scale = tl.load(scales + slot * (len(STORE) - 1) + i, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + slot * (len(STORE) - 1) + i, mask=inside, other=0).to(tl.float32)
        mask = inside[:, None] & (column < STORE[1 + i][3])[None, :]
        byte = tl.load(places(planes, slot[:, None], column[None, :], STORE, i), mask=mask, other=0)
        if STORE[1 + i][0] <= 4:
            dequantize_part(byte & 15, scale, zero, rows, inside, STORE, i, 0)
            dequantize_part(byte >> 4, scale, zero, rows, inside, STORE, i, 1)
        else:
            dequantize_part(byte, scale, zero, rows, inside, STORE, i, 0)
