"""A recipe and its file say the same, a file's mistakes are named in one line, and no code asks for a recipe's name."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import run

import resq
from resq.errors import InputError
from resq.models.architecture import Point, Role, Shape, Site
from resq.models.rope import Rope
from resq.numerics.bands import INT4_INT8, Layout
from resq.ptq.ablations import ABLATIONS
from resq.ptq.basis.pca import Pca, at_random, haar
from resq.ptq.checks import check_sizes
from resq.ptq.clipping import ClipSearch
from resq.ptq.precision import Override
from resq.ptq.recipe import Recipe
from resq.ptq.recipe_file import (
    BASES,
    ROUNDINGS,
    TUNINGS,
    definition_of,
    read_recipe,
    recipe_from_dict,
    recipe_to_dict,
    to_toml,
)
from resq.ptq.recipes import RECIPES, RESQ, RESQ_246, RESQ_WEIGHT_ONLY, recipe_named
from resq.ptq.rounding.gptq import Gptq
from resq.ptq.rounding.nearest import Nearest

KNOWN = RECIPES | ABLATIONS
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text("utf-8"), re.DOTALL)
SHAPE = Shape(64, 2, 8, 2, 16, 172, 259, 1e-5, Rope((1.0,) * 8), True, 256)


def made(**table: Any) -> Recipe:
    return recipe_from_dict(table, KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipe_comes_back_from_its_table_its_toml_and_its_json(name: str, tmp_path: Path) -> None:
    recipe = KNOWN[name]
    table = recipe_to_dict(recipe)
    assert recipe_from_dict(table, {}) == recipe
    assert tomllib.loads(to_toml(table)) == json.loads(json.dumps(table)) == table
    for ending, text in ((".toml", to_toml(table)), (".json", json.dumps(table))):
        file = tmp_path / f"copy{ending}"
        file.write_text(text, encoding="utf-8")
        assert recipe_named(str(file)) == recipe


def test_every_option_comes_back(tmp_path: Path) -> None:
    overrides = (
        Override("layers.0.*", bits=8),
        Override("layers.?.down*", skip=True),
        Override("layers.*.q", rank=Fraction(1, 8), rounding=Gptq(correction=0.5, act_order=True)),
        Override("layers.1.gate", rank=0),
    )
    layout = Layout(3, ((6, 8), (8, Fraction(1, 8))), ((2, Fraction(1, 16)),))
    precision = replace(RESQ.precision, weights=layout, inputs=layout, head=INT4_INT8, key=None, overrides=overrides)
    precision = replace(precision, value=layout, output_per_head=True, rotation_bits=8)
    basis = (Pca((Site.RESIDUAL, Site.VALUE), True, at_random, haar), *RESQ.basis[1:])
    about = 'a "quoted" \\ line é 🌲'
    recipe = Recipe(
        "mine+1.x_y-z", basis, precision, Gptq(correction=0.1), about=about, clipping=ClipSearch((1.0, 0.9), 4)
    )
    file = tmp_path / "r.toml"
    file.write_text(to_toml(recipe_to_dict(recipe)), encoding="utf-8")
    assert read_recipe(file, {}) == recipe


@pytest.mark.parametrize("text", EXAMPLES, ids=["with a base", "from nothing"])
def test_the_documented_examples_make_checkpoints_that_keep_them(
    text: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (file := tmp_path / "example.toml").write_text(text, encoding="utf-8")
    (calibration := tmp_path / "text").write_text("the quick brown fox jumps over a lazy dog. " * 20, encoding="utf-8")
    out = tmp_path / "out"
    # A path object too: what a caller has in hand.
    result = resq.quantize(checkpoint(), out, recipe=str(file), calibration=calibration, windows=8, window_length=32)
    entry, recipe = result.manifest.recipe, recipe_named(str(file))
    assert entry.name == tomllib.loads(text)["name"] == recipe.name
    assert recipe_from_dict(entry.definition, {}) == recipe
    stored = json.loads((out / "resq.json").read_text("utf-8"))["recipe"]["definition"]
    assert recipe_from_dict(stored, {}) == recipe
    printed = run("inspect", out)
    assert printed.returncode == 0
    assert to_toml(stored).splitlines()[0] in printed.stdout.splitlines()
    assert f'about = "{recipe.about}"' in printed.stdout.replace("\n", " ")
    logits = resq.load(out)(torch.arange(3, 20)[None])
    assert bool(torch.isfinite(logits).all())


def test_a_recipe_of_resqs_own_is_inspected_by_its_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    resq.quantize(checkpoint(), tmp_path / "out", recipe="rtn")
    printed = run("inspect", tmp_path / "out")
    assert "[precision]" not in printed.stdout
    manifest = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["manifest"]
    assert recipe_from_dict(manifest["recipe"]["definition"], {}) == RECIPES["rtn"]


def test_a_checkpoint_without_a_definition_loads(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Of an older writer, or of a recipe with a part of the caller's own."""
    out = tmp_path / "out"
    result = resq.quantize(checkpoint(), out, recipe=replace(RECIPES["rtn"], name="mine", rounding=Mine()))
    assert result.manifest.recipe.definition == {}
    manifest = json.loads((out / "resq.json").read_text("utf-8"))
    del manifest["recipe"]["definition"]
    (out / "resq.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert resq.load(out).manifest.recipe.definition == {}
    assert "[precision]" not in run("inspect", out).stdout


def test_the_documentation_names_every_kind_and_every_option() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for kinds in (BASES, TUNINGS, ROUNDINGS):
        for kind, part in kinds.items():
            (row,) = re.findall(rf"^\| `{kind}` \|(.*)$", text, re.MULTILINE)
            options = {"sites" if field.name == "on" else field.name for field in fields(part) if field.init}
            assert set(re.findall(r"`(\w+)`", row)) == options


@dataclass(frozen=True)
class Mine(Nearest):
    """A rounding of the caller's own."""


def test_parts_of_the_callers_own_have_no_definition() -> None:
    assert definition_of(replace(RESQ, rounding=Mine())) == {}
    own = Pca((Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY), rotation=lambda size, generator: haar(size, generator))
    assert definition_of(replace(RESQ, basis=(own, *RESQ.basis[1:]))) == {}
    with pytest.raises(InputError, match="no part that a recipe file can name"):
        recipe_to_dict(replace(RESQ, rounding=Mine()))


def test_what_a_file_does_not_name_stays_as_in_its_base() -> None:
    recipe = made(base="resq-paper", name="x", rounding={"damping": 0.05}, precision={"head": 8})
    paper = RECIPES["resq-paper"]
    assert recipe.basis == paper.basis
    assert recipe.rounding == Gptq(damping=0.05)
    assert recipe.precision == replace(paper.precision, head=Layout(8))
    act_order = made(base="resq-act-order", rounding={"block": 64})
    assert act_order.rounding == Gptq(block=64, act_order=True)
    assert made(base="resq-act-order", rounding={"method": "nearest"}).rounding == Nearest()
    assert made(base="spinquant", tuning=[]).tuning == ()
    assert made(base="resq-paper", precision={"rotation_bits": 16}).precision.rotation_bits is None
    corrected = made(base="resq", rounding={"correction": 0.01})
    assert corrected.rounding == Gptq(correction=0.01)
    clipped = made(base="resq", clipping={"windows": 2})
    assert clipped.clipping == ClipSearch(windows=2)
    assert recipe_from_dict({"base": "c", "clipping": False}, {"c": clipped}).clipping is None
    assert recipe_from_dict({"base": "c", "clipping": {"ratios": [0.5]}}, {"c": clipped}).clipping == ClipSearch(
        (0.5,), 2
    )
    assert recipe_from_dict({"base": "c", "rounding": {"correction": False}}, {"c": corrected}).rounding == Gptq()


def test_an_overrides_rounding_starts_from_the_recipes() -> None:
    rounding = {"damping": 0.05}
    recipe = made(
        base="resq",
        rounding=rounding,
        override=[
            {"match": "layers.0.*", "rounding": {"act_order": True}},
            {"match": "layers.1.*", "rounding": {"method": "nearest"}},
        ],
    )
    assert recipe.rounding_of(0, Role.Q) == Gptq(damping=0.05, act_order=True)
    assert recipe.rounding_of(1, Role.Q) == Nearest()
    assert recipe.rounding_of(2, Role.Q) == Gptq(damping=0.05)


def cuts(recipe: Recipe) -> dict[str, list[tuple[int, int]] | None]:
    """Bands of everything in layer 1, after the check that they fit together."""
    check_sizes(recipe, SHAPE)
    p = recipe.precision
    bands = {
        **{role.value: p.weight_bands(1, role, SHAPE) for role in (Role.Q, Role.O, Role.UP, Role.DOWN)},
        **{point.value: p.input_bands(1, point, SHAPE) for point in (Point.ATTN_IN, Point.O_IN)},
        "key": p.key_bands(1, SHAPE),
        "value": p.value_bands(1, SHAPE),
    }
    return {name: None if found is None else found.pairs for name, found in bands.items()}


def test_a_rank_reaches_exactly_its_site_and_o_follows_the_values() -> None:
    before = cuts(RESQ)
    for rank in ("1/4", 16, 0.25):
        residual = cuts(made(base="resq", rank={"residual": rank}))
        wide = {name: [(4, 48), (8, 16)] for name in ("q", "up", "attn_in")}
        assert residual == {**before, **wide}
    for rank in ("1/4", 4):
        value = cuts(made(base="resq", rank={"value": rank}))
        assert value == {**before, "o": [(4, 96), (8, 32)], "o_in": [(4, 96), (8, 32)], "value": [(4, 12), (8, 4)]}
    assert cuts(made(base="resq", rank={"key": 3})) == {**before, "key": [(4, 13), (8, 3)]}
    none = cuts(made(base="resq", rank={"residual": 0, "value": 0, "key": 0}))
    assert all(pairs is not None and len(pairs) == 1 for pairs in none.values())
    both = made(base="resq", rank={"residual": "1/4", "value": "1/4"})
    assert both.precision.overrides == ()


def test_a_rank_leaves_what_is_not_cut_below_8_bits() -> None:
    recipe = made(base="resq-weight-only", rank={"residual": "1/4", "value": 4, "key": 3})
    assert cuts(recipe) == {
        **cuts(RESQ_WEIGHT_ONLY),
        "q": [(4, 48), (8, 16)],
        "up": [(4, 48), (8, 16)],
        "o": [(4, 96), (8, 32)],
    }
    eight = made(base="resq-w4a8kv4", rank={"residual": "1/4"})
    assert cuts(eight)["attn_in"] == [(8, 64)]
    iso = cuts(made(base="resq-246", rank={"value": "1/4"}))
    assert iso == {
        **cuts(RESQ_246),
        "o": [(2, 16), (4, 80), (6, 32)],
        "o_in": [(2, 16), (4, 80), (6, 32)],
        "value": [(2, 2), (4, 10), (6, 4)],
    }
    with pytest.raises(InputError, match="leave o_proj no cut like the values'"):
        made(base="resq-246", rank={"residual": 0})


R = {"base": "resq"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"base": "resk"}, r"base: no recipe 'resk'; recipes are rtn, .*; did you mean resq\?"),
    ({**R, "percision": {}}, r"unknown key 'percision'; accepted are name, .*; did you mean precision\?"),
    ({**R, "a\nb": 1}, r"unknown key 'a\\nb'; accepted are name, .*"),
    ({**R, "precision": {"wieghts": 4}}, r"precision: unknown key 'wieghts'; .*; did you mean weights\?"),
    ({**R, "precision": {"weights": 7}}, r"precision: weights is 7; accepted are 16 \(unrounded\), 1, 2, .*, 6, 8, .*"),
    ({**R, "precision": {"weights": True}}, r"precision: weights is True; accepted are .*"),
    ({**R, "precision": {"weights": "4"}}, r"precision: weights is '4'; accepted are .*"),
    ({**R, "precision": {"key": {"low": 7}}}, r"precision: key: low is 7; accepted widths are 1, .*, 6, 8"),
    ({**R, "precision": {"key": {"last": []}}}, r"precision: key: low is missing"),
    ({**R, "precision": {"key": {"low": 4, "last": [[8, 1.5]]}}}, r"precision: key: last\[0\]\[1\] is 1.5; .*share.*"),
    ({**R, "precision": {"key": {"low": 4, "last": [[8, "1/0"]]}}}, r"precision: key: last\[0\]\[1\] is '1/0'; .*"),
    ({**R, "precision": {"key": {"low": 4, "last": [[8, 0]]}}}, r"precision: key: last\[0\]\[1\] is 0; .*leave it out"),
    ({**R, "precision": {"rotation_bits": 7}}, r"precision: rotation_bits is 7; accepted are 16 .*"),
    ({**R, "precision": {"output_per_head": 1}}, r"precision: output_per_head is 1; .*boolean"),
    ({**R, "rank": {"residual": -1}}, r"rank: residual is -1; accepted are a count such as 64 and a share .*"),
    ({**R, "clipping": {"ratio": [1.0]}}, r"clipping: unknown key 'ratio'; .*; did you mean ratios\?"),
    ({**R, "rank": {"keys": 1}}, r"rank: unknown key 'keys'; accepted are residual, value, key; did you mean key\?"),
    ({**R, "rounding": {"dampng": 1}}, r"rounding \(gptq\): unknown key 'dampng'; .*; did you mean damping\?"),
    ({**R, "rounding": {"method": "gtpq"}}, r"rounding: method is 'gtpq'; accepted are .*; did you mean gptq\?"),
    ({**R, "rounding": {"damping": "1"}}, r"rounding \(gptq\): damping is '1'; .*number"),
    ({**R, "rounding": {"damping": float("nan")}}, r"rounding \(gptq\): damping is nan; .*finite.*"),
    ({**R, "rounding": {"correction": "x"}}, r"rounding \(gptq\): correction is 'x'; .*number or false"),
    ({**R, "rounding": {"block": 0}}, r"rounding \(gptq\): GPTQ takes a block of at least 1 .*"),
    ({**R, "rounding": {"sees_rounded": "yes"}}, r"rounding \(gptq\): sees_rounded is 'yes'; .*boolean"),
    ({**R, "rounding": []}, r"rounding is \[\]; .*"),
    ({**R, "basis": [{"sites": ["value"]}]}, r"basis 1: kind is missing; accepted are pca, .*"),
    ({**R, "basis": [{"kind": "pca"}]}, r"basis 1 \(pca\): sites is missing"),
    ({**R, "basis": [{"kind": "gather_heads", "sites": []}]}, r"basis 1 \(gather_heads\): unknown key 'sites'; .*none"),
    ({**R, "basis": [{"kind": "pca", "sites": ["valeu"]}]}, r"basis 1 \(pca\): sites\[0\] is 'valeu'; .*'value'.*"),
    (
        {**R, "basis": [{"kind": "gather_heads"}, {"kind": "pca", "sites": ["mlp_hidden"]}]},
        r"basis 2 \(pca\): pca has no map for mlp_hidden; it has for residual, value, query_key",
    ),
    (
        {**R, "basis": [{"kind": "pca", "sites": [], "pick": "best"}]},
        r"basis 1 \(pca\): pick is 'best'; .*by_variance.*",
    ),
    ({**R, "basis": []}, r"recipe mine: inputs and weights are cut into bands, but no basis orders .*"),
    ({**R, "tuning": [{"kind": "learn"}]}, r"tuning 1: kind is 'learn'; accepted are learn_rotations, search_strength"),
    (
        {**R, "tuning": [{"kind": "learn_rotations", "sites": ["residual"], "steps": -1}]},
        r"tuning 1 \(learn_rotations\): learning takes steps of at least 0, .*",
    ),
    ({**R, "override": [{"bits": 8}]}, r"override 1: match is missing"),
    ({**R, "override": [{"match": "layers.0.*"}]}, r"override 1: it changes nothing; .*"),
    ({**R, "override": [{"match": "a", "bits": 16}]}, r"override 1: bits is 16; accepted widths are .*"),
    (
        {**R, "override": [{"match": "a", "rounding": {"block": "b"}}]},
        r"override 1: rounding \(gptq\): block is 'b'; .*",
    ),
    ({**R, "name": "a/b"}, r"name is 'a/b'; accepted are up to 64 letters, .*"),
    ({**R, "about": "two\nlines"}, r"about is 'two\\nlines'; accepted is one line .*"),
    (
        {"precision": {"weights": 4}},
        r"precision: inputs, down_weights, .* must be named in a recipe without a base; .*",
    ),
    (
        {"precision": dict.fromkeys(("weights", "inputs", "down_weights", "down_inputs", "key", "value"), 4)},
        r".*method.*",
    ),
]


@pytest.mark.parametrize(("table", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_used_is_refused_in_one_line_by_file_and_key(
    table: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(InputError, match=rf"\A{re.escape(str(file))}: {message}\Z") as refusal:
        recipe_named(str(file))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "base = ", "is not valid TOML: Invalid value"),
        ("a.toml", "[a]\n[a]\n", "is not valid TOML: "),
        ("a.json", "{", "is not valid JSON: "),
        ("a.json", "[" * 100_000, "is not valid JSON: "),
        ("a.json", "[]", r"is \[\]; it must be a table"),
        ("a.toml", b"\xff", "is not valid TOML: "),
        ("a b.toml", 'base = "resq"', "name: 'a b' is no name of a recipe; accepted are "),
        ("resq.toml", 'base = "rtn"', "name: resq is a recipe of resq's own; give this one another name"),
        ("a.toml", "about = 2020-01-01\nbase = 2020-01-01", "base: no recipe '2020-01-01'"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as refusal:
        recipe_named(str(file))
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "resq"')
    missing = re.escape(str(tmp_path / "mime.toml"))
    with pytest.raises(InputError, match=rf"\Athe recipe file {missing} does not exist; did you mean .*mine.toml\?\Z"):
        recipe_named(str(tmp_path / "mime.toml"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        recipe_named(str(tmp_path / "folder.json"))


def test_a_name_not_given_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "careful.toml").write_text('base = "resq"')
    recipe = recipe_named(str(tmp_path / "careful.toml"))
    assert (recipe.name, recipe.about) == ("careful", "resq, changed")
    assert replace(recipe, name="resq", about=RESQ.about) == RESQ


def test_ablations_are_listed_under_their_own_heading() -> None:
    plain, both = run("recipes").stdout, run("recipes", "--ablations").stdout
    assert all(name not in plain for name in ABLATIONS)
    recipes, ablations = both.split(" ablation ")
    first_words = [line.split()[0] for line in ablations.splitlines() if re.match(r" \S", line)]
    assert set(ABLATIONS) <= set(first_words)
    assert set(RECIPES) <= {line.split()[0] for line in recipes.splitlines() if re.match(r" \S", line)}
    told = json.loads(run("recipes", "--ablations", "--json").stdout)
    assert [each["name"] for each in told["ablations"]] == list(ABLATIONS)
    for each in told["recipes"] + told["ablations"]:
        assert recipe_from_dict(each["definition"], {}) == KNOWN[each["name"]]
        assert each["about"]
    assert not set(RECIPES) & set(ABLATIONS)


# Where a recipe may be called by its name: their pages, and what is told, offered or run by default.
NAMED = ("ptq/recipes.py", "ptq/ablations.py", "cli/", "demo.py", "report/")
# Words with a meaning of their own: the package, its format, a rounding.
ALSO_WORDS = {"resq", "gptq"}


def test_no_code_branches_on_a_recipes_name() -> None:
    source = ROOT / "src" / "resq"
    for file in sorted(source.rglob("*.py")):
        where = file.relative_to(source).as_posix()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and not where.startswith(NAMED):
                assert node.value not in set(KNOWN) - ALSO_WORDS, f"{where}:{node.lineno}"
            if isinstance(node, ast.Compare | ast.MatchValue | ast.IfExp):
                test = ast.unparse(node.test if isinstance(node, ast.IfExp) else node)
                words = {each.value for each in ast.walk(ast.parse(test)) if isinstance(each, ast.Constant)}
                assert not words & (set(KNOWN) - ALSO_WORDS), f"{where}:{node.lineno}: {test}"
                assert not re.search(r"recipe(\.name)?\s*[!=]=\s*['\"]", test), f"{where}:{node.lineno}: {test}"
