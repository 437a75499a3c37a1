"""Where tensors lie: the same data on another device, and full float32 products on a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CPU = torch.device("cpu")


def changed(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same data with `change` made to every tensor in it, through dataclasses, dicts, lists and tuples.

    A tensor that is met twice is changed once and stays one tensor; what holds no changed tensor is returned as it is.
    """
    return _changed(value, change, {})


def _changed(each: Any, change: Callable[[Tensor], Tensor], done: dict[int, Tensor]) -> Any:
    """No function inside `changed` that calls itself: it would be in a cycle with `done`, and the tensors there until
    garbage is collected."""
    if isinstance(each, Tensor):
        if id(each) not in done:
            done[id(each)] = change(each)
        return done[id(each)]
    if is_dataclass(each) and not isinstance(each, type):
        before = {field.name: getattr(each, field.name) for field in fields(each) if field.init}
        after = {name: _changed(part, change, done) for name, part in before.items()}
        return each if all(after[name] is before[name] for name in before) else replace(each, **after)
    if isinstance(each, dict):
        after = {key: _changed(part, change, done) for key, part in each.items()}
        return each if all(after[key] is each[key] for key in each) else after
    if isinstance(each, (list, tuple)):
        parts = [_changed(part, change, done) for part in each]
        same = all(new is old for new, old in zip(parts, each, strict=True))
        return each if same else type(each)(parts)
    return each


def moved(value: T, device: torch.device) -> T:
    """The same data on `device`: `moved(layer, torch.device("cuda"))`; as it is where it lies there already."""
    return changed(value, lambda tensor: tensor.to(device))


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, float32 products on a card have all 24 bits, not TF32's 11: a setting of the process, put back after."""
    matmul = torch.backends.cuda.matmul
    # torch 2.8 knows the older name alone; from 2.9 on, reading it fails where someone has set the newer one.
    name, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)
