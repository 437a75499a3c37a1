"""`resq bench`: build the contenders, measure the limits, time everything in one run, write rows."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resq.backends.backend import Backend
from resq.backends.choose import backend_named
from resq.backends.cpu import CPU
from resq.backends.triton import TRITON
from resq.errors import InputError, nearest
from resq.measure import rows
from resq.measure.peers.choose import PEERS, check_peer, peer_named
from resq.measure.shapes import shape_named
from resq.measure.speed import (
    STEPS,
    WARM_STEPS,
    Contender,
    Limits,
    Ours,
    Point,
    Result,
    anonymous_bytes,
    as_row,
    measure,
    measure_limits,
)
from resq.measure.synthetic import synthetic
from resq.models.architecture import Config, architecture_for
from resq.progress import Progress, silent
from resq.ptq.recipe import Recipe
from resq.ptq.recipes import RECIPES, recipe_named
from resq.runtime.load import Opened, load


@dataclass(frozen=True)
class Plan:
    """What to measure: a packed checkpoint, or a published shape with random weights under a recipe.

    head_bits: 16, 8 or 4.5, of a shape. against: names of peers and, beside a shape, of recipes.
    """

    checkpoint: Path | None = None
    shape: str | None = None
    recipe: str = "resq"
    head_bits: float = 8
    prefill: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1,)
    context: int = 512
    against: tuple[str, ...] = ()
    rounds: int = 5
    backend: str | None = None
    threads: int | None = None

    def points(self) -> list[Point]:
        """Every prefill, then every decode."""
        decode = [Point("decode", batch=batch, context=self.context) for batch in self.batches]
        return [*(Point("prefill", tokens=tokens) for tokens in self.prefill), *decode]


@dataclass(frozen=True)
class Report:
    """What was measured. memory: anonymous bytes that loading took, bytes of weights, and of the cache at the end."""

    subject: str
    limits: Limits
    results: list[Result]
    memory: dict[str, int]
    about: dict[str, str]

    def rows(self) -> list[dict[str, Any]]:
        """One row per contender and point; ours with ratios to the others."""
        ours = self.results[0].name
        found = []
        for result in self.results:
            others = [o for o in self.results if o.point == result.point and o.name != ours]
            row = as_row(result, self.limits, others if result.name == ours else [])
            found.append({"subject": self.subject, **row, "about": self.about.get(result.name, "")})
            if result.name == ours:
                found[-1]["memory"] = self.memory
        return found


def check(plan: Plan) -> Config:
    """The configuration of what is measured. Raises InputError for a plan that cannot be run; nothing is built."""
    if (plan.checkpoint is None) == (plan.shape is None):
        raise InputError("give a packed checkpoint or --shape, one of them")
    if plan.backend == TRITON.name:
        raise InputError(
            "backend triton is timed by --device cuda --shape …, a block of a model; whole models on the CPU"
        )
    with_head(recipe_named(plan.recipe), plan.head_bits)
    for what, values in (("--prefill", plan.prefill), ("--batch", plan.batches), ("--context", (plan.context,))):
        if any(value < 1 for value in values):
            raise InputError(f"{what} is {min(values)}; at least 1 is needed")
    if plan.rounds < 1 or (plan.threads is not None and plan.threads < 1):
        raise InputError("--rounds and --threads must be at least 1")
    accepted = [*PEERS, *(RECIPES if plan.shape is not None else ())]
    names = [plan.recipe] if plan.shape is not None else []
    for name in plan.against:
        if name not in accepted:
            raise InputError(
                f"nothing called {name!r} to measure against; there are {', '.join(accepted)}{nearest(name, accepted)}"
            )
        if name in names:
            raise InputError(f"{name} would be measured twice; name everything once")
        if name in PEERS:
            check_peer(name)
        names.append(name)
    config = Opened(plan.checkpoint).config if plan.checkpoint is not None else shape_named(str(plan.shape))
    context, steps = architecture_for(config["model_type"]).shape(config).max_positions, WARM_STEPS + STEPS
    if max(plan.prefill) > context:
        raise InputError(f"--prefill is {max(plan.prefill)}; the model's context holds {context} tokens, give fewer")
    if plan.context + steps > context:
        raise InputError(
            f"--context is {plan.context}; the model's context of {context} tokens holds {context - steps} and the "
            f"{steps} of decoding, give fewer"
        )
    return config


def with_head(recipe: Recipe, head_bits: float) -> Recipe:
    """The recipe with its head at that width."""
    return replace(recipe, precision=recipe.precision.with_head(head_bits))


def bench(plan: Plan, *, progress: Progress = silent) -> Report:
    """Run the plan. Raises InputError for what cannot be run, BackendUnavailable without kernels."""
    config, backend = check(plan), backend_named(plan.backend or CPU.name)
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads or before)
    try:
        with ExitStack() as stack:
            return _bench(plan, config, backend, stack, progress)
    finally:
        torch.set_num_threads(before)


def _bench(plan: Plan, config: Config, backend: Backend, stack: ExitStack, progress: Progress) -> Report:
    threads = torch.get_num_threads()
    gc.collect()
    anonymous = anonymous_bytes()
    if plan.shape is not None:
        recipe = with_head(recipe_named(plan.recipe), plan.head_bits)
        ours = Ours(recipe.name, synthetic(config, recipe, backend, progress=progress))
        subject = plan.shape
    else:
        assert plan.checkpoint is not None
        model = load(plan.checkpoint, backend=backend, progress=progress)
        ours = Ours(model.manifest.recipe.name, model)
        subject = str(plan.checkpoint)
    gc.collect()
    memory = {"anonymous": anonymous_bytes() - anonymous, "weights": ours.weight_bytes}
    contenders: list[Contender] = [ours]
    about = {ours.name: f"backend {backend.name}, head {plan.head_bits:g} bit" if plan.shape else backend.name}
    for name in plan.against:
        if name in PEERS:
            bits = 4 if plan.shape is not None and plan.head_bits == 4.5 else 8
            peer = peer_named(name, config, threads=threads, head_bits=bits, progress=progress)
            stack.callback(peer.engine.close)
            contenders.append(peer)
            engine = peer.engine
            about[name] = f"{engine.version}: {engine.about}, {engine.weight_bytes / 1e9:.2f} GB"
        else:
            other = with_head(recipe_named(name), plan.head_bits)
            contenders.append(Ours(name, synthetic(config, other, backend, progress=progress)))
    limits = measure_limits(threads)
    results = measure(contenders, plan.points(), rounds=plan.rounds, progress=progress)
    # Limits are what the machine can do at its best: look again, it may have been disturbed.
    again = measure_limits(threads)
    limits = replace(limits, read=max(limits.read, again.read), integer=max(limits.integer, again.integer))
    memory |= {"anonymous at the end": anonymous_bytes() - anonymous, "cache": ours.cache_bytes()}
    return Report(subject, limits, results, memory, about)


def save(report: Report, plan: Plan, file: Path) -> None:
    """Append the report's rows, with what made them, to a .jsonl file."""
    given = {key: value for key, value in asdict(plan).items() if key != "checkpoint"}
    for row in report.rows():
        rows.append_row(file, {"kind": "speed", **row, "plan": given, **rows.provenance()})
