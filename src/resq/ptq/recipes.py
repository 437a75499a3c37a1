"""The methods on one page."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from resq.errors import InputError
from resq.models.architecture import Site
from resq.numerics.bands import INT4
from resq.ptq.basis.fixed import GatherHeads, HadamardBasis
from resq.ptq.basis.pca import pca
from resq.ptq.recipe import Precision, Recipe
from resq.ptq.rounding.gptq import Gptq
from resq.ptq.rounding.nearest import Nearest

# The model as it is, everything rounded to nearest: the floor.
RTN = Recipe(
    name="rtn",
    basis=(),
    precision=Precision(weights=INT4, inputs=INT4, key=INT4, value=INT4),
    rounding=Nearest(),
)

# 4 bit with the top 1/8 PCA subspace in 8 bit, random rotations inside each band, GPTQ.
RESQ = Recipe(
    name="resq",
    basis=(pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY, balance_heads=True), GatherHeads(), HadamardBasis()),
    precision=Precision(),
    rounding=Gptq(),
)

# ResQ as the authors' simulation does it: o_proj's input ranged per head, query/key rotation and its inputs in 8 bit.
RESQ_PAPER = replace(
    RESQ,
    name="resq-paper",
    basis=(pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY), GatherHeads(), HadamardBasis()),
    precision=replace(RESQ.precision, output_per_head=True, rotation_bits=8),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (RTN, RESQ, RESQ_PAPER)}


def recipe_named(name: str) -> Recipe:
    """A recipe of this page. Raises InputError with the nearest name."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"no recipe {name!r}; recipes are {', '.join(RECIPES)}{hint}")
    return RECIPES[name]
