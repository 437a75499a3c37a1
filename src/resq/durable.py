"""Files that are there whole or not at all: written beside their place, flushed to disk, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def check_free(out: Path) -> None:
    """Raises InputError when there is something at `out`, or no way to look."""
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    raise InputError(f"{out} exists already; choose another --out or remove it first")


def beside(out: Path) -> Path:
    """A hidden name in the same directory: random, for a process id comes back after a crash, in a container with
    every run."""
    return out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"


def remove_halves(directory: Path) -> None:
    """Remove what processes that were killed while they wrote left in a directory that no other writes to now."""
    for half in directory.glob(".*.partial-*"):
        half.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Of a whole file, lower-case hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing(out: Path, outcome: str | None = "nothing was kept") -> Iterator[None]:
    """Failures to write inside become an InputError that names `out`, the reason and, where known, the outcome."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error) or "os error 28" in str(error)
        reason = "the disk is full; free some space" if full else f"{error}; choose another --out"
        raise InputError(f"writing {out} failed: {reason}" + (f", {outcome}" if outcome else "")) from error


def written(file: Path, write: Callable[[Path], None], *, replace: bool = True) -> None:
    """Make `file` in one piece: `write` fills a file beside it, which then takes its name, as readable as its
    directory.

    Not `replace`: raises InputError when the name is taken by then. Raises OSError, and what `write` raises; nothing is
    left over then.
    """
    work = beside(file)
    try:
        write(work)
        work.chmod(file.parent.stat().st_mode & 0o666)
        sync(work)
        if not replace:
            check_free(file)
        work.rename(file)
        sync(file.parent)
    finally:
        work.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """A small UTF-8 file in one piece."""
    written(file, lambda work: _fill(work, text.encode()))


def _fill(work: Path, content: bytes) -> None:
    with open(work, "xb") as stream:
        stream.write(content)


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, replace: bool = True
) -> None:
    """A .safetensors file in one piece."""
    from safetensors.torch import save_file

    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    written(file, lambda work: save_file(dense, work, metadata=dict(metadata or {})), replace=replace)


def write_object(file: Path, make: Callable[[], Any]) -> None:
    """Tensors in plain containers, for `torch.load`, in one piece. Raises OSError."""
    import torch

    def write(work: Path) -> None:
        with open(work, "xb") as stream:
            try:
                torch.save(make(), stream)
            except RuntimeError as error:  # torch closes its archive after a failure, and fails again
                if isinstance(first := error.__context__, OSError):
                    raise OSError(*first.args) from error
                raise

    written(file, write)
