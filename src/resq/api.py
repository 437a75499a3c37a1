"""One call from a source checkpoint to a packed one."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from resq import embedded
from resq._version import __version__
from resq.backends.reference import dense
from resq.checkpoint.files import CheckpointWriter, check_free, sha256_of
from resq.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    CalibrationEntry,
    Manifest,
    RecipeEntry,
    SourceEntry,
    StatisticsEntry,
    TextEntry,
)
from resq.errors import InputError
from resq.measure.card import model_card
from resq.measure.rows import processor
from resq.models.source import Source
from resq.models.text import Windows, load_tokenizer, sampled_windows, text_sha256
from resq.numerics.device import full_float32
from resq.numerics.moments import Leaves
from resq.progress import Progress, silent
from resq.ptq import statistics_file
from resq.ptq.pipeline import Job, LinearReport
from resq.ptq.pipeline import quantize as run_pipeline
from resq.ptq.recipe import Recipe, Setting, Statistic
from resq.ptq.recipes import recipe_named
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
DEFAULT_WINDOWS, DEFAULT_ROUNDING_WINDOWS, DEFAULT_LENGTH = 128, 128, 2048


@dataclass(frozen=True)
class Result:
    """What `quantize` made: where, its manifest, what each linear's rounding cost, and how long it all took."""

    directory: Path
    manifest: Manifest
    linears: list[LinearReport]
    seconds: float


def chosen_recipe(name: str | Recipe, bits: int | None, head_bits: float | None) -> Recipe:
    """A recipe by name, with its low band at `bits` and its head at `head_bits` (16: unrounded, 8, 4.5) where given."""
    recipe = recipe_named(name) if isinstance(name, str) else name
    precision = recipe.precision
    if bits is not None:
        if bits not in (2, 3, 4, 6):
            raise InputError(f"--bits {bits} is no width of the low band; accepted are 2, 3, 4 and 6")
        precision = precision.with_low(bits)
    if head_bits is not None:
        precision = precision.with_head(head_bits)
    return replace(recipe, precision=precision)


def chosen_device(given: str | torch.device) -> torch.device:
    """Where to compute: cpu, cuda, or a card by its number (`cuda:1`). Raises InputError for anything else, and when
    there is no such card."""
    accepted = "accepted are cpu, cuda, and cuda:1 for the second of several cards"
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise InputError(f"--device {given!r} is no device; {accepted}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {given} is not supported; {accepted}")
    if device.type == "cuda":
        if not torch.backends.cuda.is_built():
            raise InputError(
                f"--device {given} needs a card, torch {torch.__version__} is built without CUDA; install a CUDA build "
                "of torch, or use --device cpu"
            )
        if not torch.cuda.is_available():
            raise InputError(
                f"--device {given} was asked for, but torch sees no card; see what nvidia-smi and CUDA_VISIBLE_DEVICES "
                "say, or use --device cpu"
            )
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(
                f"--device {given} was asked for; torch's last card is cuda:{count - 1}, give that or less"
            )
    return device


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
    card of several (`cuda:1`); a seed draws the same on each, float sums differ in their last digits.
    Raises InputError, a ValueError, for anything given that cannot be used; `out` then does not exist.
    """
    started = time.perf_counter()
    method = chosen_recipe(recipe, bits, head_bits)
    place = chosen_device(device)
    stored, used = None, None
    if statistics is not None:
        stored = statistics_file.read(Path(statistics))
        used = StatisticsEntry(sha256=sha256_of(Path(statistics)), device=stored.header.device)
        windows, window_length = _windows_of(str(statistics), stored.header, method, windows, window_length)
    count = _counted(windows)
    rounding = min(DEFAULT_ROUNDING_WINDOWS, count) if rounding_windows is None else rounding_windows
    if not 1 <= rounding <= count:
        raise InputError(f"--rounding-windows {rounding} must lie in 1 … {count}, the number of --windows")
    out = Path(out)
    check_free(out)
    model = Source.open(source)
    tokenizer, files = load_tokenizer(model.path), _texts(model, calibration)
    hashed = None
    if stored is not None:
        hashed = source_files(model, progress)
        statistics_file.check_fit(str(statistics), stored.header, hashed, method.needs)
    looks = method.needs_windows or bool(method.tuning)
    windows_seed = seed if stored is None else stored.header.calibration.seed
    chosen, texts = None, []
    if looks or (stored is None and method.needs) or (stored is not None and files):
        chosen = _windows(model, tokenizer, files, count, window_length, windows_seed, progress)
        texts = [TextEntry(name=str(file), sha256=text_sha256(file)) for file in files]
        if stored is not None and chosen.sha256 != stored.header.calibration.tokens_sha256:
            raise InputError(
                f"--calibration gives other windows than {statistics} was made of (sha256 of their tokens differs); "
                f"give its text, {stored.header.calibration.origin}"
            )
    calibrated = _calibration_entry(stored, chosen, count, rounding if method.needs_windows else 0, place)
    if calibrated is not None:
        calibrated = calibrated.model_copy(update={"seed": windows_seed, "texts": texts, "statistics": used})
    setting = Setting(model.shape, method.precision, seed, place)
    keep_tied = model.shape.tied and method.precision.head is None and not untie
    with CheckpointWriter(out) as writer:
        tokens = torch.zeros(0, 0, dtype=torch.int64) if chosen is None else chosen.tokens
        try:
            moments = None if stored is None else stored.moments(method.needs)
            job = Job(method, tokens, rounding, seed, keep_tied, place, moments)
            outcome = run_pipeline(model, job, writer, progress)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{place} ran out of memory, which must hold one layer and all calibration windows ({tokens.numel()} "
                "tokens); use fewer or shorter windows, or --device cpu"
            ) from error
        hashed = source_files(model, progress) if hashed is None else hashed
        _copy_files(model, writer)
        header = {
            "made_by": made_by(place),
            "recipe": RecipeEntry(**method.describe(), seed=seed),
            "source": SourceEntry(
                name=model.name,
                model_type=model.config["model_type"],
                dtype=model.dtype,
                bytes=model.nbytes,
                parameters=model.parameters(),
                tied=model.shape.tied,
                sha256={file: entry.sha256 for file, entry in hashed.items()},
            ),
            "calibration": calibrated,
            "notes": [
                *(note for basis in method.basis for note in basis.notes(setting)),
                *outcome.notes,
                *damping_notes(outcome.linears),
                *([] if stored is None else device_notes(stored.header, place)),
            ],
        }
        writer.add_text("README.md", model_card(header, out.name, hub="/" in str(source) and not Path(source).exists()))
        manifest = writer.close(**header)
    return Result(out, manifest, outcome.linears, time.perf_counter() - started)


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
    progress: Progress = silent,
) -> Header:
    """Write what the bases of one recipe or several are fitted on into the new file `out`; returns what it holds.

    `calibrate("llama", "stats-3.safetensors", calibration="wiki.train.raw", shard=(3, 16))`, then `merge`.

    shard: (number from 1, of how many), a contiguous run of the windows that the summation tree does not cut. seed:
    of the choice of windows. The rest is as for `quantize`, which takes the whole as `statistics`. Raises InputError
    for anything given that cannot be used; `out` then does not exist.
    """
    methods = [recipe_named(each) if isinstance(each, str) else each for each in _listed(recipe)]
    needs = frozenset[Statistic]().union(*(method.needs for method in methods))
    if not needs:
        raise InputError(f"{', '.join(method.name for method in methods)} fits no basis and needs no statistics")
    place, out, leaves = chosen_device(device), Path(out), Leaves(_counted(windows))
    first, stop = leaves.shard(*shard)
    check_free(out)
    model = Source.open(source)
    tokenizer, files = load_tokenizer(model.path), _texts(model, calibration)
    chosen = _windows(model, tokenizer, files, leaves.windows, window_length, seed, progress)
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
            sums = gather(model, dense(torch.float32, place), tokens, needs, leaves, first, progress)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{place} ran out of memory, which must hold one layer and the calibration windows ({tokens.numel()} "
            "tokens); use smaller shards, or --device cpu"
        ) from error
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


def damping_notes(reports: Sequence[LinearReport]) -> list[str]:
    """A line for each linear whose Hessian took more damping than the first of its kind: remarks for the manifest."""
    least = min((report.damping for report in reports if report.damping is not None), default=0.0)
    raised = [report for report in reports if report.damping is not None and report.damping > least]
    return [f"layer {report.layer} {report.role}: Cholesky needed damping {report.damping:g}" for report in raised]


def device_notes(header: Header, place: torch.device) -> list[str]:
    """A line for the manifest where the statistics come from another kind of device than the rest."""
    return [] if header.device == place.type else [f"statistics: forward in float32, {header.device}"]


def _listed(given: Any) -> Sequence[Any]:
    return [given] if isinstance(given, (str, Path, Recipe)) else given


def _counted(windows: int | None) -> int:
    count = DEFAULT_WINDOWS if windows is None else windows
    if count < 1:
        raise InputError(f"--windows is {count}; at least 1 is needed")
    return count


def _texts(model: Source, given: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    files = _listed(given)
    # What the embedded model was trained on.
    return [embedded.TEXT] if not files and model.path == embedded.model_directory() else files


def _windows_of(file: str, header: Header, recipe: Recipe, windows: int | None, length: int | None) -> tuple[int, int]:
    """The statistics' number and length of windows, which are the only ones that may be given."""
    if not recipe.needs:
        raise InputError(f"recipe {recipe.name} fits no basis and needs no --statistics; leave it out")
    calibration = header.calibration
    for option, given, own in (
        ("--windows", windows, calibration.windows),
        ("--window-length", length, calibration.window_length),
    ):
        if given not in (None, own):
            raise InputError(f"{option} is {given}, {file} was made with {own}; leave {option} out")
    return calibration.windows, calibration.window_length


def _windows(
    model: Source,
    tokenizer: Any,
    files: Sequence[str | Path],
    count: int,
    length: int | None,
    seed: int,
    progress: Progress,
) -> Windows:
    progress("tokenizing", 0, 1)
    context = model.shape.max_positions
    length = min(DEFAULT_LENGTH, context) if length is None else length
    if not 2 <= length <= context:
        raise InputError(f"--window-length {length} must lie in 2 … {context}, the model's context")
    chosen = sampled_windows([Path(file) for file in files], tokenizer, count=count, length=length, seed=seed)
    if int(chosen.tokens.max()) >= model.shape.vocab:
        raise InputError(
            f"the tokenizer gives token {int(chosen.tokens.max())}, the model's vocabulary has {model.shape.vocab}; "
            "tokenizer and weights do not belong together"
        )
    progress("tokenizing", 1, 1)
    return chosen


def _calibration_entry(
    stored: Statistics | None, chosen: Windows | None, windows: int, rounding: int, place: torch.device
) -> CalibrationEntry | None:
    """What the manifest says of the calibration: None where there was none."""
    if chosen is not None:
        origin, length, digest = chosen.origin, chosen.tokens.shape[1], chosen.sha256
    elif stored is not None:
        calibration = stored.header.calibration
        origin, length, digest = calibration.origin, calibration.window_length, calibration.tokens_sha256
    else:
        return None
    return CalibrationEntry(
        origin=origin,
        windows=windows,
        rounding_windows=rounding,
        window_length=length,
        tokens_sha256=digest,
        forward=f"float32, {place.type}",
    )


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
