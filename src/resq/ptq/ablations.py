"""Single choices of the recipes undone or added, each a recipe of its own: what a choice is worth."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from resq.models.architecture import Site
from resq.ptq.basis.fixed import GatherHeads, hadamard
from resq.ptq.basis.pca import Pca, at_random, by_magnitude, none, pca, randomised_hadamard
from resq.ptq.precision import Precision
from resq.ptq.recipe import Recipe
from resq.ptq.recipes import GPTQ, RESQ, RESQ_PAPER, RESQ_WEIGHT_ONLY, UNIFORM
from resq.ptq.rounding.gptq import Gptq
from resq.ptq.rounding.nearest import Nearest

PCA = pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY, balance_heads=True)


def with_basis(name: str, about: str, basis: Pca, precision: Precision = RESQ.precision) -> Recipe:
    """resq on another basis of the residual stream, values, queries and keys."""
    return replace(
        RESQ, name=name, about=about, basis=(basis, GatherHeads(), hadamard(Site.MLP_HIDDEN)), precision=precision
    )


def with_rounding(recipe: Recipe, name: str, about: str, rounding: Gptq | Nearest) -> Recipe:
    """Another rounding of weights."""
    return replace(recipe, name=name, about=about, rounding=rounding)


def with_rank(rank: Fraction) -> Recipe:
    """resq with another share of the coordinates in 8 bit, 0 for none."""
    p = RESQ.precision
    cut = {
        name: layout and layout.with_rank(rank)
        for name, layout in {"weights": p.weights, "inputs": p.inputs, "key": p.key, "value": p.value}.items()
    }
    share = f"the top {rank} in 8 bit" if rank else "nothing in 8 bit"
    name = f"resq-rank-{str(rank).replace('/', '-')}"
    return replace(RESQ, name=name, about=f"resq with {share}", precision=replace(p, **cut))


ABLATIONS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        with_basis("resq-unrotated", "resq without rotations inside the parts", replace(PCA, rotation=none)),
        with_basis(
            "resq-random", "resq with a random subspace in 8 bit in place of PCA's", replace(PCA, pick=at_random)
        ),
        with_basis(
            "resq-magnitude",
            "resq with the coordinates of most power in 8 bit in place of PCA's subspace, rotated inside each part",
            replace(PCA, pick=by_magnitude),
        ),
        with_basis(
            "resq-uniform",
            "random rotations alone: 4 bit everywhere, no subspace",
            replace(PCA, pick=at_random, rotation=none),
            UNIFORM,
        ),
        with_basis(
            "resq-hadamard",
            "resq with randomised Hadamard matrices inside the parts in place of random rotations",
            replace(PCA, rotation=randomised_hadamard),
        ),
        replace(
            RESQ,
            name="resq-unbalanced",
            about="resq without balancing the heads before o_proj",
            basis=RESQ_PAPER.basis,
        ),
        replace(
            RESQ,
            name="resq-ranged-per-head",
            about="resq with a range per head before o_proj in place of balanced heads",
            basis=RESQ_PAPER.basis,
            precision=replace(RESQ.precision, output_per_head=True),
        ),
        with_rounding(RESQ, "resq-nearest", "resq with weights rounded to nearest", Nearest()),
        with_rounding(
            RESQ_WEIGHT_ONLY,
            "resq-weight-only-nearest",
            "resq-weight-only with weights rounded to nearest",
            Nearest(),
        ),
        with_rounding(RESQ, "resq-act-order", "resq with columns of large inputs rounded first", Gptq(act_order=True)),
        with_rounding(RESQ, "resq-no-clip-search", "resq with weights' ranges not searched", Gptq(clip_search=False)),
        with_rounding(
            RESQ,
            "resq-rounded-inputs",
            "resq with GPTQ on inputs whose activations and cache are rounded",
            Gptq(sees_rounded=True),
        ),
        *(with_rank(rank) for rank in (Fraction(1, 16), Fraction(1, 4), Fraction(1, 2), Fraction(0))),
        with_rounding(GPTQ, "gptq-act-order", "gptq with columns of large inputs rounded first", Gptq(act_order=True)),
    )
}
