"""Products of activations and packed weights. Tiles are output channels by tokens: packed weights go from memory into
registers, are unpacked there, and are the left operand of the tensor cores.

A weight band is a constant tuple `BAND`:
(first coordinate, coordinates of a group, first byte of a weight row, bytes of a group, bytes of a block, blocks of a
group, whether bytes hold two nibbles, the activation's band, whether that has 8 bits, first block, first segment).
Byte j of a group of nibbles holds coordinates j (low) and j + bytes (high); of a group of bytes, coordinate j. What
pads a group is zero. Nibbles are multiplied as 16 times themselves: scales are a sixteenth, column sums 16 times as
large.
"""

import triton
import triton.language as tl

from resq.backends.triton.kernels.interpreter import loop_bound

# Where float32 integers may go without their sums with the 4-bit part leaving int32.
MERGEABLE = tl.constexpr(2.0**30)


@triton.jit
def nibbles(packed, ASM: tl.constexpr):
    """16 times the signed low and the signed high nibble of every byte, int8 each."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 shifted;
            shl.b32 shifted, $2, 4;
            and.b32 $0, shifted, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }""",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        return (packed << 4).to(tl.int8), (packed & -16).to(tl.int8)


@triton.jit
def tile_of(program, rows, out, BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr):
    """(first token, first channel) of a program: `WIDTH` tiles of channels run along all tokens together, so that both
    operands stay in the L2 cache."""
    across, down = tl.cdiv(out, BN), tl.cdiv(rows, BM)
    first = program // (WIDTH * down) * WIDTH
    width = tl.minimum(across - first, WIDTH)
    inside = program % (WIDTH * down)
    return inside // width * BM, (first + inside % width) * BN


@triton.jit
def products(acc, w, a, first, last, group, BAND: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr):
    """acc int32 [BN, BM] plus the products of blocks first … last - 1 of a group; w, a: pointers to the first byte and
    the first coordinate of every row of the tile, [BN] and [BM]."""
    BYTES: tl.constexpr = BAND[3]
    BLOCK: tl.constexpr = BAND[4]
    j = tl.arange(0, BLOCK)
    ws = w[:, None] + (BAND[2] + group * BYTES) + j[None, :]
    xs = a[:, None] + (BAND[0] + group * BAND[1]) + j[None, :]
    # The grid is flat, which the compiler does not know: it would unroll a short loop and run out of registers.
    last -= tl.program_id(2)
    for block in tl.range(loop_bound(first, ASM), loop_bound(last, ASM), num_stages=STAGES):
        packed = tl.load(ws + block * BLOCK)
        if BAND[6]:
            low, high = nibbles(packed, ASM)
            acc = tl.dot(low, tl.load(xs + block * BLOCK).T, acc, out_dtype=tl.int32)
            acc = tl.dot(high, tl.load(xs + block * BLOCK + BYTES).T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(packed, tl.load(xs + block * BLOCK).T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def inside(first, count, SIZE: tl.constexpr):
    """SIZE indices from `first` on, those from `count` on replaced by the last: no masks where nothing is stored."""
    return tl.minimum(first + tl.arange(0, SIZE), count - 1)


@triton.jit
def of_channels(base, n0, out, BN: tl.constexpr):
    """Values of a tile's channels, [BN]; 1 beyond the last, so that quotients are finite."""
    # Masked rather than clamped: the addresses are then one register and constants.
    n = tl.arange(0, BN)
    return tl.load(base + n0 + n, mask=n < out - n0, other=1)


@triton.jit
def of_tokens(base, m0, rows, stride, BM: tl.constexpr):
    """Values of a tile's tokens, [BM], `stride` apart; something beyond the last."""
    m = inside(m0, rows, BM) * stride
    if BM < 64:
        return tl.load(base + m)
    else:
        # A thread needs a quarter of them all. Of so few the compiler would have it load each, with all the addresses
        # in registers; of more values than threads each is loaded once and handed round in shared memory.
        return tl.max(tl.load(base + m[None, :] + tl.zeros([4, 1], tl.int32)), 0)


@triton.jit
def places(base, m0, n0, rows, out, ld, BM: tl.constexpr, BN: tl.constexpr):
    """Pointers [BN, BM] to a tile of [rows, out] in rows `ld` apart, and which of its elements exist."""
    # Found again at every use: indices of a tile would stay in registers while it is summed.
    n, m = tl.arange(0, BN), tl.arange(0, BM)
    here = (n < out - n0)[:, None] & (m < rows - m0)[None, :]
    return base + m0.to(tl.int64) * ld + n0 + (m[None, :] * ld + n[:, None]), here


@triton.jit
def centred(acc, sums_ptr, zero_ptr, m0, n0, rows, out, ldv, group, BAND: tl.constexpr, INPUTS: tl.constexpr,
            GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Σ (q_x - z_x) q_w from Σ q_x q_w, int32 [BN, BM]."""
    zero = of_tokens(zero_ptr + BAND[7] * GROUPS + group, m0, rows, INPUTS * GROUPS, BM).to(tl.int32)
    if BAND[8]:
        zero -= 128
    sums = of_channels(sums_ptr + (BAND[10] + group) * ldv, n0, out, BN)
    return acc - sums[:, None] * zero[None, :]


@triton.jit
def scaled(total, acc, scale_ptr, x_scale_ptr, m0, n0, rows, out, ldv, group, BAND: tl.constexpr, INPUTS: tl.constexpr,
           GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """total + s_x s_w acc, float32 [BN, BM]."""
    s_w = of_channels(scale_ptr + BAND[10] // GROUPS * ldv, n0, out, BN)
    s_x = of_tokens(x_scale_ptr + BAND[7] * GROUPS + group, m0, rows, INPUTS * GROUPS, BM)
    values = acc.to(tl.float32) * s_w[:, None]
    return tl.fma(values, tl.broadcast_to(s_x[None, :], values.shape), total)


@triton.jit
def finished(total, bias_ptr, onto_ptr, out_ptr, m0, n0, rows, out, onto_out, ld_onto, ldo, BM: tl.constexpr,
             BN: tl.constexpr):  # fmt: skip
    """Add bias and residual, write: total [BN, BM], out [rows, out]. The residual has the first onto_out channels."""
    if bias_ptr is not None:
        total += of_channels(bias_ptr, n0, out, BN)[:, None]
    if onto_ptr is not None:
        # Keeps the compiler from loading the residual before the sums have left their registers.
        tl.debug_barrier()
        under, there = places(onto_ptr, m0, n0, rows, onto_out, ld_onto, BM, BN)
        total += tl.load(under, mask=there, other=0.0)
    at, here = places(out_ptr, m0, n0, rows, out, ldo, BM, BN)
    tl.store(at, total, mask=here)


@triton.jit(do_not_specialize=["rows"])
def packed_linear(
    w_ptr, sums_ptr, scale_ptr, bias_ptr, x_ptr, x_scale_ptr, x_zero_ptr, onto_ptr, out_ptr, work_ptr, ticket_ptr,
    rows, out, onto_out, ldw, ldv, ldx, ld_onto, ldo,
    BANDS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr,
    MERGE: tl.constexpr, APART: tl.constexpr, INTEGERS: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = onto + bias + Σ_segments s_x s_w Σ (q_x - z_x) q_w; a segment is a group of a weight band.

    w int8 [out, ldw], sums int32 [segments, ldv], scale float32 [bands, ldv], bias float32 [out] or None; x int8
    [rows, ldx], its scale float32 and zero uint8 [rows, INPUTS, GROUPS]; onto float32 [rows, ld_onto] or None; out
    float32 [rows, ldo], with INTEGERS the segments' sums int32 [rows, segments, out]. Programs: tiles, then SPLIT parts
    of the blocks of a row. With parts, work int32 [segments, rows, out] and ticket int32 [tiles] are zero before and
    after; the last part to come adds up the tile.

    APART: while a band is summed, the sum of those before it waits in `out`, so that one accumulator needs registers:
    the same operations in the same order. MERGE, for a band of nibbles and one of bytes: the second's sum becomes a
    number of 16ths of the first's unit and one accumulator goes on; where that could leave int32 it waits in `out` as
    float32.
    """
    m0, n0 = tile_of(tl.program_id(0), rows, out, BM, BN, WIDTH)
    w = w_ptr + n0.to(tl.int64) * ldw + (inside(n0, out, BN) - n0) * ldw
    a = x_ptr + m0.to(tl.int64) * ldx + (inside(m0, rows, BM) - m0) * ldx
    total = tl.zeros([BN, BM], tl.float32)
    if MERGE:
        LOW: tl.constexpr = BANDS[0]
        HIGH: tl.constexpr = BANDS[1]
        acc = products(tl.zeros([BN, BM], tl.int32), w, a, 0, HIGH[5], 0, HIGH, ASM, STAGES)
        acc = centred(acc, sums_ptr, x_zero_ptr, m0, n0, rows, out, ldv, 0, HIGH, INPUTS, 1, BM, BN)
        w_ratio = of_channels(scale_ptr + ldv, n0, out, BN) / of_channels(scale_ptr, n0, out, BN)
        low, high = x_scale_ptr + LOW[7], x_scale_ptr + HIGH[7]
        x_ratio = of_tokens(high, m0, rows, INPUTS, BM) / of_tokens(low, m0, rows, INPUTS, BM)
        steps = acc.to(tl.float32) * w_ratio[:, None] * x_ratio[None, :]
        # Counted rather than maximized: a maximum would pass over a NaN.
        apart = tl.sum(tl.sum((tl.abs(steps) <= MERGEABLE).to(tl.int32), 0), 0) < BN * BM
        at, here = places(out_ptr, m0, n0, rows, out, ldo, BM, BN)
        if apart:
            eights = scaled(total, acc, scale_ptr, x_scale_ptr, m0, n0, rows, out, ldv, 0, HIGH, INPUTS, 1, BM, BN)
            tl.store(at, eights, mask=here)
            steps = tl.zeros([BN, BM], tl.float32)
        acc = tl.floor(steps + 0.5).to(tl.int32)
        acc = products(acc, w, a, 0, LOW[5], 0, LOW, ASM, STAGES)
        acc = centred(acc, sums_ptr, x_zero_ptr, m0, n0, rows, out, ldv, 0, LOW, INPUTS, 1, BM, BN)
        total = scaled(total, acc, scale_ptr, x_scale_ptr, m0, n0, rows, out, ldv, 0, LOW, INPUTS, 1, BM, BN)
        if apart:
            tl.debug_barrier()
            total += tl.load(at, mask=here, other=0.0)
        finished(total, bias_ptr, onto_ptr, out_ptr, m0, n0, rows, out, onto_out, ld_onto, ldo, BM, BN)
    else:
        last = True
        if SPLIT > 1:
            for band in tl.static_range(len(BANDS)):
                parts(w, a, work_ptr, m0, n0, rows, out, BANDS, band, GROUPS, BLOCKS, SPLIT, ASM, STAGES, BM, BN)
            # The barrier orders every thread's additions before the ticket, the ticket orders them between programs.
            tl.debug_barrier()
            last = tl.atomic_add(ticket_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1
        if last:
            for band in tl.static_range(len(BANDS)):
                total = summed(
                    total, w, a, work_ptr, sums_ptr, scale_ptr, x_scale_ptr, x_zero_ptr, out_ptr, m0, n0, rows, out,
                    ldv, ldo, BANDS, band, GROUPS, INPUTS, SPLIT, APART, INTEGERS, ASM, STAGES, BM, BN,
                )  # fmt: skip
            if SPLIT > 1:
                tl.store(ticket_ptr + tl.program_id(0), 0)
            if not INTEGERS:
                finished(total, bias_ptr, onto_ptr, out_ptr, m0, n0, rows, out, onto_out, ld_onto, ldo, BM, BN)


@triton.jit
def parts(w, a, work_ptr, m0, n0, rows, out, BANDS: tl.constexpr, INDEX: tl.constexpr, GROUPS: tl.constexpr,
          COUNT: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr, BM: tl.constexpr,
          BN: tl.constexpr):  # fmt: skip
    """Add the products of those of this part's blocks that lie in a band to the planes of the band's groups."""
    BAND: tl.constexpr = BANDS[INDEX]
    BLOCKS: tl.constexpr = BAND[5]
    part = tl.program_id(1)
    first, last = part * COUNT // SPLIT - BAND[9], (part + 1) * COUNT // SPLIT - BAND[9]
    first, last = tl.maximum(first, 0), tl.maximum(last, 0)
    end = tl.minimum(tl.cdiv(last, BLOCKS), GROUPS)
    for group in range(loop_bound(first // BLOCKS, ASM), loop_bound(end, ASM)):
        skipped = group * BLOCKS
        start, stop = tl.maximum(first - skipped, 0), tl.minimum(last - skipped, BLOCKS)
        acc = products(tl.zeros([BN, BM], tl.int32), w, a, start, stop, group, BAND, ASM, STAGES)
        at, here = places(work_ptr + (BAND[10] + group) * (rows * out), m0, n0, rows, out, out, BM, BN)
        tl.atomic_add(at, acc, mask=here, sem="relaxed")


@triton.jit
def summed(total, w, a, work_ptr, sums_ptr, scale_ptr, x_scale_ptr, x_zero_ptr, out_ptr, m0, n0, rows, out, ldv, ldo,
           BANDS: tl.constexpr, INDEX: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, SPLIT: tl.constexpr,
           APART: tl.constexpr, INTEGERS: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr):  # fmt: skip
    """total plus a band's segments, whose sums are read from `work` (and zeroed there) where rows were split."""
    BAND: tl.constexpr = BANDS[INDEX]
    if APART and INDEX > 0:
        at, here = places(out_ptr, m0, n0, rows, out, ldo, BM, BN)
        tl.store(at, total, mask=here)
    for group in range(0, GROUPS):
        if SPLIT > 1:
            at, here = places(work_ptr + (BAND[10] + group) * (rows * out), m0, n0, rows, out, out, BM, BN)
            acc = tl.load(at, mask=here, other=0, cache_modifier=".cg")
            # Another thread may zero what this one reads.
            tl.debug_barrier()
            tl.store(at, tl.zeros([BN, BM], tl.int32), mask=here)
        else:
            acc = products(tl.zeros([BN, BM], tl.int32), w, a, 0, BAND[5], group, BAND, ASM, STAGES)
        acc = centred(acc, sums_ptr, x_zero_ptr, m0, n0, rows, out, ldv, group, BAND, INPUTS, GROUPS, BM, BN)
        if APART and INDEX > 0:
            # Another thread may have stored what this one loads.
            tl.debug_barrier()
            at, here = places(out_ptr, m0, n0, rows, out, ldo, BM, BN)
            total = tl.load(at, mask=here, other=0.0)
        if INTEGERS:
            if BAND[6]:
                acc = acc >> 4
            row = len(BANDS) * GROUPS * out
            at, here = places(out_ptr + (BAND[10] + group) * out, m0, n0, rows, out, row, BM, BN)
            tl.store(at, acc, mask=here)
        else:
            total = scaled(
                total, acc, scale_ptr, x_scale_ptr, m0, n0, rows, out, ldv, group, BAND, INPUTS, GROUPS, BM, BN
            )
    return total


@triton.jit
def float_products(
    acc, w, x, size, group, BANDS: tl.constexpr, INDEX: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr
):
    """acc float32 [BN, BM] plus x times the integers of a group. x: pointers to the rows, [BM], of `size` values."""
    BAND: tl.constexpr = BANDS[INDEX]
    BYTES: tl.constexpr = BAND[3]
    BLOCK: tl.constexpr = BAND[4]
    j = tl.arange(0, BLOCK)
    ws = w[:, None] + (BAND[2] + group * BYTES) + j[None, :]
    at = BAND[0] + group * BAND[1] + j
    for block in tl.range(0, BAND[5], num_stages=STAGES):
        packed = tl.load(ws + block * BLOCK)
        here = at + block * BLOCK
        left = tl.load(x[:, None] + here[None, :], mask=(here < size)[None, :], other=0.0)
        # Integers are exact in tf32; the three products carry the activations' float32.
        if BAND[6]:
            low, high = nibbles(packed, ASM)
            there = here + BYTES
            right = tl.load(x[:, None] + there[None, :], mask=(there < size)[None, :], other=0.0)
            acc = tl.dot(low.to(tl.float32), left.T, acc, input_precision="tf32x3")
            acc = tl.dot(high.to(tl.float32), right.T, acc, input_precision="tf32x3")
        else:
            acc = tl.dot(packed.to(tl.float32), left.T, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["rows"])
def float_linear(
    w_ptr, scale_ptr, bias_ptr, x_ptr, onto_ptr, out_ptr,
    rows, out, size, onto_out, ldw, ldv, ldx, ld_onto, ldo,
    BANDS: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = onto + bias + Σ_bands s_w x q_w for float32 x [rows, size]; the rest as in `packed_linear`."""
    m0, n0 = tile_of(tl.program_id(0), rows, out, BM, BN, WIDTH)
    w = w_ptr + n0.to(tl.int64) * ldw + (inside(n0, out, BN) - n0) * ldw
    x = x_ptr + m0.to(tl.int64) * ldx + (inside(m0, rows, BM) - m0) * ldx
    total = tl.zeros([BN, BM], tl.float32)
    for band in tl.static_range(len(BANDS)):
        acc = tl.zeros([BN, BM], tl.float32)
        for group in range(0, GROUPS):
            acc = float_products(acc, w, x, size, group, BANDS, band, ASM, STAGES)
        s_w = of_channels(scale_ptr + band * ldv, n0, out, BN)
        total = tl.fma(acc, tl.broadcast_to(s_w[:, None], acc.shape), total)
    finished(total, bias_ptr, onto_ptr, out_ptr, m0, n0, rows, out, onto_out, ld_onto, ldo, BM, BN)
