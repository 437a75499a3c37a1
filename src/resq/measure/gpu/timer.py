"""How long work takes on a device, by its own clock: CUDA events and graphs on a card, the host's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from resq.backends.triton.graph import record

Run = Callable[[], Any]


class Timer(Protocol):
    """A clock of a device."""

    @property
    def device(self) -> torch.device:
        """Where the work runs."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of the device's last-level cache, which copies of weights must exceed."""
        ...

    def captured(self, run: Run) -> Run:
        """The same work as one launch, where the device can: what a replay reads and writes lies where it lay."""
        ...

    def seconds(self, run: Run, repeats: int) -> float:
        """Seconds of one of `repeats` runs one after the other."""
        ...


@dataclass(frozen=True)
class HostTimer:
    """The host's clock; nothing is captured."""

    device: torch.device
    cache_bytes: int = 0

    def captured(self, run: Run) -> Run:
        """See Timer."""
        return run

    def seconds(self, run: Run, repeats: int) -> float:
        """See Timer."""
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started) / repeats


class CudaTimer:
    """CUDA events around runs that the card does one after the other, and CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size

    def captured(self, run: Run) -> Run:
        """See Timer."""
        return record(run)

    def seconds(self, run: Run, repeats: int) -> float:
        """See Timer."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats


def timer_on(device: torch.device) -> Timer:
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer(device)


def repeats_for(timer: Timer, run: Run, seconds: float, most: int = 2000) -> int:
    """How often to run so that it takes about so long; runs it a few times."""
    run()
    once = max(timer.seconds(run, 2), 1e-9)
    return max(1, min(most, round(seconds / once)))
