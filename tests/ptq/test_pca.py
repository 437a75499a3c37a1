"""PCA maps catch the most energy, round held-out inputs better than other subspaces, and follow from the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resq.backends.reference import dense
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import Shape, Site
from resq.models.decoder import Positions
from resq.models.rope import Rope
from resq.models.source import Source
from resq.models.text import load_tokenizer, sampled_windows
from resq.numerics.affine import quantize
from resq.numerics.bands import INT4_INT8, Bands
from resq.numerics.maps import Dense, LinearMap, PerHead, random_orthogonal
from resq.numerics.moments import eigenbasis, second_moment
from resq.ptq.basis.pca import (
    Pick,
    Rotation,
    at_random,
    by_magnitude,
    by_variance,
    haar,
    none,
    pca,
    randomised_hadamard,
    rotated,
)
from resq.ptq.placement import fold_norms
from resq.ptq.recipe import At, Moments, Setting
from resq.ptq.recipes import RESQ
from resq.ptq.statistics import collect, in_dtype

EVERY = (Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_shape() -> Shape:
    return Shape(64, 3, 4, 2, 16, 96, 259, 1e-5, Rope((1.0,) * 8), True, 256)


def small_moments(seed: int = 0) -> Moments:
    """Moments of correlated inputs for `small_shape`."""

    def moment(size: int, *lead: int, at: int) -> Tensor:
        scales = torch.linspace(-3, 1, size, dtype=torch.float64).exp()
        x = gaussian(*lead, 500, size, seed=1000 * seed + at) * scales
        return second_moment(x @ random_orthogonal(size, torch.Generator().manual_seed(at)))

    return Moments(
        500,
        moment(64, at=1),
        [moment(16, 2, at=10 + layer) for layer in range(3)],
        [moment(16, at=20 + layer) for layer in range(3)],
    )


def matrices(maps: dict[At, LinearMap]) -> dict[tuple[At, int], Tensor]:
    """Every map as matrices, one per head."""
    found = {}
    for at, map in maps.items():
        assert isinstance(map, Dense | PerHead)
        each = map.matrices if isinstance(map, PerHead) else map.matrix[None]
        found |= {(at, head): matrix for head, matrix in enumerate(each)}
    return found


def parts_of(moments: Moments) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    assert moments.residual is not None
    assert moments.value is not None
    assert moments.key is not None
    return moments.residual, moments.value, moments.key


def moment_at(moments: Moments, at: At, head: int) -> Tensor:
    residual, values, keys = parts_of(moments)
    if at.layer is None:
        return residual
    return keys[at.layer] if at.site is Site.QUERY_KEY else values[at.layer][head]


def energy(moment: Tensor, columns: Tensor) -> float:
    """||X P||² from X^T X."""
    return float(torch.trace(columns.T @ moment @ columns))


def magnitude_order(x: Tensor) -> Tensor:
    """The permutation matrix that puts the coordinates with the largest max|x| last."""
    return torch.eye(x.shape[-1], dtype=torch.float64)[:, x.abs().amax(dim=0).argsort()]


def rounding_error(x: Tensor, turn: Tensor, bands: Bands) -> float:
    """Mean ||x U - dq(q(x U))||² per token."""
    y = (x.double() @ turn).float()
    return float((y - quantize(y, bands).dequantize()).double().square().sum(dim=-1).mean())


def assert_pca_rounds_best(calibration: Tensor, moment: Tensor, held_out: Tensor) -> None:
    size = held_out.shape[-1]
    bands = INT4_INT8.bands(size, 8)
    bases = {
        "pca": eigenbasis(moment)[1],
        "random": random_orthogonal(size, torch.Generator().manual_seed(99)),
        "magnitude": magnitude_order(calibration),
    }
    for seed in range(3):
        errors = {
            name: rounding_error(held_out, rotated(basis, bands, torch.Generator().manual_seed(seed)), bands)
            for name, basis in bases.items()
        }
        assert errors["pca"] < min(errors["random"], errors["magnitude"]), errors


def test_the_precise_band_holds_the_most_energy_a_subspace_of_its_size_can(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    tokens = torch.randint(3, 259, (8, 32), generator=torch.Generator().manual_seed(0))
    moments = collect(source, dense(torch.float32), tokens, RESQ.needs, lambda what, done, steps: None)
    setting = Setting(source.shape, RESQ.precision, 0)
    found = matrices(pca(*EVERY).fit(moments, setting))
    assert len(found) == 1 + 2 * 2 + 2
    for (at, head), turn in found.items():
        moment, bands = moment_at(moments, at, head), setting.bands(at)
        assert len(bands) == 2
        precise = bands.slices()[-1]
        size = precise.stop - precise.start
        got, total = energy(moment, turn[:, precise]), float(torch.trace(moment))
        most = float(torch.linalg.eigvalsh(moment)[-size:].sum())
        assert got == pytest.approx(most, rel=1e-10)
        others = [torch.eye(len(moment), dtype=torch.float64)[:, torch.diagonal(moment).argsort()[-size:]]]
        others += [random_orthogonal(len(moment), torch.Generator().manual_seed(seed))[:, :size] for seed in range(5)]
        assert all(energy(moment, other) < got for other in others)
        assert got > total * size / len(moment)


def test_three_bands_hold_ascending_parts_of_the_spectrum() -> None:
    moment, bands = parts_of(small_moments())[0], Bands.of((2, 8), (4, 48), (6, 8))
    turn = rotated(eigenbasis(moment)[1], bands, torch.Generator().manual_seed(0))
    values = torch.linalg.eigvalsh(moment)
    for cut in bands.slices():
        assert energy(moment, turn[:, cut]) == pytest.approx(float(values[cut].sum()), rel=1e-10)


def test_maps_are_orthogonal_in_float64() -> None:
    for turn in matrices(pca(*EVERY).fit(small_moments(), Setting(small_shape(), RESQ.precision, 0))).values():
        assert turn.dtype == torch.float64
        identity = torch.eye(len(turn), dtype=torch.float64)
        torch.testing.assert_close(turn.T @ turn, identity, rtol=0, atol=1e-13)


def test_a_rotation_inside_a_band_mixes_all_its_coordinates_and_no_other() -> None:
    moment, bands = parts_of(small_moments())[0], Bands.of((4, 56), (8, 8))
    vectors = eigenbasis(moment)[1]
    inside = vectors.T @ rotated(vectors, bands, torch.Generator().manual_seed(0))
    assert float(inside[:56, 56:].abs().max()) < 1e-13
    assert float(inside[56:, :56].abs().max()) < 1e-13
    assert float(inside[56:, 56:].abs().min()) > 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_pca_rounds_held_out_anisotropic_inputs_better_than_other_subspaces(seed: int) -> None:
    """Energy decaying over directions that are no coordinates, as in a residual stream."""
    turn = random_orthogonal(128, torch.Generator().manual_seed(seed))
    scales = torch.linspace(-4, 1, 128, dtype=torch.float64).exp()
    x = (gaussian(4000, 128, seed=seed) * scales) @ turn
    assert_pca_rounds_best(x[:2000], second_moment(x[:2000]), x[2000:])


def test_pca_rounds_a_trained_models_held_out_attention_inputs_best(shared: Path) -> None:
    source = Source.open(shared / "models" / "llama-5m")
    tokenizer, texts = load_tokenizer(source.path), shared / "data" / "wikitext-2"

    def windows(name: str, count: int) -> Tensor:
        return sampled_windows([texts / name], tokenizer, count=count, length=128, seed=0).tokens

    train = windows("wiki.train.first1MB.raw", 16)
    moments = collect(source, dense(torch.float32), train, pca(Site.RESIDUAL).needs, lambda what, done, steps: None)
    assert moments.residual is not None
    known = attention_inputs(source, train).flatten(0, 1)
    for held_out in ("wiki.valid.first100KB.raw", "wiki.test.first400KB.raw"):
        new = attention_inputs(source, windows(held_out, 8)).flatten(0, 1)
        assert_pca_rounds_best(known, moments.residual, new)


def attention_inputs(source: Source, tokens: Tensor) -> Tensor:
    """Gain-free inputs of q, k, v in every layer, float32 [layers, tokens, hidden]."""
    ops = dense(torch.float32)
    hidden = decoder.embed(ops, source.ends(), tokens)
    at = Positions.following(source.shape, 0, len(tokens), tokens.shape[1])
    inputs = []
    for index in range(source.shape.layers):
        layer = in_dtype(fold_norms(source.layer(index)), ops.dtype)
        inputs.append(decoder.attention_input(ops, layer, hidden).flatten(0, 1))
        hidden = decoder.forward_layer(ops, source.shape, layer, hidden, at)
    return torch.stack(inputs)


ROTATIONS = {"haar": haar, "randomised_hadamard": randomised_hadamard, "none": none}


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("pick", [by_variance, by_magnitude, at_random])
def test_every_pick_and_rotation_gives_orthogonal_maps_that_follow_from_the_seed(
    pick: Pick, rotation: Rotation
) -> None:
    setting = Setting(small_shape(), RESQ.precision, 0)
    basis = pca(*EVERY, pick=pick, rotation=rotation)
    first, again = (matrices(basis.fit(small_moments(), setting)) for _ in range(2))
    for key, turn in first.items():
        assert torch.equal(turn, again[key])
        identity = torch.eye(len(turn), dtype=torch.float64)
        torch.testing.assert_close(turn.T @ turn, identity, rtol=0, atol=1e-13)
    other = matrices(basis.fit(small_moments(), replace(setting, seed=1)))
    drawn = pick is at_random or rotation is not none
    assert all(not torch.equal(turn, other[key]) for key, turn in first.items()) == drawn


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_a_pick_decides_the_subspace_and_no_rotation_changes_it(rotation: Rotation) -> None:
    moments, setting = small_moments(), Setting(small_shape(), RESQ.precision, 0)
    held = {}
    for pick in (by_variance, by_magnitude, at_random):
        found = matrices(pca(*EVERY, pick=pick, rotation=rotation).fit(moments, setting))
        plain = matrices(pca(*EVERY, pick=pick, rotation=none).fit(moments, setting))
        for (at, head), turn in found.items():
            cut = setting.bands(at).slices()[-1]
            assert energy(moment_at(moments, at, head), turn[:, cut]) == pytest.approx(
                energy(moment_at(moments, at, head), plain[at, head][:, cut]), rel=1e-10
            )
        held[pick] = energy(moments_residual(moments), found[At(Site.RESIDUAL), 0][:, -8:])
    powers = torch.diagonal(moments_residual(moments)).sort().values
    assert held[by_variance] == pytest.approx(float(torch.linalg.eigvalsh(moments_residual(moments))[-8:].sum()))
    assert held[by_magnitude] == pytest.approx(float(powers[-8:].sum()))
    assert held[by_variance] > held[by_magnitude] > held[at_random]


def moments_residual(moments: Moments) -> Tensor:
    return parts_of(moments)[0]


def test_without_a_rotation_the_basis_is_the_pick_itself() -> None:
    moments, setting = small_moments(), Setting(small_shape(), RESQ.precision, 0)
    found = matrices(pca(*EVERY, rotation=none).fit(moments, setting))
    assert all(torch.equal(turn, eigenbasis(moment_at(moments, at, head))[1]) for (at, head), turn in found.items())
    turn = matrices(pca(Site.RESIDUAL, pick=by_magnitude, rotation=none).fit(moments, setting))[At(Site.RESIDUAL), 0]
    assert torch.equal(turn.sum(dim=0), torch.ones(64, dtype=torch.float64))
    powers = torch.diagonal(moments_residual(moments))
    assert bool((torch.diagonal(turn.T @ torch.diag(powers) @ turn).diff() >= 0).all())


@pytest.mark.parametrize("size", [8, 32, 56, 224])
def test_a_randomised_hadamard_matrix_of_a_bands_size_spreads_every_coordinate_evenly(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    turn = randomised_hadamard(size, generator)
    torch.testing.assert_close(turn.abs(), torch.full_like(turn, size**-0.5), rtol=1e-12, atol=0)
    assert not torch.equal(turn, randomised_hadamard(size, generator))


def test_a_basis_says_what_it_picks_and_how_it_rotates_where_that_is_not_usual() -> None:
    assert str(pca(Site.VALUE, pick=by_magnitude)) == "pca(value, picked by_magnitude, rotation haar)"
    assert str(pca(Site.VALUE, rotation=none)) == "pca(value, picked by_variance, rotation none)"


def test_a_site_without_a_moment_is_refused() -> None:
    with pytest.raises(InputError, match=r"\Apca has no map for mlp_hidden; it has for residual, value, query_key\Z"):
        pca(Site.VALUE, Site.MLP_HIDDEN)


def test_the_same_seed_gives_the_same_maps_and_another_seed_others() -> None:
    def maps(seed: int) -> dict[tuple[At, int], Tensor]:
        return matrices(pca(*EVERY).fit(small_moments(), Setting(small_shape(), RESQ.precision, seed)))

    first, again, other = maps(0), maps(0), maps(1)
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_a_map_does_not_depend_on_the_other_sites_or_their_order() -> None:
    setting, moments = Setting(small_shape(), RESQ.precision, 0), small_moments()
    together = matrices(pca(*EVERY).fit(moments, setting))
    torch.manual_seed(5)
    apart = {}
    for site in reversed(EVERY):
        apart |= matrices(pca(site).fit(moments, setting))
    backwards = matrices(pca(*reversed(EVERY)).fit(moments, setting))
    for key, turn in together.items():
        assert torch.equal(turn, apart[key])
        assert torch.equal(turn, backwards[key])


def test_equal_moments_in_two_places_get_different_rotations() -> None:
    moments = small_moments()
    _, values, keys = parts_of(moments)
    keys[1] = keys[0]
    values[0][1] = values[0][0]
    found = matrices(pca(*EVERY).fit(moments, Setting(small_shape(), RESQ.precision, 0)))
    assert not torch.equal(found[At(Site.QUERY_KEY, 0), 0], found[At(Site.QUERY_KEY, 1), 0])
    assert not torch.equal(found[At(Site.VALUE, 0), 0], found[At(Site.VALUE, 0), 1])


def test_balanced_heads_have_the_same_power_in_each_band() -> None:
    moments, setting = small_moments(), Setting(small_shape(), RESQ.precision, 0)
    loudness = torch.tensor([0.01, 25.0], dtype=torch.float64)[:, None, None]
    outputs = [moment * loudness for moment in parts_of(moments)[1]]
    moments = replace(moments, value=outputs)
    maps = pca(Site.VALUE, balance_heads=True).fit(moments, setting)
    plain = pca(Site.VALUE).fit(moments, setting)
    for at, map in maps.items():
        before = plain[at]
        assert at.layer is not None
        assert isinstance(map, PerHead)
        assert isinstance(before, PerHead)
        assert map.scales is not None
        assert before.scales is None
        assert torch.equal(map.matrices, before.matrices)
        powers = torch.einsum("gij,gik,gkj->gj", map.matrices, outputs[at.layer], map.matrices)
        for cut in setting.bands(At(Site.ATTN_OUT, 0)).slices():
            factors = map.scales[:, cut]
            assert torch.equal(factors, factors[:, :1].expand_as(factors))
            quiet, loud = (powers[:, cut] * factors.square()).mean(dim=1).tolist()
            assert quiet == pytest.approx(loud, rel=1e-12)
            assert float(factors[:, 0].log().sum()) == pytest.approx(0.0, abs=1e-12)


def test_a_silent_head_is_not_scaled() -> None:
    moment = small_moments()
    outputs = [torch.zeros(2, 16, 16, dtype=torch.float64) for _ in range(3)]
    outputs[1][1] = torch.eye(16, dtype=torch.float64)
    setting = Setting(small_shape(), RESQ.precision, 0)
    for map in pca(Site.VALUE, balance_heads=True).fit(replace(moment, value=outputs), setting).values():
        assert isinstance(map, PerHead)
        assert map.scales is not None
        torch.testing.assert_close(map.scales, torch.ones_like(map.scales), rtol=1e-12, atol=0)


def test_fewer_tokens_than_twice_the_hidden_size_are_refused() -> None:
    setting, moments = Setting(small_shape(), RESQ.precision, 0), small_moments()
    few = Moments(127, moments.residual, moments.value, moments.key)
    with pytest.raises(InputError, match=r"127 calibration tokens are too few for a basis of 64.*at least 128"):
        pca(*EVERY).fit(few, setting)
    pca(*EVERY).fit(Moments(128, moments.residual, moments.value, moments.key), setting)
    pca(Site.VALUE, Site.QUERY_KEY).fit(few, setting)
