"""A case of a comparison, and what a process of its own does to make it: quantize, evaluate beside 16 bit, time."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from resq.api import quantize
from resq.backends.backend import wait
from resq.durable import beside
from resq.inputs import DEFAULT_WINDOWS, chosen_recipe
from resq.measure.ledger import Ledger, ledger
from resq.measure.perplexity import Interval, Streamed, open_streamed, perplexity
from resq.measure.rows import provenance, write_json
from resq.measure.scores import Original, Scores, keep_states, score
from resq.models import decoder
from resq.models.decoder import Positions
from resq.processes import memory
from resq.progress import Progress
from resq.ptq.learning import LearnRotations
from resq.ptq.recipe import Recipe
from resq.ptq.recipes import RECIPES
from resq.runtime.load import Opened

BASE = "16-bit"


@dataclass(frozen=True)
class Plan:
    """What is compared. source: a directory, a hub id or `tiny`; recipes: names or files; bits: widths of the low band,
    None the recipe's own; windows, rounding_windows, head_bits, calibration, seeds: as `quantize` takes them.

    text: what is evaluated, in windows of `window_length` tokens as calibration has (default 2048 or the context);
    evaluation_windows: so many of them, evenly spread, default all. speed_rounds: 0 measures no speed. at_once: cases
    side by side, which share the threads. learning_steps: at most so many where rotations are learned, None as the
    recipe has it.
    """

    source: str
    text: str
    recipes: tuple[str, ...] = tuple(RECIPES)
    bits: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    calibration: tuple[str, ...] = ()
    windows: int = DEFAULT_WINDOWS
    rounding_windows: int | None = None
    window_length: int | None = None
    evaluation_windows: int | None = None
    head_bits: float | None = None
    wikitext: bool = False
    backend: str | None = None
    speed_rounds: int = 3
    at_once: int = 1
    keep_checkpoints: bool = False
    learning_steps: int | None = None

    def recipe(self, case: Case) -> Recipe:
        """The whole method of a case. Raises InputError when the recipe cannot have that width."""
        recipe = chosen_recipe(case.found_by, case.bits, self.head_bits)
        if self.learning_steps is None:
            return recipe
        most = self.learning_steps
        tuning = (
            replace(part, steps=min(part.steps, most)) if isinstance(part, LearnRotations) else part
            for part in recipe.tuning
        )
        return replace(recipe, tuning=tuple(tuning))


@dataclass(frozen=True)
class Case:
    """One recipe (its name, and the name or file it is found by) with one width of its low band and one seed."""

    recipe: str
    found_by: str
    bits: int | None
    seed: int

    @property
    def name(self) -> str:
        """Also the directory's name."""
        width = "" if self.bits is None else f"-{self.bits}bit"
        return f"{self.recipe}{width}{f'-seed{self.seed}' if self.seed else ''}"


@dataclass(frozen=True)
class Speed:
    """Prefill of `tokens` tokens, in tokens per second: medians of interleaved rounds, those of the 16-bit source in
    the same rounds, and the median of the ratios. Reading and prepacking weights is not counted."""

    tokens_per_second: float
    source_tokens_per_second: float
    ratio: float
    tokens: int
    rounds: int
    threads: int


@dataclass(frozen=True)
class Row:
    """One case's figures.

    key: everything that decided them, by topic. delta: nats per token to 16 bit, ratio = exp(delta.mean); kl: nats per
    token; agreement: a share; each with its 95 % bootstrap interval over windows. ledger: true bits and bytes; bytes:
    weight files. peak_bytes: the most resident memory of quantizing, start_bytes: before it. What a 16-bit or a failed
    row cannot have is None.
    """

    case: str
    recipe: str
    bits: int | None
    seed: int
    key: dict[str, Any]
    provenance: dict[str, Any]
    failed: str | None = None
    perplexity: float | None = None
    nll: float | None = None
    ratio: float | None = None
    delta: Interval | None = None
    kl: Interval | None = None
    agreement: Interval | None = None
    ledger: Ledger | None = None
    bytes: int | None = None
    quantize_seconds: float | None = None
    evaluate_seconds: float | None = None
    peak_bytes: int | None = None
    start_bytes: int | None = None
    speed: Speed | None = None
    windows: int | None = None
    window_length: int | None = None
    backend: str | None = None
    notes: tuple[str, ...] = ()


ROW = TypeAdapter(Row)


def scores_of(directory: Path) -> Scores:
    """The scores of every token that a case holds."""
    tensors = load_file(directory / "tokens.safetensors")
    return Scores(tensors["nll"], tensors.get("kl"), tensors.get("agreement"))


@dataclass(frozen=True)
class Job:
    """What a process needs to make a case; keep: whether its checkpoint stays."""

    case: Case
    plan: Plan
    folder: Path
    key: dict[str, Any]
    keep: bool


@contextmanager
def in_one_piece(folder: Path) -> Iterator[Path]:
    """A hidden directory beside `folder` that takes its place when the block ends well, and is removed when not."""
    work = beside(folder)
    work.mkdir()
    try:
        yield work
        if folder.exists():
            old = beside(folder)
            folder.rename(old)
            shutil.rmtree(old)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_base(
    source: str, tokens: Any, folder: Path, key: dict[str, Any], speed: Speed | None, *, progress: Progress
) -> Row:
    """Evaluate the 16-bit source on tokens int64 [windows, length] and keep its hidden states."""
    model, windows, started = open_streamed(source), torch.from_numpy(tokens), time.perf_counter()
    with in_one_piece(folder) as work:
        scores = keep_states(model, windows, work / "states.npy", lambda *at: progress("evaluating", *at))
        save(work / "tokens.safetensors", {"nll": scores.nll, "tokens": windows})
        row = Row(
            case=BASE,
            recipe=BASE,
            bits=None,
            seed=0,
            key=key,
            provenance=provenance(),
            bytes=sum(file.stat().st_size for file in model.path.glob("*.safetensors")),
            evaluate_seconds=time.perf_counter() - started,
            backend=model.ops.name,
            speed=speed,
            **evaluated(scores, windows),
        )
        write_json(work / "row.json", ROW.dump_python(row, mode="json"))
    return row


def make_case(job: Job, *, progress: Progress) -> Row:
    """Quantize, evaluate what was written beside 16 bit, and put everything into the case's folder."""
    case, plan, start = job.case, job.plan, memory("VmRSS")
    base = job.folder.parent / BASE
    with in_one_piece(job.folder) as work:
        result = quantize(
            plan.source,
            work / "checkpoint",
            recipe=plan.recipe(case),
            calibration=plan.calibration,
            windows=plan.windows,
            rounding_windows=plan.rounding_windows,
            window_length=plan.window_length,
            seed=case.seed,
            progress=progress,
        )
        peak, started = memory("VmHWM"), time.perf_counter()
        model, original = open_streamed(work / "checkpoint", plan.backend), open_streamed(plan.source)
        windows = load_file(base / "tokens.safetensors")["tokens"]
        beside = Original(original, base / "states.npy")
        scores = score(model, windows, beside, lambda *at: progress("evaluating", *at))
        assert scores.kl is not None
        assert scores.agreement is not None
        save(work / "tokens.safetensors", {"nll": scores.nll, "kl": scores.kl, "agreement": scores.agreement})
        write_json(work / "linears.json", [asdict(report) for report in result.linears])
        delta = scores.delta(scores_of(base))
        book = ledger(result.manifest, Opened(work / "checkpoint").shape.head_dim)
        row = Row(
            case=case.name,
            recipe=case.recipe,
            bits=case.bits,
            seed=case.seed,
            key=job.key,
            provenance=provenance(),
            ratio=math.exp(delta.mean),
            delta=delta,
            kl=scores.kl_interval(),
            agreement=scores.agreement_interval(),
            ledger=book,
            bytes=book.bytes,
            quantize_seconds=result.seconds,
            evaluate_seconds=time.perf_counter() - started,
            peak_bytes=peak,
            start_bytes=start,
            backend=model.ops.name,
            notes=tuple(result.manifest.notes),
            **evaluated(scores, windows),
        )
        write_json(work / "row.json", ROW.dump_python(row, mode="json"))
        if not job.keep:
            shutil.rmtree(work / "checkpoint")
    return row


def evaluated(scores: Scores, windows: torch.Tensor) -> dict[str, Any]:
    """What a row says of any model."""
    losses = scores.window_nll
    count, length = windows.shape
    return {
        "perplexity": perplexity(losses),
        "nll": float(losses.mean()),
        "windows": count,
        "window_length": length,
    }


def save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors, as readable as other files."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    file.chmod(file.parent.stat().st_mode & 0o666)


@torch.inference_mode()
def measure(
    source: str, places: Sequence[tuple[str, str]], tokens: Any, rounds: int, backend: str | None, *, progress: Progress
) -> dict[str, Speed]:
    """The prefill speed of the source (`BASE`) and of packed checkpoints (name, directory) on tokens int64 [b, t]:
    every round runs each once."""
    batch = torch.from_numpy(tokens)
    models = {BASE: open_streamed(source), **{name: open_streamed(place, backend) for name, place in places}}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds):
        for number, (name, model) in enumerate(models.items(), start=1):
            seconds[name].append(prefill_seconds(model, batch))
            progress("prefill", turn * len(models) + number, rounds * len(models))
    base = seconds[BASE]
    return {
        name: Speed(
            tokens_per_second=batch.numel() / statistics.median(each),
            source_tokens_per_second=batch.numel() / statistics.median(base),
            ratio=statistics.median(first / second for first, second in zip(base, each, strict=True)),
            tokens=batch.numel(),
            rounds=rounds,
            threads=torch.get_num_threads(),
        )
        for name, each in seconds.items()
    }


def prefill_seconds(model: Streamed, tokens: torch.Tensor) -> float:
    """Seconds from tokens int64 [b, t] to the last token's logits, one layer in memory; reading and prepacking layers
    is not counted."""
    ends, (rows, length) = model.ends(), tokens.shape
    started = time.perf_counter()
    at = Positions.following(model.shape, 0, rows, length, device=model.ops.device)
    hidden = decoder.embed(model.ops, ends, tokens)
    wait(model.ops.device)
    spent = time.perf_counter() - started
    for layer in model.layers():
        started = time.perf_counter()
        hidden = decoder.forward_layer(model.ops, model.shape, layer, hidden, at)
        wait(model.ops.device)
        spent += time.perf_counter() - started
        del layer
    started = time.perf_counter()
    decoder.logits(model.ops, ends, hidden[:, -1:])
    wait(model.ops.device)
    return spent + time.perf_counter() - started
