"""Baselines: the same decoder block in torch, in bfloat16 and with int8 products, as well as torch alone does it.

q, k, v and gate, up are one matrix each, attention is SDPA by whichever of torch's kernels is fastest here, the cache
is static and a decode step of grouped heads may read every key and value once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from resq.measure.gpu.timer import Timer, repeats_for
from resq.models.architecture import READERS, Point, Role, Shape
from resq.numerics.linear import DenseLinear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]
# torch._int_mm on a card takes more than 16 rows.
INT8_ROWS = 32
CHOICE_SECONDS = 0.005
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _attention(kernel: SDPBackend | None, *, causal: bool, grouped: bool) -> Attend:
    """SDPA of q [b, H, t, h] over k, v [b, G, s, h]. grouped: the queries that share a head are its rows, for t = 1."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3]) if grouped else q
        out = F.scaled_dot_product_attention(
            rows, k, v, is_causal=causal, enable_gqa=not grouped and q.shape[1] != k.shape[1]
        )
        return out.reshape(q.shape)

    def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert kernel is not None
        with sdpa_kernel([kernel]):
            return attend(q, k, v)

    return attend if kernel is None else by_kernel


def fastest_attention(timer: Timer, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[str, Attend]:
    """The fastest of torch's kernels for these tensors, and what it is called; those that refuse them are passed over.
    Heads are grouped or not where there is one query."""
    found: list[tuple[float, str, Attend]] = []
    forms = (False,) if causal or q.shape[1] == k.shape[1] else (False, True)
    for name, kernel in (("torch's choice", None), *KERNELS.items()):
        for grouped in forms:
            attend = _attention(kernel, causal=causal, grouped=grouped)

            def run(attend: Attend = attend) -> Tensor:
                return attend(q, k, v)

            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns of every reason before it raises
                    run()
            except RuntimeError:  # no such kernel for these tensors
                if kernel is None:
                    raise
                continue
            captured = timer.captured(run)
            taken = timer.seconds(captured, repeats_for(timer, captured, CHOICE_SECONDS))
            found.append((taken, f"{name}{', grouped' if grouped else ''}", attend))
    _, name, attend = min(found, key=lambda entry: entry[0])
    return name, attend


def bf16_product(linear: DenseLinear) -> tuple[Product, int]:
    """x W^T + b in bfloat16, and the bytes of the weights."""
    weight = linear.weight.to(torch.bfloat16)
    bias = None if linear.bias is None else linear.bias.to(torch.bfloat16)
    return lambda x: F.linear(x, weight, bias), weight.nbytes


def int8_product(linear: DenseLinear) -> tuple[Product, int]:
    """The same by integers: weights symmetric per output channel, activations symmetric per token as they come."""
    whole = linear.weight.to(torch.float32)
    scale = whole.abs().amax(dim=1).clamp(min=1e-12) / 127
    weight = (whole / scale[:, None]).round().to(torch.int8)
    bias = None if linear.bias is None else linear.bias.to(torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        rows = flat.shape[0]
        if rows < INT8_ROWS:
            flat = F.pad(flat, (0, 0, 0, INT8_ROWS - rows))
        step = flat.abs().amax(dim=1, keepdim=True).to(torch.float32).clamp(min=1e-12) / 127
        sums = torch._int_mm((flat / step).round().to(torch.int8), weight.t())  # pyright: ignore[reportPrivateImportUsage]
        y = (sums.to(torch.float32) * step * scale).to(torch.bfloat16)[:rows].view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    return product, weight.nbytes + scale.nbytes


@dataclass(frozen=True)
class Weights:
    """One block: a product for the linears that share an input, gains of the norms (of heads where there are), and the
    bytes of the linears."""

    products: dict[Point, Product]
    norms: dict[Point, Tensor]
    head_norms: dict[Role, Tensor]
    bytes: int


def fused(
    linears: dict[Role, DenseLinear],
    norms: dict[Point, Tensor],
    head_norms: dict[Role, Tensor],
    product: Callable[[DenseLinear], tuple[Product, int]],
) -> Weights:
    """The linears that share an input as one."""
    products, held = {}, 0
    for point, roles in READERS.items():
        parts = [linears[role] for role in roles]
        weight = torch.cat([part.weight for part in parts])
        biases = [weight.new_zeros(part.shape[0]) if part.bias is None else part.bias for part in parts]
        biased = any(part.bias is not None for part in parts)
        products[point], size = product(DenseLinear(weight, torch.cat(biases) if biased else None))
        held += size
    norms = {point: gain.to(torch.bfloat16) for point, gain in norms.items()}
    return Weights(products, norms, {role: gain.to(torch.bfloat16) for role, gain in head_norms.items()}, held)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def block(
    shape: Shape,
    weights: Weights,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    attend: Attend,
) -> Tensor:
    """hidden bfloat16 [b, t, d] -> [b, t, d]; keys and values [b, G, room, h] take the tokens from slot `past` on.

    cos, sin bfloat16 [b, t, h]. attend sees all slots up to the last token's, only the new ones where past is 0.
    """
    heads, kv_heads, h = shape.heads, shape.kv_heads, shape.head_dim
    tokens = hidden.shape[1]

    def normed(x: Tensor, gain: Tensor | None) -> Tensor:
        return x if gain is None else F.rms_norm(x, x.shape[-1:], gain, shape.eps)

    x = weights.products[Point.ATTN_IN](normed(hidden, weights.norms[Point.ATTN_IN]))
    q, k, v = (part.unflatten(-1, (-1, h)) for part in x.split([heads * h, kv_heads * h, kv_heads * h], dim=-1))
    q, k = normed(q, weights.head_norms.get(Role.Q)), normed(k, weights.head_norms.get(Role.K))
    q, k = (_turned(each, cos[:, :, None], sin[:, :, None]).transpose(1, 2) for each in (q, k))
    keys[:, :, past : past + tokens] = k
    values[:, :, past : past + tokens] = v.transpose(1, 2)
    seen = slice(0, past + tokens)
    out = attend(q, keys[:, :, seen], values[:, :, seen]).transpose(1, 2).flatten(-2)
    hidden = hidden + weights.products[Point.O_IN](out)
    gate, up = weights.products[Point.MLP_IN](normed(hidden, weights.norms[Point.MLP_IN])).chunk(2, dim=-1)
    return hidden + weights.products[Point.DOWN_IN](F.silu(gate) * up)
