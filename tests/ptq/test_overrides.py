"""An override reaches exactly what its pattern names, the last one wins, what cannot be is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import resq
from resq.errors import InputError
from resq.models.architecture import READERS, Point, Role, Shape
from resq.models.rope import Rope
from resq.numerics.bands import INT8, Layout
from resq.ptq.checks import check_sizes
from resq.ptq.precision import Override, names_of
from resq.ptq.recipe import Recipe
from resq.ptq.recipes import GPTQ, QUIK, RESQ, RESQ_WEIGHT_ONLY, RTN
from resq.ptq.rounding.gptq import Gptq
from resq.ptq.rounding.nearest import Nearest

SHAPE = Shape(64, 3, 8, 2, 16, 172, 259, 1e-5, Rope((1.0,) * 8), True, 256)
NAMES = tuple(names_of(SHAPE.layers))


def with_overrides(recipe: Recipe, *overrides: Override) -> Recipe:
    return replace(recipe, precision=replace(recipe.precision, overrides=overrides))


def pairs(recipe: Recipe) -> dict[str, list[tuple[int, int]] | None]:
    """Bands of everything that can be named."""
    p, found = recipe.precision, {}
    for layer in range(SHAPE.layers):
        each = {
            **{role.value: p.weight_bands(layer, role, SHAPE) for role in Role},
            **{point.value: p.input_bands(layer, point, SHAPE) for point in Point},
            "key": p.key_bands(layer, SHAPE),
            "value": p.value_bands(layer, SHAPE),
        }
        found |= {f"layers.{layer}.{name}": bands and bands.pairs for name, bands in each.items()}
    return found


def changed(recipe: Recipe, *overrides: Override) -> dict[str, list[tuple[int, int]] | None]:
    """What overrides change, after the check of sizes."""
    after = with_overrides(recipe, *overrides)
    check_sizes(after, SHAPE)
    before = pairs(recipe)
    return {name: bands for name, bands in pairs(after).items() if bands != before[name]}


def test_every_layer_has_a_name_for_each_weight_input_and_cache() -> None:
    assert len(NAMES) == len(set(NAMES)) == 3 * 13
    assert set(NAMES) == set(pairs(RTN))


@pytest.mark.parametrize(
    "pattern",
    ["layers.0.*", "layers.*.down", "layers.*.down_in", "layers.1.key", "*", "layers.[02].q", "layers.?.mlp_in"],
)
def test_bits_reach_exactly_what_the_pattern_names(pattern: str) -> None:
    named = {name for name in NAMES if fnmatchcase(name, pattern)}
    assert named
    found = changed(RESQ, Override(pattern, bits=3))
    assert set(found) == named
    before = pairs(RESQ)
    for name, bands in found.items():
        old = before[name]
        assert old is not None
        assert bands == [(3, old[0][1]), *old[1:]]


def test_a_skip_leaves_exactly_what_is_named_in_16_bit() -> None:
    assert changed(RESQ, Override("layers.2.down*", skip=True)) == {"layers.2.down": None, "layers.2.down_in": None}
    # Skipped, whatever else it says.
    assert changed(RTN, Override("layers.0.q", bits=3, skip=True)) == {"layers.0.q": None}


def test_a_rank_reaches_exactly_what_is_named() -> None:
    assert changed(RESQ, Override("layers.1.key", rank=3)) == {"layers.1.key": [(4, 13), (8, 3)]}
    heads = changed(RESQ, *(Override(f"layers.1.{name}", rank=Fraction(1, 4)) for name in ("value", "o", "o_in")))
    assert heads == {
        "layers.1.value": [(4, 12), (8, 4)],
        "layers.1.o": [(4, 96), (8, 32)],
        "layers.1.o_in": [(4, 96), (8, 32)],
    }
    none = changed(RESQ, Override("layers.0.attn_in", rank=0), Override("layers.0.[qkv]", rank=0))
    assert none == {f"layers.0.{name}": [(4, 64)] for name in ("attn_in", "q", "k", "v")}


def test_a_rounding_reaches_exactly_the_weights_that_are_named() -> None:
    recipe = with_overrides(RESQ, Override("layers.1.o*", rounding=Nearest()), Override("*.down", rounding=Gptq(0.5)))
    for layer in range(SHAPE.layers):
        for role in Role:
            want = Nearest() if (layer, role) == (1, Role.O) else Gptq(0.5) if role is Role.DOWN else RESQ.rounding
            assert recipe.rounding_of(layer, role) == want
    assert changed(RESQ, Override("*", rounding=Nearest())) == {}


def test_the_last_override_wins() -> None:
    overrides = (Override("layers.*", bits=3), Override("layers.1.q", bits=6), Override("layers.1.*", bits=2))
    found = changed(RTN, *overrides)
    assert found["layers.1.q"] == [(2, 64)]
    assert found["layers.0.q"] == [(3, 64)]
    back = changed(RTN, Override("layers.0.q", skip=True), Override("layers.0.q", bits=4))
    assert back == {}  # 4 bit again
    recipe = with_overrides(RESQ, Override("*", rounding=Nearest()), Override("layers.0.q", rounding=Gptq(0.2)))
    assert recipe.rounding_of(0, Role.Q) == Gptq(0.2)
    assert recipe.rounding_of(0, Role.K) == Nearest()


def test_moments_are_taken_where_any_rounding_asks_for_them() -> None:
    assert with_overrides(RTN, Override("layers.0.q", rounding=Gptq())).needs_moment
    assert not RTN.needs_moment
    assert with_overrides(GPTQ, Override("layers.0.q", rounding=Gptq(sees_rounded=True))).sees_rounded
    assert with_overrides(RTN, Override("layers.0.q", rounding=Gptq(correction=0.1))).corrects


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        (
            RESQ,
            Override("layers.3.*", bits=3),
            "an override names 'layers.3.*', which is nothing in a model of 3 layers",
        ),
        (RESQ, Override("lm_head", bits=8), "an override names 'lm_head', which is nothing in a model"),
        (RESQ, Override("layers.1.q", rank=Fraction(1, 4)), "layers.1.q is cut into .* the residual stream"),
        (RESQ, Override("layers.1.mlp_in", rank=Fraction(1, 4)), "layers.1.mlp_in is cut into .* the residual stream"),
        (RESQ_WEIGHT_ONLY, Override("layers.1.up", rank=24), "layers.1.up is cut into .* the residual stream"),
        (RESQ, Override("layers.1.q", rank=0), "weights of q are cut into .*, its inputs into"),
        (RESQ, Override("layers.1.value", rank=4), "share coordinates but are cut differently"),
        (RESQ, Override("layers.1.down*", rank=8), "down_proj are cut into bands, but no basis orders"),
        (RTN, Override("layers.2.key", rank=2), "keys are cut into bands, but no basis orders"),
        (QUIK, Override("layers.1.mlp_in", rank=16), "weights of gate are cut into"),
        (RESQ, Override("layers.1.key", rank=16), "leave 0 of 16 coordinates for the low band"),
        (RESQ, Override("layers.1.key", bits=7), "a band has 7 bits"),
    ],
    ids=lambda value: value.pattern if isinstance(value, Override) else None,
)
def test_what_cannot_be_is_refused_in_one_line_before_any_work(
    recipe: Recipe, override: Override, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        check_sizes(with_overrides(recipe, override), SHAPE)
    assert "\n" not in str(refusal.value)


def test_a_rank_of_its_own_needs_no_shared_stream() -> None:
    """QUIK orders every layer's inputs apart: a layer may have another cut."""
    found = changed(QUIK, *(Override(f"layers.1.{name}", rank=16) for name in ("mlp_in", "gate", "up")))
    assert found == {f"layers.1.{name}": [(4, 48), (8, 16)] for name in ("mlp_in", "gate", "up")}


def test_a_layout_changes_as_the_override_says() -> None:
    layout = Layout(4, ((6, 8), (8, Fraction(1, 8))))
    assert Override("*", bits=3, rank=16).layout(layout) == Layout(3, ((6, 8), (8, 16)))
    assert Override("*", rank=0).layout(layout) == Layout(4)
    assert Override("*", bits=4).layout(None) == Layout(4)
    with pytest.raises(InputError, match="gives a rank to what has 16 bit"):
        Override("*", rank=4).layout(None)
    assert Override("*", bits=4).layout(None) == Layout(4)
    assert Override("*", rounding=Nearest()).layout(None) is None
    assert Override("*", skip=True).layout(INT8) is None


def test_an_override_reads_as_what_it_does() -> None:
    override = Override("layers.0.*", bits=3, rank=Fraction(1, 4), rounding=Nearest())
    assert str(override) == "layers.0.*: 3 bit, rank 1/4, nearest, clip search on"
    assert str(Override("a", skip=True)) == "a: 16 bit"
    words = replace(RESQ.precision, overrides=(override, Override("a", skip=True))).describe()
    assert words["overrides"] == f"{override}; a: 16 bit"
    assert "overrides" not in RESQ.precision.describe()


def test_a_checkpoint_with_overrides_runs_on_both_backends(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    recipe = with_overrides(
        RESQ,
        Override("layers.0.*", bits=6),
        Override("layers.0.down*", bits=8),
        Override("layers.1.down*", skip=True),
        Override("layers.1.key", rank=4),
        Override("layers.1.gate", rounding=Nearest()),
        Override("layers.1.attn_in", rank=0),
    )
    out = tmp_path / "out"
    resq.quantize(checkpoint("qwen2"), out, recipe=recipe, calibration=text, windows=6, window_length=32)
    tokens = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(6))
    logits = {}
    for backend in ("reference", "cpu"):
        model = resq.load(out, backend=backend)
        logits[backend] = model(tokens)
        cache = model.cache()
        parts = torch.cat([model(part, cache) for part in tokens.split([1, 9, 1, 13], dim=1)], dim=1)
        scale = float(logits[backend].abs().max())
        torch.testing.assert_close(parts, logits[backend], rtol=0, atol=1e-5 * scale)
        first, second = model.manifest.layers
        assert first.linears["q"].bands == first.inputs["attn_in"].bands == [[6, 56], [8, 8]]
        assert first.linears["down"].bands == first.inputs["down_in"].bands == [[8, 172]]
        assert second.linears["down"].bands is second.inputs["down_in"].bands is None
        assert (first.key.bands, second.key.bands) == ([[6, 14], [8, 2]], [[4, 12], [8, 4]])
        assert (second.inputs["attn_in"].bands, second.linears["q"].bands) == ([[4, 64]], [[4, 56], [8, 8]])
    # A float32 sum in another order moves an integer here and there.
    difference = (logits["cpu"] - logits["reference"]).norm() / logits["reference"].norm()
    assert float(difference) < 0.05


def test_an_overrides_rounding_is_that_of_the_recipe_with_it(checkpoint: Callable[..., Path], text: Path) -> None:
    """The first linears see the same inputs: their integers are those of a recipe that rounds everything so."""
    source, made = checkpoint(), {}
    recipes = {
        "gptq": RESQ,
        "nearest": replace(RESQ, rounding=Nearest()),
        "mixed": with_overrides(RESQ, Override("layers.0.k", rounding=Nearest())),
    }
    for name, recipe in recipes.items():
        out = source.parent / name
        resq.quantize(source, out, recipe=recipe, calibration=text, windows=6, window_length=32)
        made[name] = resq.load(out, backend="reference").layers[0].linears
    for role in READERS[Point.ATTN_IN]:
        linears = {name: each[role] for name, each in made.items()}
        equal = {name: torch.equal(linears["mixed"].integers, linears[name].integers) for name in ("gptq", "nearest")}
        assert equal == {"gptq": role is not Role.K, "nearest": role is Role.K}
