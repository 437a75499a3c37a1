"""The native module, or the reason why there is none; and which instruction set it uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from resq.errors import BackendUnavailable, nearest

_MISSING: str | None = None
try:
    from resq.backends.cpu import _native  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    _native = None
    _MISSING = (
        f"its kernels are not built ({error}); install from source with a C++17 compiler: "
        "pip install --force-reinstall --no-deps resq-llm"
    )

# Forces an instruction set, for tests; results do not depend on it.
FORCE = "RESQ_CPU_ISA"


@dataclass(frozen=True)
class InstructionSet:
    """A set of kernels: its name and what this machine lacks for it (None: usable)."""

    name: str
    missing: str | None


def instruction_sets() -> list[InstructionSet]:
    """All that were built, fastest first. Raises BackendUnavailable when none was."""
    return [InstructionSet(name, missing) for name, missing in module().instruction_sets()]


def module() -> Any:
    """The native module. Raises BackendUnavailable with the reason when it is not there."""
    if _native is None:
        raise BackendUnavailable(f"the CPU backend cannot be used: {_MISSING}")
    return _native


def use(name: str) -> None:
    """Run this instruction set from now on. Raises BackendUnavailable when it is unknown or unusable here."""
    sets = {each.name: each.missing for each in instruction_sets()}
    if name not in sets:
        raise BackendUnavailable(f"no instruction set {name!r}; there are {', '.join(sets)}{nearest(name, sets)}")
    if sets[name] is not None:
        usable = ", ".join(other for other, missing in sets.items() if missing is None)
        raise BackendUnavailable(f"instruction set {name} cannot be used: {sets[name]}; usable are {usable}")
    module().use(name)


def unusable() -> str | None:
    """Why the kernels cannot run here, or None. A forced instruction set is put to use."""
    if _MISSING is not None:
        return _MISSING
    forced = os.environ.get(FORCE)
    if forced:
        try:
            use(forced)
        except BackendUnavailable as error:
            return f"{FORCE} is set: {error}"
    return None
