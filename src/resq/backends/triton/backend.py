"""The record of the Triton backend. Triton is imported when the first operator is called, not before."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from resq.backends.backend import Backend
from resq.backends.triton.device import DEVICE, card, unusable
from resq.backends.triton.graph import record


def _late(module: str, name: str) -> Callable[..., Any]:
    """The operator of that name in `resq.backends.triton.<module>`."""
    found: list[Callable[..., Any]] = []

    def call(*arguments: Any, **named: Any) -> Any:
        if not found:
            found.append(getattr(import_module(f"resq.backends.triton.{module}"), name))
        return found[0](*arguments, **named)

    return call


TRITON = Backend(
    name="triton",
    dtype=torch.float32,
    device=DEVICE,
    unusable=unusable,
    prepack=_late("linear", "prepack"),
    norm_quantize=_late("activation", "norm_quantize"),
    linears=_late("linear", "linears"),
    rope_project_append=_late("attention", "rope_project_append"),
    attend=_late("attention", "attend"),
    gather_quantize=_late("activation", "gather_quantize"),
    act_hadamard_quantize=_late("activation", "act_hadamard_quantize"),
    cache=_late("cache", "Cache"),
    together=_late("linear", "together"),
    accumulate=_late("linear", "accumulate"),
    kernels=lambda: card() or "Triton's interpreter",
    record=record,
)
