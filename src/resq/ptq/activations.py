"""The calibration windows' hidden states between two layers: where they lie, and how they survive the process."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from resq.durable import written
from resq.errors import InputError
from resq.numerics.device import CPU


class Place(StrEnum):
    """Where hidden states lie: on the device that computes, in the machine's memory, or in a mapped file."""

    DEVICE = "device"
    MEMORY = "memory"
    DISK = "disk"


class Activations(Protocol):
    """Float32 states by window, one [1, t, d] each. An item is read onto the device that computes; what is set
    replaces it."""

    def __len__(self) -> int:
        """Windows."""
        ...

    def __getitem__(self, number: int) -> Tensor:
        """One window's, on the device that computes."""
        ...

    def __setitem__(self, number: int, value: Tensor) -> None:
        """Replace one window's."""
        ...


class _Held:
    """State: the windows' tensors on a device, maybe another than the one that computes."""

    def __init__(self, windows: Iterable[Tensor], at: torch.device, device: torch.device) -> None:
        self._at, self._device = at, device
        self._windows = [window.to(at) for window in windows]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, number: int) -> Tensor:
        return self._windows[number].to(self._device)

    def __setitem__(self, number: int, value: Tensor) -> None:
        self._windows[number] = value.to(self._at)


class _Mapped:
    """State: the windows in a mapped file without a name, which goes with the process. Memory holds the window at hand;
    what the system keeps of the file beside it, it gives back when it is short."""

    def __init__(self, windows: Iterable[Tensor], count: int, directory: Path, device: torch.device) -> None:
        self._count, self._device = count, device
        self._map: mmap.mmap | None = None
        self._shape: tuple[int, ...] = ()
        for number, window in enumerate(windows):
            if self._map is None:
                self._shape = tuple(window.shape)
                self._stride = -(-window.numel() * 4 // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
                try:
                    with tempfile.TemporaryFile(dir=directory) as file:
                        os.posix_fallocate(file.fileno(), 0, count * self._stride)
                        self._map = mmap.mmap(file.fileno(), count * self._stride)
                except OSError as error:
                    raise InputError(
                        f"{directory} has no room for the states of {count} windows ({error.strerror}); free some "
                        "space, or use fewer or shorter windows"
                    ) from error
            self[number] = window

    def __len__(self) -> int:
        return self._count

    def _view(self, number: int) -> np.ndarray:
        assert self._map is not None
        size = int(np.prod(self._shape))
        return np.frombuffer(self._map, np.float32, size, number * self._stride).reshape(self._shape)

    def _release(self, number: int) -> None:
        assert self._map is not None
        self._map.madvise(mmap.MADV_DONTNEED, number * self._stride, self._stride)

    def __getitem__(self, number: int) -> Tensor:
        value = torch.from_numpy(self._view(number).copy()).to(self._device)
        self._release(number)
        return value

    def __setitem__(self, number: int, value: Tensor) -> None:
        self._view(number)[:] = value.to(CPU).numpy()
        self._release(number)


@dataclass(frozen=True)
class Buffers:
    """How the states of a job are kept. directory: of mapped files, on a disk with room for all windows."""

    place: Place = Place.DEVICE
    device: torch.device = CPU
    directory: Path | None = None

    def keep(self, windows: Iterable[Tensor], count: int) -> Activations:
        """States of `count` windows, taken one after the other. Raises InputError when the disk has no room."""
        if self.place is not Place.DISK:
            return _Held(windows, self.device if self.place is Place.DEVICE else CPU, self.device)
        directory = Path(tempfile.gettempdir()) if self.directory is None else self.directory
        return _Mapped(windows, count, directory, self.device)


def save(states: Activations, first: int, stop: int, file: Path) -> None:
    """Write the windows first … stop - 1 to a .npy file, in one piece and durable. Raises OSError."""
    shape = (stop - first, *states[first].shape)

    def write(work: Path) -> None:
        with open(work, "xb") as stream:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(stream, {**header, "shape": shape})
            for number in range(first, stop):
                stream.write(states[number].to(CPU).contiguous().numpy().data)

    written(file, write)


def saved(files: Sequence[Path]) -> Iterator[Tensor]:
    """The windows of files that `save` wrote, in order. Raises OSError, ValueError or EOFError for one that is not
    whole."""
    for file in files:
        windows = np.load(file, mmap_mode="r")
        for number in range(len(windows)):
            yield torch.from_numpy(np.array(windows[number]))
