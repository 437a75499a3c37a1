"""GPTQ: round columns in order, moving each column's error into the columns not yet rounded (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.affine import round_symmetric
from resq.numerics.bands import Bands
from resq.numerics.linear import PackedLinear
from resq.ptq.recipe import InputMoments, Rounded
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


def corrected(weight: Tensor, moments: InputMoments, damping: float) -> Tensor:
    """W' minimising Σ ||W' x̂ - W x||² + λ ||W' - W||², float64 [out, in]; λ = damping · mean(diag Σ x̂ x̂^T).

    x̂ is what the rounded model feeds this linear, x what the unrounded one does:
    W' = W + W (X - X̂)^T X̂ (X̂^T X̂ + λ I)^-1.
    Rounding W' then minimises the error of the linear's output against the unrounded model's (the objective of GPTAQ,
    arXiv 2504.02692, solved for real weights first).
    """
    assert moments.cross is not None
    seen = (moments.seen + moments.seen.T) / 2
    hessian = seen.clone()
    hessian.diagonal().add_(damping * seen.diagonal().mean().clamp(min=1e-300))
    return weight + torch.linalg.solve(hessian, (moments.cross - seen) @ weight.T).T


@dataclass(frozen=True)
class Gptq:
    """Natural column order (low band first, precise columns last), `block` columns at a time, scales from the weights
    that are rounded. Everything in float64.

    clip_search: the scales'. act_order: inside each band, columns with the largest inputs first. sees_rounded: the
    Hessian is of inputs with activations and cache rounded. correction: damping of `corrected`, None for none.
    """

    damping: float = 0.01
    block: int = 128
    clip_search: bool = True
    act_order: bool = False
    sees_rounded: bool = False
    correction: float | None = None
    needs_moment: ClassVar[bool] = True

    def __post_init__(self) -> None:
        damped = self.damping > 0 and (self.correction is None or self.correction > 0)
        if not damped or self.block < 1:
            raise InputError(
                f"GPTQ takes a block of at least 1 and positive dampings, got {self.block}, {self.damping} and "
                f"{self.correction}"
            )

    @property
    def corrects(self) -> bool:
        """Whether weights are corrected for what the rounded model feeds them."""
        return self.correction is not None

    def __call__(self, weight: Tensor, moments: InputMoments | None, bands: Bands, bias: Tensor | None) -> Rounded:
        """weight float64 [out, in]; moments float64 [in, in]."""
        assert moments is not None
        target = weight.to(torch.float64)
        if self.correction is not None:
            target = corrected(target, moments, self.correction)
        scale = scales(target, bands, clip_search=self.clip_search)
        order = self.order(moments.seen, bands)
        moment = moments.seen if order is None else moments.seen[order][:, order]
        integers, damping = self.integers(target if order is None else target[:, order], moment, scale, bands)
        if order is not None:
            integers = integers[:, order.argsort()]
        return Rounded(PackedLinear.from_integers(integers, scale, bands, bias), target, damping)

    def order(self, moment: Tensor, bands: Bands) -> Tensor | None:
        """The columns in the order in which they are rounded, int64 [in]; None for the natural one."""
        if not self.act_order:
            return None
        energy = torch.diagonal(moment)
        return torch.cat([cut.start + energy[cut].argsort(descending=True, stable=True) for cut in bands.slices()])

    def integers(self, weight: Tensor, moment: Tensor, scale: Tensor, bands: Bands) -> tuple[Tensor, float]:
        """Integers int8 [out, in] and the damping used; weight and moment in the order of rounding."""
        upper, damping = inverse_factor(moment, self.damping)
        # Columns as rows: the inner loop then walks contiguous memory. A copy: the update writes to it.
        columns = weight.T.clone(memory_format=torch.contiguous_format)
        columns[torch.diagonal(moment) == 0] = 0.0
        column_scale = torch.empty_like(columns)
        for index, cut in enumerate(bands.slices()):
            column_scale[cut] = scale[:, index].to(torch.float64)
        integers = torch.empty_like(columns, dtype=torch.int8)
        bits = [band.bits for band in bands for _ in range(band.size)]
        for start in range(0, bands.size, self.block):
            stop = min(start + self.block, bands.size)
            errors = torch.empty_like(columns[start:stop])
            for i in range(start, stop):
                q = round_symmetric(columns[i], column_scale[i], bits[i])
                integers[i] = q.to(torch.int8)
                error = (columns[i] - q * column_scale[i]) / upper[i, i]
                columns[i:stop] -= upper[i, i:stop, None] * error
                errors[i - start] = error
            columns[stop:] -= upper[start:stop, stop:].T @ errors
        return integers.T, damping

    def __str__(self) -> str:
        words = f"gptq, damping {self.damping:g}, block {self.block}, clip search {'on' if self.clip_search else 'off'}"
        words += ", act-order inside bands" if self.act_order else ""
        words += ", Hessians of rounded inputs" if self.sees_rounded else ""
        return words + ("" if self.correction is None else f", weights corrected with damping {self.correction:g}")
