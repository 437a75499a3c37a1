"""GPTQ: round columns in order, moving each column's error into the columns not yet rounded (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.affine import round_symmetric
from resq.numerics.bands import Bands, cuts
from resq.numerics.linear import PackedLinear
from resq.numerics.moments import symmetric
from resq.ptq.recipe import InputMoments, Rounded
from resq.ptq.rounding.nearest import scales

# Damping is multiplied by this after a failed Cholesky factorization, at most this often (1 % → 1000 %).
DAMPING_STEP, DAMPING_TRIES = 10.0, 4
# Columns rounded one by one before the errors of all are taken to the next ones by a matrix product; and rows that are
# factorized or inverted in one piece.
STRIP, PANEL = 16, 512


@dataclass(frozen=True)
class Factor:
    """Lower-triangular V with V V^T = (H + λ I)^-1, float64.

    below: [n, n], what of V lies below the diagonal; on and above it is something else. pivots: the diagonal of V, [n].
    damping: λ as a share of the mean of diag H.
    """

    below: Tensor
    pivots: Tensor
    damping: float

    def square(self, panel: slice) -> Tensor:
        """The panel's rows and columns of V, lower-triangular [k, k]."""
        return self.below[panel, panel].tril(-1) + self.pivots[panel].diag()

    def put(self, panel: slice, lower: Tensor) -> None:
        """Set them."""
        self.pivots[panel] = lower.diagonal()
        self.below[panel, panel] = self.below[panel, panel].triu() + lower.tril(-1)


def inverse_factor(moments: InputMoments, damping: float, order: Tensor | None = None) -> Factor:
    """V of H, the moment of the inputs as seen, with its rows and columns in the order int64 [n] where one is given.

    λ = damping · mean(diag H) over the inputs that are not dead (zero diagonal), raised stepwise while it cannot be
    factorized. A dead input counts as an independent one of mean energy. Takes the `room` of the moments and a few
    panels of rows. Raises InputError when H is not finite or no damping helps.

    V^T is the upper factor that GPTQ walks along. With Q^T Q = H + λ I, Q lower-triangular, V = Q^-1: no inverse of H
    is formed.
    """
    energy = moments.seen.diagonal().clone()
    dead = energy == 0
    mean = energy[~dead].mean() if bool((~dead).any()) else energy.new_ones(())
    plain = torch.where(dead, mean, energy)
    plain = plain if order is None else plain[order]
    room = moments.room()
    for _ in range(DAMPING_TRIES):
        made = Factor(room, torch.empty_like(energy), damping)
        if bool(torch.isfinite(mean)) and factorize(made, moments, plain + damping * mean, order):
            invert(made)
            return made
        if not all(
            torch.isfinite(moments.seen[panel, panel.start :].triu()).all() for panel in cuts(len(energy), PANEL)
        ):
            raise InputError(
                "the calibration moment holds NaN or Inf: an activation overflowed; check the source model"
            )
        damping *= DAMPING_STEP
    raise InputError(
        f"the calibration moment cannot be factorized even with damping {damping / DAMPING_STEP:g}; use more windows"
    )


def factorize(into: Factor, moments: InputMoments, diagonal: Tensor, order: Tensor | None) -> bool:
    """Q lower-triangular with Q^T Q = A in place of V: A is the moment in its order or in one int64 [n], with another
    diagonal float64 [n]. False, and anything in its place, where A is not positive definite.

    By panels of rows from the last, each of which first loses what those after explain of it: one long product a panel,
    faster than MKL's factorization.
    """
    index = torch.arange(len(diagonal), device=diagonal.device) if order is None else order
    for panel in reversed(cuts(len(diagonal), PANEL)):
        start, after = panel.start, into.below[panel.stop :]
        square = moments.entries(index[panel], index[panel])
        square.diagonal().copy_(diagonal[panel])
        square.addmm_(after[:, panel].T, after[:, panel], alpha=-1)
        # Rows and columns reversed, A = L L^T.
        lower, failed = torch.linalg.cholesky_ex(square.flip(0, 1))
        if failed:
            return False
        square = lower.mT.flip(0, 1)
        into.put(panel, square)
        rows = into.below[panel, :start]
        rows.copy_(moments.seen[:start, panel].T if order is None else moments.entries(index[panel], index[:start]))
        rows.addmm_(after[:, panel].T, after[:, :start], alpha=-1)
        rows.copy_(inverse_of(square).T @ rows)
    return True


def inverse_of(lower: Tensor) -> Tensor:
    """L^-1 of a lower-triangular L [k, k]."""
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False)


def invert(factor: Factor) -> None:
    """Q^-1 in place of the lower-triangular Q, by panels of rows: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1,
    C^-1]] with A^-1 from the panels before."""
    below, done = factor.below, list[tuple[slice, Tensor]]()
    for panel in cuts(len(factor.pivots), PANEL):
        inverse = inverse_of(factor.square(panel))
        for each, last in done:  # what it reads of this panel of B lies in and after the columns that it writes
            own = below[panel, each] @ last
            below[panel, each] = own.addmm_(below[panel, each.stop : panel.start], below[each.stop : panel.start, each])
        below[panel, : panel.start] = (inverse @ below[panel, : panel.start]).neg_()
        factor.put(panel, inverse)
        done.append((panel, inverse))


def corrected(weight: Tensor, moments: InputMoments, damping: float) -> Tensor:
    """W' minimising Σ ||W' x̂ - W x||² + λ ||W' - W||², float64 [out, in]; λ as in `inverse_factor` of Σ x̂ x̂^T.

    x̂ is what the rounded model feeds this linear, x what the unrounded one does:
    W' = W + W (X - X̂)^T X̂ (X̂^T X̂ + λ I)^-1.
    Rounding W' then minimises the error of the linear's output against the unrounded model's (the objective of GPTAQ,
    arXiv 2504.02692, solved for real weights first).
    """
    assert moments.cross is not None
    made = factor(moments, damping)
    # By panels of rows: no difference of two [in, in] is held, and no zeros of V are multiplied.
    right, half, change = (weight.new_empty(weight.shape[1], weight.shape[0]) for _ in range(3))
    panels = cuts(weight.shape[1], PANEL)
    for panel in panels:
        own = symmetric(moments.seen[panel, panel])
        seen = torch.cat([moments.seen[: panel.start, panel].T, own, moments.seen[panel, panel.stop :]], dim=1)
        torch.mm(moments.cross[panel] - seen, weight.T, out=right[panel])
    for panel in panels:
        torch.mm(made.square(panel).T, right[panel], out=half[panel])
        half[panel].addmm_(made.below[panel.stop :, panel].T, right[panel.stop :])
    for panel in panels:
        torch.mm(made.square(panel), half[panel], out=change[panel])
        change[panel].addmm_(made.below[panel, : panel.start], half[: panel.start])
    return weight + change.T


def factor(moments: InputMoments, damping: float, order: Tensor | None = None, key: Hashable = None) -> Factor:
    """`inverse_factor`, made once for all that share the inputs; `key` names the order."""
    return moments.once(("factor", damping, key), lambda: inverse_factor(moments, damping, order))


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
        made = factor(moments, self.damping, order, key=None if order is None else bands)
        # The weights of dead inputs are rounded as zeros.
        columns = torch.where(moments.seen.diagonal() == 0, 0.0, target)
        integers = self.integers(columns if order is None else columns[:, order], made, scale, bands)
        if order is not None:
            integers = integers[:, order.argsort()]
        return Rounded(PackedLinear.from_integers(integers, scale, bands, bias), target, made.damping)

    def order(self, moment: Tensor, bands: Bands) -> Tensor | None:
        """The columns in the order in which they are rounded, int64 [in]; None for the natural one."""
        if not self.act_order:
            return None
        energy = torch.diagonal(moment)
        return torch.cat([cut.start + energy[cut].argsort(descending=True, stable=True) for cut in bands.slices()])

    def integers(self, weight: Tensor, made: Factor, scale: Tensor, bands: Bands) -> Tensor:
        """Integers int8 [out, in]; weight and factor in the order of rounding."""
        # Columns as rows, so that the loop walks contiguous memory. A column that was rounded holds its error from then
        # on, and what the errors change in a column is subtracted when its block, its strip and itself come: each entry
        # is written four times in all, and most products are of matrices.
        columns = weight.T.clone(memory_format=torch.contiguous_format)
        steps = scale.T.to(torch.float64, memory_format=torch.contiguous_format)
        band_of = [(index, band.bits) for index, band in enumerate(bands) for _ in range(band.size)]
        below, pivots = made.below, made.pivots.tolist()
        integers = torch.empty_like(columns, dtype=torch.int8)

        def settle(start: int, stop: int, since: int) -> None:
            """Subtract from columns start … stop - 1 what the errors of since … start - 1 change in them."""
            if since < start:
                columns[start:stop].addmm_(below[start:stop, since:start], columns[since:start], alpha=-1)

        for start in range(0, bands.size, self.block):
            stop = min(start + self.block, bands.size)
            settle(start, stop, 0)
            for first in range(start, stop, STRIP):
                last = min(first + STRIP, stop)
                settle(first, last, start)
                for i in range(first, last):
                    column, (band, bits) = columns[i], band_of[i]
                    if i > first:
                        column.addmv_(columns[first:i].T, below[i, first:i], alpha=-1)
                    q = round_symmetric(column, steps[band], bits)
                    integers[i] = q
                    column.addcmul_(q, steps[band], value=-1).div_(pivots[i])
        return integers.T

    def __str__(self) -> str:
        words = f"gptq, damping {self.damping:g}, block {self.block}, clip search {'on' if self.clip_search else 'off'}"
        words += ", act-order inside bands" if self.act_order else ""
        words += ", Hessians of rounded inputs" if self.sees_rounded else ""
        return words + ("" if self.correction is None else f", weights corrected with damping {self.correction:g}")
