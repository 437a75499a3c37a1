"""The pipeline: moments, maps, then layer by layer place → round → write. It never asks which method it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resq.backends.backend import Backend
from resq.backends.reference import dense, straight_through
from resq.checkpoint.files import CheckpointWriter, EndParts, Parts
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import READERS, Point, Role, Shape, Site
from resq.models.decoder import Layer, Positions
from resq.models.source import Source
from resq.numerics.bands import INT8, Bands
from resq.numerics.device import CPU, full_float32, moved
from resq.numerics.formats import ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, Linear
from resq.numerics.maps import Dense, LinearMap
from resq.numerics.moments import Leaves, TreeSum
from resq.progress import Progress
from resq.ptq.clipping import ClipSearch
from resq.ptq.golden import golden_of, golden_of_layer
from resq.ptq.placement import Placement
from resq.ptq.precision import Precision, names_of
from resq.ptq.recipe import At, Fitted, InputMoments, Moments, Recipe, Setting
from resq.ptq.rounding.nearest import Nearest
from resq.ptq.statistics import check_finite, collect, in_dtype


@dataclass(frozen=True)
class LinearReport:
    """What rounding one linear cost.

    error: ||X W^T - X Ŵ^T||² / ||X W^T||² on the calibration inputs, or of the weights alone (None inputs) when the
    rounding used no moment; W is the weight that was rounded, after the rounding's correction where it makes one.
    damping: what the Cholesky factorization took. seconds: wall time.
    """

    layer: int
    role: str
    error: float
    damping: float | None
    seconds: float


@dataclass(frozen=True)
class Job:
    """Everything that decides the integers beside the source: recipe, calibration windows, seed, and where it is all
    computed. moments: of the calibration windows, where they were collected before; the tokens then may be none when
    neither rounding nor tuning looks at any."""

    recipe: Recipe
    tokens: Tensor
    rounding_windows: int
    seed: int
    keep_tied: bool
    device: torch.device = CPU
    moments: Moments | None = None


@dataclass(frozen=True)
class Outcome:
    """What `quantize` tells: the cost of every linear, and remarks of the tuning for the manifest."""

    linears: list[LinearReport]
    notes: list[str]


def fit_maps(
    recipe: Recipe, moments: Moments, shape: Shape, seed: int, device: torch.device = CPU
) -> dict[At, LinearMap]:
    """All bases' maps, on `device`; the recipe has made sure that no site is named twice."""
    setting = Setting(shape, recipe.precision, seed, device)
    maps: dict[At, LinearMap] = {}
    for basis in recipe.basis:
        maps.update(moved(basis.fit(moments, setting), device))
    return maps


def tuned_maps(source: Source, job: Job, moments: Moments, progress: Progress) -> tuple[dict[At, LinearMap], list[str]]:
    """The bases' maps after the recipe's tuning, and what it remarks."""
    maps, notes = fit_maps(job.recipe, moments, source.shape, job.seed, job.device), []
    setting = Setting(source.shape, job.recipe.precision, job.seed, job.device)
    for tuning in job.recipe.tuning:
        tuned = tuning(Fitted(source, job.recipe, maps, moments, job.tokens, setting), progress)
        maps, notes = dict(tuned.maps), [*notes, *tuned.notes]
    return maps, notes


@full_float32()
def quantize(source: Source, job: Job, writer: CheckpointWriter, progress: Progress) -> Outcome:
    """Quantize `source` into `writer`'s layers and ends. Two passes, each with one decoder layer in memory.

    A layer is moved to the job's device when it is visited and back to the CPU when it is written; the windows' hidden
    states stay there. Raises InputError for tensors or activations that are not finite and for impossible bands.
    """
    ops = dense(torch.float32, job.device)
    recipe, shape = job.recipe, source.shape
    check_sizes(recipe, shape)
    for basis in recipe.basis:
        basis.check(shape, job.tokens.numel() if job.moments is None else job.moments.tokens)
    if job.moments is None:
        moments = collect(source, ops, job.tokens, recipe.needs, progress)
    else:
        moments = moved(job.moments, job.device)
    maps, notes = tuned_maps(source, job, moments, progress)
    placement = Placement(shape, maps, recipe.precision, recipe.folds_norms)

    placed = placement.ends(moved(source.ends(), job.device), keep_tied=job.keep_tied)
    rounded = store_ends(placed, source, recipe.precision, keep_tied=job.keep_tied)
    head, stored = golden_of(rounded.head, rounded.head_input), moved(rounded, CPU)
    writer.add_ends(_end_names(source), stored)
    writer.add_golden({} if head is None else {_end_names(source)["head"]: head})
    tokens = job.tokens[: job.rounding_windows] if recipe.needs_windows else job.tokens[:0]
    # The table as it will be read: already rounded to 16 bit.
    hidden = [stored.embed[window[None]].to(job.device, ops.dtype) for window in tokens]
    seen = tokens.to(job.device) if recipe.corrects else []
    exact = [placed.embed[window[None]].to(ops.dtype) for window in seen]
    del placed, rounded, stored

    names = _layer_names(source)
    reports = []
    progress("rounding", 0, shape.layers * len(Role))
    for index in range(shape.layers):
        layer = placement.layer(moved(source.layer(index), job.device), index)
        rounded = round_layer(shape, layer, recipe, hidden, exact, reports, index, progress)
        writer.add_golden(golden_of_layer(rounded, source.layer_prefix(index), names))
        packed = moved(rounded, CPU)
        parts = Parts({**packed.linears}, {**packed.norms}, {**packed.inputs}, packed.heads, packed.window)
        writer.add_layer(index, shape.layers, source.layer_prefix(index), names, parts)
        del layer, rounded, packed, parts
    return Outcome(reports, notes)


class Stream:
    """State: the calibration windows on their way through one layer; `hidden` is one [1, t, d] per window and moves to
    the layer's output as the layer's groups are passed."""

    def __init__(self, ops: Backend, shape: Shape, layer: Layer, hidden: list[Tensor]) -> None:
        self.ops, self.shape, self.layer, self.hidden = ops, shape, in_dtype(layer, ops.dtype), hidden
        self._heads: list[Tensor] = []

    def input(self, point: Point, window: int) -> Tensor:
        """What the linears at `point` read, [t, n], once the groups before were passed."""
        hidden = self.hidden[window]
        match point:
            case Point.ATTN_IN:
                return decoder.attention_input(self.ops, self.layer, hidden)[0]
            case Point.O_IN:
                return self._heads[window][0]
            case Point.MLP_IN:
                return decoder.mlp_input(self.ops, self.layer, hidden)[0]
            case Point.DOWN_IN:
                return decoder.mlp_hidden(self.ops, self.layer, decoder.mlp_input(self.ops, self.layer, hidden))[0]

    def replace(self, role: Role, linear: DenseLinear) -> None:
        """Run on with another weight."""
        self.layer.linears[role] = linear

    def advance(self, point: Point) -> None:
        """Pass the group that reads `point`."""
        ops, layer = self.ops, self.layer
        match point:
            case Point.ATTN_IN:
                at = Positions.following(self.shape, 0, 1, self.hidden[0].shape[1], device=ops.device)
                for hidden in self.hidden:
                    x = decoder.attention_input(ops, layer, hidden)
                    self._heads.append(decoder.attention(ops, self.shape, layer, x, at, ops.cache(layer.heads)))
            case Point.O_IN:
                for number, x in enumerate(self._heads):
                    self.hidden[number] = self.hidden[number] + ops.linear(x, layer.linears[Role.O])
                self._heads.clear()
            case Point.DOWN_IN:
                for number, hidden in enumerate(self.hidden):
                    x = decoder.mlp_hidden(ops, layer, decoder.mlp_input(ops, layer, hidden))
                    self.hidden[number] = hidden + ops.linear(x, layer.linears[Role.DOWN])


def round_layer(
    shape: Shape,
    layer: Layer,
    recipe: Recipe,
    hidden: list[Tensor],
    exact: list[Tensor],
    reports: list[LinearReport],
    index: int,
    progress: Progress,
) -> Layer:
    """Round one placed float64 layer, group by group in the order it runs, and move `hidden` (one [1, t, d] per window)
    to its output, and `exact` (of the unrounded model, where the rounding corrects) to that of the unrounded layer. All
    on the device where layer and windows lie.

    A group's moments are taken after the groups before it were rounded, with the online maps applied; activations and
    cache are rounded where the rounding asks for it. `hidden` is empty when nothing is looked at.
    """
    if recipe.clipping is not None:
        layer = replace(layer, inputs=clipped_inputs(shape, layer, recipe.clipping, hidden))
    norms = {point: _stored_norm(norm) for point, norm in layer.norms.items()}
    stored = replace(layer, linears=dict(layer.linears), norms=norms, heads=_stored_heads(layer.heads))
    ops = dense(torch.float32, device_of(layer))
    seen = Stream(straight_through(ops.device) if recipe.sees_rounded else ops, shape, layer, hidden)
    wanted = Stream(ops, shape, layer, exact) if exact else None

    for point, roles in READERS.items():
        moments = input_moments(seen, wanted, point) if recipe.needs_moment else None
        for role in roles:
            weight, bias = layer.linears[role].weight, layer.linears[role].bias
            bands = recipe.precision.weight_bands(index, role, shape)
            started = time.perf_counter()
            damping, target = None, weight
            if bands is None:
                wide = None if bias is None else bias.to(torch.float32)
                stored.linears[role] = DenseLinear(nearest_16_bit(weight), wide)
                rounded = stored.linears[role].weight.to(torch.float64)
            else:
                result = recipe.rounding_of(index, role)(weight, moments, bands, bias)
                stored.linears[role], damping, target = result.linear, result.damping, result.target
                rounded = result.linear.dequantize(torch.float64)
            kept = None if bias is None else bias.to(seen.ops.dtype)
            seen.replace(role, DenseLinear(rounded.to(seen.ops.dtype), kept))
            error = relative_error(target, rounded, None if moments is None else moments.seen)
            reports.append(LinearReport(index, role, error, damping, time.perf_counter() - started))
            progress("rounding", len(reports), shape.layers * len(Role))
        for stream in (seen, wanted):
            if stream is not None and hidden:
                stream.advance(point)
    check_finite(hidden, index)
    return stored


def device_of(layer: Layer) -> torch.device:
    """Where a layer's weights lie."""
    return layer.linears[Role.Q].weight.device


def clipped_inputs(
    shape: Shape, layer: Layer, clipping: ClipSearch, hidden: Sequence[Tensor]
) -> dict[Point, ActivationFormat]:
    """The formats of a layer's inputs with their clips, from the unrounded layer on some of its inputs."""
    ops = dense(torch.float32, device_of(layer))
    stream, formats = Stream(ops, shape, layer, list(hidden[: clipping.windows])), {}
    for point in READERS:
        inputs = [stream.input(point, number) for number in range(len(stream.hidden))]
        formats[point] = clipping.search(layer.inputs[point], inputs)
        stream.advance(point)
    return formats


def input_moments(seen: Stream, wanted: Stream | None, point: Point) -> InputMoments:
    """Sums over the windows of the inputs of the linears at `point`."""
    leaves = Leaves(len(seen.hidden))
    total, cross = TreeSum(leaves), TreeSum(leaves)
    for number in range(len(seen.hidden)):
        x = seen.input(point, number)
        total.add(number, x)
        if wanted is not None:
            cross.add_cross(number, x, wanted.input(point, number))
    return InputMoments(total.total(), None if wanted is None else cross.total())


def relative_error(weight: Tensor, rounded: Tensor, moment: Tensor | None) -> float:
    """||X (W - Ŵ)^T||² / ||X W^T||² from the moment X^T X, or ||W - Ŵ||² / ||W||² without one."""
    difference = weight - rounded
    if moment is None:
        return float(difference.square().sum() / weight.square().sum().clamp(min=1e-300))
    energy = torch.einsum("oi,ij,oj->", weight, moment, weight)
    return float(torch.einsum("oi,ij,oj->", difference, moment, difference) / energy.clamp(min=1e-300))


def check_sizes(recipe: Recipe, shape: Shape) -> None:
    """Raises InputError before any work when some dimension cannot be cut as the recipe asks, or when an override names
    nothing."""
    precision = recipe.precision
    for override in precision.overrides:
        if not any(override.names(name) for name in names_of(shape.layers)):
            raise InputError(
                f"an override names {override.pattern!r}, which is nothing in a model of {shape.layers} layers; names "
                "are layers.0.q … with q, k, v, o, gate, up, down, attn_in, o_in, mlp_in, down_in, key or value"
            )
    shared = Setting(shape, precision, 0).bands(At(Site.RESIDUAL)) if recipe.folds_norms else None
    for index in range(shape.layers):
        for point, roles in READERS.items():
            inputs = precision.input_bands(index, point, shape)
            for role in roles:
                weights = precision.weight_bands(index, role, shape)
                for what, bands in ((point, inputs), (role, weights)):
                    # The residual stream's coordinates are in one order for all layers, with rotations in each part.
                    read = point in (Point.ATTN_IN, Point.MLP_IN)
                    if read and shared and bands and not starts(bands) <= starts(shared):
                        raise InputError(
                            f"layers.{index}.{what} is cut into {bands.pairs}, the residual stream that it shares with "
                            f"other layers into {shared.pairs}; use the same rank, or none"
                        )
                if inputs is None or weights is None:
                    continue
                per_head = precision.output_per_head and point is Point.O_IN
                if not starts(inputs) <= starts(weights) or (per_head and starts(inputs) != starts(weights)):
                    raise InputError(
                        f"weights of {role} are cut into {weights.pairs}, its inputs into {inputs.pairs}; integers can "
                        "be summed only where weights are cut wherever inputs are"
                        f"{', and nowhere else' if per_head else ''}"
                    )
        recipe.check_layer(index)
        precision.key_bands(index, shape)
        precision.value_bands(index, shape)


def starts(bands: Bands) -> set[int]:
    """Where a dimension is cut."""
    return {cut.start for cut in bands.slices()}


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
