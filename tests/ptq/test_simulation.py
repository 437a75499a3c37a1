"""The simulated loss is the loss of the decoder on the placed, rounded model, and it has a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resq.backends.backend import Backend
from resq.backends.reference import REFERENCE, dense, straight_through
from resq.models import decoder
from resq.models.architecture import Site
from resq.models.decoder import Layer
from resq.models.source import Source
from resq.numerics.bands import Bands
from resq.numerics.linear import DenseLinear
from resq.numerics.maps import Dense, LinearMap
from resq.progress import silent
from resq.ptq.pipeline import fit_maps
from resq.ptq.placement import Placement
from resq.ptq.precision import Precision
from resq.ptq.recipe import At, Recipe
from resq.ptq.recipes import QUIK, RECIPES, RESQ, SMOOTHQUANT_PLUS, SPINQUANT
from resq.ptq.rounding.nearest import Nearest
from resq.ptq.simulation import Simulation, nearest, rounded
from resq.ptq.statistics import collect, in_dtype


def tokens() -> Tensor:
    return torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(9))


def maps_of(source: Source, recipe: Recipe) -> dict[At, LinearMap]:
    moments = collect(source, dense(torch.float32), tokens().repeat(2, 1), recipe.needs, silent)
    return fit_maps(recipe, moments, source.shape, 0)


def decoded(source: Source, recipe: Recipe, maps: dict[At, LinearMap], ops: Backend, *, round_weights: bool) -> float:
    """Next-token loss of the whole placed model at once."""
    placement = Placement(source.shape, maps, recipe.precision, recipe.folds_norms)
    ends, layers = placement.ends(source.ends(), keep_tied=False), list[Layer]()
    for index in range(source.shape.layers):
        layer = placement.layer(source.layer(index), index)
        layer = rounded(layer, index, recipe.precision, source.shape) if round_weights else layer
        layers.append(in_dtype(layer, ops.dtype))
    logits = decoder.forward(ops, source.shape, ends, layers, tokens())[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1).double(), tokens()[:, 1:].flatten()))


@pytest.mark.parametrize("round_weights", [False, True])
@pytest.mark.parametrize("recipe", [RESQ, QUIK, SMOOTHQUANT_PLUS, SPINQUANT], ids=lambda recipe: recipe.name)
def test_the_loss_is_that_of_the_decoder_on_the_placed_layers(
    recipe: Recipe, round_weights: bool, checkpoint: Callable[..., Path]
) -> None:
    source = Source.open(checkpoint("qwen2"))
    maps = maps_of(source, recipe)
    got = float(Simulation(source, recipe, round_weights).loss(maps, tokens()))
    want = decoded(source, recipe, maps, straight_through(), round_weights=round_weights)
    assert got == pytest.approx(want, rel=1e-6)  # float32 sums of the same numbers
    # By the integers: in float64 up to the rounding, so that some of them differ by one.
    assert got == pytest.approx(decoded(source, recipe, maps, REFERENCE, round_weights=round_weights), rel=2e-2)
    unrounded = decoded(source, recipe, maps, dense(torch.float64), round_weights=False)
    assert abs(got - unrounded) > 1e-3


def test_without_rounding_it_is_the_models_own_loss(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint("qwen2"))
    plain = replace(RESQ, precision=Precision(None, None, None, None, None, None))
    want = decoded(source, replace(plain, basis=()), {}, dense(torch.float64), round_weights=False)
    got = Simulation(source, plain, round_weights=True).loss(maps_of(source, RESQ), tokens())
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_the_loss_has_a_gradient_and_the_same_value_with_and_without(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    maps = maps_of(source, RESQ)
    residual = maps[At(Site.RESIDUAL)]
    assert isinstance(residual, Dense)
    matrix = residual.matrix.clone().requires_grad_()
    for round_weights in (False, True):
        simulation = Simulation(source, RESQ, round_weights)
        loss = simulation.loss({**maps, At(Site.RESIDUAL): replace(residual, matrix=matrix)}, tokens())
        (gradient,) = torch.autograd.grad(loss, matrix)
        assert bool(torch.isfinite(gradient).all())
        assert float(gradient.norm()) > 1e-3
        with torch.no_grad():
            assert float(simulation.loss(maps, tokens())) == float(loss)


@pytest.mark.parametrize("pairs", [[(4, 40)], [(4, 35), (8, 5)], [(2, 5), (3, 30), (6, 5)], [(1, 5), (3, 30), (5, 5)]])
def test_weights_are_rounded_as_nearest_does(pairs: list[tuple[int, int]]) -> None:
    bands = Bands.of(*pairs)
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[3] = 0.0
    want = Nearest(clip_search=False)(weight, None, bands, None).linear.dequantize(torch.float64)
    # Its scales are float32.
    torch.testing.assert_close(nearest(weight, bands), want, rtol=2.0**-23, atol=0)


def test_rounded_weights_pass_the_gradient_of_the_unrounded(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    layer = source.layer(0)
    for role, linear in layer.linears.items():
        weight = linear.weight.double().requires_grad_()
        layer.linears[role] = DenseLinear(weight, linear.bias)
        found = rounded(layer, 0, RECIPES["rtn"].precision, source.shape).linears[role].weight
        upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((found * upstream).sum(), weight)
        assert torch.equal(gradient, upstream)
        assert not torch.equal(found, weight)
