"""The pipeline: moments, maps, then layer by layer place → round → write. It never asks which method it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resq.backends.backend import Backend
from resq.backends.reference import dense
from resq.checkpoint.files import CheckpointWriter, EndParts, Parts
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import READERS, Point, Role, Shape
from resq.models.decoder import Layer, Positions
from resq.models.source import Source
from resq.numerics.bands import INT8
from resq.numerics.formats import HeadFormats, Norm
from resq.numerics.linear import DenseLinear, Linear
from resq.numerics.maps import Dense, LinearMap
from resq.numerics.moments import MomentSum
from resq.progress import Progress
from resq.ptq.placement import Placement
from resq.ptq.recipe import At, Moments, Precision, Recipe, Setting
from resq.ptq.rounding.nearest import Nearest
from resq.ptq.statistics import check_finite, collect, in_dtype


@dataclass(frozen=True)
class LinearReport:
    """What rounding one linear cost.

    error: ||X W^T - X Ŵ^T||² / ||X W^T||² on the calibration inputs, or of the weights alone (None inputs) when the
    rounding used no moment. damping: what the Cholesky factorization took. seconds: wall time.
    """

    layer: int
    role: str
    error: float
    damping: float | None
    seconds: float


@dataclass(frozen=True)
class Job:
    """Everything that decides the integers beside the source: recipe, calibration windows, seed."""

    recipe: Recipe
    tokens: Tensor
    rounding_windows: int
    seed: int
    keep_tied: bool


def fit_maps(recipe: Recipe, moments: Moments, shape: Shape, seed: int) -> dict[At, LinearMap]:
    """All bases' maps; the recipe has made sure that no site is named twice."""
    setting = Setting(shape, recipe.precision, seed)
    maps: dict[At, LinearMap] = {}
    for basis in recipe.basis:
        maps.update(basis.fit(moments, setting))
    return maps


def quantize(source: Source, job: Job, writer: CheckpointWriter, progress: Progress) -> list[LinearReport]:
    """Quantize `source` into `writer`'s layers and ends. Two passes, each with one decoder layer in memory.

    Raises InputError for tensors or activations that are not finite and for impossible bands.
    """
    ops = dense(torch.float32)
    recipe, shape = job.recipe, source.shape
    check_sizes(recipe.precision, shape)
    for basis in recipe.basis:
        basis.check(shape, job.tokens.numel())
    moments = collect(source, ops, job.tokens, recipe.needs, progress)
    placement = Placement(shape, fit_maps(recipe, moments, shape, job.seed), recipe.precision, recipe.folds_norms)

    placed = placement.ends(source.ends(), keep_tied=job.keep_tied)
    stored = store_ends(placed, source, recipe.precision, keep_tied=job.keep_tied)
    writer.add_ends(_end_names(source), stored)
    tokens = job.tokens[: job.rounding_windows] if recipe.rounding.needs_moment else job.tokens[:0]
    # The table as it will be read: already rounded to 16 bit.
    hidden = [stored.embed[window[None]].to(ops.dtype) for window in tokens]
    del placed, stored

    names = _layer_names(source)
    reports = []
    progress("rounding", 0, shape.layers * len(Role))
    for index in range(shape.layers):
        layer = placement.layer(source.layer(index), index)
        packed = round_layer(ops, shape, layer, recipe, hidden, reports, index, progress)
        parts = Parts({**packed.linears}, {**packed.norms}, {**packed.inputs}, packed.heads, packed.window)
        writer.add_layer(index, shape.layers, source.layer_prefix(index), names, parts)
        del layer, packed, parts
    return reports


def round_layer(
    ops: Backend,
    shape: Shape,
    layer: Layer,
    recipe: Recipe,
    hidden: list[Tensor],
    reports: list[LinearReport],
    index: int,
    progress: Progress,
) -> Layer:
    """Round one placed float64 layer, group by group in the order it runs, and move `hidden` (one [1, t, d] per window)
    to its output.

    A group's moment is taken after the groups before it were rounded, with the online maps applied and neither
    activations nor cache rounded. `hidden` is empty when the rounding needs no moments.
    """
    run = in_dtype(layer, ops.dtype)
    norms = {point: _stored_norm(norm) for point, norm in layer.norms.items()}
    stored = replace(layer, linears=dict(layer.linears), norms=norms, heads=_stored_heads(layer.heads))
    at = Positions.following(shape, 0, 1, hidden[0].shape[1]) if hidden else None

    def round_group(point: Point, moment: Tensor | None) -> None:
        for role in READERS[point]:
            weight, bias = layer.linears[role].weight, layer.linears[role].bias
            bands = recipe.precision.weight_bands(role, point, shape)
            started = time.perf_counter()
            if bands is None:
                wide = None if bias is None else bias.to(torch.float32)
                stored.linears[role] = DenseLinear(nearest_16_bit(weight), wide)
                rounded, damping = stored.linears[role].weight.to(torch.float64), None
            else:
                result = recipe.rounding(weight, moment, bands, bias)
                stored.linears[role], damping = result.linear, result.damping
                rounded = result.linear.dequantize(torch.float64)
            run.linears[role] = DenseLinear(rounded.to(ops.dtype), None if bias is None else bias.to(ops.dtype))
            error = relative_error(weight, rounded, moment)
            reports.append(LinearReport(index, role, error, damping, time.perf_counter() - started))
            progress("rounding", len(reports), shape.layers * len(Role))

    def moment_of(inputs: list[Tensor]) -> Tensor | None:
        if not inputs:
            return None
        total = MomentSum()
        for x in inputs:
            total.add(x[0])
        return total.total()

    def streamed_moment(form: Callable[[int], Tensor]) -> Tensor | None:
        # A window's number -> its input, made and dropped.
        if at is None:
            return None
        total = MomentSum()
        for number in range(len(hidden)):
            total.add(form(number)[0])
        return total.total()

    round_group(Point.ATTN_IN, streamed_moment(lambda n: decoder.attention_input(ops, run, hidden[n])))
    heads = []
    if at is not None:
        for h in hidden:
            x = decoder.attention_input(ops, run, h)
            heads.append(decoder.attention(ops, shape, run, x, at, ops.cache(run.heads)))
    round_group(Point.O_IN, moment_of(heads))
    for number, x in enumerate(heads):
        hidden[number] = hidden[number] + ops.linear(x, run.linears[Role.O])
    del heads
    round_group(Point.MLP_IN, streamed_moment(lambda n: decoder.mlp_input(ops, run, hidden[n])))

    def mlp_hidden(number: int) -> Tensor:
        return decoder.mlp_hidden(ops, run, decoder.mlp_input(ops, run, hidden[number]))

    round_group(Point.DOWN_IN, streamed_moment(mlp_hidden))
    for number in range(len(hidden)):
        hidden[number] = hidden[number] + ops.linear(mlp_hidden(number), run.linears[Role.DOWN])
    check_finite(hidden, index)
    return stored


def relative_error(weight: Tensor, rounded: Tensor, moment: Tensor | None) -> float:
    """||X (W - Ŵ)^T||² / ||X W^T||² from the moment X^T X, or ||W - Ŵ||² / ||W||² without one."""
    difference = weight - rounded
    if moment is None:
        return float(difference.square().sum() / weight.square().sum().clamp(min=1e-300))
    energy = torch.einsum("oi,ij,oj->", weight, moment, weight)
    return float(torch.einsum("oi,ij,oj->", difference, moment, difference) / energy.clamp(min=1e-300))


def check_sizes(precision: Precision, shape: Shape) -> None:
    """Raises InputError before any work when some dimension cannot be cut as the recipe asks."""
    for point, roles in READERS.items():
        inputs = precision.input_bands(point, shape)
        for role in roles:
            weights = precision.weight_bands(role, point, shape)
            if inputs is None or weights is None:
                continue
            outer, inner = ({cut.start for cut in bands.slices()} for bands in (inputs, weights))
            per_head = precision.output_per_head and point is Point.O_IN
            if not outer <= inner or (per_head and outer != inner):
                raise InputError(
                    f"weights of {role} are cut into {weights.pairs}, its inputs into {inputs.pairs}; integers can be "
                    f"summed only where weights are cut wherever inputs are{', and nowhere else' if per_head else ''}"
                )
    precision.head_bands(precision.key, shape)
    precision.head_bands(precision.value, shape)


def store_ends(ends: decoder.Ends, source: Source, precision: Precision, *, keep_tied: bool) -> EndParts:
    """Placed float64 ends as they are written: tables in 16 bit, the head in the precision asked for."""
    embed = ends.embed.to(sixteen_bit(ends.embed, source.dtype))
    head: Linear
    head_input = ends.head_input
    if keep_tied:
        head = DenseLinear(embed)
    elif precision.head is None:
        head = DenseLinear(ends.head.weight.to(sixteen_bit(ends.head.weight, source.dtype)))
    else:
        bands = precision.lm_head_bands(source.shape)
        assert bands is not None
        head = Nearest()(ends.head.weight, None, bands, None).linear
        head_input = replace(head_input, bands=INT8.bands(source.shape.hidden))
    head_input = replace(head_input, map=_stored_map(head_input.map))
    return EndParts(embed, _stored_norm(ends.norm), head_input, head, keep_tied)


def sixteen_bit(table: Tensor, source_dtype: str) -> torch.dtype:
    """bfloat16 for a bfloat16 source and where a value is out of float16's range, else float16: more digits."""
    if source_dtype == "bfloat16" or float(table.abs().max()) > torch.finfo(torch.float16).max:
        return torch.bfloat16
    return torch.float16


def nearest_16_bit(weight: Tensor) -> Tensor:
    """float64 weights in bfloat16 or float16, whichever is nearer: what came from either comes back bit for bit."""
    # bfloat16 first: small matrices of a bfloat16 source often fit both.
    candidates = [weight.to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    return min(candidates, key=lambda rounded: float((weight - rounded).norm()))


def _stored_norm(norm: Norm) -> Norm:
    return Norm(norm.eps, None if norm.gain is None else norm.gain.to(torch.float32))


def _stored_heads(heads: HeadFormats) -> HeadFormats:
    """The query and key map, one tensor for both, in the activations' float32."""
    turn = _stored_map(heads.query.map)
    return replace(
        heads,
        query=replace(heads.query, map=turn),
        key=replace(heads.key, map=turn),
        query_norm=None if heads.query_norm is None else _stored_norm(heads.query_norm),
        key_norm=None if heads.key_norm is None else _stored_norm(heads.key_norm),
    )


def _stored_map(map: LinearMap | None) -> LinearMap | None:
    """The same map, its matrix in float32."""
    return replace(map, matrix=map.matrix.to(torch.float32)) if isinstance(map, Dense) else map


def _layer_names(source: Source) -> Mapping[str, str]:
    return {**source.architecture.linears, **source.architecture.norms}


def _end_names(source: Source) -> Mapping[str, str]:
    architecture = source.architecture
    return {"embed": architecture.embed, "norm": architecture.final_norm, "head": architecture.head}
