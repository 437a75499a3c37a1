"""How long quantizing will take: operations of every phase, at rates that this machine shows in about two seconds."""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resq.measure.plan_memory import Work
from resq.models.architecture import READERS, Point, Role, Site
from resq.numerics.bands import Bands
from resq.numerics.device import CPU
from resq.numerics.moments import second_moment
from resq.ptq.recipe import InputMoments, Statistic
from resq.ptq.rounding import ROWS
from resq.ptq.rounding.gptq import Gptq, factor
from resq.ptq.rounding.nearest import Nearest

# Sizes of what is timed: square products in float32 and float64, a factor, an eigenbasis, columns of rounded rows;
# bytes that are copied, hashed and written.
PRODUCT, FACTOR, EIGEN, COLUMNS, BYTES = 1024, 768, 384, 512, 32 << 20
# Timed so often at least, and for so many seconds; the median counts, for a machine that is shared stays so.
REPEATS, SECONDS = 3, 0.2
# float32 values of a token written and read by norms, RoPE, softmax and gates, per coordinate of their inputs.
TOUCHED = 24


@dataclass(frozen=True)
class Rates:
    """A second's worth. float32, float64: operations of a product (a multiply-add is 2); factor, eigen: n³ of a factor
    of [n, n] and of an eigenbasis; memory: bytes copied; gptq, nearest: weights that are rounded, products left out;
    sha256, disk: bytes hashed, and written and flushed."""

    float32: float
    float64: float
    factor: float
    eigen: float
    memory: float
    gptq: float
    nearest: float
    sha256: float
    disk: float


def measured(device: torch.device = CPU, directory: Path | None = None) -> Rates:
    """The rates of this machine now, with the threads that torch has; directory: where files would be written."""

    def typical(run: Callable[[], Any]) -> float:
        found, began = [], time.perf_counter()
        while len(found) < REPEATS or time.perf_counter() - began < SECONDS:
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(PRODUCT, PRODUCT, generator=generator, dtype=torch.float64).to(device)
    plain, copy = wide.to(torch.float32), torch.empty(BYTES, dtype=torch.uint8, device=device)
    other = torch.empty_like(copy)
    sample = torch.randn(2 * FACTOR, FACTOR, generator=generator).to(device)
    moment = second_moment(sample)
    float64 = 2 * PRODUCT**3 / typical(lambda: wide @ wide)
    rows, bands = wide[:ROWS, :COLUMNS].contiguous(), Bands.of((4, COLUMNS))
    small = InputMoments(moment[:COLUMNS, :COLUMNS].contiguous())
    factor(small, Gptq().damping)
    rounded = typical(lambda: Gptq()(rows, small, bands, None)) - rows.shape[0] * COLUMNS**2 / float64
    buffer = os.urandom(1 << 20) * (BYTES >> 20)
    return Rates(
        float32=2 * PRODUCT**3 / typical(lambda: plain @ plain),
        float64=float64,
        factor=FACTOR**3 / typical(lambda: factor(InputMoments(moment), Gptq().damping)),
        eigen=EIGEN**3 / typical(lambda: torch.linalg.eigh(moment[:EIGEN, :EIGEN])),
        memory=2 * BYTES / typical(lambda: other.copy_(copy)),
        gptq=rows.numel() / max(rounded, 1e-6),
        nearest=rows.numel() / typical(lambda: Nearest()(rows, None, bands, None)),
        sha256=BYTES / typical(lambda: hashlib.sha256(buffer).digest()),
        disk=BYTES / typical(lambda: _write(buffer, directory)),
    )


def _write(buffer: bytes, directory: Path | None) -> None:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(buffer)
        file.flush()
        os.fsync(file.fileno())


def seconds(work: Work, rates: Rates, source_bytes: int, result_bytes: int) -> dict[str, float]:
    """Of every phase by name; a tuning has none here."""
    shape = work.shape
    files = 1 / rates.sha256 + 1 / rates.disk
    found = {"hashing the source": source_bytes / rates.sha256}
    if work.passes:
        found["collecting moments"] = shape.layers * (
            _layer_cast(work, rates) + work.windows * window_in_first_pass(work, rates)
        )
    found["fitting bases"] = _bases(work, rates)
    found["embedding and head"] = _ends(work, rates) + files * 2 * shape.vocab * shape.hidden
    layer = layer_in_second_pass(work, rates) + work.rounded * window_in_second_pass(work, rates)
    found["rounding"] = shape.layers * layer + files * result_bytes
    return found


def _layer_cast(work: Work, rates: Rates) -> float:
    return work.weights() * (work.value_bytes + 40) / rates.memory


def forward(work: Work, rates: Rates, *roles: Role, attention: bool = True) -> float:
    """Seconds of one window through these linears of a layer, all of them without any."""
    shape, length = work.shape, work.length
    sizes, heads = shape.sizes(), shape.heads * shape.head_dim
    products = 2 * length * work.weights(*roles) + (2 * length * length * heads if attention else 0)
    touched = TOUCHED * length * sum(sizes[role][1] for role in roles or Role)
    return products / rates.float32 + touched / rates.memory


def _squared(work: Work, rates: Rates, size: int) -> float:
    """Seconds of a window's second moment [n, n]: just over half of the product."""
    return work.length * (1.1 * size**2 / rates.float64 + 24 * size / rates.memory)


def window_in_first_pass(work: Work, rates: Rates) -> float:
    """Seconds of a window in a layer."""
    shape, needs = work.shape, work.recipe.needs
    found = forward(work, rates)
    found += 2 * _squared(work, rates, shape.hidden) * (Statistic.RESIDUAL in needs)
    kinds = (Statistic.VALUE in needs) + (Statistic.KEY in needs)
    found += kinds * shape.kv_heads * _squared(work, rates, shape.head_dim)
    if Statistic.PEAKS in needs:
        found += 8 * work.length * (2 * shape.hidden + shape.ffn + shape.heads * shape.head_dim) / rates.memory
    return found


def window_in_second_pass(work: Work, rates: Rates) -> float:
    """Seconds of a window in a layer: every group's moment, then past it; down's input is made twice."""
    recipe = work.recipe
    found = work.streams * (forward(work, rates) + forward(work, rates, Role.GATE, Role.UP, attention=False))
    sizes = work.shape.sizes()
    for roles in READERS.values() if recipe.needs_moment else ():
        size = sizes[roles[0]][1]
        found += _squared(work, rates, size)
        found += (2 * work.length * size**2 / rates.float64) * recipe.corrects
    return found


def layer_in_second_pass(work: Work, rates: Rates) -> float:
    """Seconds of a layer beside its windows: placed, rounded, unpacked, made golden vectors of."""
    shape, recipe = work.shape, work.recipe
    sizes, sites = shape.sizes(), {site for basis in recipe.basis for site in basis.sites}
    found = work.weights() * (24 + 60 + 60) / rates.memory
    if Site.RESIDUAL in sites:
        found += 2 * shape.hidden * work.weights() / rates.float64
    for point, roles in READERS.items():
        size, factored = sizes[roles[0]][1], 0
        for role in roles:
            rounding, out = recipe.rounding_of(0, role), sizes[role][0]
            if recipe.precision.weight_bands(0, role, shape) is None:
                continue
            if not isinstance(rounding, Gptq):
                found += out * size / rates.nearest
                continue
            factored = 2 if rounding.corrects else 1
            # What errors change in later columns, the energies of error and output, and the correction.
            products = out * size**2 * (1 + 2 + 4 * rounding.corrects)
            found += out * size / rates.gptq + products / rates.float64
        found += factored * size**3 / rates.factor
        if point is Point.DOWN_IN and recipe.clipping is not None:
            clipped = replace(work, rounding_windows=min(recipe.clipping.windows, work.rounded))
            values = clipped.rounded * work.length * sum(sizes[each[0]][1] for each in READERS.values())
            found += len(recipe.clipping.ratios) * 60 * values / rates.memory
            found += clipped.rounded * forward(work, rates)
    return found


def _bases(work: Work, rates: Rates) -> float:
    """Seconds of eigenbases and of the random rotations inside them."""
    shape, needs = work.shape, work.recipe.needs
    found = 1.5 * shape.hidden**3 / rates.eigen if Statistic.RESIDUAL in needs else 0.0
    kinds = shape.kv_heads * (Statistic.VALUE in needs) + (Statistic.KEY in needs)
    return found + shape.layers * kinds * 1.5 * shape.head_dim**3 / rates.eigen


def _ends(work: Work, rates: Rates) -> float:
    shape, table = work.shape, work.shape.vocab * work.shape.hidden
    tables = 1 if work.keep_tied else 2
    found = tables * 40 * table / rates.memory
    if work.recipe.folds_norms:
        found += tables * 2 * table * shape.hidden / rates.float64
    if work.recipe.precision.head is not None and not work.keep_tied:
        found += table / rates.nearest
    return found
