"""One call from a source checkpoint to a packed one."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from resq._version import __version__
from resq.backends.reference import dense
from resq.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    RecipeEntry,
    SourceEntry,
)
from resq.checkpoint.work import WorkDirectory, check_not_finished, differences, remove_remains, work_path
from resq.checkpoint.writer import CheckpointWriter
from resq.durable import check_free
from resq.errors import InputError
from resq.inputs import (
    Given,
    Task,
    chosen_activations,
    chosen_device,
    chosen_recipe,
    chosen_windows,
    counted,
    listed,
    read_task,
    texts_of,
)
from resq.measure.card import model_card
from resq.measure.rows import processor
from resq.models.source import Source
from resq.models.text import load_tokenizer
from resq.numerics.device import full_float32
from resq.numerics.moments import Leaves
from resq.progress import Progress, silent
from resq.ptq import statistics_file
from resq.ptq.activations import Buffers, Place
from resq.ptq.layers import LinearReport
from resq.ptq.pipeline import Job, LayerReport, Outcome
from resq.ptq.pipeline import quantize as run_pipeline
from resq.ptq.ranks import joined
from resq.ptq.recipe import Moments, Recipe, Setting, Statistic
from resq.ptq.recipes import recipe_named
from resq.ptq.resume import Position
from resq.ptq.statistics import gather
from resq.ptq.statistics_file import Calibration, Header, Sizes, Statistics, source_files

# What of a source goes along: tokenizer, chat templates, generation config, licences.
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Result:
    """What `quantize` made: where, its manifest, what each linear's rounding cost, what each layer took, and how long
    it all took."""

    directory: Path
    manifest: Manifest
    linears: list[LinearReport]
    layers: list[LayerReport]
    seconds: float


@torch.inference_mode()
def quantize(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "resq",
    calibration: str | Path | Sequence[str | Path] = (),
    statistics: str | Path | None = None,
    windows: int | None = None,
    rounding_windows: int | None = None,
    window_length: int | None = None,
    bits: int | None = None,
    head_bits: float | None = None,
    untie: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    activations: str = "device",
    resume: bool = False,
    progress: Progress = silent,
) -> Result:
    """Quantize a Hugging Face checkpoint (directory or hub id) into the new directory `out`.

    `resq.quantize("llama", "llama-resq", calibration=["wiki.train.raw"])`.

    source `tiny` is the embedded model. calibration: text or .jsonl files; `stdlib` is the text of Python's own library
    and the default for `tiny` alone. windows: for the bases, default 128; rounding_windows (default: the first 128 of
    them) for GPTQ. window_length: tokens, default 2048 or the model's context. statistics: a file of `calibrate` or
    `merge`, which the bases are then fitted on without a forward pass; windows, their length and the seed that chooses
    them are its own, and the calibration text is needed only where rounding or tuning looks at it. bits: the low band,
    default the recipe's (4). head_bits: 16 (the recipes' default) keeps lm_head unrounded, and a tied head on the
    embedding table unless `untie`; 8 and 4.5 round it, and its input to 8. device: what computes, `cpu`, `cuda` or one
    card of several (`cuda:1`); a seed draws the same on each, float sums differ in their last digits. activations:
    where the windows' hidden states lie, on the `device`, in `memory`, or on `disk`. resume: go on with a job that was
    stopped, from its last finished layer, to the same bits; starts one where there is none. Under torchrun all
    processes share the work, the first writes.
    Raises InputError, a ValueError, for anything given that cannot be used, or a job that was begun with other inputs;
    `out` then does not exist, and what is finished of it is kept beside it for `resume`.
    """
    started, out = time.perf_counter(), Path(out)
    method = chosen_recipe(recipe, bits, head_bits)
    kept_at = chosen_activations(activations)
    with joined(chosen_device(device)) as (ranks, place):
        progress = progress if ranks.first else silent
        stored = None if statistics is None or not ranks.first else statistics_file.read(Path(statistics))
        given = Given(calibration, statistics, windows, rounding_windows, window_length, seed)
        if ranks.first:
            remove_remains(out)
            check_not_finished(out, resume=resume)
        model = Source.open(source)
        task = ranks.from_first(lambda: read_task(method, model, given, stored, place, progress))
        if ranks.size > 1:
            seen = source_files(model) if ranks.leads and not ranks.first else task.files
            ranks.same("files of the source", {name: entry.sha256 for name, entry in seen.items()})
            ranks.same("settings", {name: made_by(place)[name] for name in ("resq", "torch", "threads", "device")})
        keep_tied = model.shape.tied and method.precision.head is None and not untie
        with ExitStack() as held:
            work = None
            if ranks.first:
                inputs = {**task.inputs(method, keep_tied=keep_tied), "seed": seed, "device": place.type}
                about = {name: each for name, each in made_by(place).items() if name != "time"}
                work = held.enter_context(WorkDirectory(out, inputs, resume=resume, about=about))
            directory = ranks.from_first(lambda: work_path(out))
            directory.mkdir(parents=True, exist_ok=True)  # on another machine than the first process's
            moments = None if stored is None else stored.moments(method.needs)
            header = None if stored is None else stored.header
            stored = None  # its sums leave memory; the moments are their own
            if task.has_statistics and moments is None:
                moments = Moments(task.calibrated_tokens)
            job = Job(
                recipe=method,
                tokens=task.tokens,
                rounding_windows=task.rounding_windows,
                seed=seed,
                keep_tied=keep_tied,
                device=place,
                moments=moments,
                buffers=Buffers(kept_at, place, directory),
                position=Position(directory, work, ranks),
            )
            writer = None if work is None else CheckpointWriter(work)
            if work is not None and work.resumed:
                assert writer is not None
                progress(f"going on: {writer.finished} of {model.shape.layers} layers are written", 1, 1)
            try:
                outcome = run_pipeline(model, job, writer, progress)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise out_of_memory(place, kept_at, task.tokens, "fewer or shorter windows") from error
            manifest = ranks.from_first(lambda: _finished(writer, model, method, task, job, outcome, header))
        if not ranks.first:
            shutil.rmtree(directory, ignore_errors=True)
    return Result(out, manifest, outcome.linears, outcome.layers, time.perf_counter() - started)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device was full; on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def out_of_memory(place: torch.device, kept_at: Place, tokens: Tensor, otherwise: str) -> InputError:
    """What to do about a device that is full."""
    needed, advice = "one layer and its Hessians", otherwise
    if kept_at is not Place.DISK:
        other = Place.MEMORY if kept_at is Place.DEVICE and place.type != "cpu" else Place.DISK
        needed += f", and with --activations {kept_at} the states of {tokens.numel()} tokens"
        advice = f"--activations {other}, or {otherwise}"
    return InputError(f"{place} ran out of memory, which must hold {needed}; use {advice}")


def _finished(
    writer: CheckpointWriter | None,
    model: Source,
    method: Recipe,
    task: Task,
    job: Job,
    outcome: Outcome,
    collected: Header | None,
) -> Manifest:
    """Write what is not tensors, and give the checkpoint its place."""
    assert writer is not None
    _copy_files(model, writer)
    setting = Setting(model.shape, method.precision, job.seed, job.device)
    ended = made_by(job.device)
    header = {
        "made_by": ended,
        "recipe": RecipeEntry(**method.describe(), seed=job.seed),
        "source": SourceEntry(
            name=model.name,
            model_type=model.config["model_type"],
            dtype=model.dtype,
            bytes=model.nbytes,
            parameters=model.parameters(),
            tied=model.shape.tied,
            sha256={file: entry.sha256 for file, entry in task.files.items()},
        ),
        "calibration": task.calibrated,
        "notes": [
            *(note for basis in method.basis for note in basis.notes(setting)),
            *outcome.notes,
            *rounding_notes(outcome.linears),
            *([] if collected is None else device_notes(collected, job.device)),
            *(f"resumed: {each}" for each in differences({**writer.work.about, "time": ended["time"]}, ended)),
        ],
    }
    hub = "/" in model.name and not Path(model.name).exists()
    writer.add_text("README.md", model_card(header, writer.work.out.name, hub=hub))
    return writer.close(**header)


@torch.inference_mode()
def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe | Sequence[str | Recipe] = "resq",
    calibration: str | Path | Sequence[str | Path] = (),
    windows: int | None = None,
    window_length: int | None = None,
    shard: tuple[int, int] = (1, 1),
    seed: int = 0,
    device: str | torch.device = "cpu",
    activations: str = "device",
    progress: Progress = silent,
) -> Header:
    """Write what the bases of one recipe or several are fitted on into the new file `out`; returns what it holds.

    `calibrate("llama", "stats-3.safetensors", calibration="wiki.train.raw", shard=(3, 16))`, then `merge`.

    shard: (number from 1, of how many), a contiguous run of the windows that the summation tree does not cut. seed:
    of the choice of windows. The rest is as for `quantize`, which takes the whole as `statistics`. Raises InputError
    for anything given that cannot be used; `out` then does not exist.
    """
    methods = [recipe_named(each) if isinstance(each, str) else each for each in listed(recipe)]
    needs = frozenset[Statistic]().union(*(method.needs for method in methods))
    if not needs:
        raise InputError(f"{', '.join(method.name for method in methods)} fits no basis and needs no statistics")
    place, out, leaves = chosen_device(device), Path(out), Leaves(counted(windows))
    kept_at = chosen_activations(activations)
    first, stop = leaves.shard(*shard)
    check_free(out)
    model = Source.open(source)
    tokenizer, files = load_tokenizer(model.path), texts_of(model, calibration)
    chosen = chosen_windows(model, tokenizer, files, leaves.windows, window_length, seed, progress)
    for method in methods:
        for basis in method.basis:
            basis.check(model.shape, chosen.tokens.numel())
    header = Header(
        version=statistics_file.STATISTICS_VERSION,
        source=source_files(model, progress),
        sizes=Sizes.of(model.shape),
        calibration=Calibration(
            origin=chosen.origin,
            tokens_sha256=chosen.sha256,
            windows=leaves.windows,
            window_length=chosen.tokens.shape[1],
            seed=seed,
        ),
        dtype="float32",
        device="cuda" if place.type == "cuda" else "cpu",
        statistics=sorted(needs),
        leaves=[first, stop],
    )
    tokens = chosen.tokens[slice(*header.span)]
    try:
        with full_float32():
            buffers = Buffers(kept_at, place, out.parent)
            sums = gather(model, dense(torch.float32, place), tokens, needs, leaves, first, progress, buffers)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(place, kept_at, tokens, "smaller shards") from error
    statistics_file.write(Statistics(header, sums), out)
    return header


def merge(shards: Sequence[str | Path], out: str | Path, *, progress: Progress = silent) -> Header:
    """Merge files of `calibrate`, in any order, into the new file `out`; returns what it holds.

    `merge(glob("stats-*.safetensors"), "stats.safetensors")`. A run of shards that is not the whole can be merged with
    the rest later. Raises InputError for shards given twice, of different calibrations, or with others missing between
    them.
    """
    out = Path(out)
    check_free(out)
    merged = statistics_file.merge([Path(each) for each in shards], progress)
    statistics_file.write(merged, out)
    return merged.header


def rounding_notes(reports: Sequence[LinearReport]) -> list[str]:
    """Remarks for the manifest: each linear whose Hessian took more damping than the first of its kind, inputs that
    calibration never reached, rows without a weight."""
    least = min((report.damping for report in reports if report.damping is not None), default=0.0)
    notes = []
    for report in reports:
        name = f"layer {report.layer} {report.role}"
        if report.damping is not None and report.damping > least:
            notes.append(f"{name}: Cholesky needed damping {report.damping:g}")
        if report.dead_inputs:
            notes.append(f"{name}: inputs that are 0 on every calibration token: {report.dead_inputs}")
        if report.zero_rows:
            notes.append(f"{name}: rows without a weight: {report.zero_rows}")
    return notes


def device_notes(header: Header, place: torch.device) -> list[str]:
    """A line for the manifest where the statistics come from another kind of device than the rest."""
    return [] if header.device == place.type else [f"statistics: forward in float32, {header.device}"]


def _copy_files(model: Source, writer: CheckpointWriter) -> None:
    raw = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    raw.pop("auto_map", None)  # names code files that are not copied, and ours runs instead
    raw["quantization_config"] = {"quant_method": "resq", "format_version": FORMAT_VERSION, "manifest": MANIFEST_FILE}
    writer.add_text("config.json", json.dumps(raw, indent=2) + "\n")
    for pattern in COPIED:
        for file in sorted(model.path.glob(pattern)):
            if file.is_file():
                writer.add_copy(file, str(file.relative_to(model.path)))


def made_by(place: torch.device) -> dict[str, str]:
    """What of this process and machine the last digits of float sums depend on, by name, and the time: for the manifest
    of what is computed on `place`."""
    import transformers

    return {
        "resq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "device": place.type,
        **({"card": torch.cuda.get_device_name(place)} if place.type == "cuda" else {}),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
