"""One process for each card of a machine, through torchrun."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from resq.errors import InputError


def launch(devices: str | None, device: str) -> None:
    """Run this command as so many processes of torchrun's engine and exit as the first that failed, or with 0; return
    where one process is enough or this is one of several.

    devices: a number, `auto` for one process a card, or None. Raises InputError for something else.
    """
    from resq.ptq.ranks import started

    if devices is None or started():
        return
    count = counted(devices, device)
    if count == 1:
        return
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "OMP_NUM_THREADS" not in os.environ:  # the engine would give each process one thread, and say so at length
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    for name in logging.root.manager.loggerDict:  # each has a level of its own; the processes say what is wrong
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    engine = ["--standalone", f"--nproc-per-node={count}", "-m", "resq", *without(sys.argv[1:], "--devices")]
    try:
        run.run(run.parse_args(engine))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 1)
    except SignalException:
        sys.exit(130)
    sys.exit(0)


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
