"""How long quantizing takes beside what it cannot do without: GPTQ beside its products, pass 1 beside a forward."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from resq import embedded
from resq.backends.backend import Backend
from resq.backends.reference import dense
from resq.errors import InputError
from resq.measure import rows
from resq.measure.shapes import shape_named
from resq.models import decoder
from resq.models.architecture import Config, Role, Shape, architecture_for
from resq.models.decoder import Positions
from resq.models.source import Source
from resq.numerics.moments import Leaves, second_moment
from resq.progress import Progress, silent
from resq.ptq.placement import fold_norms
from resq.ptq.recipe import InputMoments, Recipe
from resq.ptq.recipes import recipe_named
from resq.ptq.rounding import ROWS
from resq.ptq.rounding.gptq import Gptq, factor
from resq.ptq.rounding.nearest import scales
from resq.ptq.statistics import gather, in_dtype

# Size of the square product whose rate is that of products; tokens of the vocabulary; windows of each process; products
# of each process that shares nothing.
PRODUCT, VOCABULARY, SHARED_WINDOWS, INDEPENDENT = 2048, 4096, 32, 4


@dataclass(frozen=True)
class QuantizingPlan:
    """What to time: GPTQ of the first layer's down_proj of a published shape, and pass 1 over `windows` windows of
    `length` tokens through `layers` layers of it, all with random weights. Everything runs once a round. processes:
    more than one are timed on a whole job beside one, each with one thread."""

    shape: str = "llama-3.2-1b"
    recipe: str = "resq"
    windows: int = 8
    length: int = 512
    layers: int = 2
    rounds: int = 3
    threads: int | None = None
    processes: int = 1


@dataclass(frozen=True)
class Timed:
    """Seconds of every round of one thing and of what it is held against, and what else was seen."""

    name: str
    seconds: tuple[float, ...]
    against: tuple[float, ...]
    about: dict[str, Any]

    @property
    def ratio(self) -> float:
        """How many times as long as what it is held against: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.seconds, self.against, strict=True))

    @property
    def ceiling(self) -> float | None:
        """What the ratio could be at most on this machine, the median of the rounds; None where that is not known."""
        return statistics.median(self.about["ceiling"]) if "ceiling" in self.about else None

    def row(self) -> dict[str, Any]:
        """For results/quantizing.jsonl."""
        return {"kind": "quantizing", **asdict(self), "ratio": self.ratio}


def checked(plan: QuantizingPlan) -> tuple[Config, Recipe, Gptq]:
    """The configuration, the recipe and its GPTQ. Raises InputError for a plan that cannot be run; nothing is built."""
    counts = {"--rounds": plan.rounds, "--threads": plan.threads, "windows": plan.windows, "layers": plan.layers}
    counts["--processes"] = plan.processes
    for what, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{what} is {count}; at least 1 is needed")
    recipe, config = recipe_named(plan.recipe), shortened(shape_named(plan.shape), plan.layers)
    shape = architecture_for(config["model_type"]).shape(config)
    if not isinstance(recipe.rounding, Gptq) or recipe.precision.weight_bands(0, Role.DOWN, shape) is None:
        raise InputError(
            f"recipe {plan.recipe} rounds no down_proj by GPTQ, which --quantizing times; name one that does"
        )
    return config, recipe, recipe.rounding


def shortened(config: Config, layers: int) -> dict[str, Any]:
    """The first `layers` layers, and few tokens: nothing here depends on their number."""
    kinds = {"layer_types": config["layer_types"][:layers]} if "layer_types" in config else {}
    return {**config} | {"num_hidden_layers": layers, "vocab_size": VOCABULARY} | kinds


def quantizing(plan: QuantizingPlan, *, progress: Progress = silent) -> list[Timed]:
    """Run the plan. Raises InputError for what cannot be run."""
    config, recipe, rounding = checked(plan)
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads or before)
    try:
        with tempfile.TemporaryDirectory(prefix="resq-quantizing-") as directory:
            write_source(config, Path(directory))
            source = Source.open(directory)
            shared = [] if plan.processes == 1 else [time_processes(Path(directory), plan, progress)]
            passed = time_pass(source, recipe, plan, progress)
            return [time_gptq(source.shape, recipe, rounding, plan, progress), passed, *shared]
    finally:
        torch.set_num_threads(before)


def time_gptq(shape: Shape, recipe: Recipe, rounding: Gptq, plan: QuantizingPlan, progress: Progress) -> Timed:
    """GPTQ of down_proj, search of scales included, beside its Cholesky factorization and its products: the inverse of
    the triangular factor, n³/3 operations, and what errors change in later columns, n² · out, at the rate of a square
    float64 product of the same round."""
    out, size = shape.sizes()[Role.DOWN]
    bands = recipe.precision.weight_bands(0, Role.DOWN, shape)
    assert bands is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, size, generator=generator, dtype=torch.float64)
    moment = second_moment(torch.randn(min(size, 1024), size, generator=generator))
    moment.diagonal().add_(moment.diagonal().mean())
    square = torch.randn(PRODUCT, PRODUCT, generator=generator, dtype=torch.float64)
    seconds, against = [], []
    parts: dict[str, list[float]] = {name: [] for name in ("product", "cholesky", "factor", "scales")}
    for number in range(plan.rounds):
        product, cholesky = timed(lambda: square @ square), timed(lambda: torch.linalg.cholesky(moment))
        moments = InputMoments(moment)
        factored = timed(lambda moments=moments: factor(moments, rounding.damping))

        def rest(moments: InputMoments = moments) -> None:
            for start in range(0, out, ROWS):
                rounding(weight[start : start + ROWS], moments, bands, None)

        seconds.append(factored + timed(rest))
        del moments
        searched = timed(lambda: scales(weight, bands, clip_search=rounding.clip_search))
        rate = 2 * PRODUCT**3 / product
        against.append(cholesky + (size**3 / 3 + size**2 * out) / rate)
        for name, taken in zip(parts, (product, cholesky, factored, searched), strict=True):
            parts[name].append(taken)
        progress("gptq", number + 1, plan.rounds)
    about = {"out": out, "in": size, "rounding": str(rounding), "parts": parts, "product_size": PRODUCT}
    return Timed("gptq", tuple(seconds), tuple(against), about)


def time_pass(source: Source, recipe: Recipe, plan: QuantizingPlan, progress: Progress) -> Timed:
    """Pass 1 with what the recipe's bases need, beside a plain forward of the same windows that reads and casts the
    layers in the same way and keeps nothing."""
    ops, shape = dense(torch.float32), source.shape
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab, (plan.windows, plan.length), generator=generator)
    leaves, seconds, against = Leaves(plan.windows), [], []
    runs: tuple[tuple[list[float], Callable[[], Any]], ...] = (
        (against, lambda: plain_forward(source, ops, tokens)),
        (seconds, lambda: gather(source, ops, tokens, recipe.needs, leaves, 0, silent)),
    )
    for number in range(plan.rounds + 1):
        for into, run in runs:
            taken = timed(run)
            if number:  # the first one finds files and caches cold
                into.append(taken)
        progress("pass 1", number, plan.rounds)
    about = {"windows": plan.windows, "length": plan.length, "layers": shape.layers, "needs": sorted(recipe.needs)}
    return Timed("pass 1", tuple(seconds), tuple(against), about)


def time_processes(source: Path, plan: QuantizingPlan, progress: Progress) -> Timed:
    """One process of one thread beside several of one thread each that torchrun started, on the whole job of quantizing
    `source`; seconds are the job's own, without the start of Python. `ceiling` of every round is what as many processes
    reach that share nothing, for two cores may be one. Raises InputError when a run fails."""
    for file in embedded.model_directory().glob("tokenizer*"):
        shutil.copy(file, source / file.name)
    windows = SHARED_WINDOWS * plan.processes
    job = ["-m", "resq", "quantize", str(source), "--recipe", plan.recipe, "--calibration", embedded.TEXT, "--json"]
    job += ["--windows", str(windows), "--window-length", str(plan.length)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={plan.processes}"]
    seconds, against, ceiling = [], [], []
    with tempfile.TemporaryDirectory(prefix="resq-quantized-") as room, multiplying(plan.processes) as multiplied:
        for number in range(plan.rounds):
            alone, together = multiplied(1), multiplied(plan.processes)
            ceiling.append(plan.processes * max(alone) / max(together))
            for into, start in ((seconds, []), (against, torchrun)):
                out = Path(room) / f"{number}-{len(start)}"
                done = subprocess.run(
                    [sys.executable, *start, *job, "--out", str(out)],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise InputError(f"quantizing for --processes failed: {done.stderr.strip().splitlines()[-1]}")
                into.append(json.loads(done.stdout)["seconds"])
                shutil.rmtree(out)
            progress("processes", number + 1, plan.rounds)
    about = {"processes": plan.processes, "windows": windows, "length": plan.length, "ceiling": ceiling}
    return Timed(f"one process beside {plan.processes}", tuple(seconds), tuple(against), about)


@contextmanager
def multiplying(
    processes: int, *, size: int = PRODUCT, count: int = INDEPENDENT
) -> Iterator[Callable[[int], list[float]]]:
    """So many processes of one thread that are started and wait; called with a number, so many of them begin at once
    and each gives the seconds of its own `count` products of a square [size, size]. Raises InputError when one ends."""
    program = f"from resq.measure.quantizing import multiply; multiply({size}, {count})"
    with ExitStack() as held:
        started = [
            held.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(processes)
        ]

        def said(process: subprocess.Popen[str]) -> str:
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                words = process.communicate()[1].strip().splitlines() or [f"exit code {process.returncode}"]
                raise InputError(f"a process that multiplies for --processes ended: {words[-1]}")
            return line

        def multiplied(number: int) -> list[float]:
            for process in started[:number]:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            return [float(said(process)) for process in started[:number]]

        for process in started:
            said(process)
        yield multiplied


def multiply(size: int, count: int) -> None:
    """What a process of `multiplying` does: says that it is there, and for each line that it reads the seconds of
    `count` products of a float64 square [size, size], by one thread."""
    torch.set_num_threads(1)
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timed(lambda: square @ square)  # the first one finds everything cold
    print("ready", flush=True)
    for _ in sys.stdin:
        print(timed(lambda: [square @ square for _ in range(count)]), flush=True)


@torch.no_grad()
def plain_forward(source: Source, ops: Backend, tokens: Tensor) -> list[Tensor]:
    """Hidden states [1, t, d] after the last layer of windows tokens int64 [windows, t], one layer in memory."""
    table, shape = source.embedding(), source.shape
    hidden = [F.embedding(window[None], table).to(ops.dtype) for window in tokens]
    at = Positions.following(shape, 0, 1, tokens.shape[1])
    for index in range(shape.layers):
        layer = in_dtype(fold_norms(source.layer(index)), ops.dtype)
        for number, before in enumerate(hidden):
            hidden[number] = decoder.forward_layer(ops, shape, layer, before, at)
    return hidden


def write_source(config: Config, directory: Path) -> None:
    """A Hugging Face checkpoint of `config`, of a family without fused linears, with random bfloat16 weights."""
    architecture = architecture_for(config["model_type"])
    assert not architecture.fused
    shape, generator = architecture.shape(config), torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * size[-1] ** -0.5).to(torch.bfloat16)

    table = (shape.vocab, shape.hidden)
    tensors = {f"{architecture.embed}.weight": random(*table), f"{architecture.final_norm}.weight": _ones(shape.hidden)}
    if not shape.tied:
        tensors[f"{architecture.head}.weight"] = random(*table)
    for index in range(shape.layers):
        prefix = f"{architecture.layers}.{index}"
        for role, size in shape.sizes().items():
            tensors[f"{prefix}.{architecture.linears[role]}.weight"] = random(*size)
            if role in architecture.biased:
                tensors[f"{prefix}.{architecture.linears[role]}.bias"] = random(size[0])
        for name in architecture.norms.values():
            tensors[f"{prefix}.{name}.weight"] = _ones(shape.hidden)
        for name in architecture.head_norms.values():
            tensors[f"{prefix}.{name}.weight"] = _ones(shape.head_dim)
    save_file(tensors, directory / "model.safetensors")
    rows.write_json(directory / "config.json", config)


def save(results: list[Timed], plan: QuantizingPlan, file: Path) -> None:
    """Append the rows, with what made them, to a .jsonl file; threads are those of the run."""
    threads = {} if plan.threads is None else {"threads": plan.threads}
    for timing in results:
        rows.append_row(file, {**timing.row(), "plan": asdict(plan), **rows.provenance(), **threads})


def timed(run: Callable[[], Any]) -> float:
    """Seconds that it took."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)
