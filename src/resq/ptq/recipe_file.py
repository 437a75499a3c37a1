"""Recipes as data: the TOML or JSON files that people write, and the dict that a manifest keeps (docs/recipes.md)."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainValidator, ValidationError, create_model

from resq.errors import InputError, nearest, nearest_path
from resq.models.architecture import Point, Role
from resq.numerics.bands import PACKABLE_BITS, Layout
from resq.ptq.basis.fixed import GatherHeads, HadamardBasis
from resq.ptq.basis.pca import Pca, at_random, by_magnitude, by_variance, haar, none, randomised_hadamard
from resq.ptq.basis.peaks import OutliersLast, SearchStrength, Smooth
from resq.ptq.clipping import ClipSearch
from resq.ptq.learning import LearnRotations
from resq.ptq.precision import Override, Precision
from resq.ptq.recipe import Recipe, Rounding
from resq.ptq.rounding.gptq import Gptq
from resq.ptq.rounding.nearest import Nearest

ENDINGS = (".toml", ".json")
# What a file calls the parts of a recipe: their dataclasses' fields are its keys.
BASES: dict[str, type] = {
    "pca": Pca,
    "hadamard": HadamardBasis,
    "gather_heads": GatherHeads,
    "outliers_last": OutliersLast,
    "smooth": Smooth,
}
TUNINGS: dict[str, type] = {"learn_rotations": LearnRotations, "search_strength": SearchStrength}
ROUNDINGS: dict[str, type] = {"nearest": Nearest, "gptq": Gptq}
# Functions among the fields, by their names.
FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "pick": {pick.__name__: pick for pick in (by_variance, by_magnitude, at_random)},
    "rotation": {rotation.__name__: rotation for rotation in (haar, randomised_hadamard, none)},
}
WIDTHS = ("weights", "inputs", "down_weights", "down_inputs", "key", "value", "head")
# Characters of a value that an error repeats.
SHOWN = 60


def packable(bits: int) -> int:
    """A width of a band."""
    if bits not in PACKABLE_BITS:
        raise ValueError(f"accepted widths are {', '.join(map(str, PACKABLE_BITS))}")
    return bits


def packable_or_16(bits: int) -> int:
    """A width, or 16 for none."""
    if bits not in (16, *PACKABLE_BITS):
        raise ValueError(f"accepted are 16 (unrounded), {', '.join(map(str, PACKABLE_BITS))}")
    return bits


def rank_of(value: Any) -> Fraction | int:
    """A count (int), or a share of a dimension: "1/8" or 0.125. Raises ValueError."""
    found: Fraction | int | None = None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        found = value
    elif isinstance(value, float) or (isinstance(value, str) and re.fullmatch(r"\d{1,9}(/\d{1,9}|\.\d{1,9})?", value)):
        try:
            share = Fraction(str(value))
            found = share if 0 <= share < 1 else None
        except (ValueError, ZeroDivisionError):  # nan, 1/0
            found = None
    if found is None:
        raise ValueError('accepted are a count such as 64 and a share below 1 such as "1/8"')
    return found


def part_of(value: Any) -> Fraction | int:
    """The same, but not 0. Raises ValueError."""
    if (found := rank_of(value)) == 0:
        raise ValueError("a part of a dimension holds at least one coordinate; leave it out")
    return found


def one_line(text: str) -> str:
    """Text that a table can show."""
    if not text.isprintable():
        raise ValueError("accepted is one line of printable characters")
    return text


def short_name(text: str) -> str:
    """A name that can be a directory's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}", text):
        raise ValueError("accepted are up to 64 letters, digits, +, ., _ and -")
    return text


Width = Annotated[int, AfterValidator(packable)]
RotationWidth = Annotated[int, AfterValidator(packable_or_16)]
Rank = Annotated[Any, PlainValidator(rank_of)]
Part = Annotated[Any, PlainValidator(part_of)]
Name = Annotated[str, AfterValidator(short_name)]
Line = Annotated[str, AfterValidator(one_line)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _File(_Table):
    name: Name | None = None
    about: Line | None = None
    base: str | None = None
    precision: dict[str, Any] | None = None
    rank: dict[str, Any] | None = None
    rounding: dict[str, Any] | None = None
    basis: list[dict[str, Any]] | None = None
    tuning: list[dict[str, Any]] | None = None
    clipping: dict[str, Any] | Literal[False] | None = None
    override: list[dict[str, Any]] | None = None


class _Layout(_Table):
    low: Width
    last: tuple[tuple[Width, Part], ...] = ()
    first: tuple[tuple[Width, Part], ...] = ()


class _Precision(_Table):
    weights: Any = None
    inputs: Any = None
    down_weights: Any = None
    down_inputs: Any = None
    key: Any = None
    value: Any = None
    head: Any = None
    output_per_head: bool = False
    rotation_bits: RotationWidth = 16


class _Ranks(_Table):
    residual: Rank = None
    value: Rank = None
    key: Rank = None


class _Override(_Table):
    match: Line
    bits: Width | None = None
    rank: Rank = None
    skip: bool = False
    rounding: dict[str, Any] | None = None


def read_recipe(path: str | Path, known: Mapping[str, Recipe]) -> Recipe:
    """The recipe that a TOML or JSON file describes; known: what its `base` may name.

    Raises InputError in one line that names the file and the key.
    """
    path = Path(path)
    try:
        raw = path.read_text(encoding="utf-8")
        table = json.loads(raw) if path.suffix == ".json" else tomllib.loads(raw)
    except FileNotFoundError as error:
        raise InputError(f"the recipe file {path} does not exist{nearest_path(path)}") from error
    except OSError as error:
        raise InputError(f"the recipe file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        kind = path.suffix.removeprefix(".").upper()
        raise InputError(f"the recipe file {path} is not valid {kind}: {' '.join(str(error).split())}") from error
    recipe = recipe_from_dict(table, known, default_name=path.stem, where=str(path))
    if recipe.name in known and recipe != known[recipe.name]:
        raise InputError(f"{path}: name: {recipe.name} is a recipe of resq's own; give this one another name")
    return recipe


def recipe_from_dict(
    table: Mapping[str, Any], known: Mapping[str, Recipe], *, default_name: str = "mine", where: str = "the recipe"
) -> Recipe:
    """The recipe that a table describes: `recipe_from_dict({"base": "resq", "rounding": {"method": "nearest"}},
    RECIPES)`. Raises InputError in one line, which begins with `where`."""
    given = checked(_File, table, where)
    base = None
    if given.base is not None:
        if given.base not in known:
            raise InputError(
                f"{where}: base: no recipe {shown(given.base)}; recipes are {', '.join(known)}"
                f"{nearest(given.base, known)}"
            )
        base = known[given.base]
    name = given.name
    if name is None:
        try:
            name = short_name(default_name)
        except ValueError as error:
            raise InputError(f"{where}: name: {shown(default_name)} is no name of a recipe; {error}") from error
    precision = precision_from(given.precision or {}, base and base.precision, f"{where}: precision")
    if given.rank is not None:
        precision = ranked(precision, checked(_Ranks, given.rank, f"{where}: rank"), f"{where}: rank")
    if given.rounding is None and base is None:
        raise InputError(f"{where}: a recipe without a base needs [rounding] with method {' or '.join(ROUNDINGS)}")
    rounding = rounding_from(given.rounding or {}, base and base.rounding, f"{where}: rounding")
    overrides = [
        override_from(each, rounding, f"{where}: override {number}")
        for number, each in enumerate(given.override or [], start=1)
    ]
    precision = replace(precision, overrides=(*precision.overrides, *overrides))
    parts = {}
    for field, kinds, tables in (("basis", BASES, given.basis), ("tuning", TUNINGS, given.tuning)):
        inherited = () if base is None else getattr(base, field)
        parts[field] = (
            inherited
            if tables is None
            else tuple(
                part_from(kinds, "kind", each, f"{where}: {field} {number}")
                for number, each in enumerate(tables, start=1)
            )
        )
    clipping = base and base.clipping
    if given.clipping is False:
        clipping = None
    elif given.clipping is not None:
        clipping = fields_from(ClipSearch, given.clipping, f"{where}: clipping", clipping)
    about = given.about if given.about is not None else f"{base.name}, changed" if base is not None else ""
    try:
        return Recipe(name, parts["basis"], precision, rounding, tuning=parts["tuning"], clipping=clipping, about=about)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The table of a recipe, every option in it: `recipe_from_dict(recipe_to_dict(recipe), {})` is the recipe.

    Raises InputError for a part that no file can name, such as a basis of the caller's own.
    """
    p = recipe.precision
    return {
        "name": recipe.name,
        "about": recipe.about,
        "basis": [table_from(BASES, "kind", basis) for basis in recipe.basis],
        "tuning": [table_from(TUNINGS, "kind", tuning) for tuning in recipe.tuning],
        "clipping": False if recipe.clipping is None else table_of(recipe.clipping),
        "precision": {
            **{name: layout_table(getattr(p, name)) for name in WIDTHS},
            "output_per_head": p.output_per_head,
            "rotation_bits": 16 if p.rotation_bits is None else p.rotation_bits,
        },
        "rounding": table_from(ROUNDINGS, "method", recipe.rounding),
        "override": [override_table(override) for override in p.overrides],
    }


def definition_of(recipe: Recipe) -> dict[str, Any]:
    """What a manifest keeps: `recipe_to_dict`, or nothing for a recipe with parts that no file can name."""
    try:
        return recipe_to_dict(recipe)
    except InputError:
        return {}


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML of a recipe's table: plain keys, then tables, then arrays of tables."""

    def lines(entries: Mapping[str, Any]) -> list[str]:
        return [f"{key} = {inline(value)}" for key, value in entries.items()]

    def is_tables(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)

    text = lines({k: v for k, v in table.items() if not isinstance(v, dict) and not is_tables(v)})
    for key, value in table.items():
        if isinstance(value, dict):
            text += ["", f"[{key}]", *lines(value)]
    for key, value in table.items():
        for each in value if is_tables(value) else ():
            text += ["", f"[[{key}]]", *lines(each)]
    return "\n".join(text) + "\n"


def inline(value: Any) -> str:
    """One TOML value."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case dict():
            return "{" + ", ".join(f"{key} = {inline(each)}" for key, each in value.items()) + "}"
    return "[" + ", ".join(map(inline, value)) + "]"


Table = TypeVar("Table", bound=_Table)


def checked(model: type[Table], table: Any, where: str) -> Table:
    """A table with the model's keys alone. Raises InputError in one line."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where} is {shown(table)}; it must be a table")
    try:
        # As JSON, strictly: an enumeration is its word, a tuple a list, and a number never a string.
        return model.model_validate_json(json.dumps(dict(table), default=str))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = errors[0]
    if not first["loc"]:
        raise InputError(f"{where}: {first['msg']}")
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        accepted = tuple(model.model_fields)
        words = f"accepted are {', '.join(accepted)}" if accepted else "there are none"
        raise InputError(f"{where}: unknown key {shown(key)}; {words}{nearest(key, accepted)}")
    if first["type"] == "missing":
        raise InputError(f"{where}: {key} is missing")
    reason = str(first.get("ctx", {}).get("error", first["msg"].lower()))
    # A field that may be None.
    reason += " or false" if any(other["loc"][-1] == "literal[False]" for other in errors) else ""
    place = f"{where}: {key}"
    for step in first["loc"][1:]:
        place += f"[{step}]" if isinstance(step, int) else ""
    raise InputError(f"{place} is {shown(first['input'])}; {reason}")


def shown(value: Any) -> str:
    """What was given, short and on one line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


@cache
def options(part: type) -> type[_Table]:
    """The table of a part's fields; `on` is written `sites`, None false, a function by its name."""
    hints = get_type_hints(part)
    found: dict[str, Any] = {}
    for field in fields(part):
        if not field.init:
            continue
        kind = hints[field.name]
        if field.name in FUNCTIONS:
            kind = Literal[tuple(FUNCTIONS[field.name])]
        elif NoneType in get_args(kind):
            (some,) = (each for each in get_args(kind) if each is not NoneType)
            kind = some | Literal[False]
        required = field.default is MISSING and field.default_factory is MISSING
        found["sites" if field.name == "on" else field.name] = (kind, ... if required else None)
    return create_model(part.__name__, __base__=_Table, **found)


def part_from(kinds: Mapping[str, type], label: str, table: Any, where: str, before: Any = None) -> Any:
    """A basis, a tuning or a rounding; what the table does not name stays as in `before`, one of the same kind."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where} is {shown(table)}; it must be a table")
    entries = dict(table)
    names = {part: name for name, part in kinds.items()}
    kind = entries.pop(label, names.get(type(before)))
    if not isinstance(kind, str) or kind not in kinds:
        given = "is missing" if kind is None else f"is {shown(kind)}"
        near = nearest(kind, kinds) if isinstance(kind, str) else ""
        raise InputError(f"{where}: {label} {given}; accepted are {', '.join(kinds)}{near}")
    return fields_from(kinds[kind], entries, f"{where} ({kind})", before)


def fields_from(part: type, table: Any, where: str, before: Any = None) -> Any:
    """A part from its fields; what the table does not name stays as in `before`, if that is one."""
    found = checked(options(part), table, where)
    values = {}
    for key in found.model_fields_set:
        name, value = "on" if key == "sites" else key, getattr(found, key)
        if name in FUNCTIONS:
            value = FUNCTIONS[name][value]
        optional = NoneType in get_args(get_type_hints(part)[name])
        values[name] = None if optional and value is False else value
    try:
        return replace(before, **values) if isinstance(before, part) else part(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def table_from(kinds: Mapping[str, type], label: str, part: object) -> dict[str, Any]:
    """The inverse of `part_from`, with every field. Raises InputError for a part of the caller's own."""
    kind = next((name for name, each in kinds.items() if type(part) is each), None)
    if kind is None:
        raise InputError(f"{part} is no part that a recipe file can name; those are {', '.join(kinds)}")
    return {label: kind, **table_of(part)}


def table_of(part: Any) -> dict[str, Any]:
    """The inverse of `fields_from`."""
    table: dict[str, Any] = {}
    for field in fields(part):
        if not field.init:
            continue
        value = getattr(part, field.name)
        if field.name in FUNCTIONS:
            name = next((name for name, each in FUNCTIONS[field.name].items() if each is value), None)
            if name is None:
                raise InputError(f"{field.name} is a function of its own, which no recipe file can name")
            value = name
        elif isinstance(value, tuple):
            value = [str(each) if isinstance(each, str) else each for each in value]
        table["sites" if field.name == "on" else field.name] = False if value is None else value
    return table


def rounding_from(table: Any, before: Rounding | None, where: str) -> Rounding:
    """How weights are rounded."""
    return part_from(ROUNDINGS, "method", table, where, before)


def layout_from(value: Any, where: str) -> Layout | None:
    """16, a width, or {low = 4, last = [[8, "1/8"]], first = [[2, "1/8"]]}."""
    if isinstance(value, Mapping):
        found = checked(_Layout, value, where)
        return Layout(found.low, found.last, found.first)
    if isinstance(value, int) and not isinstance(value, bool) and value in (16, *PACKABLE_BITS):
        return None if value == 16 else Layout(value)
    widths = ", ".join(map(str, PACKABLE_BITS))
    raise InputError(
        f'{where} is {shown(value)}; accepted are 16 (unrounded), {widths}, and {{low = 4, last = [[8, "1/8"]]}}'
    )


def layout_table(layout: Layout | None) -> Any:
    """The inverse of `layout_from`."""
    if layout is None:
        return 16
    if not layout.parts:
        return layout.low
    sides = {"last": layout.last, "first": layout.first}
    return {
        "low": layout.low,
        **{side: [[bits, rank_word(part)] for bits, part in parts] for side, parts in sides.items() if parts},
    }


def rank_word(rank: Fraction | int) -> int | str:
    """The inverse of `rank_of`."""
    return rank if isinstance(rank, int) else str(rank)


def precision_from(table: Any, before: Precision | None, where: str) -> Precision:
    """Widths; those that the table does not name stay as before, and may not be left out where there is none before."""
    given = checked(_Precision, table, where)
    if before is None:
        if missing := [name for name in WIDTHS if name != "head" and name not in given.model_fields_set]:
            raise InputError(f"{where}: {', '.join(missing)} must be named in a recipe without a base; 16 is unrounded")
        before = Precision()
    values: dict[str, Any] = {}
    for key in given.model_fields_set:
        value = getattr(given, key)
        if key in WIDTHS:
            value = layout_from(value, f"{where}: {key}")
        elif key == "rotation_bits" and value == 16:
            value = None
        values[key] = value
    return replace(before, **values)


def ranked(precision: Precision, rank: _Ranks, where: str) -> Precision:
    """Every cut below 8 bits with another rank: residual, of weights and inputs but down's; value, of values and of
    o_proj's heads; key, of keys. o_proj follows the values by overrides. Raises InputError where it cannot."""

    def cut(layout: Layout | None, part: Fraction | int | None) -> Layout | None:
        return layout if layout is None or part is None or layout.low >= 8 else layout.with_rank(part)

    found = replace(
        precision,
        weights=cut(precision.weights, rank.residual),
        inputs=cut(precision.inputs, rank.residual),
        key=cut(precision.key, rank.key),
        value=cut(precision.value, rank.value),
    )
    overrides = list(precision.overrides)
    for name, before, after in (
        (Role.O, precision.weights, found.weights),
        (Point.O_IN, precision.inputs, found.inputs),
    ):
        wanted = cut(before, rank.value)
        if wanted is not None and wanted != after:
            override = Override(f"layers.*.{name}", rank=wanted.last[-1][1] if wanted.last else 0)
            if override.layout(after) != wanted:
                raise InputError(
                    f"{where}: residual {rank.residual} and value {rank.value} leave o_proj no cut like the values'; "
                    "give both, or write [[override]] for layers.*.o and layers.*.o_in"
                )
            overrides.append(override)
    return replace(found, overrides=tuple(overrides))


def override_from(table: Any, rounding: Rounding, where: str) -> Override:
    """One [[override]]; its rounding starts from the recipe's."""
    given = checked(_Override, table, where)
    if given.model_fields_set <= {"match"}:
        raise InputError(f"{where}: it changes nothing; give bits, rank, skip or rounding")
    changed = None
    if given.rounding is not None:
        changed = rounding_from(given.rounding, rounding, f"{where}: rounding")
    return Override(given.match, given.bits, given.rank, given.skip, changed)


def override_table(override: Override) -> dict[str, Any]:
    """The inverse of `override_from`."""
    table: dict[str, Any] = {"match": override.pattern, "skip": override.skip}
    table |= {} if override.bits is None else {"bits": override.bits}
    table |= {} if override.rank is None else {"rank": rank_word(override.rank)}
    if override.rounding is not None:
        table["rounding"] = table_from(ROUNDINGS, "method", override.rounding)
    return table
