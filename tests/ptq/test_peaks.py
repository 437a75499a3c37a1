"""Bases from the largest magnitudes leave logits unchanged and put outliers where they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import float64_logits
from torch import Tensor

from resq.backends.reference import dense
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import READERS, Point, Role, Site
from resq.models.decoder import Positions
from resq.models.source import Source
from resq.numerics.maps import Diagonal, LinearMap, PerHead, Permutation
from resq.progress import silent
from resq.ptq.basis.peaks import OutliersLast, SearchStrength, Smooth, ascending, outliers_last, smooth
from resq.ptq.pipeline import fit_maps
from resq.ptq.placement import Placement
from resq.ptq.recipe import At, Fitted, Moments, Recipe, Setting, Statistic
from resq.ptq.recipes import GPTQ, QUIK, SMOOTHQUANT_PLUS
from resq.ptq.simulation import Simulation
from resq.ptq.statistics import collect

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
# Float64 rounds at 1e-16; some hundred sums of some hundred terms through a few layers stay far below this.
UNCHANGED = 1e-10


def tokens(windows: int = 4) -> Tensor:
    return torch.randint(3, 259, (windows, 32), generator=torch.Generator().manual_seed(3))


def collected(source: Source) -> Moments:
    """In float64, so that peaks are those of the model to the last digits."""
    return collect(source, dense(torch.float64), tokens(), frozenset({Statistic.PEAKS}), silent)


def seen_peaks(source: Source, placement: Placement) -> list[dict[str, Tensor]]:
    """max |x| of every channel of each layer's inputs, keys and values as they are rounded, float64."""
    ops, found = dense(torch.float64), []
    hidden = decoder.embed(ops, placement.ends(source.ends(), keep_tied=False), tokens())
    at = Positions.following(source.shape, 0, *tokens().shape)
    for index in range(source.shape.layers):
        layer = placement.layer(source.layer(index), index)
        cache = ops.cache(layer.heads)
        x = decoder.attention_input(ops, layer, hidden)
        o = decoder.attention(ops, source.shape, layer, x, at, cache)
        m = decoder.mlp_input(ops, layer, hidden + ops.linear(o, layer.linears[Role.O]))
        down = decoder.mlp_hidden(ops, layer, m)
        keys, values = cache.read()
        inputs = {Point.ATTN_IN: x, Point.O_IN: o, Point.MLP_IN: m, Point.DOWN_IN: down}
        peaks = {point.value: each.abs().flatten(0, -2).amax(dim=0) for point, each in inputs.items()}
        peaks["key"] = keys.abs().flatten(0, 2).amax(dim=0)
        peaks["value"] = values.abs().amax(dim=(0, 2))
        found.append(peaks)
        hidden = decoder.forward_layer(ops, source.shape, layer, hidden, at)
    return found


@pytest.mark.parametrize("recipe", [QUIK, SMOOTHQUANT_PLUS], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("model", MODELS)
def test_placing_leaves_logits_unchanged(recipe: Recipe, model: str, checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint(**MODELS[model]))
    maps = fit_maps(recipe, collected(source), source.shape, 0)
    placement = Placement(source.shape, maps, recipe.precision, recipe.folds_norms)
    want = float64_logits(source, tokens())
    for keep_tied in (False, True):
        got = float64_logits(source, tokens(), placement, keep_tied=keep_tied)
        assert float((got - want).abs().max() / want.abs().max()) <= UNCHANGED


@pytest.mark.parametrize("model", MODELS)
def test_outliers_come_last_at_every_site(model: str, checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint(**MODELS[model]))
    maps = fit_maps(QUIK, collected(source), source.shape, 0)
    placement = Placement(source.shape, maps, QUIK.precision, QUIK.folds_norms)
    plain = Placement(source.shape, {}, GPTQ.precision, folds=False)
    for index, (after, before) in enumerate(zip(seen_peaks(source, placement), seen_peaks(source, plain), strict=True)):
        bands = {
            **{point.value: QUIK.precision.input_bands(index, point, source.shape) for point in READERS},
            "key": QUIK.precision.key_bands(index, source.shape),
            "value": QUIK.precision.value_bands(index, source.shape),
        }
        for name, peaks in after.items():
            sorted_before = before[name].sort(dim=-1).values
            if name == Point.DOWN_IN:
                torch.testing.assert_close(peaks, before[name], rtol=1e-9, atol=1e-12)
                continue
            torch.testing.assert_close(peaks, sorted_before, rtol=1e-9, atol=1e-12)
            cut = bands[name]
            assert cut is not None
            assert len(cut) == 2
            precise = cut.slices()[-1]
            assert (precise.stop - precise.start) * 8 == peaks.shape[-1]


def test_permutations_of_values_are_folded_and_the_others_online(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    maps = fit_maps(QUIK, collected(source), source.shape, 0)
    layer = Placement(source.shape, maps, QUIK.precision, folds=False).layer(source.layer(0), 0)
    online = [format.map for point, format in layer.inputs.items() if point is not Point.DOWN_IN]
    assert all(isinstance(map, Permutation) for map in (*online, layer.heads.query.map, layer.heads.key.map))
    assert layer.inputs[Point.DOWN_IN].map is layer.heads.value.map is None
    # Rows of v in the order of its heads' peaks; its columns are those of its input.
    alone = {at: map for at, map in maps.items() if at.site is Site.VALUE}
    layer = Placement(source.shape, alone, QUIK.precision, folds=False).layer(source.layer(0), 0)
    v = source.layer(0).linears[Role.V].weight.double().view(2, 16, -1)
    order = collected(source).peaks
    assert order is not None
    want = torch.stack([head[peak.argsort()] for head, peak in zip(v, order[0].value, strict=True)])
    assert torch.equal(layer.linears[Role.V].weight, want.flatten(0, 1))


def test_equal_peaks_keep_their_order() -> None:
    assert ascending(torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0])).tolist() == [3, 1, 4, 0, 2]


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("site", "point"),
    [
        (Site.ATTN_NORM_OUT, Point.ATTN_IN),
        (Site.MLP_NORM_OUT, Point.MLP_IN),
        (Site.MLP_HIDDEN, Point.DOWN_IN),
    ],
)
@pytest.mark.parametrize("model", ["llama", "biases"])
def test_smoothing_spreads_peaks_as_the_formula_says(
    site: Site, point: Point, strength: float, model: str, checkpoint: Callable[..., Path]
) -> None:
    """s = X^α / W^(1-α): inputs then have peaks X^(1-α) W^(1-α), weights X^α W^α."""
    source = Source.open(checkpoint(**MODELS[model]))
    moments = collected(source)
    assert moments.peaks is not None
    maps = Smooth((site,), strength).fit(moments, Setting(source.shape, GPTQ.precision, 0))
    placement = Placement(source.shape, maps, GPTQ.precision, folds=False)
    seen = seen_peaks(source, placement)
    for index, peaks in enumerate(moments.peaks):
        layer = placement.layer(source.layer(index), index)
        x, w = peaks.inputs[point], peaks.weights[point]
        torch.testing.assert_close(seen[index][point.value], (x * w) ** (1 - strength), rtol=1e-9, atol=0)
        columns = torch.cat([layer.linears[role].weight for role in READERS[point]]).abs().amax(dim=0)
        torch.testing.assert_close(columns, (x * w) ** strength, rtol=1e-9, atol=0)
        assert layer.inputs[point].map is None


def test_values_are_smoothed_for_all_query_heads_that_share_them(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())  # query heads 0 … 3 read kv head 0, 4 … 7 kv head 1
    moments = collected(source)
    assert moments.peaks is not None
    map = smooth(Site.VALUE).fit(moments, Setting(source.shape, GPTQ.precision, 0))[At(Site.VALUE, 1)]
    assert isinstance(map, PerHead)
    assert map.scales is not None
    peaks = moments.peaks[1]
    x, w = (each[Point.O_IN].view(2, 4, 16).amax(dim=1) for each in (peaks.inputs, peaks.weights))
    torch.testing.assert_close(map.scales, (w / x).sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(map.matrices, torch.eye(16, dtype=torch.float64).expand(2, 16, 16))


def test_silent_channels_are_not_scaled() -> None:
    scales = smooth(Site.MLP_HIDDEN).scales(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert scales.tolist() == [1.0, 1.0, 0.5]


def searched(source: Source, recipe: Recipe, search: SearchStrength) -> tuple[Fitted, list[tuple[str, int, int]], Any]:
    moments, seen = collected(source), []
    setting = Setting(source.shape, recipe.precision, 0)
    fitted = Fitted(source, recipe, fit_maps(recipe, moments, source.shape, 0), moments, tokens(), setting)
    return fitted, seen, search(fitted, lambda *step: seen.append(step))


def scales_of(map: LinearMap) -> Tensor:
    assert isinstance(map, Diagonal | PerHead)
    assert map.scales is not None
    return map.scales


def test_the_search_takes_the_strength_of_least_loss_and_notes_it(checkpoint: Callable[..., Path]) -> None:
    source, strengths = Source.open(checkpoint()), (0.2, 0.5, 0.9)
    search = SearchStrength(strengths, windows=2)
    fitted, seen, tuned = searched(source, SMOOTHQUANT_PLUS, search)
    (basis,) = SMOOTHQUANT_PLUS.basis
    assert isinstance(basis, Smooth)
    simulation, losses = Simulation(source, SMOOTHQUANT_PLUS, round_weights=True), []
    for strength in strengths:
        maps = replace(basis, strength=strength).fit(fitted.moments, fitted.setting)
        with torch.no_grad():
            losses.append(float(simulation.loss(maps, tokens()[:2])))
    assert list(tuned.losses) == losses
    assert len(set(losses)) == 3
    best = strengths[losses.index(min(losses))]
    assert tuned.notes == (f"smoothing strength {best:g}",)
    want = replace(basis, strength=best).fit(fitted.moments, fitted.setting)
    assert tuned.maps.keys() == want.keys() == fitted.maps.keys()
    assert all(torch.equal(scales_of(tuned.maps[at]), scales_of(map)) for at, map in want.items())
    assert seen == [("searching the strength of smoothing", step, 3) for step in (1, 2, 3)]


def test_a_search_without_smoothing_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"\Arecipe gptq has no smoothing whose strength could be searched\Z"):
        searched(Source.open(checkpoint()), GPTQ, SearchStrength())


def test_impossible_settings_are_refused_where_they_are_made() -> None:
    with pytest.raises(InputError, match="outliers_last has no map for mlp_hidden; it has for attn_norm_out"):
        outliers_last(Site.MLP_HIDDEN)
    with pytest.raises(InputError, match="smooth has no map for residual"):
        smooth(Site.RESIDUAL)
    for strength in (-0.1, 1.1):
        with pytest.raises(InputError, match=rf"smoothing has a strength in 0 … 1, got {strength}"):
            Smooth((), strength)
    for changes in ({"strengths": ()}, {"strengths": (2.0,)}, {"windows": 0}):
        with pytest.raises(InputError, match="a search takes strengths in 0 … 1 and at least 1 window"):
            SearchStrength(**changes)
    assert str(OutliersLast((Site.VALUE,))) == "outliers_last(value)"
