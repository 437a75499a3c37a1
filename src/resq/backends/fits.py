"""What backends with kernels refuse before a kernel reads it: heads, queries and activations that do not fit."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from resq.errors import InputError
from resq.numerics.affine import Quantized
from resq.numerics.bands import Bands


def check_heads(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, sizes: Set[int]) -> None:
    """q [b, t, H, h], k and v [b, t, G, h], cos and sin [b, t, h]; sizes: coordinates that their formats take, 0: any.

    Raises InputError.
    """
    batch, tokens, _, size = q.shape
    fit = k.shape == v.shape == (batch, tokens, k.shape[2], size) and cos.shape == sin.shape == (batch, tokens, size)
    if not fit or size % 2:
        named = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in named.items())
        raise InputError(f"queries, keys, values and RoPE tables do not fit together: {shapes}")
    if not sizes <= {0, size}:
        raise InputError(f"formats of heads of {sorted(sizes - {0})} coordinates cannot take heads of {size}")


def check_queries(q: Tensor, held: tuple[int, int] | None, length: int, size: int, starts: Tensor | None) -> None:
    """q [b, t, H, h] for a cache that holds `length` tokens of (rows, kv heads) of `size` coordinates; starts [b].

    Raises InputError.
    """
    batch, tokens, heads, _ = q.shape
    if held is None or tokens > length or held[0] != batch or heads % held[1] or size != q.shape[-1]:
        found = "nothing" if held is None else f"{held[0]} rows of {length} tokens, {held[1]} heads"
        raise InputError(f"queries {list(q.shape)} do not fit a cache of {found} of {size} coordinates")
    if starts is not None and starts.shape != (batch,):
        raise InputError(f"starts {list(starts.shape)} do not fit a batch of {batch}; one first slot per row is needed")


def check_cut(x: Quantized, inputs: Bands, groups: int) -> None:
    """inputs, groups: what a weight was prepacked for. Raises InputError where x is cut otherwise."""
    if x.groups != groups or (x.bands is not inputs and x.bands != inputs):
        raise InputError(
            f"this weight was prepacked for activations of bands {inputs.pairs} in {groups} groups, got "
            f"{x.bands.pairs} in {x.groups}; give prepack the format of the activations"
        )
