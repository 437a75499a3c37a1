"""What `quantize` and `calibrate` are asked for: read and checked before the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq import embedded
from resq._version import __version__
from resq.checkpoint.manifest import CalibrationEntry, FileEntry, StatisticsEntry, TextEntry
from resq.durable import sha256_of
from resq.errors import InputError
from resq.models.source import Source
from resq.models.text import Windows, load_tokenizer, sampled_windows, text_sha256
from resq.progress import Progress
from resq.ptq import statistics_file
from resq.ptq.activations import Place
from resq.ptq.recipe import Recipe
from resq.ptq.recipes import recipe_named
from resq.ptq.statistics_file import Header, Statistics, source_files

DEFAULT_WINDOWS, DEFAULT_ROUNDING_WINDOWS, DEFAULT_LENGTH = 128, 128, 2048


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


def chosen_activations(given: str) -> Place:
    """Where hidden states lie. Raises InputError for another word."""
    try:
        return Place(given)
    except ValueError:
        raise InputError(f"--activations {given!r} is none of {', '.join(Place)}") from None


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


@dataclass(frozen=True)
class Given:
    """What was asked for of the calibration; see `quantize`."""

    calibration: str | Path | Sequence[str | Path]
    statistics: str | Path | None
    windows: int | None
    rounding_windows: int | None
    window_length: int | None
    seed: int


@dataclass(frozen=True)
class Task:
    """What was read and checked before the work: hashes of the source, the calibration's tokens int64
    [windows, length] (none where nothing looks at any) and what the manifest says of it."""

    files: dict[str, FileEntry]
    tokens: Tensor
    rounding_windows: int
    calibrated: CalibrationEntry | None
    calibrated_tokens: int

    @property
    def has_statistics(self) -> bool:
        """Whether the bases are fitted on a statistics file."""
        return self.calibrated is not None and self.calibrated.statistics is not None

    def inputs(self, method: Recipe, *, keep_tied: bool) -> dict[str, Any]:
        """What decides the result beside the seed and the device, for `WorkDirectory`."""
        calibration = None if self.calibrated is None else self.calibrated.model_dump(exclude={"origin", "texts"})
        return {
            "resq": __version__,
            "source": {name: entry.sha256 for name, entry in self.files.items()},
            "recipe": method.describe(),
            "calibration": calibration,
            "rounding windows": self.rounding_windows,
            "tied head": keep_tied,
        }


def read_task(
    method: Recipe, model: Source, given: Given, stored: Statistics | None, place: torch.device, progress: Progress
) -> Task:
    """Read and check everything that the work starts from. Raises InputError."""
    windows, length, used, file = given.windows, given.window_length, None, str(given.statistics)
    if stored is not None:
        used = StatisticsEntry(sha256=sha256_of(Path(file)), device=stored.header.device)
        windows, length = windows_of(file, stored.header, method, windows, length)
    count = counted(windows)
    rounding = counted_for_rounding(given.rounding_windows, count)
    tokenizer, files = load_tokenizer(model.path), texts_of(model, given.calibration)
    looks = method.needs_windows or bool(method.tuning)
    seed = given.seed if stored is None else stored.header.calibration.seed
    chosen, texts = None, []
    if looks or (stored is None and method.needs) or (stored is not None and files):
        chosen = chosen_windows(model, tokenizer, files, count, length, seed, progress)
        texts = [TextEntry(name=str(each), sha256=text_sha256(each)) for each in files]
        if stored is not None and chosen.sha256 != stored.header.calibration.tokens_sha256:
            raise InputError(
                f"--calibration gives other windows than {file} was made of (sha256 of their tokens differs); give its "
                f"text, {stored.header.calibration.origin}"
            )
    hashed = source_files(model, progress)
    if stored is not None:
        statistics_file.check_fit(file, stored.header, hashed, method.needs)
    entry = calibration_entry(stored, chosen, count, rounding if method.needs_windows else 0, place)
    if entry is not None:
        entry = entry.model_copy(update={"seed": seed, "texts": texts, "statistics": used})
    tokens = torch.zeros(0, 0, dtype=torch.int64) if chosen is None else chosen.tokens
    return Task(hashed, tokens, rounding, entry, 0 if entry is None else entry.windows * entry.window_length)


def listed(given: Any) -> Sequence[Any]:
    """One of something as several."""
    return [given] if isinstance(given, (str, Path, Recipe)) else given


def counted(windows: int | None) -> int:
    """How many calibration windows. Raises InputError for none."""
    count = DEFAULT_WINDOWS if windows is None else windows
    if count < 1:
        raise InputError(f"--windows is {count}; at least 1 is needed")
    return count


def counted_for_rounding(given: int | None, windows: int) -> int:
    """How many of so many windows rounding looks at. Raises InputError for more or none."""
    count = min(DEFAULT_ROUNDING_WINDOWS, windows) if given is None else given
    if not 1 <= count <= windows:
        raise InputError(f"--rounding-windows {count} must lie in 1 … {windows}, the number of --windows")
    return count


def window_length(given: int | None, context: int) -> int:
    """Tokens per window. Raises InputError for more than the model's context, or fewer than 2."""
    length = min(DEFAULT_LENGTH, context) if given is None else given
    if not 2 <= length <= context:
        raise InputError(f"--window-length {length} must lie in 2 … {context}, the model's context")
    return length


def texts_of(model: Source, given: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    """The calibration texts: for the embedded model, without any, what it was trained on."""
    files = listed(given)
    return [embedded.TEXT] if not files and model.path == embedded.model_directory() else files


def windows_of(file: str, header: Header, recipe: Recipe, windows: int | None, length: int | None) -> tuple[int, int]:
    """The statistics' number and length of windows, the only ones that may be given. Raises InputError for others."""
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


def chosen_windows(
    model: Source,
    tokenizer: Any,
    files: Sequence[str | Path],
    count: int,
    length: int | None,
    seed: int,
    progress: Progress,
) -> Windows:
    """The calibration's windows of texts. Raises InputError for too little text, or a tokenizer of another model."""
    progress("tokenizing", 0, 1)
    length = window_length(length, model.shape.max_positions)
    chosen = sampled_windows([Path(file) for file in files], tokenizer, count=count, length=length, seed=seed)
    if int(chosen.tokens.max()) >= model.shape.vocab:
        raise InputError(
            f"the tokenizer gives token {int(chosen.tokens.max())}, the model's vocabulary has {model.shape.vocab}; "
            "tokenizer and weights do not belong together"
        )
    progress("tokenizing", 1, 1)
    return chosen


def calibration_entry(
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
