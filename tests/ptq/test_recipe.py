"""A recipe that means nothing is refused where it is made, and one that does says so in words."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from resq.errors import InputError
from resq.models.architecture import READERS, Point, Role, Shape, Site
from resq.models.rope import Rope
from resq.numerics.bands import INT4, INT4_INT8, INT8, Layout
from resq.numerics.maps import Permutation
from resq.ptq.basis.fixed import GatherHeads, HadamardBasis
from resq.ptq.basis.pca import pca
from resq.ptq.pipeline import check_sizes
from resq.ptq.recipe import At, Basis, Moments, Precision, Recipe, Setting, Statistic
from resq.ptq.recipes import RECIPES, RESQ, RESQ_PAPER, RTN, recipe_named
from resq.ptq.rounding.nearest import Nearest

UNIFORM = Precision(weights=INT4, inputs=INT4, key=INT4, value=INT4)
ISO = Layout(4, ((6, Fraction(1, 8)),), ((2, Fraction(1, 8)),))


def recipe(basis: tuple[Basis, ...], precision: Precision = UNIFORM) -> Recipe:
    return Recipe("mine", basis, precision, Nearest())


def shape(hidden: int = 64, heads: int = 8, kv_heads: int = 2, head_dim: int = 16, ffn: int = 172) -> Shape:
    rope = Rope((1.0,) * (head_dim // 2))
    return Shape(hidden, 2, heads, kv_heads, head_dim, ffn, 259, 1e-5, rope, True, 256)


@pytest.mark.parametrize(
    ("basis", "site"),
    [
        ((pca(Site.RESIDUAL), pca(Site.VALUE, Site.RESIDUAL)), "residual"),
        ((HadamardBasis(), HadamardBasis()), "mlp_hidden"),
        ((GatherHeads(), HadamardBasis(), GatherHeads()), "attn_out"),
    ],
)
def test_two_bases_on_one_site_are_refused_by_its_name(basis: tuple[Basis, ...], site: str) -> None:
    with pytest.raises(InputError, match=f"recipe mine: two bases change {site};"):
        recipe(basis)


@pytest.mark.parametrize("banded", [INT4_INT8, ISO], ids=["4/8", "2/4/6"])
@pytest.mark.parametrize(
    ("field", "what", "basis"),
    [
        ("inputs", "inputs and weights", (pca(Site.VALUE, Site.QUERY_KEY), GatherHeads(), HadamardBasis())),
        ("weights", "inputs and weights", ()),
        ("inputs", "o_proj", (pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY), HadamardBasis())),
        ("weights", "o_proj", (pca(Site.RESIDUAL),)),
        ("key", "keys", (pca(Site.RESIDUAL, Site.VALUE), GatherHeads())),
        ("value", "values", (pca(Site.RESIDUAL, Site.QUERY_KEY), GatherHeads())),
        ("down_inputs", "down_proj", (HadamardBasis(),)),
        ("down_weights", "down_proj", ()),
    ],
)
def test_bands_where_no_basis_orders_coordinates_are_refused(
    field: str, what: str, basis: tuple[Basis, ...], banded: Layout
) -> None:
    with pytest.raises(InputError, match=f"recipe mine: {what} are cut into bands, but no basis orders"):
        recipe(basis, replace(UNIFORM, **{field: banded}))


@pytest.mark.parametrize("layout", [None, INT4, INT8])
def test_one_band_everywhere_needs_no_basis(layout: Layout | None) -> None:
    precision = Precision(layout, layout, layout, layout, layout, layout, layout)
    assert recipe((), precision).needs == frozenset()


def test_a_recipe_needs_what_its_bases_need() -> None:
    assert RESQ.needs == set(Statistic)
    assert recipe((pca(Site.VALUE),)).needs == {Statistic.VALUE}
    assert recipe((pca(Site.VALUE, balance_heads=True),)).needs == {Statistic.VALUE}
    assert recipe((HadamardBasis(), GatherHeads())).needs == frozenset()


def test_norms_fold_exactly_when_the_residual_stream_is_rotated() -> None:
    assert RESQ.folds_norms
    assert not RTN.folds_norms
    assert not recipe((pca(Site.VALUE, Site.QUERY_KEY), HadamardBasis())).folds_norms


def test_with_low_changes_the_low_band_everywhere_but_at_the_head() -> None:
    low = replace(RESQ.precision, head=INT8, key=None).with_low(3)
    assert (low.weights, low.inputs, low.value) == (Layout(3, INT4_INT8.last),) * 3
    assert (low.down_weights, low.down_inputs) == (Layout(3),) * 2
    assert (low.head, low.key) == (INT8, None)
    assert ISO.with_low(3) == Layout(3, ISO.last, ISO.first)
    assert RESQ.precision.with_low(4) == RESQ.precision


def test_options_that_are_not_widths_survive_with_low() -> None:
    low = RESQ_PAPER.precision.with_low(3)
    assert (low.output_per_head, low.rotation_bits) == (True, 8)


@pytest.mark.parametrize(
    ("layout", "given"),
    [
        (Layout(4, ((8, Fraction(1)),)), {}),
        (Layout(4, ((8, Fraction(9, 10)),)), {"head_dim": 4}),
        (Layout(4, ((8, Fraction(1, 8)),), ((2, Fraction(1, 8)),)), {"head_dim": 2}),
        (INT4_INT8, {"hidden": 8}),
    ],
)
def test_bands_that_leave_no_low_band_are_refused_before_any_work(layout: Layout, given: dict[str, int]) -> None:
    precision = Precision(layout, layout, INT4, INT4, layout, layout)
    with pytest.raises(InputError, match="coordinates for the low band"):
        check_sizes(precision, shape(**given))


@pytest.mark.parametrize(
    ("precision", "role"),
    [
        (replace(RESQ.precision, weights=INT4), "q"),
        (Precision(down_weights=INT4, down_inputs=INT4_INT8), "down"),
        (replace(RESQ_PAPER.precision, inputs=INT8), "o"),
    ],
    ids=["one-weight-band", "down", "ranges-per-head"],
)
def test_weights_that_are_not_cut_where_inputs_are_get_refused_before_any_work(precision: Precision, role: str) -> None:
    with pytest.raises(InputError, match=f"weights of {role} are cut into"):
        check_sizes(precision, shape())


def test_weights_may_be_cut_finer_than_inputs_and_either_may_stay_16_bit() -> None:
    for changes in ({"inputs": INT8}, {"inputs": None}, {"weights": None}, {"down_weights": INT8}):
        check_sizes(replace(RESQ.precision, **changes), shape())


def test_sizes_of_every_recipe_fit_small_and_odd_models() -> None:
    for each in RECIPES.values():
        for given in ({}, {"head_dim": 2}, {"hidden": 36, "head_dim": 6, "ffn": 107}, {"heads": 14, "kv_heads": 2}):
            check_sizes(each.precision, shape(**given))


def test_inputs_and_weights_of_a_linear_are_cut_at_the_same_places() -> None:
    for precision in (RESQ.precision, RTN.precision, Precision(ISO, ISO, INT4, INT4, ISO, ISO)):
        for point, roles in READERS.items():
            inputs = precision.input_bands(point, shape())
            for role in roles:
                weights = precision.weight_bands(role, point, shape())
                assert inputs is not None
                assert weights is not None
                assert [cut.start for cut in inputs.slices()] == [cut.start for cut in weights.slices()]
                assert weights.size == shape().sizes()[role][1]


def test_named_parts_are_whole_bytes_where_the_size_allows_it() -> None:
    for hidden, pairs in ((200, [(4, 176), (8, 24)]), (36, [(4, 32), (8, 4)])):
        bands = RESQ.precision.input_bands(Point.ATTN_IN, shape(hidden=hidden))
        assert bands is not None
        assert bands.pairs == pairs


def test_the_o_input_gathers_equal_bands_of_all_heads() -> None:
    setting = Setting(shape(heads=3, head_dim=8), RESQ.precision, 0)
    (map,) = {id(map): map for map in GatherHeads().fit(Moments(0), setting).values()}.values()
    assert isinstance(map, Permutation)
    assert map.index.tolist() == [*range(7), *range(8, 15), *range(16, 23), 7, 15, 23]
    bands = RESQ.precision.input_bands(Point.O_IN, setting.shape)
    assert bands is not None
    assert bands.pairs == [(4, 21), (8, 3)]


def test_a_point_in_sixteen_bit_has_no_bands() -> None:
    none = Precision(weights=None, inputs=None, down_weights=None, down_inputs=None, key=None, value=None)
    check_sizes(none, shape())
    assert none.input_bands(Point.O_IN, shape()) is None
    assert none.weight_bands(Role.DOWN, Point.DOWN_IN, shape()) is None
    assert Setting(shape(), none, 0).bands(Site.QUERY_KEY).pairs == [(8, 16)]


def test_describe_names_every_width_and_option() -> None:
    words = replace(RESQ_PAPER.precision, key=None).describe()
    assert words == {
        "weights": "4 bit, last 1/8 8 bit",
        "inputs": "4 bit, last 1/8 8 bit",
        "down_weights": "4 bit",
        "down_inputs": "4 bit",
        "key": "16 bit",
        "value": "4 bit, last 1/8 8 bit",
        "head": "16 bit",
        "output_ranges": "per head",
        "query_key_rotation": "8 bit",
    }
    assert RESQ.precision.describe()["query_key_rotation"] == "activation dtype"
    assert str(ISO) == "first 1/8 2 bit, 4 bit, last 1/8 6 bit"


def test_bases_say_what_they_change() -> None:
    assert str(pca(Site.VALUE)) == "pca(value)"
    assert [str(basis) for basis in RESQ.basis] == [
        "pca(residual, value, query_key, balanced heads)",
        "gather_heads(attn_out)",
        "hadamard(mlp_hidden)",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_by_its_name(name: str) -> None:
    assert recipe_named(name).name == name


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"\Ano recipe 'resqq'; recipes are rtn, resq, resq-paper.*did you mean resq\?\Z"
    ):
        recipe_named("resqq")
    with pytest.raises(InputError) as caught:
        recipe_named("zzzzz")
    assert "did you mean" not in str(caught.value)


def test_a_generator_follows_from_seed_site_layer_and_head_alone() -> None:
    setting = Setting(shape(), RESQ.precision, 3)

    def draw(setting: Setting, at: At, head: int | None = None) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=setting.generator(at, head)).tolist())

    keys = [
        (At(site, layer), head)
        for site in (Site.RESIDUAL, Site.VALUE)
        for layer in (None, 0, 1, 11)
        for head in (None, 0, 1, 10)
    ]
    draws = [draw(setting, *key) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [draw(setting, *key) for key in reversed(keys)][::-1]
    assert not set(draws) & {draw(replace(setting, seed=4), *key) for key in keys}
    assert draws == [draw(replace(setting, shape=shape(hidden=32)), *key) for key in keys]
