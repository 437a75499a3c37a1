"""Products of float32 activations and plain weights (float32, bfloat16 or float16), to float32 accuracy."""

import triton
import triton.language as tl

from resq.backends.triton.kernels.interpreter import loop_bound
from resq.backends.triton.kernels.linear import finished, inside, tile_of


@triton.jit(do_not_specialize=["rows"])
def dense_rows(
    w_ptr, bias_ptr, x_ptr, onto_ptr, out_ptr, rows, out, size, ldw, ldx, ld_onto, ldo,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out = onto + bias + x w^T for few rows: w is read once, products are summed without tensor cores."""
    m0, n0 = tile_of(tl.program_id(0), rows, out, BM, BN, 1)
    k = tl.arange(0, BK)
    w = w_ptr + n0.to(tl.int64) * ldw + (inside(n0, out, BN) - n0) * ldw
    x = x_ptr + inside(m0, rows, BM) * ldx
    acc = tl.zeros([BN, BM, BK], tl.float32)
    for start in range(0, loop_bound(size, ASM), BK):
        at = start + k
        weights = tl.load(w[:, None] + at[None, :], mask=(at < size)[None, :], other=0.0).to(tl.float32)
        values = tl.load(x[:, None] + at[None, :], mask=(at < size)[None, :], other=0.0)
        acc = tl.fma(
            tl.broadcast_to(weights[:, None, :], acc.shape), tl.broadcast_to(values[None, :, :], acc.shape), acc
        )
    finished(tl.sum(acc, 2), bias_ptr, onto_ptr, out_ptr, m0, n0, rows, out, out, ld_onto, ldo, BM, BN)


@triton.jit(do_not_specialize=["rows"])
def dense_tiles(
    w_ptr, bias_ptr, x_ptr, onto_ptr, out_ptr, rows, out, size, ldw, ldx, ld_onto, ldo,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """out = onto + bias + x w^T on tensor cores: 16-bit weights are exact in tf32, three products carry float32."""
    m0, n0 = tile_of(tl.program_id(0), rows, out, BM, BN, WIDTH)
    k = tl.arange(0, BK)
    w = w_ptr + n0.to(tl.int64) * ldw + (inside(n0, out, BN) - n0) * ldw
    x = x_ptr + m0.to(tl.int64) * ldx + (inside(m0, rows, BM) - m0) * ldx
    acc = tl.zeros([BN, BM], tl.float32)
    for start in tl.range(0, loop_bound(size, ASM), BK, num_stages=STAGES):
        at = start + k
        weights = tl.load(w[:, None] + at[None, :], mask=(at < size)[None, :], other=0.0).to(tl.float32)
        values = tl.load(x[:, None] + at[None, :], mask=(at < size)[None, :], other=0.0)
        acc = tl.dot(weights, values.T, acc, input_precision="tf32x3")
    finished(acc, bias_ptr, onto_ptr, out_ptr, m0, n0, rows, out, out, ld_onto, ldo, BM, BN)
