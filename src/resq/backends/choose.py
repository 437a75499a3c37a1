"""Which backend runs: the fastest one that can, or the one that was named."""

from __future__ import annotations

import os
from typing import Any

import torch

from resq.backends.backend import Backend
from resq.backends.cpu import CPU, native
from resq.backends.reference import REFERENCE
from resq.backends.triton import TRITON
from resq.backends.triton.device import INTERPRETING, card
from resq.errors import BackendUnavailable, InputError, nearest

# Names what is taken unasked, for hosts that have no option for it.
FORCE = "RESQ_BACKEND"
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TRITON, CPU, REFERENCE)}


def preferred() -> Backend:
    """What is taken unasked: the one named in the environment, else the card's where there is a card that runs it, else
    the CPU's."""
    if forced := os.environ.get(FORCE):
        return _known(forced, f"{FORCE} is set to a backend that does not exist; ")
    return TRITON if not INTERPRETING and TRITON.unusable() is None else CPU


def _known(name: str, why: str = "") -> Backend:
    if name not in BACKENDS:
        raise InputError(f"{why}no backend {name!r}; there are {', '.join(BACKENDS)}{nearest(name, BACKENDS)}")
    return BACKENDS[name]


def device_of(name: str | Backend | None = None) -> torch.device:
    """Where that backend's tensors lie, whether or not it can run: for what runs beside it without kernels."""
    return (BACKENDS.get(name, CPU) if isinstance(name, str) else name or preferred()).device


def describe_system() -> dict[str, Any]:
    """Which backend and instruction set are used here and why the others are not.

    backends (name, reason or None); preferred, the name of the one that is taken unasked; card, the NVIDIA card that
    Triton's kernels run on or None; instruction_sets (name, reason or None) that were built; active, None where the CPU
    backend is not usable; forced, by the environment; threads.
    """
    reasons = {name: backend.unusable() for name, backend in BACKENDS.items()}
    try:
        sets = native.instruction_sets()
    except BackendUnavailable:
        sets = []
    return {
        "backends": [{"name": name, "unusable": reason} for name, reason in reasons.items()],
        "preferred": preferred().name,
        "card": card(),
        "instruction_sets": [{"name": each.name, "missing": each.missing} for each in sets],
        "active": native.module().active() if reasons[CPU.name] is None else None,
        "forced": os.environ.get(native.FORCE),
        "threads": torch.get_num_threads(),
    }


def backend_named(name: str | Backend | None = None) -> Backend:
    """The backend of that name, or the `preferred` one; a Backend is returned as it is.

    Raises InputError for an unknown name and BackendUnavailable when the backend cannot run here: a slower one is
    never taken in its place.
    """
    if name is not None and not isinstance(name, str):
        chosen = name
    else:
        chosen = preferred() if name is None else _known(name)
    if reason := chosen.unusable():
        other = (
            f"{CPU.name} can"
            if chosen is TRITON and CPU.unusable() is None
            else f"{REFERENCE.name} runs everywhere, slowly"
        )
        raise BackendUnavailable(f"backend {chosen.name} cannot be used here: {reason}; backend {other}")
    return chosen
