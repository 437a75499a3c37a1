"""What every measurement asks of its windows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import Shape


class Sized(Protocol):
    """A model with a name: a source, or a stream of layers."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def shape(self) -> Shape:
        """Sizes."""
        ...


def check_windows(model: Sized, windows: Tensor) -> None:
    """Raises InputError for windows that are no int64 [windows, length] of the model's tokens, within its context and
    long enough to predict one."""
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
        raise InputError(f"windows are int64 [windows, length], got {windows.dtype} of shape {tuple(windows.shape)}")
    if windows.shape[1] > model.shape.max_positions:
        raise InputError(
            f"windows of {windows.shape[1]} tokens are longer than the context of {model.name}, "
            f"{model.shape.max_positions}; use a shorter --window-length"
        )
    if windows.shape[1] < 2:
        raise InputError(f"a window of {windows.shape[1]} tokens predicts nothing; use at least 2")
    if int(windows.min()) < 0 or int(windows.max()) >= model.shape.vocab:
        raise InputError(
            f"token ids of {model.name} must lie in 0 … {model.shape.vocab - 1}, got {int(windows.min())} … "
            f"{int(windows.max())}"
        )
