"""Tasks in processes of their own: each has its own peak of memory, one that is killed takes no other with it, and none
outlives the process that asked."""

from __future__ import annotations

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
from typing import Any

from resq.errors import InputError
from resq.progress import Progress, silent

# Steps of progress are passed on so often, in seconds.
PASSED_ON = 0.1


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
