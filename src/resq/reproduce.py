"""Making a packed checkpoint once more from what its manifest records, and comparing the two."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resq import embedded
from resq.api import calibrate, made_by, quantize
from resq.checkpoint.files import CheckpointReader
from resq.checkpoint.manifest import CalibrationEntry, Manifest
from resq.durable import sha256_of
from resq.errors import InputError
from resq.inputs import chosen_device
from resq.measure.differences import CARD_FILE, Differences, differences
from resq.models.source import Source, locate
from resq.models.text import load_tokenizer, sampled_windows, text_sha256
from resq.progress import Progress, silent
from resq.ptq import statistics_file
from resq.ptq.recipe import Recipe
from resq.ptq.recipe_file import recipe_from_dict
from resq.ptq.statistics_file import source_files

# Where things lie, and what the rerun was checked to share or says in words: no difference between two results.
APART_FROM = (
    "made_by",
    "source.name",
    "source.sha256",
    "calibration.origin",
    "calibration.seed",
    "calibration.texts",
    "calibration.statistics",
)
# Digits of a hash that was found; one that is asked for is written out.
SHOWN = 12


@dataclass(frozen=True)
class Report:
    """What `reproduce` found. environment: what of versions and machine is not as it was, in words; `differences` are
    between the checkpoint and its rerun; seconds: of the rerun, wall time; threads: what it ran with."""

    checkpoint: str
    source: str
    environment: list[str]
    differences: Differences
    threads: int
    seconds: float


def reproduce(
    checkpoint: str | Path,
    *,
    source: str | Path | None = None,
    calibration: Sequence[str | Path] = (),
    statistics: str | Path | None = None,
    device: str | torch.device | None = None,
    activations: str = "device",
    work: str | Path | None = None,
    progress: Progress = silent,
) -> Report:
    """Make a packed checkpoint (directory or hub id) once more, from its manifest alone, and compare the two.

    `reproduce("llama-resq").differences.identical`. source, calibration, statistics: where the original, the texts and
    the statistics file are now; default: where they were. Their hashes must be those recorded. device: default the
    recorded kind. activations: as for `quantize`, no bit depends on it. The rerun has the recorded number of threads;
    it is written to a directory of its own in `work`, default beside the checkpoint, and removed. Raises InputError for
    what cannot be run, and CheckpointError for a checkpoint whose files are not as they were written.
    """
    path, local = locate(checkpoint), Path(checkpoint).is_dir()
    first = CheckpointReader(path)
    _check_files(first, fetched=not local, progress=progress)
    manifest = first.manifest
    recipe = _recipe(path, manifest)
    recorded = manifest.made_by
    place = chosen_device(device if device is not None else recorded.get("device") or _device_of(manifest.calibration))
    model = _source(manifest, source, progress)
    inputs = _Inputs.of(manifest, recipe, calibration, statistics)
    inputs.check(model)
    room = Path(work) if work is not None else path.resolve().parent if local else Path.cwd()
    name = path.resolve().name
    with _threads(recorded.get("threads")), _directory(room, f".{name}.reproduce-") as directory:
        environment = _environment(recorded, made_by(place))
        started, threads = time.perf_counter(), torch.get_num_threads()
        again = _run(manifest, model, recipe, inputs, directory, place, activations, progress)
        seconds = time.perf_counter() - started
        found = differences(first, CheckpointReader(again), apart_from=APART_FROM, progress=progress)
    return Report(str(checkpoint), model.name, environment, found, threads, seconds)


def _check_files(reader: CheckpointReader, *, fetched: bool, progress: Progress) -> None:
    """Raises CheckpointError for a file that is not as it was written; small files of the hub may be absent."""
    for number, name in enumerate(reader.recorded):
        progress("checking", number, len(reader.recorded))
        absent = fetched and name in reader.manifest.copied and not (reader.directory / name).exists()
        if not absent and name != CARD_FILE:
            reader.check(name)
    progress("checking", len(reader.recorded), len(reader.recorded))


def _recipe(path: Path, manifest: Manifest) -> Recipe:
    if not manifest.recipe.definition:
        raise InputError(
            f"{path} does not record its recipe {manifest.recipe.name}: it was written before recipes were, or has "
            "parts that no file can name; only who has its code can run it again"
        )
    return recipe_from_dict(manifest.recipe.definition, {}, where=f"{path}: recipe.definition")


def _device_of(entry: CalibrationEntry | None) -> str:
    """The kind of device, from checkpoints that name it only with the calibration."""
    return "cuda" if entry is not None and entry.forward.endswith("cuda") else "cpu"


def _source(manifest: Manifest, given: str | Path | None, progress: Progress) -> Source:
    """The source, once its files are known to be those recorded."""
    name = manifest.source.name if given is None else given
    if given is None and name != embedded.MODEL and not Path(name).is_dir():
        raise InputError(
            f"the source was {name}, which is no directory here; say where it is with --source (a hub id is fetched)"
        )
    model = Source.open(name)
    # A phase of its own: the rerun hashes the source too.
    here = source_files(model, lambda phase, done, total: progress("checking the source", done, total))
    for file, want in manifest.source.sha256.items():
        if file not in here:
            raise InputError(f"{model.path} has no {file} (sha256 {want} is recorded); give the original with --source")
        if here[file].sha256 != want:
            raise InputError(
                f"{model.path / file} is not what the checkpoint was made from: its sha256 is "
                f"{here[file].sha256[:SHOWN]}…, {want} is recorded; give the original with --source"
            )
    return model


@dataclass(frozen=True)
class _Inputs:
    """What the windows come from: texts to read and a statistics file that was given (both may be none), the seed that
    chooses them, and what the checkpoint records of them."""

    entry: CalibrationEntry | None
    files: tuple[Path, ...]
    statistics: Path | None
    seed: int

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        recipe: Recipe,
        given: Sequence[str | Path],
        statistics: str | Path | None,
    ) -> _Inputs:
        """Raises InputError for a text that is not there or another than recorded."""
        entry, seed = manifest.calibration, manifest.recipe.seed
        if entry is None:
            for option, value in (("--calibration", given), ("--statistics", statistics)):
                if value:
                    raise InputError(f"the checkpoint was made without calibration; leave {option} out")
            return cls(None, (), None, seed)
        seed = seed if entry.seed is None else entry.seed
        looks = recipe.needs_windows or bool(recipe.tuning)
        if statistics is not None and not looks and not given:
            return cls(entry, (), Path(statistics), seed)
        names = [text.name for text in entry.texts] or entry.origin.split(", ")
        files = tuple(Path(file) for file in given or names)
        if entry.texts and len(files) != len(entry.texts):
            raise InputError(
                f"--calibration is given {len(files)} times, the checkpoint was made with {len(entry.texts)} texts: "
                f"{', '.join(names)}; give them all, in this order"
            )
        for number, file in enumerate(files):
            want = entry.texts[number] if entry.texts else None
            if not given and str(file) != embedded.TEXT and not file.is_file():
                hashed = "" if want is None else f" (sha256 {want.sha256} is recorded)"
                other = "" if entry.statistics is None else ", or give the statistics with --statistics"
                raise InputError(
                    f"the calibration text {file} is not here{hashed}; say where it is with --calibration{other}"
                )
            if want is not None and (sha256 := text_sha256(file)) != want.sha256:
                what = "the text of this Python's own library" if str(file) == embedded.TEXT else str(file)
                do = "use the Python that made_by names" if str(file) == embedded.TEXT else "give that text"
                raise InputError(
                    f"{what} is not the calibration text {want.name} that the checkpoint was made with: its sha256 is "
                    f"{sha256[:SHOWN]}…, {want.sha256} is recorded; {do}"
                )
        return cls(entry, files, None if statistics is None else Path(statistics), seed)

    def check(self, model: Source) -> None:
        """Raises InputError when statistics or windows are others than recorded."""
        entry = self.entry
        if entry is None:
            return
        if self.statistics is not None:
            header = statistics_file.read_header(self.statistics)
            if entry.statistics is not None and (sha256 := sha256_of(self.statistics)) != entry.statistics.sha256:
                raise InputError(
                    f"{self.statistics} is not the statistics file that the checkpoint was made with: its sha256 is "
                    f"{sha256[:SHOWN]}…, {entry.statistics.sha256} is recorded; give that file, or leave it out to "
                    "collect them again from the text"
                )
            if header.calibration.tokens_sha256 != entry.tokens_sha256:
                raise InputError(
                    f"{self.statistics} was made of other windows than the checkpoint (sha256 of their tokens "
                    "differs); give the file that it was made with"
                )
        if self.files:
            windows = sampled_windows(
                self.files,
                load_tokenizer(model.path),
                count=entry.windows,
                length=entry.window_length,
                seed=self.seed,
            )
            if windows.sha256 != entry.tokens_sha256:
                raise InputError(
                    f"{windows.origin} gives other windows than were recorded (sha256 of their tokens is "
                    f"{windows.sha256[:SHOWN]}…, {entry.tokens_sha256} is recorded); give the text with --calibration "
                    "and the source with the tokenizer that it was made with"
                )


def _run(
    manifest: Manifest,
    model: Source,
    recipe: Recipe,
    inputs: _Inputs,
    directory: Path,
    place: torch.device,
    activations: str,
    progress: Progress,
) -> Path:
    """Quantize into a new directory inside `directory`."""
    out, entry = directory / "again", inputs.entry
    options: dict[str, Any] = {"seed": manifest.recipe.seed, "untie": not manifest.ends.tied, "device": place}
    options["activations"] = activations
    if entry is not None:
        sizes = {"windows": entry.windows, "window_length": entry.window_length}
        statistics = inputs.statistics
        if statistics is None and entry.statistics is not None:
            statistics = directory / "statistics.safetensors"
            collected: dict[str, Any] = {"recipe": recipe, "calibration": inputs.files, "seed": inputs.seed, **sizes}
            collected |= {"device": entry.statistics.device, "activations": activations}
            calibrate(model.path, statistics, **collected, progress=progress)
        # 0 is recorded where rounding looked at none.
        options |= {"rounding_windows": entry.rounding_windows or None, "statistics": statistics, **sizes}
        options["calibration"] = inputs.files
    quantize(model.path, out, recipe=recipe, **options, progress=progress)
    return out


def _environment(recorded: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What of versions and machine is not as it was, in words; the time is not looked at."""
    return [
        f"{name}: {recorded.get(name, 'not recorded')}, now {here.get(name, 'none')}"
        for name in {**here, **recorded}
        if name != "time" and recorded.get(name) != here.get(name)
    ]


@contextmanager
def _threads(recorded: str | None) -> Iterator[None]:
    """Inside, torch computes with the recorded number of threads, on which sums depend; else with what it has."""
    before = torch.get_num_threads()
    if recorded is not None and recorded.isdecimal() and int(recorded) > 0:
        torch.set_num_threads(int(recorded))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _directory(room: Path, prefix: str) -> Iterator[Path]:
    """A new directory in `room`, removed with all in it. Raises InputError where none can be made."""
    try:
        made = tempfile.TemporaryDirectory(prefix=prefix, dir=room)
    except OSError as error:
        raise InputError(
            f"cannot write to {room}: {error.strerror}; name a directory for the rerun with --work"
        ) from error
    with made as directory:
        try:
            yield Path(directory)
        except BaseException as error:
            # Such as how to go on with a job whose finished layers are removed here.
            error.__dict__.pop("__notes__", None)
            raise
