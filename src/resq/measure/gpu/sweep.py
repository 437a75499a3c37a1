"""Which tiles the linears of a block should have on a card: candidates timed, the best proposed as a configuration.

A choice holds for a range of rows, whatever the linear, so what is timed is all linears of a block one after the other,
over copies that the cache does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resq.backends.triton import TRITON
from resq.backends.triton.configs import chosen, using
from resq.backends.triton.rows import Rows, rows_of
from resq.errors import InputError
from resq.measure.gpu.contenders import copies_for
from resq.measure.gpu.timer import Run, Timer, repeats_for
from resq.measure.speed import held_bytes
from resq.models.architecture import READERS, Point, Shape
from resq.models.decoder import Layer
from resq.progress import Progress, silent

KERNEL = "packed_linear"
SECONDS = 0.02
# Rows up to which a choice holds, and changes of the default that are tried for them. Where memory limits: how much is
# on its way at once; where tensor cores do: what a tile reads for each product.
MEMORY: tuple[dict[str, Any], ...] = (
    {},
    {"channels": 32},
    {"channels": 128},
    {"channels": 32, "warps": 2},
    {"channels": 128, "warps": 8},
    {"stages": 3},
    {"stages": 6},
    {"block": 64},
    {"waves": 2},
    {"waves": 8},
    {"channels": 32, "waves": 8},
    {"channels": 128, "waves": 2},
)
PRODUCTS: tuple[dict[str, Any], ...] = (
    {},
    {"block": 32},
    {"block": 128},
    {"stages": 2},
    {"stages": 4},
    {"warps": 4},
    {"width": 4},
    {"width": 16},
    {"tokens": 256},
    {"channels": 256},
    {"tokens": 64},
    {"tokens": 64, "channels": 256},
    {"tokens": 256, "channels": 64},
    {"merge": True},
    {"merge": True, "tokens": 256},
    {"merge": True, "channels": 256},
)
CANDIDATES: dict[int, tuple[dict[str, Any], ...]] = {
    1: MEMORY,
    16: MEMORY,
    32: MEMORY,
    64: MEMORY,
    512: PRODUCTS,
    2048: PRODUCTS,
    8192: PRODUCTS,
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a block's linears for so many rows with these choices; None and why where they cannot run."""

    rows: int
    use: dict[str, Any]
    seconds: float | None
    failed: str | None = None


def linears_of(layer: Layer, shape: Shape, rows: int, copies: int = 1) -> Run:
    """All linears of copies of a layer on random activations; gives what the last copy does."""
    made = [layer.prepacked(TRITON) for _ in range(copies)]
    generator = torch.Generator(TRITON.device).manual_seed(rows)
    inputs: dict[Point, Rows | Tensor] = {}
    for point, roles in READERS.items():
        size = shape.sizes()[roles[0]][1]
        x = torch.randn(1, rows, size, generator=generator, device=TRITON.device)
        format = layer.inputs[point]
        inputs[point] = x if format.bands is None else rows_of(format.quantize(x))

    def run() -> list[Tensor]:
        found = []
        for each in made:
            parts = [
                TRITON.linears(inputs[at], [each.linears[role] for role in roles]) for at, roles in READERS.items()
            ]
            found = [y for part in parts for y in part]
        return found

    return run


def candidates(rows: int, changes: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Whole choices for so many rows, each once."""
    seen: list[dict[str, Any]] = []
    for change in changes:
        use = chosen(KERNEL, rows=rows, groups=1) | change
        if use not in seen:
            seen.append(use)
            yield use


def _attempt(run: Run) -> tuple[list[Tensor], str | None]:
    """What a choice computes, or why it cannot be compiled or launched."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return [y.clone() for y in run()], None
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        return [], (str(error).strip().splitlines() or [type(error).__name__])[0]


def compile_part(layer: Layer, shape: Shape, part: int, parts: int, wanted: dict[int, Any] | None = None) -> int:
    """Run every `parts`-th candidate once from `part` on, so that Triton's cache on disk has it; how many those were.
    Several processes at once compile what one then times."""
    every = [(rows, use) for rows, changes in (wanted or CANDIDATES).items() for use in candidates(rows, changes)]
    for rows, use in every[part::parts]:
        with using(KERNEL, **use):
            _attempt(linears_of(layer, shape, rows))
    return len(every[part::parts])


def sweep(
    layer: Layer,
    shape: Shape,
    timer: Timer,
    *,
    wanted: dict[int, Any] | None = None,
    progress: Progress = silent,
) -> list[Timing]:
    """Every candidate's time. layer: of packed linears, not prepacked. Raises InputError for one without rounded
    inputs, whose linears are another kernel's."""
    if any(layer.inputs[point].bands is None for point in READERS):
        raise InputError("only linears with rounded inputs have tiles to choose; give a recipe that rounds activations")
    wanted = wanted or CANDIDATES
    held = sum(held_bytes(weight) for weight in layer.prepacked(TRITON).linears.values())
    copies, found = copies_for(timer, held), []
    for number, (rows, changes) in enumerate(wanted.items()):
        progress("sweeping", number, len(wanted))
        run = linears_of(layer, shape, rows, copies)
        plain, _ = _attempt(run)
        for use in candidates(rows, changes):
            with using(KERNEL, **use):
                computed, why = _attempt(run)
                # Tiles change the order of nothing but integers; one sum of both bands is another kernel.
                if why is None and not use.get("merge") and not all(map(torch.equal, computed, plain)):
                    why = "not what the default computes"
                seconds = None
                if why is None:
                    captured = timer.captured(run)
                    seconds = timer.seconds(captured, repeats_for(timer, captured, SECONDS)) / copies
            found.append(Timing(rows, use, seconds, why))
    progress("sweeping", len(wanted), len(wanted))
    return found


def proposals(timings: Iterable[Timing]) -> list[dict[str, Any]]:
    """Entries for backends/triton/configs: for each number of rows the fastest choice, the last without a limit."""
    best: dict[int, Timing] = {}
    for timing in timings:
        if timing.seconds is not None:
            known = best.get(timing.rows)
            if known is None or known.seconds is None or timing.seconds < known.seconds:
                best[timing.rows] = timing
    entries = [{"when": {"rows": rows}, "use": best[rows].use} for rows in sorted(best)]
    return [*entries[:-1], {"use": entries[-1]["use"]}] if entries else []
