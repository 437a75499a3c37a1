"""Tile sizes and the like as data, chosen by capability and shape. Nothing is tuned at run time.

`configs/default.json` has for every kernel a list of {"when": {fact: at most}, "use": {choice: value}}; the first entry
whose every fact holds is used. `configs/<capability>.json` replaces the lists of the kernels that it names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from resq.backends.triton.device import target

FOLDER = Path(__file__).parent / "configs"

_forced: dict[str, dict[str, Any]] = {}


@lru_cache
def _table(capability: int) -> dict[str, list[dict[str, dict[str, Any]]]]:
    table = json.loads((FOLDER / "default.json").read_text(encoding="utf-8"))
    own = FOLDER / f"{capability}.json"
    return table | json.loads(own.read_text(encoding="utf-8")) if own.is_file() else table


def listed(kernel: str) -> list[dict[str, dict[str, Any]]]:
    """The current target's entries for `kernel`, first match first."""
    return _table(target().capability)[kernel]


def chosen(kernel: str, **facts: int) -> dict[str, Any]:
    """What `kernel` uses on the current target for these facts, 0 for one not given.
    `chosen("dense_tiles", rows=16)["tokens"]`."""
    found = next(
        entry["use"]
        for entry in listed(kernel)
        if all(facts.get(fact, 0) <= most for fact, most in entry.get("when", {}).items())
    )
    return found | _forced[kernel] if kernel in _forced else found


@contextmanager
def using(kernel: str, **choices: Any) -> Iterator[None]:
    """Inside, `kernel` uses these choices in place of the table's: for tuning and tests."""
    before = _forced.get(kernel)
    _forced[kernel] = choices
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before
