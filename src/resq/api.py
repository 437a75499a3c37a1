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
from resq.checkpoint.files import CheckpointWriter, check_free
from resq.checkpoint.manifest import FORMAT_VERSION, MANIFEST_FILE, CalibrationEntry, Manifest, RecipeEntry, SourceEntry
from resq.errors import InputError
from resq.measure.card import model_card
from resq.models.source import Source
from resq.models.text import Windows, load_tokenizer, sampled_windows
from resq.progress import Progress, silent
from resq.ptq.pipeline import Job, LinearReport
from resq.ptq.pipeline import quantize as run_pipeline
from resq.ptq.recipe import Recipe, Setting
from resq.ptq.recipes import recipe_named

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
    windows: int = DEFAULT_WINDOWS,
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
    and the default for `tiny` alone. windows: for the bases; rounding_windows (default: the first 128 of them) for
    GPTQ. window_length: tokens, default 2048 or the model's context. bits: the low band, default the recipe's (4).
    head_bits: 16 (the recipes' default) keeps lm_head unrounded, and a tied head on the embedding table unless `untie`;
    8 and 4.5 round it, and its input to 8. device: what computes, `cpu`, `cuda` or one card of several (`cuda:1`); a
    seed draws the same on each, float sums differ in their last digits.
    Raises InputError, a ValueError, for anything given that cannot be used; `out` then does not exist.
    """
    started = time.perf_counter()
    method = chosen_recipe(recipe, bits, head_bits)
    place = chosen_device(device)
    files = [calibration] if isinstance(calibration, (str, Path)) else calibration
    rounding = min(DEFAULT_ROUNDING_WINDOWS, windows) if rounding_windows is None else rounding_windows
    if windows < 1:
        raise InputError(f"--windows is {windows}; at least 1 is needed")
    if not 1 <= rounding <= windows:
        raise InputError(f"--rounding-windows {rounding} must lie in 1 … {windows}, the number of --windows")
    out = Path(out)
    check_free(out)
    model = Source.open(source)
    if not files and model.path == embedded.model_directory():
        files = [embedded.TEXT]  # what it was trained on
    tokenizer = load_tokenizer(model.path)
    progress("tokenizing", 0, 1)
    chosen = _windows(model, tokenizer, files, windows, window_length, seed, method)
    progress("tokenizing", 1, 1)
    setting = Setting(model.shape, method.precision, seed, place)
    keep_tied = model.shape.tied and method.precision.head is None and not untie
    with CheckpointWriter(out) as writer:
        tokens = torch.zeros(0, 0, dtype=torch.int64) if chosen is None else chosen.tokens
        try:
            outcome = run_pipeline(model, Job(method, tokens, rounding, seed, keep_tied, place), writer, progress)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{place} ran out of memory, which must hold one layer and all calibration windows ({tokens.numel()} "
                "tokens); use fewer or shorter windows, or --device cpu"
            ) from error
        total = model.nbytes
        hashes = model.sha256(lambda done: progress("hashing the source", done, total))
        _copy_files(model, writer)
        header = {
            "made_by": _versions(),
            "recipe": RecipeEntry(**method.describe(), seed=seed),
            "source": SourceEntry(
                name=model.name,
                model_type=model.config["model_type"],
                dtype=model.dtype,
                bytes=total,
                parameters=model.parameters(),
                tied=model.shape.tied,
                sha256=hashes,
            ),
            "calibration": None
            if chosen is None
            else CalibrationEntry(
                origin=chosen.origin,
                windows=windows,
                rounding_windows=rounding if method.needs_windows else 0,
                window_length=tokens.shape[1],
                tokens_sha256=chosen.sha256,
                forward=f"float32, {place.type}",
            ),
            "notes": [
                *(note for basis in method.basis for note in basis.notes(setting)),
                *outcome.notes,
                *damping_notes(outcome.linears),
            ],
        }
        writer.add_text("README.md", model_card(header, out.name, hub="/" in str(source) and not Path(source).exists()))
        manifest = writer.close(**header)
    return Result(out, manifest, outcome.linears, time.perf_counter() - started)


def damping_notes(reports: Sequence[LinearReport]) -> list[str]:
    """A line for each linear whose Hessian took more damping than the first of its kind: remarks for the manifest."""
    least = min((report.damping for report in reports if report.damping is not None), default=0.0)
    raised = [report for report in reports if report.damping is not None and report.damping > least]
    return [f"layer {report.layer} {report.role}: Cholesky needed damping {report.damping:g}" for report in raised]


def _windows(
    model: Source,
    tokenizer: Any,
    files: Sequence[str | Path],
    count: int,
    length: int | None,
    seed: int,
    recipe: Recipe,
) -> Windows | None:
    if not recipe.needs and not recipe.needs_windows and not recipe.tuning:
        return None
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
    return chosen


def _copy_files(model: Source, writer: CheckpointWriter) -> None:
    raw = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    raw.pop("auto_map", None)  # names code files that are not copied, and ours runs instead
    raw["quantization_config"] = {"quant_method": "resq", "format_version": FORMAT_VERSION, "manifest": MANIFEST_FILE}
    writer.add_text("config.json", json.dumps(raw, indent=2) + "\n")
    for pattern in COPIED:
        for file in sorted(model.path.glob(pattern)):
            if file.is_file():
                writer.add_copy(file, str(file.relative_to(model.path)))


def _versions() -> dict[str, str]:
    import transformers

    return {
        "resq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
