"""Results that are computed once: JSON files beside what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resq.measure.rows import write_json

# Raised when a diagnostic computes something else than before.
VERSION = 1


def kept(directory: Path, name: str, depends: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """The plain data that `compute` gives, from `directory/name.json` when that was computed from the same `depends`.

    The file is replaced as a whole or not at all. Raises InputError when it cannot be written.
    """
    key = hashlib.sha256(json.dumps({"version": VERSION, **depends}, sort_keys=True).encode()).hexdigest()
    file = directory / f"{name}.json"
    found = _read(file)
    if found.get("key") == key and "value" in found:
        return found["value"]
    value = json.loads(json.dumps(compute()))  # what is read later is what is used now
    write_json(file, {"key": key, "depends": depends, "value": value})
    return value


def _read(file: Path) -> dict[str, Any]:
    """The file's object, empty when it is missing or no JSON: it is then computed again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
