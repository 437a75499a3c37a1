"""GPTQ: round columns in order, moving each column's error into the columns not yet rounded (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Hashable
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
# Columns rounded one by one before the errors of all are taken to the next ones by a matrix product; and the size up to
# which a matrix is factorized or inverted in one piece.
STRIP, PANEL = 16, 512


def inverse_factor(moment: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """Upper-triangular U with U^T U = (H + λ I)^-1, float64 [n, n], and the damping used; H is the moment, its rows and
    columns in the order int64 [n] where one is given.

    λ = damping · mean(diag H) over the inputs that are not dead (zero diagonal), raised stepwise while it cannot be
    factorized. A dead input counts as an independent one of mean energy. Holds at most two further [n, n]. Raises
    InputError when H is not finite or no damping helps.

    With R R^T = H + λ I, R upper-triangular, U = R^-1: no inverse of H is formed. R is the Cholesky factor of H with
    rows and columns reversed, itself reversed.
    """
    diagonal = moment.diagonal() if order is None else moment.diagonal()[order]
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    plain = torch.where(dead, mean, diagonal).flip(0)
    for _ in range(DAMPING_TRIES):
        turned = moment.flip(0, 1) if order is None else moment[order.flip(0)][:, order.flip(0)]
        turned.diagonal().copy_(plain + damping * mean)
        # Symmetric: the transposed one is laid out as LAPACK wants it.
        lower = turned.mT
        if bool(torch.isfinite(mean)) and factorize(lower):
            invert_lower(lower)
            return turned.flip(0, 1).mT, damping
        if not all(torch.isfinite(rows).all() for rows in moment.split(PANEL)):
            raise InputError(
                "the calibration moment holds NaN or Inf: an activation overflowed; check the source model"
            )
        del turned, lower
        damping *= DAMPING_STEP
    raise InputError(
        f"the calibration moment cannot be factorized even with damping {damping / DAMPING_STEP:g}; use more windows"
    )


def factorize(matrix: Tensor) -> bool:
    """Lower-triangular L with L L^T = A in place of the symmetric A [n, n], of which what is on and below the diagonal
    is read; False, and anything in its place, where A is not positive definite.

    By panels of columns, each of which first loses what the ones before explain of it: one long product a panel, faster
    than MKL's factorization (3.0 s for 4.4 s at n = 8192 on one core of a Xeon with AVX-512).
    """
    size = matrix.shape[0]
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        if start:
            matrix[start:, start:stop].addmm_(matrix[start:, :start], matrix[start:stop, :start].mT, alpha=-1)
        square, below = matrix[start:stop, start:stop], matrix[stop:, start:stop]
        lower, failed = torch.linalg.cholesky_ex(square)
        if failed:
            return False
        square.copy_(lower)
        below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
        matrix[:start, start:stop] = 0.0
    return True


def invert_lower(lower: Tensor) -> None:
    """L^-1 in place of the lower-triangular L [n, n]: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]."""
    size = lower.shape[0]
    if size <= PANEL:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    inner = torch.linalg.solve_triangular(first, below, upper=False, left=False)
    below.copy_(torch.linalg.solve_triangular(last, inner, upper=False).neg_())
    del inner
    invert_lower(first)
    invert_lower(last)


def corrected(weight: Tensor, moments: InputMoments, damping: float) -> Tensor:
    """W' minimising Σ ||W' x̂ - W x||² + λ ||W' - W||², float64 [out, in]; λ as in `inverse_factor` of Σ x̂ x̂^T.

    x̂ is what the rounded model feeds this linear, x what the unrounded one does:
    W' = W + W (X - X̂)^T X̂ (X̂^T X̂ + λ I)^-1.
    Rounding W' then minimises the error of the linear's output against the unrounded model's (the objective of GPTAQ,
    arXiv 2504.02692, solved for real weights first).
    """
    assert moments.cross is not None
    upper, _ = factor(moments, damping)
    # By panels of rows: no difference of two [in, in] is held, and no zeros of U are multiplied.
    right, half, change = (weight.new_empty(weight.shape[1], weight.shape[0]) for _ in range(3))
    panels = [slice(start, start + PANEL) for start in range(0, weight.shape[1], PANEL)]
    for panel in panels:
        torch.mm(moments.cross[panel] - moments.seen[panel], weight.T, out=right[panel])
    for panel in panels:
        torch.mm(upper[panel, panel.start :], right[panel.start :], out=half[panel])
    for panel in panels:
        torch.mm(upper[: panel.stop, panel].T, half[: panel.stop], out=change[panel])
    return weight + change.T


def factor(
    moments: InputMoments, damping: float, order: Tensor | None = None, key: Hashable = None
) -> tuple[Tensor, float]:
    """`inverse_factor` of the inputs as seen, made once for all that share them; `key` names the order."""
    return moments.once(("factor", damping, key), lambda: inverse_factor(moments.seen, damping, order))


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
        upper, damping = factor(moments, self.damping, order, key=None if order is None else bands)
        # The weights of dead inputs are rounded as zeros.
        columns = torch.where(moments.seen.diagonal() == 0, 0.0, target)
        integers = self.integers(columns if order is None else columns[:, order], upper, scale, bands)
        if order is not None:
            integers = integers[:, order.argsort()]
        return Rounded(PackedLinear.from_integers(integers, scale, bands, bias), target, damping)

    def order(self, moment: Tensor, bands: Bands) -> Tensor | None:
        """The columns in the order in which they are rounded, int64 [in]; None for the natural one."""
        if not self.act_order:
            return None
        energy = torch.diagonal(moment)
        return torch.cat([cut.start + energy[cut].argsort(descending=True, stable=True) for cut in bands.slices()])

    def integers(self, weight: Tensor, upper: Tensor, scale: Tensor, bands: Bands) -> Tensor:
        """Integers int8 [out, in]; weight and U in the order of rounding."""
        # Columns as rows, so that the loop walks contiguous memory. A column that was rounded holds its error from then
        # on, and what the errors change in a column is subtracted when its block, its strip and itself come: each entry
        # is written four times in all, and most products are of matrices.
        columns = weight.T.clone(memory_format=torch.contiguous_format)
        steps = scale.T.to(torch.float64, memory_format=torch.contiguous_format)
        band_of = [(index, band.bits) for index, band in enumerate(bands) for _ in range(band.size)]
        pivots = upper.diagonal().tolist()
        integers = torch.empty_like(columns, dtype=torch.int8)

        def settle(start: int, stop: int, since: int) -> None:
            """Subtract from columns start … stop - 1 what the errors of since … start - 1 change in them."""
            if since < start:
                columns[start:stop].addmm_(upper[since:start, start:stop].T, columns[since:start], alpha=-1)

        for start in range(0, bands.size, self.block):
            stop = min(start + self.block, bands.size)
            settle(start, stop, 0)
            for first in range(start, stop, STRIP):
                last = min(first + STRIP, stop)
                settle(first, last, start)
                for i in range(first, last):
                    column, (band, bits) = columns[i], band_of[i]
                    if i > first:
                        column.addmv_(columns[first:i].T, upper[first:i, i], alpha=-1)
                    q = round_symmetric(column, steps[band], bits)
                    integers[i] = q
                    column.addcmul_(q, steps[band], value=-1).div_(pivots[i])
        return integers.T

    def __str__(self) -> str:
        words = f"gptq, damping {self.damping:g}, block {self.block}, clip search {'on' if self.clip_search else 'off'}"
        words += ", act-order inside bands" if self.act_order else ""
        words += ", Hessians of rounded inputs" if self.sees_rounded else ""
        return words + ("" if self.correction is None else f", weights corrected with damping {self.correction:g}")
