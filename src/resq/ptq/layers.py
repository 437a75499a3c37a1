"""One decoder layer: its calibration windows flow through it, its linears are rounded group by group."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from resq.backends.backend import Backend
from resq.backends.reference import dense, straight_through
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import READERS, Point, Role, Shape
from resq.models.decoder import Layer, Positions
from resq.numerics.bands import Bands, cuts
from resq.numerics.device import CPU, moved
from resq.numerics.formats import ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, Linear, PackedLinear
from resq.numerics.maps import Dense, LinearMap
from resq.numerics.moments import LEAF_WINDOWS, Leaves, MomentSum, Tree, TreeSum
from resq.progress import Progress, silent
from resq.ptq.activations import Activations, Buffers
from resq.ptq.clipping import ClipSearch
from resq.ptq.ranks import ALONE, Ranks
from resq.ptq.recipe import InputMoments, Recipe, Rounding
from resq.ptq.rounding import ROWS
from resq.ptq.statistics import check_finite


@dataclass(frozen=True)
class LinearReport:
    """What rounding one linear cost.

    error: ||X W^T - X Ŵ^T||² / ||X W^T||² on the calibration inputs, or of the weights alone (None inputs) when the
    rounding used no moment; W is the weight that was rounded, after the rounding's correction where it makes one.
    damping: what the Cholesky factorization took. seconds: wall time. dead_inputs: input channels that are 0 on every
    calibration token, whose weights are rounded to 0; zero_rows: output channels without a weight.
    """

    layer: int
    role: str
    error: float
    damping: float | None
    seconds: float
    dead_inputs: int = 0
    zero_rows: int = 0

    @property
    def snr(self) -> float:
        """Signal to noise of the outputs, dB; infinite without an error."""
        return -10 * math.log10(self.error) if self.error else math.inf


@dataclass(frozen=True)
class Flow:
    """How calibration windows run: by whom, where their states lie, and under which leaves."""

    leaves: Leaves
    ranks: Ranks = ALONE
    buffers: Buffers = field(default_factory=Buffers)


class Stream:
    """State: the calibration windows on their way through one layer; `hidden` moves to the layer's output as the
    layer's groups are passed. A group's linears are put in before it is passed: no copy of the layer is held."""

    def __init__(self, ops: Backend, shape: Shape, layer: Layer, hidden: Activations, buffers: Buffers) -> None:
        self.ops, self.shape, self.layer, self.hidden = ops, shape, replace(layer, linears={}), hidden
        self._buffers = buffers
        self._heads: Activations | None = None

    def input(self, point: Point, window: int) -> Tensor:
        """What the linears at `point` read, [t, n], once the groups before were passed."""
        if point is Point.O_IN:
            assert self._heads is not None
            return self._heads[window][0]
        hidden = self.hidden[window]
        if point is Point.ATTN_IN:
            return decoder.attention_input(self.ops, self.layer, hidden)[0]
        x = decoder.mlp_input(self.ops, self.layer, hidden)
        return (x if point is Point.MLP_IN else decoder.mlp_hidden(self.ops, self.layer, x))[0]

    def put(self, role: Role, linear: Linear, bias: Tensor | None) -> None:
        """Run on with this weight, in the dtype of the operators; bias: the one before it was stored."""
        weight = torch.empty(linear.shape, dtype=self.ops.dtype, device=self.ops.device)
        for cut in cuts(linear.shape[0], ROWS):
            packed = isinstance(linear, PackedLinear)
            weight[cut] = linear.rows(cut).dequantize(torch.float64) if packed else linear.weight[cut]
        self.layer.linears[role] = DenseLinear(weight, None if bias is None else bias.to(self.ops.dtype))

    def advance(self, point: Point) -> None:
        """Pass the group that reads `point`."""
        ops, layer, count = self.ops, self.layer, len(self.hidden)
        match point:
            case Point.ATTN_IN:
                at = Positions.following(self.shape, 0, 1, self.hidden[0].shape[1], device=ops.device)

                def attended(number: int) -> Tensor:
                    x = decoder.attention_input(ops, layer, self.hidden[number])
                    return decoder.attention(ops, self.shape, layer, x, at, ops.cache(layer.heads))

                self._heads = self._buffers.keep((attended(number) for number in range(count)), count)
            case Point.O_IN:
                assert self._heads is not None
                for number in range(count):
                    self.hidden[number] = self.hidden[number] + ops.linear(self._heads[number], layer.linears[Role.O])
                self._heads = None
            case Point.DOWN_IN:
                for number in range(count):
                    hidden = self.hidden[number]
                    x = decoder.mlp_hidden(ops, layer, decoder.mlp_input(ops, layer, hidden))
                    self.hidden[number] = hidden + ops.linear(x, layer.linears[Role.DOWN])


def round_layer(
    shape: Shape,
    layer: Layer,
    recipe: Recipe,
    index: int,
    hidden: Activations,
    exact: Activations,
    flow: Flow,
    progress: Progress = silent,
) -> tuple[Layer, list[LinearReport]]:
    """Round one placed float64 layer, group by group in the order it runs, and move `hidden` to its output, and `exact`
    (of the unrounded model, where the rounding corrects) to that of the unrounded layer. All on the device where the
    layer lies. The layer's weights are given up as they are rounded.

    A group's moments are taken after the groups before it were rounded, with the online maps applied; activations and
    cache are rounded where the rounding asks for it. `hidden` has this rank's windows, none when nothing is looked at.
    """
    if recipe.clipping is not None:
        clipping, looked = recipe.clipping, first_windows(recipe.clipping.windows, hidden, flow)
        formats = flow.ranks.from_first(lambda: moved(clipped_inputs(shape, layer, clipping, looked), CPU))
        layer = replace(layer, inputs=moved(formats, device_of(layer)))
    norms = {point: stored_norm(norm) for point, norm in layer.norms.items()}
    stored = replace(layer, linears={}, norms=norms, heads=stored_heads(layer.heads))
    ops = dense(torch.float32, device_of(layer))
    seen = Stream(straight_through(ops.device) if recipe.sees_rounded else ops, shape, layer, hidden, flow.buffers)
    wanted = Stream(ops, shape, layer, exact, flow.buffers) if recipe.corrects else None
    reports: list[LinearReport] = []
    for point, roles in READERS.items():
        size = layer.linears[roles[0]].weight.shape[1]
        moments = input_moments(seen, wanted, point, size, flow) if recipe.needs_moment else None
        for role in roles:
            started = time.perf_counter()
            linear = layer.linears.pop(role)
            bands = recipe.precision.weight_bands(index, role, shape)
            if bands is None:
                stored.linears[role], report = kept_wide(linear, moments)
            else:
                stored.linears[role], report = rounded_by_rows(
                    f"layer {index} {role}", linear, recipe.rounding_of(index, role), moments, bands, flow.ranks
                )
            if len(hidden):
                seen.put(role, stored.linears[role], linear.bias)
            if wanted is not None:
                wanted.put(role, linear, linear.bias)
            del linear
            reports.append(replace(report, layer=index, role=role, seconds=time.perf_counter() - started))
            progress("rounding", index * len(Role) + len(reports), shape.layers * len(Role))
        del moments
        for stream in (seen, wanted):
            if stream is not None and len(stream.hidden):
                stream.advance(point)
    check_finite(hidden, index)
    return stored, reports


@dataclass(frozen=True)
class _Block:
    """Some rounded rows: the weights, the damping, and Σ error² and Σ output² over these rows."""

    linear: PackedLinear
    damping: float | None
    lost: float
    energy: float


def rounded_by_rows(
    name: str, linear: DenseLinear, rounding: Rounding, moments: InputMoments | None, bands: Bands, ranks: Ranks
) -> tuple[PackedLinear, LinearReport]:
    """Round blocks of `ROWS` rows, each by the rank that owns it; all ranks get them all. Blocks are the same for any
    number of ranks, so that the bits are too. Raises InputError with the linear's `name`."""
    rows = cuts(len(linear.weight), ROWS)
    mine: dict[int, _Block] = {}
    for number in ranks.share(len(rows)):
        cut = rows[number]
        try:
            result = rounding(linear.weight[cut], moments, bands, None if linear.bias is None else linear.bias[cut])
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        rounded = result.linear.dequantize(torch.float64)
        lost, energy = output_error(result.target, rounded, moments)
        mine[number] = _Block(result.linear, result.damping, lost, energy)
    if ranks.size > 1:
        everyone = ranks.gathered(moved(mine, CPU))
        mine = moved({number: block for part in everyone for number, block in part.items()}, linear.weight.device)
    blocks = [mine[number] for number in range(len(rows))]
    dampings = [block.damping for block in blocks if block.damping is not None]
    error = sum(block.lost for block in blocks) / max(sum(block.energy for block in blocks), 1e-300)
    report = LinearReport(0, "", error, max(dampings, default=None), 0.0, *_empty(linear, moments))
    return PackedLinear.stacked([block.linear for block in blocks]), report


def kept_wide(linear: DenseLinear, moments: InputMoments | None) -> tuple[DenseLinear, LinearReport]:
    """A linear that stays 16 bit."""
    wide = None if linear.bias is None else linear.bias.to(torch.float32)
    kept = DenseLinear(nearest_16_bit(linear.weight), wide)
    lost, energy = output_error(linear.weight, kept.weight.to(torch.float64), moments)
    return kept, LinearReport(0, "", lost / max(energy, 1e-300), None, 0.0, *_empty(linear, moments))


def _empty(linear: DenseLinear, moments: InputMoments | None) -> tuple[int, int]:
    """Dead inputs, zero rows."""
    dead = 0 if moments is None else int((torch.diagonal(moments.seen) == 0).sum())
    return dead, int((~linear.weight.any(dim=1)).sum())


def device_of(layer: Layer) -> torch.device:
    """Where a layer's weights lie."""
    return layer.linears[Role.Q].weight.device


def first_windows(count: int, hidden: Activations, flow: Flow) -> list[Tensor]:
    """The states of the first `count` windows of all ranks, in the first of them; elsewhere nothing of use."""
    begin = flow.leaves.span(*flow.ranks.span(flow.leaves))[0]
    mine = [hidden[number] for number in range(max(0, min(len(hidden), count - begin)))]
    if flow.ranks.size == 1 or count <= LEAF_WINDOWS:  # the first rank has a leaf
        return mine
    return [each for part in flow.ranks.gathered([each.to(CPU) for each in mine]) for each in part]


def clipped_inputs(
    shape: Shape, layer: Layer, clipping: ClipSearch, hidden: list[Tensor]
) -> dict[Point, ActivationFormat]:
    """The formats of a layer's inputs with their clips, from the unrounded layer on some of its inputs."""
    ops, formats = dense(torch.float32, device_of(layer)), {}
    count, here = len(hidden), Buffers(device=ops.device)
    stream = Stream(ops, shape, layer, here.keep(iter(hidden), count), here)
    for point, roles in READERS.items():
        inputs = [stream.input(point, number) for number in range(count)]
        formats[point] = clipping.search(layer.inputs[point], inputs)
        for role in roles:
            stream.put(role, layer.linears[role], layer.linears[role].bias)
        stream.advance(point)
    return formats


def input_moments(seen: Stream, wanted: Stream | None, point: Point, size: int, flow: Flow) -> InputMoments:
    """Sums over all ranks' windows of the inputs, `size` coordinates, of the linears at `point`."""
    first, device = flow.ranks.span(flow.leaves)[0], seen.ops.device
    second, cross = MomentSum(size, flow.leaves, first), TreeSum(flow.leaves, first)
    for number in range(len(seen.hidden)):
        x = seen.input(point, number)
        second.add(number, x)
        if wanted is not None:
            cross.add(number, x, wanted.input(point, number))

    def summed(tree: Tree, shape: tuple[int, int]) -> Tensor:
        return flow.ranks.total(tree, flow.leaves, shape, device)

    crossed = None if wanted is None else summed(cross.tree(), (size, size))
    return InputMoments(second.total(device, summed), crossed, gives_up=True)


def output_error(weight: Tensor, rounded: Tensor, moments: InputMoments | None) -> tuple[float, float]:
    """||X (W - Ŵ)^T||² and ||X W^T||² from the inputs' moments; ||W - Ŵ||² and ||W||² without them."""
    difference = weight - rounded
    if moments is None:
        return float(difference.square().sum()), float(weight.square().sum())
    return moments.energy(difference), moments.energy(weight)


def nearest_16_bit(weight: Tensor) -> Tensor:
    """float64 weights in bfloat16 or float16, whichever is nearer: what came from either comes back bit for bit."""
    # bfloat16 first: small matrices of a bfloat16 source often fit both.
    candidates = [weight.to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    return min(candidates, key=lambda rounded: float((weight - rounded).norm()))


def stored_norm(norm: Norm) -> Norm:
    """The norm as a checkpoint has it: its gain in float32."""
    return Norm(norm.eps, None if norm.gain is None else norm.gain.to(torch.float32))


def stored_heads(heads: HeadFormats) -> HeadFormats:
    """The query and key map, one tensor for both, in the activations' float32."""
    turn = stored_map(heads.query.map)
    return replace(
        heads,
        query=replace(heads.query, map=turn),
        key=replace(heads.key, map=turn),
        query_norm=None if heads.query_norm is None else stored_norm(heads.query_norm),
        key_norm=None if heads.key_norm is None else stored_norm(heads.key_norm),
    )


def stored_map(map: LinearMap | None) -> LinearMap | None:
    """The same map, its matrix in float32."""
    return replace(map, matrix=map.matrix.to(torch.float32)) if isinstance(map, Dense) else map
