"""Diagnostics: what they measure is what the formulas say, on models and checkpoints whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_checkpoint

import resq
from resq.backends.reference import dense
from resq.errors import InputError
from resq.measure.diagnose.attribution import Attribution, attribute
from resq.measure.diagnose.histograms import distributions
from resq.measure.diagnose.massive import massive_activations
from resq.measure.diagnose.places import Place
from resq.measure.diagnose.positions import by_position
from resq.measure.diagnose.snr import AS_THEY_COME, PICKS, inverse, mean_db, other_bases, snr
from resq.measure.diagnose.spectra import spectra
from resq.measure.perplexity import open_streamed, window_nll
from resq.models.source import Source
from resq.models.text import all_windows, load_tokenizer, sampled_windows
from resq.numerics.bands import INT4, INT8, Layout
from resq.numerics.maps import Dense, Diagonal, LinearMap, PerHead, Permutation, random_orthogonal
from resq.progress import silent
from resq.ptq.pipeline import fit_maps
from resq.ptq.placement import Placement
from resq.ptq.precision import Override, Precision
from resq.ptq.recipe import Moments, Recipe
from resq.ptq.recipes import RESQ, recipe_named
from resq.ptq.statistics import collect

WINDOWS, LENGTH, SEED = 16, 32, 3


def test_bands_of_eight_bits_are_24_6_db_above_four(tmp_path: Path) -> None:
    source = Source.open(make_checkpoint(tmp_path / "source"))
    tokens = torch.randint(3, 259, (4, 64), generator=torch.Generator().manual_seed(0))

    recipe = recipe_named("quarot")
    maps = fit_maps(recipe, Moments(0), source.shape, 0)  # rotated, coordinates are nearly Gaussian

    def uniform(layout: Layout) -> Placement:
        return Placement(source.shape, maps, Precision(*[layout] * 6), True)

    rows = snr(source, {"4": uniform(INT4), "8": uniform(INT8)}, tokens)
    assert {row.place for row in rows} == {str(place) for place in Place}
    for place in Place:
        wide, narrow = mean_db(rows, "8", place), mean_db(rows, "4", place)
        assert wide is not None
        assert narrow is not None
        # The step is (max - min) / (2^b - 1); errors are nearly uniform in it.
        assert wide - narrow == pytest.approx(20 * math.log10(255 / 15), abs=0.6), place


def test_what_is_not_rounded_has_no_ratio(tmp_path: Path) -> None:
    source = Source.open(make_checkpoint(tmp_path / "source"))
    precision = replace(recipe_named("rtn").precision, inputs=None, value=None)
    rows = snr(source, {"some": Placement(source.shape, {}, precision, False)}, torch.arange(3, 35)[None])
    assert {row.place for row in rows} == {"down_in", "key"}


def test_maps_that_are_not_orthogonal_are_undone() -> None:
    generator = torch.Generator().manual_seed(1)
    turns = torch.stack([random_orthogonal(4, generator) for _ in range(3)])
    scales = torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.5
    maps: list[LinearMap] = [
        PerHead(turns, scales),
        Permutation(torch.randperm(12, generator=generator)),
        Diagonal(torch.rand(12, generator=generator, dtype=torch.float64) + 0.5),
    ]
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    y = x
    for map in maps:
        y = map.apply(y)
    back = inverse(maps, 12)
    assert back is not None
    torch.testing.assert_close(y @ back, x)
    assert inverse([PerHead(turns), Dense(random_orthogonal(12, generator))], 12) is None


def test_distributions_count_every_coordinate_and_show_a_planted_outlier(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "source", dtype="float32")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7] *= 60.0  # one loud channel of down's input
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    source = Source.open(directory)
    tokens = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(0))
    recipe = recipe_named("quarot")
    placement = Placement(source.shape, fit_maps(recipe, Moments(0), source.shape, 0), recipe.precision, True)
    found = {each.place: each for each in distributions(source, placement, tokens, 1)}
    assert found.keys() == {str(place) for place in Place}
    for each in found.values():
        values = 60 * len(each.before_channels) * (source.shape.kv_heads if each.place in ("key", "value") else 1)
        assert sum(each.before.counts) == sum(sum(band.counts) for band in each.after) == values
    down = found["down_in"]
    assert down.before_channels.index(max(down.before_channels)) == 7
    assert down.before.kurtosis > 5 * down.after[0].kurtosis
    assert max(down.after_channels) < max(down.before_channels) / 2


def test_a_planted_massive_activation_is_found_where_it_is(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "source", dtype="float32")
    assert all(layer.count == 0 for layer in massive_activations(Source.open(directory), torch.arange(3, 43)[None]))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][77, 5] = -90.0
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tokens = torch.full((2, 16), 20)
    tokens[1, 11] = 77
    first = massive_activations(Source.open(directory), tokens)[0]
    assert first.count == 1
    (outlier,) = first.outliers
    assert (outlier.window, outlier.position, outlier.token, outlier.channel) == (1, 11, 77, 5)
    assert outlier.value == -90.0 == -first.largest


def test_spectra_are_shares_of_energy() -> None:
    shape = Source.open("tiny").shape
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(32, 1, generator=generator, dtype=torch.float64)
    turn, powers = random_orthogonal(16, generator), torch.tensor([7.0, 1.0] + [0.0] * 14, dtype=torch.float64)
    moments = Moments(
        9,
        direction @ direction.T,
        [torch.eye(16, dtype=torch.float64).repeat(2, 1, 1)] * shape.layers,
        [turn @ powers.diag() @ turn.T] * shape.layers,
    )
    residual, value, key, *_ = spectra(moments, shape)
    assert (residual.site, residual.layer, value.site, value.layer) == ("residual", None, "value", 0)
    assert residual.top == pytest.approx(1.0)
    assert value.top == pytest.approx(1 / 8)
    assert key.shares[:3] == pytest.approx((0.875, 0.125, 0.0))
    assert len(spectra(moments, shape)) == 1 + 2 * shape.layers


def test_buckets_of_positions_double_and_average() -> None:
    base = torch.zeros(2, 6)
    nll = torch.tensor([[1.0, 2, 4, 8, 8, 8], [3.0, 0, 0, 8, 8, 8]])
    found = by_position(nll, base, nll / 2)
    assert [(b.first, b.last, b.count) for b in found] == [(1, 1, 2), (2, 3, 4), (4, 6, 6)]
    assert [b.delta for b in found] == [2.0, 1.5, 8.0]
    assert [b.kl for b in found] == [1.0, 0.75, 4.0]
    with pytest.raises(InputError, match=r"\(2, 6\), \(2, 5\)"):
        by_position(nll, base[:, 1:], nll)


class Attributed:
    """A random model, a checkpoint of it, and the checkpoint's maps fitted again."""

    def __init__(self, place: Path, recipe: str | Recipe, **changes: Any) -> None:
        self.source = Source.open(make_checkpoint(place / "source", **changes))
        text = place / "text"
        text.write_text("the quick brown fox jumps over a lazy dog while it rains. " * 40, encoding="utf-8")
        tokenizer = load_tokenizer(self.source.path)
        tokens = sampled_windows([text], tokenizer, count=WINDOWS, length=LENGTH, seed=SEED).tokens
        self.windows = sampled_windows([text], tokenizer, count=6, length=40, seed=9).tokens
        self.recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
        self.made = resq.quantize(
            self.source.path,
            place / "packed",
            recipe=self.recipe,
            calibration=[text],
            windows=WINDOWS,
            window_length=LENGTH,
            seed=SEED,
        )
        self.moments = collect(self.source, dense(torch.float32), tokens, self.recipe.needs, silent)

    def placement(self, seed: int = SEED) -> Placement:
        maps = fit_maps(self.recipe, self.moments, self.source.shape, seed)
        return Placement(self.source.shape, maps, self.recipe.precision, self.recipe.folds_norms)

    def attribution(self, seed: int = SEED) -> Attribution:
        from resq.runtime.load import Opened

        return attribute(Opened(self.made.directory), self.source, self.placement(seed), self.windows)


def test_the_whole_is_what_eval_measures_and_parts_and_interaction_make_it_up(tmp_path: Path) -> None:
    case = Attributed(tmp_path, "resq-paper")
    found = case.attribution()
    packed = window_nll(open_streamed(case.made.directory), case.windows)
    sixteen = window_nll(open_streamed(case.source.path), case.windows)
    assert found.whole.delta.mean == pytest.approx(float((packed - sixteen).mean()), abs=1e-5)
    assert [part.name for part in found.parts] == ["weights", "inputs", "keys", "values", "rotation", "ends"]
    assert [part.name for part in found.layers] == ["0", "1"]
    total = sum(part.delta.mean for part in found.parts) + found.interaction
    assert total == pytest.approx(found.whole.delta.mean, abs=1e-9)
    # Every rounding does something, the whole more than any; 16-bit tables next to nothing.
    kl = {part.name: part.kl for part in found.parts}
    assert min(kl.values()) > 0
    assert kl["ends"] < 0.01 * kl["weights"]
    assert max(*kl.values(), *(part.kl for part in found.layers)) < found.whole.kl


def test_a_checkpoint_of_rounded_weights_owes_everything_to_them(tmp_path: Path) -> None:
    case = Attributed(tmp_path, "resq-weight-only", num_hidden_layers=1)
    found = case.attribution()
    assert [part.name for part in found.parts] == ["weights", "ends"]
    weights, ends = found.parts
    # Alone, the only layer and the weights are one and the same; 16-bit tables and cache are the rest.
    assert found.layers[0].kl == pytest.approx(weights.kl, rel=0.02)
    assert found.whole.kl == pytest.approx(weights.kl, rel=0.02)
    assert ends.kl < 0.01 * weights.kl


def test_a_layer_that_is_left_alone_costs_nothing(tmp_path: Path) -> None:
    kept = Override("layers.0.*", skip=True)
    recipe = replace(RESQ, precision=replace(RESQ.precision, overrides=(kept,)))
    found = Attributed(tmp_path, recipe).attribution()
    assert {part.name for part in found.parts} == {"weights", "inputs", "keys", "values", "ends"}
    first, second = found.layers
    assert first.kl < 0.01 * second.kl
    assert found.whole.kl == pytest.approx(second.kl, rel=0.05)


def test_another_basis_is_refused(tmp_path: Path) -> None:
    case = Attributed(tmp_path, "resq")
    with pytest.raises(InputError, match="not the source's in the basis given"):
        case.attribution(seed=SEED + 1)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-5m", "qwen2-5m"])
def test_principal_components_beat_loud_channels_beat_none(model: str, shared: Path) -> None:
    source, texts = Source.open(shared / "models" / model), shared / "data" / "wikitext-2"
    tokenizer = load_tokenizer(source.path)
    tokens = sampled_windows([texts / "wiki.train.first1MB.raw"], tokenizer, count=128, length=256, seed=0).tokens
    moments = collect(source, dense(torch.float32), tokens, RESQ.needs, silent)
    windows = all_windows(texts / "wiki.test.first400KB.raw", tokenizer, 256, wikitext=True).tokens[:16]
    rows = snr(source, other_bases(RESQ, moments, source.shape, 0), windows)
    db = {(row.method, row.layer, row.place): row.db for row in rows}

    def ordered(values: list[float | None]) -> bool:
        pca, loudest, none = (value for value in values if value is not None)
        return pca >= loudest >= none

    for place in (Place.ATTN_IN, Place.MLP_IN):
        assert ordered([mean_db(rows, name, place) for name in (*PICKS, AS_THEY_COME)]), place
    for layer in range(source.shape.layers):
        for place in (Place.VALUE, Place.KEY):
            found = [db[name, layer, str(place)] for name in (*PICKS, AS_THEY_COME)]
            assert ordered(found), (layer, place, found)
