"""GPTQ: round columns in order, moving each column's error into the columns not yet rounded (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.affine import symmetric_limits
from resq.numerics.bands import Bands
from resq.numerics.linear import PackedLinear
from resq.ptq.recipe import Rounded
from resq.ptq.rounding.nearest import scales

# Damping is multiplied by this after a failed Cholesky factorization, at most this often (1 % → 1000 %).
DAMPING_STEP, DAMPING_TRIES = 10.0, 4


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper-triangular U with U^T U = (H + λ I)^-1, float64 [n, n], and the damping used.

    λ = damping · mean(diag H), raised stepwise while the factorization fails. A dead input (zero diagonal) counts as an
    independent one. Raises InputError when H is not finite or no damping helps.
    """
    if not torch.isfinite(moment).all():
        raise InputError("the calibration moment holds NaN or Inf: an activation overflowed; check the source model")
    hessian = (moment + moment.T) / 2
    diagonal = torch.diagonal(hessian)
    diagonal[diagonal == 0] = 1.0
    plain, mean = diagonal.clone(), diagonal.mean()
    for _ in range(DAMPING_TRIES):
        diagonal.copy_(plain + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper, damping
        damping *= DAMPING_STEP
    raise InputError(
        f"the calibration moment cannot be factorized even with damping {damping / DAMPING_STEP:g}; use more windows"
    )


@dataclass(frozen=True)
class Gptq:
    """Natural column order (low band first, precise columns last), `block` columns at a time, scales from the original
    weights. Everything in float64."""

    damping: float = 0.01
    block: int = 128
    clip_search: bool = True
    needs_moment: ClassVar[bool] = True

    def __call__(self, weight: Tensor, moment: Tensor | None, bands: Bands, bias: Tensor | None) -> Rounded:
        """weight float64 [out, in]; moment float64 [in, in]: the sum of x x^T over the linear's calibration inputs."""
        assert moment is not None
        scale = scales(weight, bands, clip_search=self.clip_search)
        upper, damping = inverse_factor(moment, self.damping)
        # Columns as rows: the inner loop then walks contiguous memory. A copy: the update writes to it.
        columns = weight.to(torch.float64).T.clone(memory_format=torch.contiguous_format)
        columns[torch.diagonal(moment) == 0] = 0.0
        column_scale = torch.empty_like(columns)
        limits = torch.empty(bands.size, 2)
        for index, (band, cut) in enumerate(zip(bands, bands.slices(), strict=True)):
            column_scale[cut] = scale[:, index].to(torch.float64)
            limits[cut] = torch.tensor(symmetric_limits(band.bits), dtype=limits.dtype)
        integers = torch.empty(columns.shape, dtype=torch.int8)
        for start in range(0, bands.size, self.block):
            stop = min(start + self.block, bands.size)
            errors = torch.empty(stop - start, columns.shape[1], dtype=torch.float64)
            for i in range(start, stop):
                low, high = limits[i].tolist()
                q = torch.round(columns[i] / column_scale[i]).clamp_(low, high)
                integers[i] = q.to(torch.int8)
                error = (columns[i] - q * column_scale[i]) / upper[i, i]
                columns[i:stop] -= upper[i, i:stop, None] * error
                errors[i - start] = error
            columns[stop:] -= upper[start:stop, stop:].T @ errors
        return Rounded(PackedLinear.from_integers(integers.T, scale, bands, bias), damping)

    def __str__(self) -> str:
        clip = "on" if self.clip_search else "off"
        return f"gptq, damping {self.damping:g}, block {self.block}, clip search {clip}"
