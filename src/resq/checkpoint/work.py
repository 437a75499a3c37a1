"""The directory in which a checkpoint grows: what is finished stays, whatever stops the process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from resq.checkpoint.manifest import MANIFEST_FILE
from resq.durable import check_free, remove_halves, sync, write_text, writing
from resq.errors import InputError

JOB_FILE, LOCK_FILE = "job.json", "lock"


def work_path(out: Path) -> Path:
    """Where the work on `out` lies: beside it, so that a rename puts the result in its place."""
    return out.parent / f".{out.name}.partial"


def remove_remains(out: Path) -> None:
    """Remove the work directory of a job that was killed after its checkpoint had taken its place `out`."""
    path = work_path(out)
    if out.is_dir() and (path / JOB_FILE).is_file() and not (path / "checkpoint").exists():
        shutil.rmtree(path, ignore_errors=True)


def check_not_finished(out: Path, *, resume: bool) -> None:
    """Raises InputError when there is something at `out`: where a job is to go on, that it is finished."""
    if resume and (out / MANIFEST_FILE).is_file() and not work_path(out).exists():
        raise InputError(f"{out} is finished, nothing is left to do; `resq verify` checks it")
    check_free(out)


class WorkDirectory:
    """State: the work on the checkpoint `out`, taken by one process at a time.

    `with WorkDirectory(out, inputs, resume=True) as work: …`. inputs: what decides every bit of the result, plain JSON
    by name; a job that was begun with others is refused by the name of what changed. about: what is only remarked on;
    `about` then is what the job was begun with. When the block is left by an exception, what was finished is kept for
    `resume`, and the exception gets a note that says so; nothing is left where nothing was finished, and nothing after
    `finish`.

    Raises InputError when `out` exists, when work on it lies there and `resume` is false, or another process is at it.
    """

    def __init__(
        self, out: Path, inputs: Mapping[str, Any], *, resume: bool = False, about: Mapping[str, Any] | None = None
    ) -> None:
        self.out, self.path = out, work_path(out)
        self.checkpoint = self.path / "checkpoint"
        check_free(out)
        begun = self.path.is_dir()
        with writing(out.parent):
            self.checkpoint.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = self._job()
            if before is None and any(file.suffix == ".json" for file in self._files()):
                raise InputError(
                    f"{self.path / JOB_FILE} cannot be read, and nobody can say what the finished layers there belong "
                    f"to; remove {self.path} to begin anew"
                )
            if before is None:
                self._clear()
                self.save("job", {"inputs": dict(inputs), "about": dict(about or {})})
            elif not resume:
                raise InputError(f"{out} was begun and not finished; go on with --resume, or remove {self.path}")
            elif changed := differences(before["inputs"], json.loads(json.dumps(dict(inputs)))):
                raise InputError(
                    f"{out} was begun with other inputs: {'; '.join(changed)}; give the same again, or remove "
                    f"{self.path}"
                )
        except BlockingIOError as error:
            os.close(self._lock)
            raise InputError(f"{out} is being made by another process; wait for it, or choose another --out") from error
        except BaseException:
            os.close(self._lock)
            if not begun:
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        for directory in (self.path, self.checkpoint):
            remove_halves(directory)
        self.resumed = before is not None
        self.about: Mapping[str, Any] = dict(about or {}) if before is None else before["about"]
        self._finished = False

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = not self._finished and any(file.suffix == ".json" and file.name != JOB_FILE for file in self._files())
        if not kept:
            shutil.rmtree(self.path, ignore_errors=True)
        elif error is not None:
            error.add_note("what is finished is kept: go on with --resume")
        os.close(self._lock)

    def _files(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _job(self) -> dict[str, Any] | None:
        """What the work was begun with; None where nobody can say."""
        found = self.record(JOB_FILE.removesuffix(".json"))
        return found if found is not None and {*found} == {"inputs", "about"} else None

    def _clear(self) -> None:
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.checkpoint.mkdir()
        self.forget(*(file.name for file in self._files() if file.is_file() and file.name != LOCK_FILE))

    def file(self, name: str) -> Path:
        """Where a file of the job's own lies."""
        return self.path / name

    def save(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep plain JSON under a name: durable when this returns. What it speaks of has to be so before."""
        with writing(self.out, None):
            write_text(self.path / f"{name}.json", json.dumps(record) + "\n")

    def record(self, name: str) -> dict[str, Any] | None:
        """What was kept under a name; None for nothing, or nothing that can be read."""
        try:
            found = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def forget(self, *names: str) -> None:
        """Remove files of the job's own, if they are there."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the checkpoint its place. Raises InputError when that is taken by now, or the disk is full."""
        with writing(self.out, None):
            sync(self.checkpoint)
            check_free(self.out)
            self.checkpoint.rename(self.out)
            sync(self.out.parent)
        self._finished = True


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of what two nested records do not share, with short values: `seed is 1, was 0`, `source config.json`."""
    found: list[str] = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name} ")
        elif all(isinstance(each, (int, float, bool, str, type(None))) and len(str(each)) <= 24 for each in (old, new)):
            found.append(f"{prefix}{name} is {new}, was {old}")
        else:
            found.append(f"{prefix}{name} differs")
    return found
