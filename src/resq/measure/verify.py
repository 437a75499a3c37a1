"""Is a packed checkpoint as it was written, and does this machine compute with it what was recorded?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from resq.backends.backend import Backend
from resq.backends.choose import backend_named
from resq.checkpoint.files import INDEX_FILE, SUMS_FILE, CheckpointReader, read_sums
from resq.checkpoint.golden import GOLDEN_FILE, from_tensors
from resq.checkpoint.manifest import MANIFEST_FILE
from resq.durable import sha256_of
from resq.errors import CheckpointError, InputError
from resq.models.architecture import READERS
from resq.models.source import locate
from resq.numerics.device import CPU, moved
from resq.numerics.formats import ActivationFormat
from resq.numerics.linear import Linear, PackedLinear
from resq.progress import Progress, silent
from resq.runtime.load import Opened

# Kernels for one token, for a few and for a prompt are not the same: more rows than any of them takes at once, and odd.
PROMPT = 17


@dataclass(frozen=True)
class Linears:
    """What replaying says: `exact` linears gave the recorded integers, `problems` those that did not; `plain` linears
    have no integers on both sides, nothing to replay."""

    exact: list[str]
    problems: dict[str, str]
    plain: list[str]


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    files: every file with what is wrong with it, or None. linears: names are `layers.3.down` and `head`. unchecked:
    what could not be looked at, and why. kernels: what replayed, in words.
    """

    checkpoint: str
    backend: str
    kernels: str
    files: dict[str, str | None]
    linears: Linears
    unchecked: list[str]

    @property
    def problems(self) -> list[str]:
        """One line each; none in a good checkpoint."""
        found = [problem for problem in self.files.values() if problem is not None]
        return found + [f"{name}: {problem}" for name, problem in self.linears.problems.items()]


@dataclass(frozen=True)
class _Files:
    """State: what is known of every file so far, and what could not be checked."""

    path: Path
    problems: dict[str, str | None] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)


@torch.inference_mode()
def verify(checkpoint: str | Path, *, backend: str | Backend | None = None, progress: Progress = silent) -> Report:
    """Check every file of a packed checkpoint (directory or hub id) and replay its golden vectors on `backend`.

    `verify("llama-resq").problems` is empty for a good one. `progress` is told ("checking", files, of all) and
    ("replaying", layers, of all). Raises InputError for what is no checkpoint, BackendUnavailable when the backend
    cannot run here.
    """
    chosen, path = backend_named(backend), locate(checkpoint)
    files = _Files(path)
    sums = _sums(files)
    opened, refused = None, None
    try:
        opened = Opened(path)
        reader = opened.reader
    except InputError as error:
        refused = error
        try:
            reader = CheckpointReader(path)
        except CheckpointError:
            if not any(files.problems.values()):
                raise
            files.unchecked.append(f"every other file: {MANIFEST_FILE} cannot be read")
            return _report(checkpoint, chosen, files, Linears([], {}, []))
    _check_files(files, reader, sums, fetched=not Path(checkpoint).is_dir(), progress=progress)
    if opened is None:
        assert refused is not None
        if not any(files.problems.values()):
            if not isinstance(refused, CheckpointError):
                raise refused
            files.problems["config.json"] = str(refused)
        files.unchecked.append("tensor shapes and integers: manifest or config.json cannot be used")
        return _report(checkpoint, chosen, files, Linears([], {}, []))
    return _report(checkpoint, chosen, files, _replay(files, opened, chosen, progress))


def _report(checkpoint: str | Path, backend: Backend, files: _Files, linears: Linears) -> Report:
    problems = dict(sorted(files.problems.items()))
    return Report(str(checkpoint), backend.name, backend.kernels(), problems, linears, files.unchecked)


def _sums(files: _Files) -> dict[str, str] | None:
    """What SHA256SUMS.txt says of every file, after the manifest and the index, which nothing else has a hash of."""
    try:
        sums = read_sums(files.path)
    except CheckpointError as error:
        files.problems[SUMS_FILE] = str(error)
        sums = None
    else:
        if sums is not None:
            files.problems[SUMS_FILE] = None
    for name in (MANIFEST_FILE, INDEX_FILE):
        file = files.path / name
        if not file.is_file():
            if name in (sums or {}):
                files.problems[name] = f"{file} is missing; copy the checkpoint again"
        elif sums is None:
            why = "cannot be used" if SUMS_FILE in files.problems else "is not there, as in checkpoints of before it"
            files.unchecked.append(f"{name}: its hash is in {SUMS_FILE} alone, which {why}")
        elif sums.get(name) != sha256_of(file):
            files.problems[name] = (
                f"{file} was altered after it was written (sha256 differs); copy the checkpoint again"
            )
        else:
            files.problems[name] = None
    return sums


def _check_files(
    files: _Files, reader: CheckpointReader, sums: Mapping[str, str] | None, *, fetched: bool, progress: Progress
) -> None:
    """Every file that the manifest names, and its hash in SHA256SUMS.txt too; hub files may be absent."""
    for number, name in enumerate(reader.recorded):
        progress("checking", number, len(reader.recorded))
        if fetched and name in reader.manifest.copied and not (files.path / name).exists():
            files.unchecked.append(f"{name}: it is not fetched from the hub")
            continue
        try:
            reader.check(name)
            files.problems[name] = None
        except CheckpointError as error:
            files.problems[name] = str(error)
    progress("checking", len(reader.recorded), len(reader.recorded))
    if sums is None:
        return
    want = {name: entry.sha256 for name, entry in reader.recorded.items()}
    found = {name: digest for name, digest in sums.items() if name not in (MANIFEST_FILE, INDEX_FILE)}
    other = sorted(name for name in want.keys() | found.keys() if want.get(name) != found.get(name))
    if other:
        files.problems[SUMS_FILE] = f"{files.path / SUMS_FILE} and {MANIFEST_FILE} disagree about {', '.join(other)}"


def _replay(files: _Files, opened: Opened, backend: Backend, progress: Progress) -> Linears:
    """Read every layer, which checks its shapes, and replay its linears."""
    found, missing = Linears([], {}, []), None
    if opened.manifest.golden is None:
        missing = "no golden vectors are recorded, as in checkpoints of before them"
    elif files.problems[GOLDEN_FILE] is not None:
        missing = f"{GOLDEN_FILE} is not as it was written"
    elif backend.accumulate is None:
        missing = f"backend {backend.name} has no integers"
    golden = {} if missing else opened.reader.golden()
    left = []
    layers = len(opened.manifest.layers)
    for index in range(layers + 1):
        progress("replaying", index, layers + 1)
        place = opened.manifest.layers[index] if index < layers else opened.manifest.ends
        if files.problems[place.file] is not None:
            files.unchecked.append(f"{place.file}: shapes and integers, as it was altered")
            continue
        try:
            for name, stored, linear, format in _linears(opened, index):
                if not isinstance(linear, PackedLinear) or format.bands is None:
                    found.plain.append(name)
                elif missing:
                    left.append(name)
                elif problem := _difference(backend, linear, format, golden, stored):
                    found.problems[name] = problem
                else:
                    found.exact.append(name)
        except CheckpointError as error:
            files.problems[place.file] = str(error)
    progress("replaying", layers + 1, layers + 1)
    if left:
        files.unchecked.append(f"integers of {len(left)} linears: {missing}")
    return found


def _linears(opened: Opened, index: int) -> Iterator[tuple[str, str, Linear, ActivationFormat]]:
    """Name for people, name in the files, weight and input format of a layer's linears, or of the head after them."""
    if index == len(opened.manifest.layers):
        ends = opened.ends()
        yield "head", opened.manifest.ends.head.name, ends.head, ends.head_input
        return
    layer, entry = opened.layer(index), opened.manifest.layers[index]
    for point, roles in READERS.items():
        for role in roles:
            name = f"layers.{index}.{role}"
            yield name, entry.linears[role].name, layer.linears[role], layer.inputs[point]


def _difference(
    backend: Backend, linear: PackedLinear, format: ActivationFormat, golden: Mapping[str, Tensor], name: str
) -> str | None:
    """How the backend's integers differ from the recorded ones, or None: each row alone, all, and a prompt of them."""
    assert format.bands is not None
    assert backend.accumulate is not None
    try:
        recorded = from_tensors(golden, name, format.bands, format.groups)
    except CheckpointError as error:
        return str(error)
    weight, rows = backend.prepack(linear, format), range(len(recorded.x.q))
    for picked in (*([row] for row in rows), list(rows), list(rows) * PROMPT):
        some = recorded.rows(picked)
        sums = backend.accumulate(moved(some.x, backend.device), weight)
        if problem := some.difference(sums.to(CPU, torch.int64)):
            return f"{problem}, {len(picked)} rows at once" if len(picked) > 1 else problem
    return None
