"""What a packed checkpoint will be: bytes, true bits, the KV cache, online transforms, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from resq.checkpoint.manifest import (
    FORMAT_VERSION,
    EndsEntry,
    FileEntry,
    FormatEntry,
    LayerEntry,
    LinearEntry,
    Manifest,
    MapEntry,
    NormEntry,
    RecipeEntry,
    SourceEntry,
)
from resq.measure.ledger import Ledger, ledger
from resq.measure.plan_memory import Work
from resq.measure.synthetic import online_maps
from resq.models.architecture import Architecture, Point, Site
from resq.numerics import maps as kinds
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats
from resq.numerics.maps import Diagonal
from resq.ptq.placement import INPUT_SITES, Placement
from resq.ptq.recipe import At, Setting

# A .safetensors header, per tensor.
HEADER = 110


@dataclass(frozen=True)
class Size:
    """The checkpoint: what `resq inspect` will say of it, the online map of the first layer at each site (size, and how
    it is made), and what a missing Hadamard order makes of the recipe."""

    ledger: Ledger
    transforms: dict[str, str]
    notes: list[str]


def sized(work: Work, architecture: Architecture, source_bytes: int, seed: int = 0) -> Size:
    """See `Size`. Raises InputError when the recipe cannot cut these sizes."""
    shape, recipe = work.shape, work.recipe
    # Maps of one layer are those of all, but for their values.
    one = replace(shape, layers=1, windows=shape.windows[:1])
    found = online_maps(recipe, one, seed)
    layers, stored = [], dict[str, FileEntry]()
    placement = Placement(one, found, recipe.precision, recipe.folds_norms)
    maps = {
        site: map
        for site in (Site.QUERY_KEY, *INPUT_SITES.values())
        if (map := found.get(At(site, 0))) is not None and not isinstance(map, Diagonal)
    }
    extra = sum(tensor.nbytes for map in maps.values() for tensor in kinds.describe(map)[1].values())
    heads = placement.heads(0, HeadFormats())
    gains = 0 if recipe.folds_norms else 2 * 4 * shape.hidden
    gains += 4 * shape.head_dim * len(architecture.head_norms)
    for index in range(shape.layers):
        precision = recipe.precision
        inputs = {point: _format(ActivationFormat(bands=precision.input_bands(index, point, shape))) for point in Point}
        if precision.output_per_head and inputs[Point.O_IN].bands is not None:
            inputs[Point.O_IN] = inputs[Point.O_IN].model_copy(update={"groups": shape.heads})
        linears, bytes = {}, extra + gains
        for role, (out, inner) in shape.sizes().items():
            bands = precision.weight_bands(index, role, shape)
            pairs, biased = None if bands is None else [list(pair) for pair in bands.pairs], role in architecture.biased
            linears[str(role)] = LinearEntry(name=str(role), shape=[out, inner], bands=pairs, bias=biased)
            bytes += work.packed(role, index) + 4 * out * biased + HEADER * (1 if bands is None else len(bands) + 1)
        file = f"layer-{index}"
        stored[file] = FileEntry(bytes=bytes, sha256="")
        key, value = precision.key_bands(index, shape), precision.value_bands(index, shape)
        norms = {str(point): NormEntry(eps=shape.eps, gain=None) for point in (Point.ATTN_IN, Point.MLP_IN)}
        layers.append(
            LayerEntry(
                file=file,
                linears=linears,
                norms=norms,
                inputs={str(point): format for point, format in inputs.items()},
                query=_format(PLAIN),
                key=_format(replace(heads.key, map=None, bands=key)),
                value=_format(replace(heads.value, bands=value)),
                window=shape.window(index),
            )
        )
    stored["ends"] = FileEntry(bytes=_ends(work), sha256="")
    head = LinearEntry(name="head", shape=[shape.vocab, shape.hidden], bands=None, bias=False)
    norm = NormEntry(eps=shape.eps, gain=None)
    format = _format(PLAIN)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        made_by={},
        recipe=RecipeEntry(name=recipe.name, basis=[], precision={}, rounding="", seed=seed),
        source=SourceEntry(
            name="", model_type="", dtype="", bytes=source_bytes, parameters=0, tied=shape.tied, sha256={}
        ),
        calibration=None,
        ends=EndsEntry(file="ends", embed="", norm=norm, head_input=format, head=head, tied=work.keep_tied),
        layers=layers,
        files=stored,
        copied={},
    )
    setting = Setting(shape, recipe.precision, seed)
    notes = [note for basis in recipe.basis for note in basis.notes(setting)]
    described = {str(site): _described(kinds.describe(map)[0]) for site, map in maps.items()}
    return Size(ledger(manifest, shape.head_dim), described, notes)


def _ends(work: Work) -> int:
    """Bytes of embedding, final norm and head."""
    shape = work.shape
    table, bands = shape.vocab * shape.hidden, work.recipe.precision.lm_head_bands(shape)
    bytes = 2 * table + 4 * HEADER + (0 if work.recipe.folds_norms else 4 * shape.hidden)
    if work.keep_tied:
        return bytes + (4 * shape.hidden**2 if work.recipe.folds_norms else 0)
    if bands is None:
        return bytes + 2 * table
    return bytes + shape.vocab * (sum(band.size * band.bits // 8 for band in bands) + 4 * len(bands))


def _format(format: ActivationFormat) -> FormatEntry:
    return FormatEntry(
        bands=None if format.bands is None else [list(pair) for pair in format.bands.pairs],
        scale_dtype="float16" if str(format.scale_dtype) == "torch.float16" else "float32",
    )


def _described(parameters: dict[str, object]) -> str:
    entry = MapEntry.model_validate(parameters)
    if entry.kind != "hadamard":
        return f"{entry.kind} of {entry.size}"
    across = f", across heads of {entry.inner}" if entry.inner > 1 else ""
    return f"hadamard of {entry.size}: {entry.power} × {entry.order} ({entry.construction}{across})"


def source_bytes(work: Work) -> int:
    """Bytes of a source whose files are not at hand, biases and norms left out."""
    shape = work.shape
    return work.value_bytes * (shape.layers * work.weights() + shape.vocab * shape.hidden * (1 if shape.tied else 2))
