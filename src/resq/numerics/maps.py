"""Linear maps that change a basis: x' = x M on row vectors, and the dual that keeps x W^T unchanged.

What a map is applied to decides dtype and device of the result; a map may lie anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics import hadamard
from resq.numerics.hadamard import HadamardPlan


@dataclass(frozen=True)
class Dense:
    """x' = x M with M [n, n]. `orthogonal` is a claim that the constructor's caller makes; `dual` relies on it."""

    matrix: Tensor
    orthogonal: bool = True
    kind: ClassVar[str] = "dense"

    @property
    def size(self) -> int:
        """Coordinates the map acts on."""
        return self.matrix.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """x M, [..., n] in x.dtype."""
        return x @ self.matrix.to(x)

    def dual(self, w: Tensor) -> Tensor:
        """w M^-T: a reader's rows in the new basis, so that (x M)(w M^-T)^T = x w^T."""
        if not self.orthogonal:
            raise InputError("a non-orthogonal dense map has no dual here; keep it online or make it orthogonal")
        return w @ self.matrix.to(w)


@dataclass(frozen=True)
class PerHead:
    """One orthogonal map per head, then a factor per coordinate: x' = (x · blkdiag(M[head], …)) · scales.

    matrices [heads, h, h], x [..., heads·h]; scales [heads, h] or None for ones.
    """

    matrices: Tensor
    scales: Tensor | None = None
    kind: ClassVar[str] = "per_head"

    @property
    def size(self) -> int:
        """Coordinates the map acts on: heads · h."""
        return self.matrices.shape[0] * self.matrices.shape[1]

    @property
    def orthogonal(self) -> bool:
        """Whether the inverse is the transpose; the matrices are, a factor is not."""
        return self.scales is None

    def repeated(self, times: int) -> PerHead:
        """The map of `times` query heads per kv head: head j uses matrix j // times."""
        scales = None if self.scales is None else self.scales.repeat_interleave(times, dim=0)
        return PerHead(self.matrices.repeat_interleave(times, dim=0), scales)

    def _turn(self, x: Tensor) -> Tensor:
        heads, size = self.matrices.shape[:2]
        return torch.einsum("...ki,kij->...kj", x.unflatten(-1, (heads, size)), self.matrices.to(x))

    def apply(self, x: Tensor) -> Tensor:
        """x blkdiag(M) diag(scales), [..., heads·h] in x.dtype."""
        turned = self._turn(x)
        return (turned if self.scales is None else turned * self.scales.to(x)).flatten(-2)

    def dual(self, w: Tensor) -> Tensor:
        """w blkdiag(M) diag(1 / scales)."""
        turned = self._turn(w)
        return (turned if self.scales is None else turned / self.scales.to(w)).flatten(-2)


@dataclass(frozen=True)
class Diagonal:
    """x' = x · scales, one positive factor per coordinate; scales [n]."""

    scales: Tensor
    kind: ClassVar[str] = "diagonal"
    orthogonal: ClassVar[bool] = False

    @property
    def size(self) -> int:
        """Coordinates the map acts on."""
        return self.scales.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """x diag(scales), [..., n] in x.dtype."""
        return x * self.scales.to(x)

    def dual(self, w: Tensor) -> Tensor:
        """w diag(1 / scales)."""
        return w / self.scales.to(w)


@dataclass(frozen=True)
class Permutation:
    """x'[..., i] = x[..., index[i]]; index int64 [n]."""

    index: Tensor
    kind: ClassVar[str] = "permutation"
    orthogonal: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """Coordinates the map acts on."""
        return self.index.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """x[..., index]."""
        return x[..., self.index.to(x.device, torch.int64)]

    dual = apply


@dataclass(frozen=True)
class Hadamard:
    """x' = x (T ⊗ I_inner) with T the normalised transform of `plan` (see `hadamard`).

    With heads of `inner` coordinates, T mixes equal coordinates of all heads. Raises InputError unless inner is at
    least 1.
    """

    plan: HadamardPlan
    inner: int = 1
    kind: ClassVar[str] = "hadamard"
    orthogonal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise InputError(f"a Hadamard map needs inner of at least 1, got {self.inner}")

    @property
    def size(self) -> int:
        """Coordinates the map acts on."""
        return self.plan.size * self.inner

    def apply(self, x: Tensor) -> Tensor:
        """x (T ⊗ I), [..., n] in x.dtype."""
        if self.inner == 1:
            return hadamard.transform(x, self.plan)
        # Coordinate i·inner + j of x is (i, j): T acts on i.
        rows = x.unflatten(-1, (self.plan.size, self.inner)).transpose(-1, -2)
        return hadamard.transform(rows, self.plan).transpose(-1, -2).flatten(-2)

    dual = apply


# What may be applied at run time; a diagonal is always folded into weights or a norm's gain.
OnlineMap = Dense | PerHead | Permutation | Hadamard
LinearMap = OnlineMap | Diagonal


def as_writer(map: LinearMap, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A linear whose outputs move to the new basis: y' = y M, so W' = M^T W and b' = b M. weight [out, in]."""
    return map.apply(weight.T).T, None if bias is None else map.apply(bias)


def as_reader(map: LinearMap, weight: Tensor) -> Tensor:
    """A linear that reads inputs in the new basis: W' = W M^-T. weight [out, in]."""
    return map.dual(weight)


def describe(map: OnlineMap) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(plain parameters, tensors) from which `restore` rebuilds the map; what a checkpoint stores."""
    match map:
        case Dense():
            return {"kind": map.kind, "size": map.size, "orthogonal": map.orthogonal}, {"matrix": map.matrix}
        case PerHead():
            if map.scales is not None:
                raise InputError("a per-head map with scales is folded into weights and has no stored form")
            return {"kind": map.kind, "size": map.size, "heads": map.matrices.shape[0]}, {"matrix": map.matrices}
        case Permutation():
            return {"kind": map.kind, "size": map.size}, {"index": map.index.to(torch.int32)}
        case Hadamard():
            plan = map.plan
            parameters = {"power": plan.power, "order": plan.order, "construction": plan.construction}
            return {"kind": map.kind, "size": map.size, **parameters, "inner": map.inner}, {}


def restore(parameters: dict[str, Any], tensors: dict[str, Tensor]) -> OnlineMap:
    """The inverse of `describe`. Raises InputError for an unknown kind or tensors of the wrong shape."""
    kind, size = parameters["kind"], parameters["size"]
    if kind == Hadamard.kind:
        power, order, inner = parameters["power"], parameters["order"], parameters.get("inner", 1)
        if size != power * order * inner:
            raise InputError(f"size must be power · order · inner = {power} · {order} · {inner}, got {size}")
        return Hadamard(HadamardPlan(power * order, power, order, parameters["construction"]), inner)
    if kind == Permutation.kind:
        index = tensors["index"].to(torch.int64)
        if tuple(index.shape) != (size,) or not torch.equal(index.sort().values, torch.arange(size)):
            raise InputError(f"the stored permutation is not one of {size} coordinates")
        return Permutation(index)
    matrix = tensors.get("matrix", torch.empty(0))
    if kind == Dense.kind and tuple(matrix.shape) == (size, size):
        return Dense(matrix, parameters["orthogonal"])
    if kind == PerHead.kind and matrix.ndim == 3:
        heads, head_size = parameters["heads"], matrix.shape[-1]
        if tuple(matrix.shape) == (heads, head_size, head_size) and heads * head_size == size:
            return PerHead(matrix)
    raise InputError(f"no linear map of kind {kind!r} and size {size} fits a matrix of shape {tuple(matrix.shape)}")


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal float64 [n, n]: QR of a Gaussian with the signs of R's diagonal moved into Q."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.sign(torch.diagonal(r))
