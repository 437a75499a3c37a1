"""One process for each card of a machine, through torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from resq.errors import InputError


def launch(devices: str | None, device: str) -> None:
    """Become torchrun with so many processes of the same command; return where one is enough or it runs already.

    devices: a number, `auto` for one process a card, or None. Raises InputError for something else.
    """
    from resq.ptq.ranks import started

    if devices is None or started():
        return
    count = counted(devices, device)
    if count == 1:
        return
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun would give each process one thread, and say so at length
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "resq", *without(sys.argv[1:], "--devices")])


def counted(devices: str, device: str) -> int:
    """How many processes; see `launch`."""
    import torch

    if devices == "auto":
        if device != "cuda":
            raise InputError(
                f"--devices auto is one process a card, --device is {device}; add --device cuda, or give a number"
            )
        return max(1, torch.cuda.device_count())
    if not devices.isdecimal() or int(devices) < 1:
        raise InputError(f"--devices {devices!r} is no number of processes; give one, or auto for one a card")
    return int(devices)


def without(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments but for an option and its value, written in either way."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == option:
            skip = not skip
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept
