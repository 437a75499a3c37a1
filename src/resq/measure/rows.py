"""Rows of results: every number in the documents comes from one, with what made it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from resq import durable
from resq._version import __version__
from resq.errors import InputError


def provenance() -> dict[str, Any]:
    """Commit (with `+` when the tree has changes outside results/; without git what RESQ_COMMIT says), versions,
    machine, threads and command."""
    return {
        "commit": _commit(),
        "resq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_appendable(file: Path) -> None:
    """Raises InputError when rows cannot be added to this file: to be asked before the work that makes them."""
    if not file.parent.is_dir():
        raise InputError(f"{file} cannot be written: {file.parent} is no directory; make it or give another path")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        reason = "it is a directory" if file.is_dir() else "permission denied"
        raise InputError(f"{file} cannot be written: {reason}; give another path")


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Add one line to a .jsonl file and flush it to disk."""
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a .jsonl file anew, in one piece: who reads it finds the old rows or the new ones."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file in one piece."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file in one piece. Raises InputError when that fails."""
    try:
        durable.write_text(file, text)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; free some space there") from error


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl file, in order."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _commit() -> str:
    here = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)results"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        # A copy of the tree without its history: who copied it knows.
        return os.environ.get("RESQ_COMMIT", "unknown")
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def processor() -> str:
    """The processor's name and how many cores are seen."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
