"""One layer for real: the middle one of a source, on a few windows, so that a plan can be corrected."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from resq.backends.reference import dense
from resq.errors import InputError
from resq.measure.plan import Phase, Plan
from resq.measure.plan_memory import holdings
from resq.measure.synthetic import random_maps
from resq.models.architecture import Shape, Site
from resq.models.source import Source
from resq.numerics import hadamard
from resq.numerics.device import full_float32, moved
from resq.numerics.maps import Dense, LinearMap
from resq.numerics.moments import Leaves
from resq.processes import Peak, held, return_blocks
from resq.ptq.activations import Buffers
from resq.ptq.layers import Flow, round_layer
from resq.ptq.placement import Placement
from resq.ptq.recipe import At
from resq.ptq.statistics import gather

# Windows that are run: the first finds everything cold.
WINDOWS = 3


@torch.inference_mode()
@full_float32()
def rehearsed(plan: Plan) -> Plan:
    """The plan with the seconds of both passes from a real layer, and with what its memory peaked above what was
    planned for it. Raises InputError where there are no weights."""
    source, work, device = plan.model.source, plan.work, plan.asked.device
    if source is None:
        raise InputError(f"{plan.model.name} has no weights at hand, which --rehearse runs; leave it out")
    middle = work.shape.layers // 2
    one = single(source, middle)
    count = min(WINDOWS, work.windows)
    small = replace(work, shape=one.shape, windows=count, rounding_windows=min(count, work.rounding_windows or count))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, work.shape.vocab, (count, work.length), generator=generator)
    return_blocks()
    process, corrected = held(), dict[str, float]()
    planned = {holding.phase: holding for holding in holdings(small, process)}
    over: dict[str, int] = {}
    buffers = Buffers(work.place, device, Path.cwd())
    if work.passes:
        steps = [time.perf_counter()]
        with Peak() as peak:
            gather(
                one,
                dense(torch.float32, device),
                tokens,
                work.recipe.needs,
                Leaves(count),
                0,
                lambda phase, done, total: steps.append(time.perf_counter()),
                buffers,
            )
        window = (steps[-1] - steps[1]) / (count - 1) if count > 1 else steps[-1] - steps[0]
        layer = max(0.0, steps[-1] - steps[0] - count * window)
        corrected["collecting moments"] = work.shape.layers * (layer + work.windows * window)
        over["collecting moments"] = peak.bytes - planned["collecting moments"].machine(cuda=work.cuda)
    with Peak() as peak:
        placement = Placement(one.shape, maps(plan, one.shape), work.recipe.precision, work.recipe.folds_norms)
        layer, run = _round(one, placement, plan, tokens[: small.rounded], buffers)
    each = run / small.rounded if small.rounded else 0.0
    corrected["rounding"] = work.shape.layers * (layer + work.rounded * each)
    over["rounding"] = peak.bytes - planned["rounding"].machine(cuda=work.cuda)
    return _corrected(plan, corrected, over, middle, count)


def single(source: Source, index: int) -> Source:
    """A source of one layer."""
    shape = source.shape
    one = copy.copy(source)
    one.shape = replace(shape, layers=1, windows=shape.windows[index : index + 1])
    one.layer = lambda number: source.layer(index)  # type: ignore[method-assign]
    return one


def maps(plan: Plan, shape: Shape) -> dict[At, LinearMap]:
    """Maps of the recipe's kinds and sizes: rotations that need no moment."""
    found = random_maps(plan.work.recipe, shape, 0)
    if Site.RESIDUAL in {site for basis in plan.work.recipe.basis for site in basis.sites}:
        found[At(Site.RESIDUAL)] = Dense(hadamard.matrix(shape.hidden))
    return moved(found, plan.asked.device)


def _round(
    one: Source, placement: Placement, plan: Plan, tokens: torch.Tensor, buffers: Buffers
) -> tuple[float, float]:
    """Seconds of a layer beside its windows, and of all windows."""
    device, recipe = plan.asked.device, plan.work.recipe
    table = one.embedding()
    states = [
        buffers.keep((F.embedding(window[None], table).to(device, torch.float32) for window in tokens), len(tokens))
        for _ in range(2)
    ]
    began = time.perf_counter()
    layer = placement.layer(moved(one.layer(0), device), 0)
    placed = time.perf_counter() - began
    began = time.perf_counter()
    _, reports = round_layer(
        one.shape, layer, recipe, 0, states[0], states[1], Flow(Leaves(len(tokens)), buffers=buffers)
    )
    whole, rounding = time.perf_counter() - began, sum(report.seconds for report in reports)
    return placed + rounding, max(0.0, whole - rounding)


def _corrected(plan: Plan, seconds: dict[str, float], over: dict[str, int], layer: int, windows: int) -> Plan:
    phases = []
    for phase in plan.phases:
        if phase.name not in seconds:
            phases.append(phase)
            continue
        more = max(0, over[phase.name])
        terms = {**phase.terms, **({"more in the rehearsal": more} if more else {})}
        phases.append(Phase(phase.name, seconds[phase.name], phase.peak + more, phase.card, phase.moment, terms))
    shares = ", ".join(f"{name} {more / 1e6:+.0f} MB" for name, more in over.items())
    note = f"rehearsed with layer {layer} and {windows} windows; beside what was planned for them: {shares}"
    return replace(plan, phases=tuple(phases), notes=(*plan.notes, note))
