"""The methods on one page."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from resq.errors import InputError, nearest
from resq.models.architecture import Site
from resq.numerics.bands import INT4, INT8, Layout
from resq.ptq.basis.fixed import GatherHeads, hadamard
from resq.ptq.basis.pca import pca
from resq.ptq.basis.peaks import SearchStrength, outliers_last, smooth
from resq.ptq.clipping import ClipSearch
from resq.ptq.learning import learn_rotations
from resq.ptq.precision import Precision
from resq.ptq.recipe import Recipe
from resq.ptq.rounding.gptq import Gptq
from resq.ptq.rounding.nearest import Nearest

UNIFORM = Precision(weights=INT4, inputs=INT4, key=INT4, value=INT4)

RTN = Recipe(
    name="rtn",
    about="the model as it is, everything rounded to nearest: the floor",
    basis=(),
    precision=UNIFORM,
    rounding=Nearest(),
)

GPTQ = replace(
    RTN, name="gptq", about="the same, weights rounded by GPTQ on calibration text (arXiv 2210.17323)", rounding=Gptq()
)

QUAROT = Recipe(
    name="quarot",
    about="Hadamard rotations everywhere, one width everywhere, GPTQ (arXiv 2404.00456)",
    basis=(hadamard(Site.RESIDUAL, Site.VALUE, Site.ATTN_OUT, Site.QUERY_KEY, Site.MLP_HIDDEN),),
    precision=UNIFORM,
    rounding=Gptq(),
)

SPINQUANT = Recipe(
    name="spinquant",
    about="rotations of the residual stream and of values learned from random Hadamard ones, GPTQ (arXiv 2405.16406)",
    basis=(hadamard(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY, Site.MLP_HIDDEN, signed=(Site.RESIDUAL, Site.VALUE)),),
    precision=UNIFORM,
    rounding=Gptq(),
    tuning=(learn_rotations(Site.RESIDUAL, Site.VALUE),),
)

SMOOTHQUANT_PLUS = Recipe(
    name="smoothquant+",
    about="outliers moved from activations into weights, one strength searched on the loss, GPTQ (arXiv 2312.03788)",
    basis=(smooth(Site.ATTN_NORM_OUT, Site.MLP_NORM_OUT, Site.VALUE, Site.MLP_HIDDEN),),
    precision=UNIFORM,
    rounding=Gptq(),
    tuning=(SearchStrength(),),
)

QUIK = Recipe(
    name="quik",
    about="the 1/8 of the channels with the largest outliers in 8 bit, the rest in 4, GPTQ (arXiv 2310.09259)",
    basis=(outliers_last(Site.ATTN_NORM_OUT, Site.MLP_NORM_OUT, Site.ATTN_OUT, Site.VALUE, Site.QUERY_KEY),),
    precision=Precision(),
    rounding=Gptq(),
)

RESQ = Recipe(
    name="resq",
    about="4 bit with the top 1/8 PCA subspace in 8 bit, rotations inside each part, GPTQ (arXiv 2412.14363)",
    basis=(
        pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY, balance_heads=True),
        GatherHeads(),
        hadamard(Site.MLP_HIDDEN),
    ),
    precision=Precision(),
    rounding=Gptq(),
)

RESQ_PAPER = replace(
    RESQ,
    name="resq-paper",
    about="resq as its authors simulate it: o_proj's input ranged per head, query/key rotation in 8 bit",
    basis=(pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY), GatherHeads(), hadamard(Site.MLP_HIDDEN)),
    precision=replace(RESQ.precision, output_per_head=True, rotation_bits=8),
)

RESQ_W4A8KV4 = replace(
    RESQ,
    name="resq-w4a8kv4",
    about="weights and KV cache as in resq, activations in 8 bit",
    precision=replace(RESQ.precision, inputs=INT8, down_inputs=INT8),
)

# No map of queries and keys and no balance of heads: both serve roundings that do not happen here. The gather stays:
# o's weights have bands, which must be contiguous. The Hadamard transform stays for down's 4-bit weights: without it
# the logits' KL divergence from 16 bit is 0.0089 nats in place of 0.0061 on llama-5m, 0.0082 in place of 0.0057 on
# qwen2-5m (60 windows of 256, one seed).
RESQ_WEIGHT_ONLY = Recipe(
    name="resq-weight-only",
    about="weights as in resq, activations and KV cache in 16 bit",
    basis=(pca(Site.RESIDUAL, Site.VALUE), GatherHeads(), hadamard(Site.MLP_HIDDEN)),
    precision=replace(RESQ.precision, inputs=None, down_inputs=None, key=None, value=None),
    rounding=Gptq(),
)

# Only v and o absorb a map, and no norm is folded: every other linear stays as it is, bit for bit. The cache has a
# range per head, so there is nothing to balance. The rounding meets no weight.
RESQ_KV = Recipe(
    name="resq-kv",
    about="the KV cache as in resq, weights and activations in 16 bit",
    basis=(pca(Site.VALUE, Site.QUERY_KEY),),
    precision=replace(RESQ.precision, weights=None, inputs=None, down_weights=None, down_inputs=None),
    rounding=Nearest(),
)

ISO_BIT = Layout(4, last=((6, Fraction(1, 8)),), first=((2, Fraction(1, 8)),))

RESQ_246 = replace(
    RESQ,
    name="resq-246",
    about="resq at exactly 4 bits on average: the least important 1/8 in 2 bit, the top 1/8 in 6",
    precision=Precision(weights=ISO_BIT, inputs=ISO_BIT, key=ISO_BIT, value=ISO_BIT),
)

RESQ_LEARNED = replace(
    RESQ,
    name="resq-learned",
    about="resq with the rotations inside each part learned as in spinquant, the subspaces held",
    tuning=(learn_rotations(Site.RESIDUAL, Site.VALUE),),
)

# What was tried, and what each part gives: docs/resq-plus.md.
RESQ_PLUS = replace(
    RESQ,
    name="resq+",
    about="resq with clipped activation ranges, weights corrected for the rounding before them: same bits and speed",
    rounding=Gptq(sees_rounded=True, correction=1.0),
    clipping=ClipSearch(),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        RTN,
        GPTQ,
        SMOOTHQUANT_PLUS,
        QUIK,
        QUAROT,
        SPINQUANT,
        RESQ,
        RESQ_PLUS,
        RESQ_PAPER,
        RESQ_246,
        RESQ_LEARNED,
        RESQ_W4A8KV4,
        RESQ_WEIGHT_ONLY,
        RESQ_KV,
    )
}


def recipe_named(name: str) -> Recipe:
    """A recipe of this page, an ablation, or what a .toml or .json file describes. Raises InputError with the nearest
    name."""
    # Both build on this page.
    from resq.ptq.ablations import ABLATIONS
    from resq.ptq.recipe_file import ENDINGS, read_recipe

    known = RECIPES | ABLATIONS
    if name.endswith(ENDINGS):
        return read_recipe(name, known)
    if name not in known:
        raise InputError(
            f"no recipe {name!r}; recipes are {', '.join(RECIPES)}, an ablation, or a .toml or .json file"
            f"{nearest(name, known)}"
        )
    return known[name]
