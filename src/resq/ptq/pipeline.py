"""The pipeline: moments, maps, then layer by layer place → round → write. It never asks which method it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from resq.backends.reference import dense
from resq.checkpoint.files import EndParts, Parts
from resq.checkpoint.writer import CheckpointWriter
from resq.models.architecture import Role, Shape
from resq.models.source import Source
from resq.numerics.device import CPU, full_float32, moved
from resq.numerics.maps import LinearMap
from resq.numerics.moments import Leaves
from resq.processes import Peak
from resq.progress import Progress
from resq.ptq.activations import Activations, Buffers
from resq.ptq.checks import check_sizes
from resq.ptq.ends import store_ends
from resq.ptq.golden import golden_of, golden_of_layer
from resq.ptq.layers import Flow, LinearReport, round_layer
from resq.ptq.placement import Placement
from resq.ptq.recipe import At, Fitted, Moments, Recipe, Setting, Statistic
from resq.ptq.resume import Position, Stage
from resq.ptq.statistics import collect

# The name of pass 2 in a job's files.
PHASE = "rounding"


@dataclass(frozen=True)
class Job:
    """Everything that decides the integers beside the source: recipe, calibration windows, seed, and where it is all
    computed. moments: of the calibration windows, where they were collected before; the tokens then may be none when
    neither rounding nor tuning looks at any. buffers: where the windows' states lie; position: what is on disk of the
    job, and the other processes on it."""

    recipe: Recipe
    tokens: Tensor
    rounding_windows: int
    seed: int
    keep_tied: bool
    device: torch.device = CPU
    moments: Moments | None = None
    buffers: Buffers = field(default_factory=Buffers)
    position: Position = field(default_factory=Position)


@dataclass(frozen=True)
class LayerReport:
    """What a layer took: wall time from its source to its integers, and the most bytes that the process held meanwhile
    (`processes.held`: of the machine's memory, not a card's)."""

    layer: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Outcome:
    """What `quantize` tells: the cost of every linear and every layer, and remarks of the tuning for the manifest."""

    linears: list[LinearReport]
    layers: list[LayerReport]
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


def tuned_maps(source: Source, job: Job, moments: Moments, progress: Progress, begun: Stage | None = None) -> Stage:
    """The bases' maps after the recipe's tunings, each kept where the job is; from `begun` on, where it was kept."""
    recipe, position = job.recipe, job.position
    setting = Setting(source.shape, recipe.precision, job.seed, job.device)
    if begun is None:
        stage = Stage(fit_maps(recipe, moments, source.shape, job.seed, job.device))
        position.keep_stage(stage)
    else:
        stage = moved(begun, job.device)
    for tuning in recipe.tuning[stage.tunings :]:
        fitted = Fitted(source, recipe, stage.maps, moments, job.tokens, setting, position.bookmark())
        tuned = tuning(fitted, progress)
        stage = Stage(tuned.maps, (*stage.notes, *tuned.notes), stage.tunings + 1)
        position.keep_stage(stage)
    return stage


@full_float32()
def quantize(source: Source, job: Job, writer: CheckpointWriter | None, progress: Progress) -> Outcome:
    """Quantize `source` into `writer`'s layers and ends. Two passes, each with one decoder layer in memory.

    A layer is moved to the job's device when it is visited and back to the CPU when it is written, and leaves memory;
    the windows' hidden states lie where the job's buffers keep them. Of several ranks the first alone has a writer.
    What `writer` and the job's position have of an earlier process is not done again. Raises InputError for tensors or
    activations that are not finite and for impossible bands.
    """
    recipe, shape = job.recipe, source.shape
    check_sizes(recipe, shape)
    for basis in recipe.basis:
        basis.check(shape, job.tokens.numel() if job.moments is None else job.moments.tokens)
    stage = all_maps(source, job, writer, progress)
    placement = Placement(shape, stage.maps, recipe.precision, recipe.folds_norms)
    if writer is not None and not writer.has_ends:
        progress("embedding and head", 0, 1)
        parts = store_ends(placement, source, recipe.precision, keep_tied=job.keep_tied, device=job.device)
        add_ends(writer, source, parts, job.device)
        del parts
        progress("embedding and head", 1, 1)
    return Outcome(*round_layers(source, placement, job, writer, progress), list(stage.notes))


def all_maps(source: Source, job: Job, writer: CheckpointWriter | None, progress: Progress) -> Stage:
    """The maps after pass 1 and the recipe's tunings, in all ranks and on the job's device, and what the tunings
    remark. Where none are those of an earlier process, what that one wrote is forgotten; pass 1 then collects what the
    whole recipe needs, and otherwise what the tunings that are left do."""
    recipe, position = job.recipe, job.position
    stage, needs = position.stage(), recipe.needs
    if stage is None:
        if writer is not None:
            writer.begin_anew()
        position.forget(PHASE)
    else:
        left = recipe.tuning[stage.tunings :]
        needs = frozenset[Statistic]().union(*(tuning.needs for tuning in left))
    if stage is None or stage.tunings < len(recipe.tuning):
        if job.moments is None:
            ops = dense(torch.float32, job.device)
            moments = collect(source, ops, job.tokens, needs, progress, job.buffers, position)
        else:
            moments = moved(job.moments, job.device)
        stage = position.ranks.from_first(lambda: moved(tuned_maps(source, job, moments, progress, stage), CPU))
    return moved(stage, job.device)


def add_ends(writer: CheckpointWriter, source: Source, parts: EndParts, device: torch.device) -> None:
    """Write embedding, norm and head with the head's golden vectors, computed on `device`."""
    names = _end_names(source)
    golden = golden_of(moved(parts.head, device), parts.head_input)
    told = {"dtype": str(parts.embed.dtype).removeprefix("torch.")}
    writer.add_ends(names, parts, {} if golden is None else {names["head"]: golden}, told)


def round_layers(
    source: Source, placement: Placement, job: Job, writer: CheckpointWriter | None, progress: Progress
) -> tuple[list[LinearReport], list[LayerReport]]:
    """Pass 2: place, round and write layer by layer, from where an earlier process was."""
    recipe, shape, position = job.recipe, source.shape, job.position
    tokens = job.tokens[: job.rounding_windows] if recipe.needs_windows else job.tokens[:0]
    flow = Flow(Leaves(len(tokens)), position.ranks, job.buffers)
    names, begin = _layer_names(source), first_layer(job, flow, writer)
    reports, layers = list[LinearReport](), list[LayerReport]()
    table_dtype = flow.ranks.from_first(lambda: "" if writer is None else writer.told("ends")["dtype"])
    states = starting_states(source, placement, job, flow, tokens, begin, getattr(torch, table_dtype))
    for index in range(begin):
        if writer is not None:
            told = writer.told(f"layer-{index}")
            reports += [LinearReport(**report) for report in told["linears"]]
            layers.append(LayerReport(**told["layer"]))
    progress("rounding", begin * len(Role), shape.layers * len(Role))
    for index in range(begin, shape.layers):
        with Peak() as peak:
            layer = placement.layer(moved(source.layer(index), job.device), index)
            rounded, costs = round_layer(shape, layer, recipe, index, states["hidden"], states["exact"], flow, progress)
            del layer
            prefix = source.layer_prefix(index)
            golden = {} if writer is None else golden_of_layer(rounded, prefix, names)
        source.check_unchanged()
        reports += costs
        layers.append(LayerReport(index, peak.seconds, peak.bytes))
        if writer is not None:
            packed = moved(rounded, CPU)
            parts = Parts({**packed.linears}, {**packed.norms}, {**packed.inputs}, packed.heads, packed.window)
            told = {"linears": [asdict(cost) for cost in costs], "layer": asdict(layers[-1])}
            writer.add_layer(index, shape.layers, prefix, names, parts, golden, told)
            del packed, parts
        del rounded, golden
        if len(tokens) and index + 1 < shape.layers:
            kept = {name: each for name, each in states.items() if name == "hidden" or recipe.corrects}
            position.save(PHASE, index + 1, kept, flow.leaves, None)
    return reports, layers


def first_layer(job: Job, flow: Flow, writer: CheckpointWriter | None) -> int:
    """The layer that pass 2 goes on at, the same in all ranks: those before are written, and where windows are run
    their states are there. The writer forgets what comes after."""
    ranks, recipe = flow.ranks, job.recipe
    written = ranks.from_first(lambda: 0 if writer is None else writer.finished)
    if recipe.needs_windows:
        names = ("hidden", "exact") if recipe.corrects else ("hidden",)
        begin = job.position.layer(PHASE, flow.leaves, names)
        begin = begin if begin <= written else 0
    else:
        begin = written
    if writer is not None:
        writer.restart(begin)
    return begin


def starting_states(
    source: Source, placement: Placement, job: Job, flow: Flow, tokens: Tensor, begin: int, stored: torch.dtype
) -> dict[str, Activations]:
    """This rank's windows before layer `begin`: `hidden` as the rounded model has them, whose table is `stored` in 16
    bit, `exact` as the unrounded one has (none unless the recipe corrects)."""
    ranks, leaves = flow.ranks, flow.leaves
    mine = tokens[slice(*leaves.span(*ranks.span(leaves)))]
    names = ("hidden", "exact") if job.recipe.corrects else ("hidden",)
    if begin and len(tokens):
        found = {name: job.position.states(PHASE, begin, name, leaves) for name in names}
    else:
        table = source.embedding()

        def looked_up(name: str) -> Iterator[Tensor]:
            for window in mine:
                placed = placement.table(table[window].to(job.device))
                yield (placed if name == "exact" else placed.to(stored)).to(torch.float32)[None]

        found = {name: looked_up(name) for name in names}
    states = {name: flow.buffers.keep(each, len(mine)) for name, each in found.items()}
    return {"exact": flow.buffers.keep(iter(()), 0), **states}


def _layer_names(source: Source) -> Mapping[str, str]:
    return {**source.architecture.linears, **source.architecture.norms}


def _end_names(source: Source) -> Mapping[str, str]:
    architecture = source.architecture
    return {"embed": architecture.embed, "norm": architecture.final_norm, "head": architecture.head}
