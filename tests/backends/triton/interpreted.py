"""Triton's interpreter without what it does in vain, which is most of its time on kernels as small as the tests'."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from resq.backends.triton.device import INTERPRETING


@pytest.fixture(scope="session", autouse=True)
def _quick() -> Iterator[None]:
    """Import it where kernels are interpreted. Results stay as they are, bit for bit.

    Sums of integers are made a second time to see whether they overflow, for an assertion that only a debugging
    interpreter makes; and every call of a device function looks through the whole language for what its launch has
    replaced already.
    """
    if not INTERPRETING:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace_language, builder = interpreter._patch_lang, interpreter.interpreter_builder

    def once(function: Any) -> Any:
        modules = [each for each in function.__globals__.values() if inspect.ismodule(each)]
        if any(each in (tl, tl.core) and tl.core.is_builtin(each.load) for each in modules):
            return replace_language(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_patch_lang", once)
        yield
