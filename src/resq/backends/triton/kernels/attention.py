"""Attention of a few new tokens over packed keys and values, in parts of the cache that are merged; and the cache as
floats."""

import triton
import triton.language as tl

from resq.backends.triton.kernels.common import loop_bound

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
    rows, inside, factor, second, FIRST: tl.constexpr, COUNT: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr
):
    """Coordinates FIRST … FIRST + COUNT of the queries times factor, as `split_rows` has them: [rows, PART]."""
    column = tl.arange(0, PART)
    q = tl.load(rows[:, None] + FIRST + column[None, :], mask=inside[:, None] & (column < COUNT)[None, :], other=0.0)
    return split_rows(q * factor, second, ASM)


@triton.jit
def offsets(slot, column, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """Where byte `column` of a slot lies in a plane of WIDTH bytes a token: equal bytes of GROUP tokens together."""
    return (slot // GROUP * WIDTH + column) * GROUP + slot % GROUP


@triton.jit
def key_scores(
    low,
    high,
    scores,
    nibbles,
    bytes,
    scales,
    zeros,
    slots,
    INDEX: tl.constexpr,
    BANDS: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    AT: tl.constexpr,
    PART: tl.constexpr,
    NIBBLES: tl.constexpr,
    BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """scores [rows, slots] + one band of q · k: scale · Σ q (k - zero)."""
    COUNT: tl.constexpr = (SIZE + 1) // 2 if BITS <= 4 else SIZE
    WIDTH: tl.constexpr = NIBBLES if BITS <= 4 else BYTES
    column = tl.arange(0, PART)[:, None]
    scale = tl.load(scales + slots * BANDS + INDEX).to(tl.float32)
    zero = tl.load(zeros + slots * BANDS + INDEX).to(tl.float32)
    zero = tl.broadcast_to(zero[None, :], (PART, slots.shape[0]))
    plane = nibbles if BITS <= 4 else bytes
    place = plane + offsets(slots[None, :], AT + column, WIDTH, GROUP)
    byte = tl.load(place, mask=column < COUNT, other=0)
    if BITS <= 4:
        first, second = nibble_values(byte, zero, ASM)
        part = tl.dot(high, second, tl.dot(low, first))
    else:
        part = tl.dot(low, byte_values(byte, zero, ASM))
    return scores + part * scale[None, :]


@triton.jit
def value_sums(
    weights,
    second,
    keep,
    low,
    high,
    nibbles,
    bytes,
    scales,
    zeros,
    slots,
    INDEX: tl.constexpr,
    BANDS: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    AT: tl.constexpr,
    PART: tl.constexpr,
    NIBBLES: tl.constexpr,
    BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """(low, high) · keep + one band of Σ weights · scale · (v - zero), over its two halves or, in bytes, in low."""
    COUNT: tl.constexpr = (SIZE + 1) // 2 if BITS <= 4 else SIZE
    WIDTH: tl.constexpr = NIBBLES if BITS <= 4 else BYTES
    column = tl.arange(0, PART)[None, :]
    scale = tl.load(scales + slots * BANDS + INDEX).to(tl.float32)
    zero = tl.load(zeros + slots * BANDS + INDEX).to(tl.float32)
    zero = tl.broadcast_to(zero[:, None], (slots.shape[0], PART))
    shares = split_rows(weights * scale[None, :], second, ASM)
    plane = nibbles if BITS <= 4 else bytes
    place = plane + offsets(slots[:, None], AT + column, WIDTH, GROUP)
    byte = tl.load(place, mask=column < COUNT, other=0)
    low = low * keep[:, None]
    if BITS <= 4:
        first, other = nibble_values(byte, zero, ASM)
        low = tl.dot(shares, first, low)
        high = tl.dot(shares, other, high * keep[:, None])
    else:
        low = tl.dot(shares, byte_values(byte, zero, ASM), low)
    return low, high


@triton.jit
def store_part(out, sums, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr):
    """Coordinates FIRST … FIRST + COUNT of the result; out: addresses of rows [ROWS]."""
    column = tl.arange(0, PART)
    total = tl.sum(tl.reshape(sums, (2, ROWS, PART)), axis=0)
    tl.store(out[:, None] + FIRST + column[None, :], total, mask=inside[:, None] & (column < COUNT)[None, :])


@triton.jit(do_not_specialize=["length"])
def decode(
    q,
    q_batch,
    q_token,
    key_nibbles,
    key_bytes,
    key_scales,
    key_zeros,
    value_nibbles,
    value_bytes,
    value_scales,
    value_zeros,
    starts,
    clock,
    length,
    capacity,
    window,
    factor,
    sums,
    most,
    total,
    TOKENS: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
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
    ASM: tl.constexpr,
):
    """One part of the slots of one kv head and batch row, for its TOKENS · SHARE ≤ ROWS queries.

    Grid (parts, kv heads, batch). q float32, rows apart by q_batch and q_token; factor: the scale times log2(e). Row r
    is query head r % SHARE of token r // SHARE. Tiles have 2 · ROWS rows: the queries (and the weights) rounded to
    bfloat16 above what the rounding left, so that one product on tensor cores has both; integers are exact there.
    sums float32 [batch, kv heads, parts, ROWS, HEAD]: Σ 2^(score - most) v; most and total [batch, kv heads, parts,
    ROWS]. clock: length - TOKENS on the device, or None and `length` holds.
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
    key_nibbles += base * K_NIBBLES
    key_bytes += base * K_BYTES
    key_scales += base * len(K_BITS)
    key_zeros += base * len(K_BITS)
    value_nibbles += base * V_NIBBLES
    value_bytes += base * V_BYTES
    value_scales += base * len(V_BITS)
    value_zeros += base * len(V_BITS)

    rows = q + batch.to(tl.int64) * q_batch + (query // SHARE) * q_token + (head * SHARE + query % SHARE) * HEAD
    queries = ()
    for i in tl.static_range(len(K_BITS)):
        if K_BITS[i] <= 4:
            below = query_part(rows, inside, factor, second, K_FIRST[i], (K_SIZE[i] + 1) // 2, K_PART[i], ASM)
            above = query_part(
                rows, inside, factor, second, K_FIRST[i] + (K_SIZE[i] + 1) // 2, K_SIZE[i] // 2, K_PART[i], ASM
            )
            queries = queries + (below, above)
        else:
            whole = query_part(rows, inside, factor, second, K_FIRST[i], K_SIZE[i], K_PART[i], ASM)
            queries = queries + (whole, whole)
    found = ()
    for i in tl.static_range(len(V_BITS)):
        nothing = zeros(2 * ROWS, V_PART[i])
        found = found + (nothing, nothing)
    top = tl.full((2 * ROWS,), NOTHING, tl.float32)
    mass = tl.zeros((2 * ROWS,), tl.float32)

    for start in tl.range(loop_bound(begin, ASM), loop_bound(end, ASM), BLOCK, num_stages=STAGES):
        slots = start + tl.arange(0, BLOCK)
        scores = tl.zeros((2 * ROWS, BLOCK), tl.float32)
        for i in tl.static_range(len(K_BITS)):
            scores = key_scores(
                queries[2 * i],
                queries[2 * i + 1],
                scores,
                key_nibbles,
                key_bytes,
                key_scales,
                key_zeros,
                slots,
                i,
                len(K_BITS),
                K_BITS[i],
                K_SIZE[i],
                K_AT[i],
                K_PART[i],
                K_NIBBLES,
                K_BYTES,
                K_GROUP,
                ASM,
            )
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
        for i in tl.static_range(len(V_BITS)):
            low, high = value_sums(
                weights,
                second,
                keep,
                found[2 * i],
                found[2 * i + 1],
                value_nibbles,
                value_bytes,
                value_scales,
                value_zeros,
                slots,
                i,
                len(V_BITS),
                V_BITS[i],
                V_SIZE[i],
                V_AT[i],
                V_PART[i],
                V_NIBBLES,
                V_BYTES,
                V_GROUP,
                ASM,
            )
            going = going + (low, high)
        found = going

    line = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + part) * ROWS
    tl.store(most + line + query, top, mask=inside & ~second)
    tl.store(total + line + query, mass, mask=inside & ~second)
    row = tl.arange(0, ROWS)
    out = sums + (line + row).to(tl.int64) * HEAD
    used = row < TOKENS * SHARE
    for i in tl.static_range(len(V_BITS)):
        if V_BITS[i] <= 4:
            store_part(out, found[2 * i], used, V_FIRST[i], (V_SIZE[i] + 1) // 2, ROWS, V_PART[i])
            store_part(out, found[2 * i + 1], used, V_FIRST[i] + (V_SIZE[i] + 1) // 2, V_SIZE[i] // 2, ROWS, V_PART[i])
        else:
            store_part(out, found[2 * i], used, V_FIRST[i], V_SIZE[i], ROWS, V_PART[i])


@triton.jit
def merge(
    sums,
    most,
    total,
    out,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
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
def dequantize_part(byte, zero, scale, out, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, PART: tl.constexpr):
    """Store scale · (byte - zero) [tokens, PART] in coordinates FIRST … FIRST + COUNT; out: addresses of rows."""
    column = tl.arange(0, PART)
    value = (byte.to(tl.float32) - zero[:, None]) * scale[:, None]
    if out.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    place = out[:, None] + FIRST + column[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=inside[:, None] & (column < COUNT)[None, :])


@triton.jit(do_not_specialize=["first", "count"])
def dequantize(
    nibbles,
    bytes,
    scales,
    zeros,
    out,
    first,
    count,
    capacity,
    HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    AT: tl.constexpr,
    PART: tl.constexpr,
    NIBBLES: tl.constexpr,
    BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Slots first … first + count of every kv head as float32 or float16 [heads, count, HEAD].

    Grid (tiles of TOKENS, batch · kv heads).
    """
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < count
    slot = head * capacity + first + token
    rows = out + (head * count + token) * HEAD
    for i in tl.static_range(len(BITS)):
        column = tl.arange(0, PART[i])
        scale = tl.load(scales + slot * len(BITS) + i, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + slot * len(BITS) + i, mask=inside, other=0).to(tl.float32)
        if BITS[i] <= 4:
            mask = inside[:, None] & (column < (SIZE[i] + 1) // 2)[None, :]
            byte = tl.load(
                nibbles + offsets(slot[:, None], AT[i] + column[None, :], NIBBLES, GROUP), mask=mask, other=0
            )
            dequantize_part(byte & 15, zero, scale, rows, inside, FIRST[i], (SIZE[i] + 1) // 2, PART[i])
            dequantize_part(byte >> 4, zero, scale, rows, inside, FIRST[i] + (SIZE[i] + 1) // 2, SIZE[i] // 2, PART[i])
        else:
            mask = inside[:, None] & (column < SIZE[i])[None, :]
            byte = tl.load(bytes + offsets(slot[:, None], AT[i] + column[None, :], BYTES, GROUP), mask=mask, other=0)
            dequantize_part(byte, zero, scale, rows, inside, FIRST[i], SIZE[i], PART[i])
