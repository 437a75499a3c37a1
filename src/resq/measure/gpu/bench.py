"""`resq bench --device cuda`: one decoder block of a published shape, ours beside torch's and the card's ceilings."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resq.backends.backend import Backend
from resq.backends.choose import backend_named
from resq.backends.triton.device import card
from resq.errors import BackendUnavailable, InputError, nearest
from resq.measure import rows
from resq.measure.gpu.ceilings import measure_ceilings
from resq.measure.gpu.contenders import BlockContender, OurBlock, TorchBlock, random_weights
from resq.measure.gpu.roofline import Ceilings, cache_bytes, least_seconds, steps, weight_bytes
from resq.measure.gpu.timer import Timer, repeats_for, timer_on
from resq.measure.shapes import shape_named
from resq.measure.speed import Point
from resq.measure.synthetic import one_layer
from resq.models.architecture import Architecture, Config, Shape, architecture_for
from resq.numerics.bands import INT4, INT8, Layout
from resq.progress import Progress, silent
from resq.ptq.precision import Precision
from resq.ptq.recipe import Recipe
from resq.ptq.recipes import recipe_named

UNIFORM, BF16 = "uniform-4", "torch-bf16"
# Contenders in torch: whether products are of integers, and whether torch.compile fuses what lies between them.
TORCH = {
    BF16: (False, False),
    "torch-bf16-compiled": (False, True),
    "torch-int8": (True, False),
    "torch-int8-compiled": (True, True),
}
# What those with integers round.
INTEGERS = Precision(weights=INT8, inputs=INT8, down_weights=INT8, down_inputs=INT8, key=None, value=None)
# Seconds that one round of one contender takes at least.
ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class BlockPlan:
    """What to measure: a prefill of a fresh context for every length, decoding for every batch and context.

    capture_prefill: as CUDA graphs, as decoding always is; else as calls, whose launches may take longer than the card.
    """

    shape: str
    recipe: str = "resq"
    prefill: tuple[int, ...] = (512, 2048, 8192)
    batches: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (1024, 4096)
    against: tuple[str, ...] = (UNIFORM, BF16, "torch-int8")
    rounds: int = 7
    capture_prefill: bool = False

    def points(self) -> list[Point]:
        """Every prefill, then every decode."""
        decode = [Point("decode", batch=batch, context=context) for context in self.contexts for batch in self.batches]
        return [*(Point("prefill", tokens=tokens) for tokens in self.prefill), *decode]


@dataclass(frozen=True)
class BlockResult:
    """Seconds of one block in every round. tops, terabytes: 10^12 operations and bytes a second that the block must do
    and move (roofline.steps), over the median."""

    name: str
    point: Point
    seconds: tuple[float, ...]
    cache_bytes: int
    tops: float
    terabytes: float
    about: str = ""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Memory:
    """Bytes of one block's weights and of one token's keys and values, and what parts of bfloat16's they are."""

    weights: int
    cache: float
    weights_ratio: float
    cache_ratio: float


@dataclass(frozen=True)
class BlockReport:
    """What was measured; results in the order of points and contenders, ours first. ideal: how many times as fast as
    bfloat16 ours would be if both ran at the ceilings, by point. card: its
    name, None where kernels are interpreted."""

    subject: str
    card: str | None
    ceilings: Ceilings
    results: list[BlockResult]
    about: dict[str, str]
    ideal: dict[Point, float]
    memory: Memory

    @property
    def ours(self) -> str:
        """The first contender's name."""
        return self.results[0].name

    def at(self, point: Point) -> dict[str, BlockResult]:
        """Every contender's result at a point."""
        return {result.name: result for result in self.results if result.point == point}

    def ratios(self, point: Point) -> dict[str, float]:
        """How many times faster ours is than each other one: the median of the rounds' ratios."""
        found = self.at(point)
        mine = found[self.ours].seconds
        return {
            name: statistics.median(b / a for a, b in zip(mine, other.seconds, strict=True))
            for name, other in found.items()
            if name != self.ours
        }

    def wanted(self, point: Point) -> Wanted:
        """What is asked for at a point."""
        return wanted(point, self.ideal[point])

    def rows(self) -> list[dict[str, Any]]:
        """One row per contender and point; ours with ratios, the ideal one, and what was asked for."""
        found = []
        for result in self.results:
            row = {
                "kind": "gpu-speed",
                "subject": self.subject,
                "card": self.card,
                "name": result.name,
                **asdict(result.point),
                "seconds": list(result.seconds),
                "tops": result.tops,
                "terabytes_per_second": result.terabytes,
                "ceilings": asdict(self.ceilings),
                "about": ", ".join(filter(None, (self.about[result.name], result.about))),
            }
            if result.name == self.ours:
                row |= {"ratios": self.ratios(result.point), "ideal": self.ideal[result.point]}
                row |= {"wanted": asdict(self.wanted(result.point)), "memory": asdict(self.memory)}
            found.append(row)
        return found


@dataclass(frozen=True)
class Wanted:
    """What is asked of Llama-3-8B's block on an H200-class card at a point: how many times as fast as bfloat16, and the
    part of the time that may be lost to one uniform 4-bit band."""

    floor: float
    aim: float
    loss_floor: float
    loss_aim: float


def wanted(point: Point, ideal: float) -> Wanted:
    """Prefill is asked for a part of the ideal, for that is what differs between cards; decoding for a ratio."""
    if point.mode == "prefill":
        return Wanted(0.68 * ideal, 0.85 * ideal, 0.14, 0.08)
    return Wanted(2.1, 2.7, 0.14, 0.11)


def uniform(recipe: Recipe) -> Recipe:
    """The recipe with one 4-bit band wherever it rounds."""

    def four(layout: Layout | None) -> Layout | None:
        return None if layout is None else INT4

    p = recipe.precision
    precision = replace(
        p,
        weights=four(p.weights),
        inputs=four(p.inputs),
        down_weights=four(p.down_weights),
        down_inputs=four(p.down_inputs),
        key=four(p.key),
        value=four(p.value),
        overrides=(),
    )
    return replace(recipe, name=UNIFORM, precision=precision)


def check(plan: BlockPlan) -> Config:
    """The configuration of what is measured. Raises InputError for a plan that cannot be run; nothing is built."""
    config = shape_named(plan.shape)
    recipe_named(plan.recipe)
    for what, values in (("--prefill", plan.prefill), ("--batch", plan.batches), ("--context", plan.contexts)):
        if any(value < 1 for value in values):
            raise InputError(f"{what} is {min(values)}; at least 1 is needed")
        if len(set(values)) < len(values):
            raise InputError(f"{what} names {next(v for v in values if values.count(v) > 1)} twice; name it once")
    if plan.rounds < 1:
        raise InputError(f"--rounds is {plan.rounds}; at least 1 is needed")
    accepted = (UNIFORM, *TORCH)
    for name in plan.against:
        if name not in accepted:
            raise InputError(
                f"on a card nothing called {name!r} is measured against; there are {', '.join(accepted)}"
                f"{nearest(name, accepted)}"
            )
        if plan.against.count(name) > 1:
            raise InputError(f"{name} would be measured twice; name everything once")
    most = architecture_for(config["model_type"]).shape(config).max_positions
    for what, needed in (("--prefill", max(plan.prefill, default=0)), ("--context", max(plan.contexts, default=0) + 1)):
        if needed > most:
            raise InputError(f"{what} needs {needed} tokens; the model's context holds {most}, give fewer")
    return config


def bench_block(
    plan: BlockPlan,
    *,
    backend: Backend | None = None,
    timer: Timer | None = None,
    ceilings: Callable[[Timer], Ceilings] = measure_ceilings,
    progress: Progress = silent,
) -> BlockReport:
    """Run the plan on the card, or with a backend that is given. Raises InputError for what cannot be run,
    BackendUnavailable without a card."""
    config = check(plan)
    if backend is None:
        backend = backend_named("triton")
        if card() is None:
            raise BackendUnavailable("speed is measured on a card, not in Triton's interpreter; unset TRITON_INTERPRET")
    timer = timer or timer_on(backend.device)
    architecture, recipe = architecture_for(config["model_type"]), recipe_named(plan.recipe)
    before = ceilings(timer)
    contenders, shape = _contenders(plan, config, architecture, recipe, backend, timer, progress)
    points = plan.points()
    precisions = {recipe.name: recipe.precision, UNIFORM: uniform(recipe).precision}
    precisions |= {name: INTEGERS for name, (integers, _) in TORCH.items() if integers}
    results = []
    for number, point in enumerate(points):
        progress(str(point), number, len(points))
        results += _measured(contenders, point, shape, precisions, plan, timer)
    progress("measuring", len(points), len(points))
    # Ceilings are what the card does at its best: look again, it may have been disturbed.
    after = ceilings(timer)
    best = Ceilings(**{name: max(value, getattr(after, name)) for name, value in asdict(before).items()})
    ideal = {
        point: least_seconds(steps(shape, point, None), best)
        / least_seconds(steps(shape, point, recipe.precision), best)
        for point in points
    }
    about = {contender.name: contender.about for contender in contenders}
    return BlockReport(
        plan.shape, card(), best, results, about, ideal, _memory(contenders[0], results[0], points[0], shape)
    )


def _contenders(
    plan: BlockPlan,
    config: Config,
    architecture: Architecture,
    recipe: Recipe,
    backend: Backend,
    timer: Timer,
    progress: Progress,
) -> tuple[list[BlockContender], Shape]:
    names = (recipe.name, *plan.against)
    contenders: list[BlockContender] = []
    shape = replace(architecture.shape(config), layers=1)
    for number, name in enumerate(names):
        progress("building", number, len(names))
        if name in TORCH:
            integers, compiled = TORCH[name]
            weights = random_weights(architecture, shape, timer, integers=integers)
            made = TorchBlock(name, shape, weights, timer, compiled=torch.compile if compiled else None)
        else:
            _, layer = one_layer(config, recipe if number == 0 else uniform(recipe))
            made = OurBlock(name, shape, layer, backend, timer)
        contenders.append(made)
    progress("building", len(names), len(names))
    return contenders, shape


def _measured(
    contenders: list[BlockContender],
    point: Point,
    shape: Shape,
    precisions: dict[str, Precision],
    plan: BlockPlan,
    timer: Timer,
) -> list[BlockResult]:
    """Every contender at a point, interleaved: in each round all run once, in turn."""
    ready = {contender.name: contender.ready(point) for contender in contenders}
    runs, repeats, seconds = {}, {}, {name: [] for name in ready}
    captured = plan.capture_prefill or point.mode == "decode"
    for name, work in ready.items():
        if not all(bool(torch.isfinite(out).all()) for out in work.run()):
            raise RuntimeError(f"{name} gives infinities or no numbers at {point}; its time means nothing")
        runs[name] = timer.captured(work.run) if captured else work.run
        repeats[name] = repeats_for(timer, runs[name], ROUND_SECONDS)
    for _ in range(plan.rounds):
        for name, work in ready.items():
            seconds[name].append(timer.seconds(runs[name], repeats[name]) / work.blocks)
    found = []
    for name, work in ready.items():
        needed = steps(shape, point, precisions.get(name))
        taken = statistics.median(seconds[name])
        operations = sum(step.operations for step in needed)
        moved = sum(step.bytes for step in needed)
        found.append(
            BlockResult(
                name,
                point,
                tuple(seconds[name]),
                work.cache_bytes,
                operations / taken / 1e12,
                moved / taken / 1e12,
                work.about,
            )
        )
    # The next point's caches take the room of these.
    del ready, runs
    gc.collect()
    return found


def _memory(ours: BlockContender, result: BlockResult, point: Point, shape: Shape) -> Memory:
    """What ours really holds, beside bfloat16's bytes."""
    stored = point.tokens if point.mode == "prefill" else point.batch * (point.context + 1)
    per_token = result.cache_bytes / stored
    plain = sum(weight_bytes(shape, None).values())
    return Memory(ours.weight_bytes, per_token, ours.weight_bytes / plain, per_token / cache_bytes(shape, None))


def save_block(report: BlockReport, plan: BlockPlan, file: Path) -> None:
    """Append the report's rows, with what made them, to a .jsonl file."""
    for row in report.rows():
        rows.append_row(file, {**row, "plan": asdict(plan), **rows.provenance()})
