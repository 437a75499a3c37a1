"""Where Triton kernels run here: on a card, in Triton's interpreter on the CPU, or nowhere, with the reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

# Triton reads it when a kernel is defined, so it must be set before this package is imported.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Without a card kernels can still be compiled for one; what they would be given lies on the CPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")
# Ampere: int8 tensor cores with asynchronous copies, bfloat16.
OLDEST = (8, 0)


@dataclass(frozen=True)
class Target:
    """What kernels are chosen for: compute capability (90 for sm_90), multiprocessors, and whether inline PTX runs."""

    capability: int
    multiprocessors: int
    assembly: bool


# Multiprocessors of a full card of that capability, for kernels compiled without one.
TARGETS = {80: Target(80, 108, True), 86: Target(86, 82, True), 89: Target(89, 128, True), 90: Target(90, 132, True)}
# The interpreter runs no inline PTX; its sizes are those of the smallest card.
INTERPRETER = Target(86, 16, False)

_forced: Target | None = None


@lru_cache(maxsize=1)
def _here() -> Target:
    if INTERPRETING:
        return INTERPRETER
    facts = torch.cuda.get_device_properties(DEVICE)
    return Target(10 * facts.major + facts.minor, facts.multi_processor_count, True)


def target() -> Target:
    """The target of kernels launched now."""
    return _forced or _here()


@contextmanager
def targeting(wanted: Target) -> Iterator[None]:
    """Inside, kernels are chosen for another target than this machine: for compiling without a card."""
    global _forced
    before, _forced = _forced, wanted
    try:
        yield
    finally:
        _forced = before


def unusable() -> str | None:
    """Why kernels cannot run here; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; a CUDA build of torch brings it"
    if INTERPRETING:
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA card"
    found = torch.cuda.get_device_capability(DEVICE)
    if found < OLDEST:
        name = torch.cuda.get_device_name(DEVICE)
        return f"{name} is sm_{found[0]}{found[1]}; sm_{OLDEST[0]}{OLDEST[1]} (Ampere) or newer is needed"
    return None


def card() -> str | None:
    """The card's name and capability, None where there is none."""
    if INTERPRETING or unusable() is not None:
        return None
    return f"{torch.cuda.get_device_name(DEVICE)}, sm_{target().capability}, {target().multiprocessors} multiprocessors"
