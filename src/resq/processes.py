"""Tasks in processes of their own: each has its own peak of memory, one that is killed takes no other with it, and none
outlives the process that asked. And what memory a process holds."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from resq.errors import InputError
from resq.progress import Progress, silent

# Steps of progress are passed on so often, in seconds.
PASSED_ON = 0.1
# Memory is looked at so often, in seconds.
SAMPLED = 0.01
# Blocks of this size and more are the system's again as soon as they are freed; glibc's M_MMAP_THRESHOLD.
RETURNED, M_MMAP_THRESHOLD = 4 << 20, -3


@dataclass(frozen=True)
class Task:
    """A function of a module and what it is called with; it gets a `progress` too. All of it must pickle."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class Killed(InputError):
    """A task's process ended without a word, as when the system needs its memory."""


def run_apart(
    tasks: Sequence[Task], *, at_once: int, threads: int, preload: Sequence[str], progress: Progress = silent
) -> Iterator[tuple[str, Any]]:
    """Yield (name, result) of each task as it ends; an InputError that it raised, or Killed, is its result.

    at_once: processes side by side, each with so many `threads` of torch. preload: modules that they all find imported.
    progress is told `name: phase` of each. Raises RuntimeError with the other's traceback when a task has a bug.
    """
    start_server(preload)
    context, waiting = get_context("forkserver"), deque(tasks)
    running: dict[Connection, tuple[Task, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                task = waiting.popleft()
                mine, other = context.Pipe()
                process = context.Process(target=_serve, args=(other, threads), name=task.name)
                running[mine] = task, process
                process.start()
                other.close()
                # Only now: a process that is not yet known here must not have begun.
                mine.send((task.function, task.arguments))
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                task, process = running[ready]
                kind, content = _answer(ready)
                if kind == "progress":
                    phase, done, total = content
                    progress(f"{task.name}: {phase}", done, total)
                    continue
                del running[ready]
                ready.close()
                process.join()
                if kind == "bug":
                    raise RuntimeError(f"{task.name} failed in its process:\n{content}")
                yield task.name, content
    finally:
        started = [process for _, process in running.values() if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _answer(ready: Connection) -> tuple[str, Any]:
    try:
        return ready.recv()
    except (EOFError, ConnectionResetError):
        return "result", Killed("its process was killed, probably for lack of memory")


def start_server(preload: Sequence[str]) -> None:
    """Start what forks the processes, if it does not run; it imports `preload` meanwhile.

    Ctrl-C goes to every process of a terminal; theirs inherit that they are not to listen, for this process stops them.
    """
    get_context("forkserver").set_forkserver_preload(list(preload))
    main = threading.current_thread() is threading.main_thread()  # only there may signals be handled
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        forkserver.ensure_running()
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def _serve(connection: Connection, threads: int) -> None:
    """Run the task that arrives and answer."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    told = 0.0

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal told
        if done in (0, total) or time.monotonic() - told > PASSED_ON:
            told = time.monotonic()
            connection.send(("progress", (phase, done, total)))

    try:
        function, arguments = connection.recv()
    except EOFError:
        return
    try:
        answer = "result", function(*arguments, progress=progress)
    except InputError as error:
        answer = "result", error
    except Exception:
        answer = "bug", traceback.format_exc()
    connection.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def memory(entry: str) -> int:
    """Resident bytes of this process: VmRSS, or VmHWM for the most there ever were."""
    status = Path("/proc/self/status")
    if status.is_file():  # rusage's peak counts what a process was before it became this program
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held() -> int:
    """Resident bytes of this process that cannot be given back: neither mapped files nor what the system caches of
    them. Where /proc does not tell, all resident bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return memory("VmRSS")
    entries = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    if "RssAnon" not in entries:
        return memory("VmRSS")
    return sum(int(entries[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def return_blocks() -> None:
    """From here on large blocks that are freed leave the process at once. glibc otherwise raises the size from which
    they do to 32 MB and keeps what is smaller: a third of the peak of a model of 1024 coordinates. Nothing elsewhere.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, RETURNED)


class Peak:
    """State: the most bytes `held` while its block runs, and seconds and peak of every phase that `watched` was told.

    `with Peak() as peak: work(progress=peak.watched(progress))`, then `peak.bytes`, `peak.seconds` and `peak.phases`:
    (seconds, bytes) by name. What comes before a phase's step 0 counts as `before …`.
    """

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0
        self.phases: dict[str, tuple[float, int]] = {}
        self._phase = 0
        self._end, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._began = self._told = time.perf_counter()
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self._end.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._began

    def _watch(self) -> None:
        while not self._end.wait(SAMPLED):
            self._look()

    def _look(self) -> None:
        with self._lock:
            now = held()
            self.bytes, self._phase = max(self.bytes, now), max(self._phase, now)

    def watched(self, progress: Progress = silent) -> Progress:
        """The same progress, whose phases are kept."""

        def tell(phase: str, done: int, total: int) -> None:
            self._look()
            name, now = phase if done else f"before {phase}", time.perf_counter()
            seconds, most = self.phases.get(name, (0.0, 0))
            with self._lock:
                self.phases[name] = seconds + now - self._told, max(most, self._phase)
                self._told, self._phase = now, 0
            progress(phase, done, total)

        return tell
