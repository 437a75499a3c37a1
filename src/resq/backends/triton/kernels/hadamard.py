"""Hadamard transforms of rows: x' = x (H_power ⊗ F_order ⊗ I_inner), float32 throughout.

H is applied by butterflies between the registers of a thread: a row is a tuple of tensors, one for each value of some
bits of the coordinate, and between two sets of bits it passes through shared memory once. F is a product with matrices
of bfloat16 parts whose sum is the float32 matrix: on tensor cores, to float32's accuracy.
"""

import triton
import triton.language as tl

from resq.backends.triton.kernels.activation import INTEGERS, SILU, sourced
from resq.backends.triton.kernels.affine import affine_integers, affine_range


@triton.jit
def butterflies(xs, RADIX: tl.constexpr):
    """The tuple xs of RADIX tensors times H_RADIX."""
    for s in tl.static_range(0, 6):
        if (1 << s) < RADIX:
            new = ()
            for i in tl.static_range(RADIX):
                if i & (1 << s):
                    new = new + (xs[i ^ (1 << s)] - xs[i],)
                else:
                    new = new + (xs[i] + xs[i ^ (1 << s)],)
            xs = new
    return xs


@triton.jit
def joined(xs, RADIX: tl.constexpr):
    """A tuple of RADIX tensors [N] as one [N, 2, …, 2]."""
    for s in tl.static_range(0, 6):
        if (1 << s) < RADIX:
            new = ()
            for i in tl.static_range(RADIX >> (s + 1)):
                new = new + (tl.join(xs[i], xs[i + (RADIX >> (s + 1))]),)
            xs = new
    return xs[0]


@triton.jit
def parted(x, N: tl.constexpr, RADIX: tl.constexpr):
    """x [N, RADIX] as a tuple of RADIX tensors [N]."""
    if RADIX == 4:
        x = tl.reshape(x, (N, 2, 2))
    elif RADIX == 8:
        x = tl.reshape(x, (N, 2, 2, 2))
    elif RADIX == 16:
        x = tl.reshape(x, (N, 2, 2, 2, 2))
    elif RADIX == 32:
        x = tl.reshape(x, (N, 2, 2, 2, 2, 2))
    elif RADIX == 64:
        x = tl.reshape(x, (N, 2, 2, 2, 2, 2, 2))
    xs = (x,)
    for s in tl.static_range(0, 6):
        if (1 << s) < RADIX:
            even = ()
            odd = ()
            for i in tl.static_range(1 << s):
                a, b = tl.split(xs[i])
                even = even + (a,)
                odd = odd + (b,)
            xs = even + odd
    return xs


@triton.jit
def thirds(x):
    """Three bfloat16 tensors whose sum is x to float32's accuracy."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(x, f, total, ASM: tl.constexpr):
    """total + x f of bfloat16 tensors: products exact, sums in float32. The interpreter has no bfloat16 products."""
    if ASM:
        return tl.dot(x, f, total)
    else:
        return tl.dot(x.to(tl.float32), f.to(tl.float32), total, input_precision="ieee")


@triton.jit
def times(x, f_ptr, f_at, f_inside, f_part, total, SIGNS: tl.constexpr, ASM: tl.constexpr):
    """total + x F: x float32 [M, K], F [K, N] at f_ptr in one bfloat16 part (SIGNS: entries ±1) or three, `f_part`
    elements apart. Small products are added first."""
    high, middle, low = thirds(x)
    f = tl.load(f_ptr + f_at, mask=f_inside, other=0.0)
    if SIGNS:
        total = product(low, f, total, ASM)
        total = product(middle, f, total, ASM)
    else:
        f_middle = tl.load(f_ptr + f_part + f_at, mask=f_inside, other=0.0)
        f_low = tl.load(f_ptr + 2 * f_part + f_at, mask=f_inside, other=0.0)
        total = product(high, f_low, total, ASM)
        total = product(middle, f_middle, total, ASM)
        total = product(low, f, total, ASM)
        total = product(high, f_middle, total, ASM)
        total = product(middle, f, total, ASM)
    return product(high, f, total, ASM)


@triton.jit
def factor_rows(
    x_ptr,
    x_ld,
    up_ptr,
    up_ld,
    f_ptr,
    out_ptr,
    out_ld,
    count,
    vectors,
    multiplier,
    SOURCE: tl.constexpr,
    ORDER: tl.constexpr,
    INNER: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """out = multiplier · source (I_power ⊗ F ⊗ I_INNER), float32.

    A program takes BLOCK_M of the `count` vectors of ORDER coordinates, `vectors` = power · INNER a row, and BLOCKS
    times BLOCK_N coordinates of their products. F [ORDER, ORDER] at f_ptr as `times` takes it.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * (BLOCKS * BLOCK_N) + tl.arange(0, BLOCK_N)
    row = m // vectors
    first = m % vectors // INNER * (ORDER * INNER) + m % vectors % INNER
    x_ptr += row * x_ld + first
    up_ptr = up_ptr + row * up_ld + first if SOURCE == SILU else x_ptr
    totals = ()
    for _ in tl.static_range(BLOCKS):
        totals = totals + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for start in tl.range(0, ORDER, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (m < count)[:, None] & (k < ORDER)[None, :]
        along = k[None, :] * INNER
        x = sourced(x_ptr[:, None] + along, up_ptr[:, None] + along, inside, SOURCE, ASM)
        sums = ()
        for b in tl.static_range(BLOCKS):
            to = n + b * BLOCK_N
            f_inside = (k < ORDER)[:, None] & (to < ORDER)[None, :]
            sums = sums + (
                times(x, f_ptr, k[:, None] * ORDER + to[None, :], f_inside, ORDER * ORDER, totals[b], SIGNS, ASM),
            )
        totals = sums
    for b in tl.static_range(BLOCKS):
        to = n + b * BLOCK_N
        out = out_ptr + (row * out_ld + first)[:, None] + to[None, :] * INNER
        tl.store(out, totals[b] * multiplier, mask=(m < count)[:, None] & (to < ORDER)[None, :])


@triton.jit
def turn_rows(
    x_ptr,
    x_ld,
    up_ptr,
    up_ld,
    f_ptr,
    out_ptr,
    out_ld,
    scale_ptr,
    zero_ptr,
    multiplier,
    SOURCE: tl.constexpr,
    OUT: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIGNS: tl.constexpr,
    TOP: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    CLIP: tl.constexpr,
    OFFSET: tl.constexpr,
    ASM: tl.constexpr,
):
    """One row a program: multiplier · source (H_R1 ⊗ H_R2 ⊗ F) as FLOATS, or as INTEGERS of one band with one range.

    F [COLUMNS, COLUMNS] at f_ptr as `times` takes it, with one block; None for the identity. BLOCKS blocks of BLOCK
    columns are turned one after the other, so that shared memory holds one, and stay in registers.
    """
    # Addresses are bases and constants: the compiler's time grows with the square of the operations in a program.
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, R2 * BLOCK)
    at = row * x_ld + e // BLOCK * COLUMNS + e % BLOCK
    x_ptr += at
    up_ptr = up_ptr + (at + row * (up_ld - x_ld)) if SOURCE == SILU else x_ptr
    ys = ()
    for block in tl.static_range(BLOCKS):
        inside = e % BLOCK < COLUMNS - block * BLOCK
        xs = ()
        for k in tl.static_range(R1):
            start = k * R2 * COLUMNS + block * BLOCK
            xs = xs + (sourced(x_ptr + start, up_ptr + start, inside, SOURCE, ASM),)
        xs = butterflies(xs, R1)
        if R2 == 1:
            for k in tl.static_range(R1):
                ys = ys + (xs[k] * multiplier,)
        else:
            if f_ptr is None:
                x = tl.permute(tl.reshape(joined(xs, R1), (R2, BLOCK, R1)), (2, 1, 0))
            else:
                x = tl.reshape(tl.trans(tl.reshape(joined(xs, R1), (R2 * BLOCK, R1))), (R1 * R2, BLOCK))
                c = tl.arange(0, BLOCK)
                f_inside = (c < COLUMNS)[:, None] & (c < COLUMNS)[None, :]
                total = tl.zeros((R1 * R2, BLOCK), tl.float32)
                total = times(
                    x, f_ptr, c[:, None] * COLUMNS + c[None, :], f_inside, COLUMNS * COLUMNS, total, SIGNS, ASM
                )
                x = tl.permute(tl.reshape(total, (R1, R2, BLOCK)), (0, 2, 1))
            x = tl.reshape(x * multiplier, (R1 * BLOCK, R2))
            ys = ys + butterflies(parted(x, R1 * BLOCK, R2), R2)
    # Value k of a block's last set is coordinate (first · last + k, c) of [power, COLUMNS].
    last: tl.constexpr = R2 if R2 > 1 else R1
    e = tl.arange(0, R1 * R2 // last * BLOCK)
    out_ptr += row * out_ld + e // BLOCK * (last * COLUMNS) + e % BLOCK
    if OUT == INTEGERS:
        least = ys[0]
        most = ys[0]
        for i in tl.static_range(1, BLOCKS * last):
            least = tl.minimum(least, ys[i])
            most = tl.maximum(most, ys[i])
        low = tl.minimum(tl.min(least, 0), 0.0)
        high = tl.maximum(tl.max(most, 0), 0.0)
        scale, inverse, zero = affine_range(low, high, RECIPROCAL, CLIP, TOP, False, CLIP != 1.0, ASM)
        tl.store(scale_ptr + row, scale)
        tl.store(zero_ptr + row, zero.to(tl.int32).to(tl.uint8))
    for i in tl.static_range(BLOCKS * last):
        inside = e % BLOCK < COLUMNS - i // last * BLOCK
        to = out_ptr + (i % last * COLUMNS + i // last * BLOCK)
        if OUT == INTEGERS:
            q = affine_integers(ys[i], inverse, zero, TOP, ASM)
            tl.store(to, (q.to(tl.int32) - OFFSET).to(tl.int8), mask=inside)
        else:
            tl.store(to, ys[i], mask=inside)
