"""A recipe that means nothing is refused where it is made, and one that does says so in words."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import READERS, Point, Role, Shape, Site
from resq.models.rope import Rope
from resq.numerics import hadamard as transforms
from resq.numerics.bands import INT4, INT4_INT8, INT8, Bands, Layout
from resq.numerics.hadamard import HadamardPlan
from resq.numerics.maps import Dense, Hadamard, LinearMap, Permutation
from resq.ptq.basis.fixed import GatherHeads, hadamard
from resq.ptq.basis.pca import pca, randomised_hadamard
from resq.ptq.basis.peaks import outliers_last
from resq.ptq.checks import check_sizes
from resq.ptq.precision import Precision
from resq.ptq.recipe import At, Basis, Moments, Recipe, Setting, Statistic
from resq.ptq.recipes import (
    QUAROT,
    RECIPES,
    RESQ,
    RESQ_KV,
    RESQ_PAPER,
    RESQ_W4A8KV4,
    RESQ_WEIGHT_ONLY,
    RTN,
    recipe_named,
)
from resq.ptq.rounding.nearest import Nearest

UNIFORM = Precision(weights=INT4, inputs=INT4, key=INT4, value=INT4)
ISO = Layout(4, ((6, Fraction(1, 8)),), ((2, Fraction(1, 8)),))


def recipe(basis: tuple[Basis, ...], precision: Precision = UNIFORM) -> Recipe:
    return Recipe("mine", basis, precision, Nearest())


@dataclass(frozen=True)
class Ordered:
    """Orders every coordinate and changes none."""

    needs = frozenset[Statistic]()
    sites = orders = frozenset(Site)

    def check(self, shape: Shape, tokens: int) -> None:
        pass

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        return {}

    def notes(self, setting: Setting) -> list[str]:
        return []


def sized(precision: Precision) -> Recipe:
    """A recipe that may have bands anywhere."""
    return Recipe("mine", (Ordered(),), precision, Nearest())


def there(bands: Bands | None) -> Bands:
    assert bands is not None
    return bands


def shape(hidden: int = 64, heads: int = 8, kv_heads: int = 2, head_dim: int = 16, ffn: int = 172) -> Shape:
    rope = Rope((1.0,) * (head_dim // 2))
    return Shape(hidden, 2, heads, kv_heads, head_dim, ffn, 259, 1e-5, rope, True, 256)


@pytest.mark.parametrize(
    ("basis", "site"),
    [
        ((pca(Site.RESIDUAL), pca(Site.VALUE, Site.RESIDUAL)), "residual"),
        ((hadamard(Site.MLP_HIDDEN), hadamard(Site.MLP_HIDDEN)), "mlp_hidden"),
        ((GatherHeads(), hadamard(Site.MLP_HIDDEN), GatherHeads()), "attn_out"),
    ],
)
def test_two_bases_on_one_site_are_refused_by_its_name(basis: tuple[Basis, ...], site: str) -> None:
    with pytest.raises(InputError, match=f"recipe mine: two bases change {site};"):
        recipe(basis)


@pytest.mark.parametrize("banded", [INT4_INT8, ISO], ids=["4/8", "2/4/6"])
@pytest.mark.parametrize(
    ("field", "what", "basis"),
    [
        ("inputs", "inputs and weights", (pca(Site.VALUE, Site.QUERY_KEY), GatherHeads(), hadamard(Site.MLP_HIDDEN))),
        ("weights", "inputs and weights", ()),
        ("inputs", "o_proj", (pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY), hadamard(Site.MLP_HIDDEN))),
        ("weights", "o_proj", (pca(Site.RESIDUAL),)),
        ("key", "keys", (pca(Site.RESIDUAL, Site.VALUE), GatherHeads())),
        ("value", "values", (pca(Site.RESIDUAL, Site.QUERY_KEY), GatherHeads())),
        ("down_inputs", "down_proj", (hadamard(Site.MLP_HIDDEN),)),
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
    assert RESQ.needs == {Statistic.RESIDUAL, Statistic.VALUE, Statistic.KEY}
    assert recipe((outliers_last(Site.ATTN_NORM_OUT),)).needs == {Statistic.PEAKS}
    assert recipe((pca(Site.VALUE),)).needs == {Statistic.VALUE}
    assert recipe((pca(Site.VALUE, balance_heads=True),)).needs == {Statistic.VALUE}
    assert recipe((hadamard(Site.MLP_HIDDEN), GatherHeads())).needs == frozenset()


def test_norms_fold_exactly_when_the_residual_stream_is_rotated() -> None:
    assert RESQ.folds_norms
    assert not RTN.folds_norms
    assert not recipe((pca(Site.VALUE, Site.QUERY_KEY), hadamard(Site.MLP_HIDDEN))).folds_norms


def test_with_low_changes_the_low_band_everywhere_but_at_the_head() -> None:
    low = replace(RESQ.precision, head=INT8, key=None).with_low(3)
    assert (low.weights, low.inputs, low.value) == (Layout(3, INT4_INT8.last),) * 3
    assert (low.down_weights, low.down_inputs) == (Layout(3),) * 2
    assert (low.head, low.key) == (INT8, None)
    assert ISO.with_low(3) == Layout(3, ((5, Fraction(1, 8)),), ((1, Fraction(1, 8)),))
    assert RESQ.precision.with_low(4) == RESQ.precision


def test_with_low_leaves_what_is_not_below_8_bits() -> None:
    low = RESQ_W4A8KV4.precision.with_low(3)
    assert (low.inputs, low.down_inputs) == (INT8, INT8)
    assert (low.weights, low.down_weights) == (Layout(3, INT4_INT8.last), Layout(3))
    wide = Layout(8, ((4, Fraction(1, 8)),))
    assert replace(RESQ.precision, key=wide).with_low(3).key == wide
    assert RESQ_KV.precision.with_low(2) == replace(
        RESQ_KV.precision, key=low.key.with_low(2), value=low.value.with_low(2)
    )
    assert QUAROT.precision.with_low(6) == Precision(*(Layout(6),) * 6)


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
        check_sizes(sized(precision), shape(**given))


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
        check_sizes(sized(precision), shape())


def test_weights_may_be_cut_finer_than_inputs_and_either_may_stay_16_bit() -> None:
    for changes in ({"inputs": INT8}, {"inputs": None}, {"weights": None}, {"down_weights": INT8}):
        check_sizes(sized(replace(RESQ.precision, **changes)), shape())


def test_sizes_of_every_recipe_fit_small_and_odd_models() -> None:
    for each in RECIPES.values():
        # A head of two coordinates has no room for three bands.
        head_dim = 2 if max(len(layout.parts) for layout in (each.precision.key, INT4) if layout) < 2 else 4
        for given in (
            {},
            {"head_dim": head_dim},
            {"hidden": 36, "head_dim": 6, "ffn": 107},
            {"heads": 14, "kv_heads": 2},
        ):
            check_sizes(each, shape(**given))


def test_inputs_and_weights_of_a_linear_are_cut_at_the_same_places() -> None:
    for precision in (RESQ.precision, RTN.precision, Precision(ISO, ISO, INT4, INT4, ISO, ISO)):
        for point, roles in READERS.items():
            inputs = precision.input_bands(0, point, shape())
            for role in roles:
                weights = precision.weight_bands(0, role, shape())
                assert inputs is not None
                assert weights is not None
                assert [cut.start for cut in inputs.slices()] == [cut.start for cut in weights.slices()]
                assert weights.size == shape().sizes()[role][1]


def test_a_basis_orders_coordinates_for_the_finer_cut_of_inputs_and_weights() -> None:
    """Weights in two bands below inputs in one (or none): the map must know the weights' cut."""
    for precision in (RESQ_W4A8KV4.precision, RESQ_WEIGHT_ONLY.precision):
        setting = Setting(shape(), precision, 0)
        weights = [
            [cut.stop - cut.start for cut in there(precision.weight_bands(0, role, shape())).slices()]
            for role, point in ((Role.Q, Point.ATTN_IN), (Role.O, Point.O_IN))
        ]
        assert [band.size for band in setting.bands(At(Site.RESIDUAL, 0))] == weights[0] == [56, 8]
        for site in (Site.VALUE, Site.ATTN_OUT):
            assert [8 * band.size for band in setting.bands(At(site, 0))] == weights[1] == [112, 16]


def test_named_parts_are_whole_bytes_where_the_size_allows_it() -> None:
    for hidden, pairs in ((200, [(4, 176), (8, 24)]), (36, [(4, 32), (8, 4)])):
        bands = RESQ.precision.input_bands(0, Point.ATTN_IN, shape(hidden=hidden))
        assert bands is not None
        assert bands.pairs == pairs


def test_the_o_input_gathers_equal_bands_of_all_heads() -> None:
    setting = Setting(shape(heads=3, head_dim=8), RESQ.precision, 0)
    map, *others = GatherHeads().fit(Moments(0), setting).values()
    assert isinstance(map, Permutation)
    assert all(isinstance(other, Permutation) and torch.equal(other.index, map.index) for other in others)
    assert map.index.tolist() == [*range(7), *range(8, 15), *range(16, 23), 7, 15, 23]
    bands = RESQ.precision.input_bands(0, Point.O_IN, setting.shape)
    assert bands is not None
    assert bands.pairs == [(4, 21), (8, 3)]


def test_a_point_in_sixteen_bit_has_no_bands() -> None:
    none = Precision(weights=None, inputs=None, down_weights=None, down_inputs=None, key=None, value=None)
    check_sizes(sized(none), shape())
    assert none.input_bands(0, Point.O_IN, shape()) is None
    assert none.weight_bands(0, Role.DOWN, shape()) is None
    assert Setting(shape(), none, 0).bands(At(Site.QUERY_KEY, 0)).pairs == [(8, 16)]


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


def test_bases_say_where_a_model_has_no_hadamard_matrix() -> None:
    def notes(basis: Basis, **given: int) -> list[str]:
        return basis.notes(Setting(shape(**given), RESQ.precision, 0))

    (basis,) = QUAROT.basis
    assert str(basis) == "hadamard(residual with random signs, value, attn_out, query_key, mlp_hidden)"
    assert notes(basis) == []
    assert notes(basis, heads=14, ffn=214) == [
        "14 heads have no Hadamard matrix: one of 224 coordinates at attn_out, none at value",
        "214 coordinates at mlp_hidden have no Hadamard matrix: random orthogonal factor of 107",
    ]
    assert notes(basis, hidden=36, head_dim=6) == [
        f"6 coordinates at {site} have no Hadamard matrix: random orthogonal factor of 3"
        for site in ("value", "query_key")
    ]
    assert all(notes(each, heads=14, hidden=36, head_dim=6) == [] for each in RESQ.basis)
    assert notes(hadamard(Site.MLP_HIDDEN), ffn=214) == notes(basis, ffn=214)
    bands = pca(Site.RESIDUAL, Site.VALUE, rotation=randomised_hadamard)
    assert notes(bands, hidden=256, head_dim=64) == []  # 224 and 32, 56 and 8
    assert notes(bands, hidden=84, head_dim=16) == [
        "a band of 74 coordinates has no Hadamard matrix: random orthogonal factor of 37",
        "a band of 14 coordinates has no Hadamard matrix: random orthogonal factor of 7",
        "a band of 10 coordinates has no Hadamard matrix: random orthogonal factor of 5",
    ]


@pytest.mark.parametrize(
    ("given", "across", "within"),
    [
        ({"heads": 8}, HadamardPlan(8, 8, 1, "sylvester"), True),
        ({"heads": 12, "kv_heads": 4}, HadamardPlan(12, 1, 12, "paley1"), True),
        ({"heads": 28, "kv_heads": 4}, HadamardPlan(28, 1, 28, "paley1"), True),
        ({"heads": 14}, HadamardPlan(224, 8, 28, "paley1"), False),
        ({"heads": 6}, HadamardPlan(96, 8, 12, "paley1"), False),
        ({"heads": 7, "kv_heads": 7, "head_dim": 6}, HadamardPlan(42, 2, 21, "random-orthogonal"), False),
    ],
    ids=lambda value: str(value.get("heads")) if isinstance(value, dict) else None,
)
def test_a_transform_over_the_heads_where_their_number_has_one_else_over_all_coordinates(
    given: dict[str, int], across: HadamardPlan, within: bool
) -> None:
    sizes = shape(**given)
    maps = QUAROT.basis[0].fit(Moments(0), Setting(sizes, QUAROT.precision, 0))
    for layer in range(sizes.layers):
        inner = sizes.head_dim if within else 1
        assert maps[At(Site.ATTN_OUT, layer)] == Hadamard(across, inner)
        assert (At(Site.VALUE, layer) in maps) == within
        assert maps[At(Site.ATTN_OUT, layer)].size == sizes.heads * sizes.head_dim


def test_a_transform_at_attn_out_alone_is_one_over_all_coordinates() -> None:
    maps = hadamard(Site.ATTN_OUT).fit(Moments(0), Setting(shape(), QUAROT.precision, 0))
    assert maps[At(Site.ATTN_OUT, 1)] == Hadamard(HadamardPlan(128, 128, 1, "sylvester"))
    assert set(maps) == {At(Site.ATTN_OUT, 0), At(Site.ATTN_OUT, 1)}


def test_the_residual_transform_has_signs_of_its_seed_alone() -> None:
    def matrix(seed: int) -> Tensor:
        map = QUAROT.basis[0].fit(Moments(0), Setting(shape(), QUAROT.precision, seed))[At(Site.RESIDUAL)]
        assert isinstance(map, Dense)
        return map.matrix

    signs = matrix(0) @ transforms.matrix(64).T
    torch.testing.assert_close(signs.abs(), torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 16 < int((signs.diagonal() < 0).sum()) < 48  # four standard deviations of 64 coins
    assert torch.equal(matrix(0), matrix(0))
    assert not torch.equal(matrix(0), matrix(1))


def test_a_manifest_says_that_no_weight_is_rounded_exactly_where_none_is() -> None:
    assert RESQ_KV.rounding_words == "none, every decoder weight stays 16 bit"
    assert RESQ_WEIGHT_ONLY.rounding_words == str(RESQ.rounding) == RESQ.rounding_words
    down = replace(RESQ_KV, precision=replace(RESQ_KV.precision, down_weights=INT8))
    assert down.rounding_words == "nearest, clip search on"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_by_its_name(name: str) -> None:
    assert recipe_named(name).name == name


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    names = re.escape(f"{', '.join(RECIPES)}, an ablation, or a .toml or .json file")
    with pytest.raises(InputError, match=rf"\Ano recipe 'resqq'; recipes are {names}; did you mean resq\?\Z"):
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
