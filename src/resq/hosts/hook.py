"""Registers ResQ with transformers without importing it: now when it is loaded, else right after its quantizers are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGET = "transformers.quantizers.auto"


def _register(auto: ModuleType) -> None:
    from resq.hosts import transformers

    transformers.register(auto)


class _Loader(Loader):
    """Runs the module's own loader, then registers."""

    def __init__(self, inner: Any, finder: _Finder) -> None:
        self._inner, self._finder = inner, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the inner loader does."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module; when that fails the finder stays for the next try."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        self._finder.remove()
        _register(module)


class _Finder(MetaPathFinder):
    """Wraps the loader of one module."""

    def remove(self) -> None:
        """Leave the import system as it was."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The target's own spec with the wrapped loader."""
        if fullname != TARGET:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


def install() -> None:
    """Idempotent."""
    auto = sys.modules.get(TARGET)
    if auto is None:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        return
    if getattr(auto.__spec__, "_initializing", False):
        auto = importlib.import_module(TARGET)  # another thread executes it: wait
    _register(auto)
