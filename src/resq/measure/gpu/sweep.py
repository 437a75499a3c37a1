"""Which tiles the linears of a block should have on a card: candidates timed, the best proposed as a configuration.

A choice holds for a range of rows and a number of bands, whatever the linear, so what is timed is all linears of a
block with so many bands one after the other, over copies that the cache does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from resq.backends.triton import TRITON
from resq.backends.triton.configs import chosen, listed, using
from resq.backends.triton.rows import Rows, rows_of
from resq.errors import InputError
from resq.measure.gpu.contenders import copies_for
from resq.measure.gpu.timer import Run, Timer, repeats_for
from resq.measure.speed import held_bytes
from resq.models.architecture import READERS, Point, Shape
from resq.models.decoder import Layer
from resq.numerics.linear import PackedLinear
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
    {"tokens": 128},
    {"tokens": 256},
    {"channels": 256},
    {"tokens": 64},
    {"tokens": 64, "warps": 4, "apart": False},
    {"tokens": 64, "channels": 256},
    {"tokens": 256, "channels": 64},
    {"merge": True},
    {"merge": True, "tokens": 256},
    {"merge": True, "channels": 256},
)
Wanted = Mapping[int, Iterable[dict[str, Any]]]
CANDIDATES: Wanted = {
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
    """Seconds of a block's linears of so many bands for so many rows with these choices; None and why where they cannot
    run."""

    rows: int
    bands: int
    use: dict[str, Any]
    seconds: float | None
    failed: str | None = None


def by_bands(layer: Layer) -> dict[int, list[Point]]:
    """Where the linears of each number of bands are. Raises InputError for linears that are another kernel's."""
    found: dict[int, list[Point]] = {}
    for point, roles in READERS.items():
        linear = layer.linears[roles[0]]
        if layer.inputs[point].bands is None or not isinstance(linear, PackedLinear):
            raise InputError("only rounded linears with rounded inputs have tiles to choose; give such a recipe")
        found.setdefault(len(linear.bands), []).append(point)
    return found


def linears_of(layer: Layer, shape: Shape, points: Sequence[Point], rows: int, copies: int = 1) -> Run:
    """The linears at these points, of copies of a layer, on random activations; gives what the last copy does."""
    made = [
        [[TRITON.prepack(layer.linears[role], layer.inputs[point]) for role in READERS[point]] for point in points]
        for _ in range(copies)
    ]
    generator = torch.Generator(TRITON.device).manual_seed(rows)
    inputs: list[Rows] = []
    for point in points:
        size = shape.sizes()[READERS[point][0]][1]
        x = torch.randn(1, rows, size, generator=generator, device=TRITON.device)
        inputs.append(rows_of(layer.inputs[point].quantize(x)))

    def run() -> list[Tensor]:
        found = []
        for each in made:
            parts = [TRITON.linears(x, weights) for x, weights in zip(inputs, each, strict=True)]
            found = [y for part in parts for y in part]
        return found

    return run


def candidates(rows: int, bands: int, changes: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Whole choices for so many rows and bands, each once."""
    seen: list[dict[str, Any]] = []
    for change in changes:
        use = chosen(KERNEL, rows=rows, groups=1, bands=bands) | change
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


def compile_part(layer: Layer, shape: Shape, part: int, parts: int, wanted: Wanted | None = None) -> int:
    """Run every `parts`-th candidate once from `part` on, so that Triton's cache on disk has it; how many those were.
    Several processes at once compile what one then times."""
    every = [
        (rows, points, use)
        for rows, changes in (wanted or CANDIDATES).items()
        for bands, points in by_bands(layer).items()
        for use in candidates(rows, bands, changes)
    ]
    for rows, points, use in every[part::parts]:
        with using(KERNEL, **use):
            _attempt(linears_of(layer, shape, points, rows))
    return len(every[part::parts])


def sweep(
    layer: Layer, shape: Shape, timer: Timer, *, wanted: Wanted | None = None, progress: Progress = silent
) -> list[Timing]:
    """Every candidate's time. layer: not prepacked. Raises InputError for linears that are another kernel's."""
    wanted, found = wanted or CANDIDATES, []
    parts = [(rows, changes, *each) for rows, changes in wanted.items() for each in by_bands(layer).items()]
    for number, (rows, changes, bands, points) in enumerate(parts):
        progress("sweeping", number, len(parts))
        held = sum(
            held_bytes(TRITON.prepack(layer.linears[role], layer.inputs[point]))
            for point in points
            for role in READERS[point]
        )
        copies = copies_for(timer, held)
        run = linears_of(layer, shape, points, rows, copies)
        plain, _ = _attempt(run)
        for use in candidates(rows, bands, changes):
            found.append(_timed(Timing(rows, bands, use, None), run, plain, timer, copies))
    progress("sweeping", len(parts), len(parts))
    return found


def _timed(timing: Timing, run: Run, plain: Sequence[Tensor], timer: Timer, copies: int) -> Timing:
    with using(KERNEL, **timing.use):
        computed, why = _attempt(run)
        # Tiles change the order of nothing but integers; one sum of both bands is another kernel.
        if why is None and not timing.use.get("merge") and not all(map(torch.equal, computed, plain)):
            why = "not what the default computes"
        if why is not None:
            return replace(timing, failed=why)
        captured = timer.captured(run)
        return replace(timing, seconds=timer.seconds(captured, repeats_for(timer, captured, SECONDS)) / copies)


def proposals(timings: Iterable[Timing]) -> list[dict[str, Any]]:
    """Entries for backends/triton/configs: the fastest choice for each number of rows and bands, one range a token. The
    most rows timed stand for more; what was not timed follows as it is."""
    best: dict[tuple[int, int], Timing] = {}
    for timing in timings:
        known = best.get((timing.rows, timing.bands))
        if timing.seconds is not None and (known is None or timing.seconds < (known.seconds or 0)):
            best[timing.rows, timing.bands] = timing
    most = max((rows for rows, _ in best), default=0)
    entries = []
    for (rows, bands), timing in sorted(best.items(), key=lambda item: item[0]):
        limit = {} if rows == most else {"rows": rows}
        entries.append({"when": limit | {"bands": bands, "groups": 1}, "use": timing.use})
    return [*entries, *listed(KERNEL)]
