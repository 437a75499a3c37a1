"""Where a job is: its windows' states after a layer and its maps on disk, so that a killed job goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq.checkpoint.work import WorkDirectory
from resq.durable import sha256_of, write_object, writing
from resq.models.architecture import Site
from resq.numerics import maps as kinds
from resq.numerics.device import CPU, moved
from resq.numerics.hadamard import HadamardPlan
from resq.numerics.maps import LinearMap
from resq.numerics.moments import Leaves
from resq.ptq.activations import Activations, save, saved
from resq.ptq.ranks import ALONE, Ranks
from resq.ptq.recipe import At, Bookmark

# Saving states takes at most about this share of the time: what is lost by a crash is one layer, or one step of a
# tuning, or this many times what a save takes.
SHARE = 10
_KINDS = {kind.kind: kind for kind in (kinds.Dense, kinds.PerHead, kinds.Diagonal, kinds.Permutation, kinds.Hadamard)}


@dataclass(frozen=True)
class Stage:
    """The maps of a job after the bases and so many of its recipe's tunings, and what those remarked."""

    maps: Mapping[At, LinearMap]
    notes: tuple[str, ...] = ()
    tunings: int = 0


@dataclass
class Position:
    """State: how far a job is on disk. directory: where files of the job lie, None for one that is not kept; work: the
    first process's hold on it."""

    directory: Path | None = None
    work: WorkDirectory | None = None
    ranks: Ranks = ALONE
    _saved: float = field(default_factory=time.monotonic)
    _took: float = 0.0
    _hashes: dict[str, str] = field(default_factory=dict)

    def layer(self, phase: str, leaves: Leaves, names: tuple[str, ...]) -> int:
        """How many layers of a phase are passed, the states of all names being there; 0 where it has not begun."""
        if self.directory is None:
            return 0
        record = self.ranks.from_first(lambda: None if self.work is None else self.work.record("position"))
        if not record or record.get("phase") != phase:
            return 0
        self._hashes = record.get("files", {})
        files = [file for name in names for file in self._files(phase, record["layer"], name, leaves)]
        return record["layer"] if self.ranks.agree(all(map(self._whole, files))) else 0

    def _whole(self, file: Path) -> bool:
        """Whether a file is there as the record has it, and not another job's."""
        try:
            return sha256_of(file) == self._hashes.get(file.name)
        except OSError:
            return False

    def forget(self, phase: str) -> None:
        """Begin a phase anew, also after another stop."""
        if self.work is not None and (self.work.record("position") or {}).get("phase") == phase:
            self.work.forget("position.json")

    def _files(self, phase: str, layer: int, name: str, leaves: Leaves) -> list[Path]:
        """The files of this rank's leaves, in order."""
        assert self.directory is not None
        return [self.directory / f"{phase}-{layer}-{name}-{leaf}.npy" for leaf in range(*self.ranks.span(leaves))]

    def states(self, phase: str, layer: int, name: str, leaves: Leaves) -> Iterator[Tensor]:
        """This rank's windows after so many layers, as they were saved."""
        return saved(self._files(phase, layer, name, leaves))

    def sums(self, phase: str, layer: int) -> Any:
        """What this rank gave `save` beside its states; None where it is not there, as for another number of ranks, or
        not whole."""
        file = self._sums(phase, layer)
        return None if file is None or not self._whole(file) else torch.load(file, weights_only=True)

    def _sums(self, phase: str, layer: int) -> Path | None:
        name = f"{phase}-{layer}-sums-{self.ranks.rank}-of-{self.ranks.size}.pt"
        return None if self.directory is None else self.directory / name

    def save(
        self, phase: str, layer: int, states: Mapping[str, Activations], leaves: Leaves, sums: Callable[[], Any] | None
    ) -> None:
        """Keep the states after `layer` layers, and what `sums` gives (tensors in plain containers), durably; or not
        yet, where that would take more than a share of the time. Raises InputError when the disk is full."""
        if self.directory is None or not self.ranks.from_first(self._due):
            return
        started, (first, stop), files = time.monotonic(), self.ranks.span(leaves), list[Path]()
        begin = leaves.span(first, first)[0]
        with writing(self.directory, None):
            for name, each in states.items():
                for leaf, file in zip(range(first, stop), self._files(phase, layer, name, leaves), strict=True):
                    start, end = leaves.span(leaf, leaf + 1)
                    save(each, start - begin, end - begin, file)
                    files.append(file)
            if sums is not None and (file := self._sums(phase, layer)) is not None:
                write_object(file, lambda: moved(sums(), CPU))
                files.append(file)
            mine = {file.name: sha256_of(file) for file in files}
        # Everyone's files are there before the record says so.
        hashes = {name: sha256 for each in self.ranks.gathered(mine) for name, sha256 in each.items()}
        if self.work is not None:
            self.work.save("position", {"phase": phase, "layer": layer, "files": hashes})
        self.ranks.agree(True)
        for file in self.directory.glob("*-*-*"):
            own = any(file.match(f"*-{name}") for name in self._suffixes(leaves))
            if own and not file.name.startswith(f"{phase}-{layer}-"):
                file.unlink(missing_ok=True)
        self._passed(started)

    def _due(self) -> bool:
        """Whether a save as long as the last one is within its share of the time."""
        return time.monotonic() - self._saved >= (SHARE - 1) * self._took

    def _passed(self, started: float) -> None:
        """A save is over."""
        self._saved = time.monotonic()
        self._took = self._saved - started

    def _suffixes(self, leaves: Leaves) -> list[str]:
        """The ends of the names of this rank's files."""
        mine = [f"{leaf}.npy" for leaf in range(*self.ranks.span(leaves))]
        return [*mine, f"{self.ranks.rank}-of-{self.ranks.size}.pt"]

    def stage(self) -> Stage | None:
        """What `keep_stage` kept last, in all processes; None where there is nothing."""
        return self.ranks.from_first(self._stage)

    def _stage(self) -> Stage | None:
        kept = self._kept("maps")
        if kept is None:
            return None
        maps = {At(Site(entry["site"]), entry["layer"]): _restored(entry) for entry in kept["maps"]}
        return Stage(maps, tuple(kept["notes"]), kept["tunings"])

    def keep_stage(self, stage: Stage) -> None:
        """Keep the maps of a job, where it is kept, in place of those before; the bookmark of the tuning between them
        is forgotten. Raises InputError when the disk is full."""
        if self.work is None:
            return
        maps = [_described(at, map) for at, map in stage.maps.items()]
        self._keep("maps", lambda: {"maps": maps, "notes": list(stage.notes), "tunings": stage.tunings})
        self._forget("tuning")

    def bookmark(self) -> Bookmark:
        """Of the tuning that starts from the maps kept last: what was saved after other maps is nothing to it.
        Saving raises InputError when the disk is full."""
        record = None if self.work is None else self.work.record("maps")
        if record is None:
            return Bookmark()
        maps = record["sha256"]

        def load() -> Any:
            kept = self._kept("tuning")
            return kept["state"] if kept is not None and kept["maps"] == maps else None

        def save(make: Callable[[], Any]) -> None:
            if self._due():
                started = time.monotonic()
                self._keep("tuning", lambda: {"maps": maps, "state": make()})
                self._passed(started)

        return Bookmark(load, save)

    def _keep(self, name: str, make: Callable[[], Any]) -> None:
        """Keep what `make` gives in place of what has this name, which is there until this is."""
        assert self.work is not None
        number = (self.work.record(name) or {}).get("number", 0) + 1
        file = self.work.file(f"{name}-{number}.pt")
        with writing(self.work.out, None):
            write_object(file, lambda: moved(make(), CPU))
            sha256 = sha256_of(file)
        self.work.save(name, {"number": number, "sha256": sha256})
        self.work.forget(*(each.name for each in self.work.path.glob(f"{name}-*.pt") if each != file))

    def _kept(self, name: str) -> Any:
        """What has this name; None where there is nothing, or it is not as it was written."""
        record = None if self.work is None else self.work.record(name)
        if self.work is None or record is None:
            return None
        file = self.work.file(f"{name}-{record.get('number')}.pt")
        try:
            whole = sha256_of(file) == record.get("sha256")
        except OSError:
            return None
        return torch.load(file, weights_only=True) if whole else None

    def _forget(self, name: str) -> None:
        """Remove what has this name."""
        assert self.work is not None
        self.work.forget(f"{name}.json", *(each.name for each in self.work.path.glob(f"{name}-*.pt")))


def _described(at: At, map: LinearMap) -> dict[str, Any]:
    """A map as plain containers and tensors, on any device."""
    fields = {name: asdict(value) if isinstance(value, HadamardPlan) else value for name, value in vars(map).items()}
    return {"site": str(at.site), "layer": at.layer, "kind": map.kind, "fields": fields}


def _restored(entry: Mapping[str, Any]) -> LinearMap:
    fields = dict(entry["fields"])
    if "plan" in fields:
        fields["plan"] = HadamardPlan(**fields["plan"])
    return _KINDS[entry["kind"]](**fields)
