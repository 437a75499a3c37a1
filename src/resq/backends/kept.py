"""What a backend makes of formats, norms and other objects: once each, kept while the original lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """State: what was made of objects, by identity, for as long as they live."""

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make
        self._kept: dict[int, tuple[Any, V]] = {}

    def __call__(self, of: K) -> V:
        """What was made of `of`."""
        key = id(of)
        found = self._kept.get(key)
        if found is not None:
            return found[1]
        made = self._make(of)
        self._kept[key] = (weakref.ref(of, lambda _: self._kept.pop(key, None)), made)
        return made
