"""Plain weights as backends with kernels hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.numerics.linear import DenseLinear

# What kernels read, in the order of cpu/csrc/kernels.h: Element.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DenseWeight:
    """Plain weights [out, in] of one of `FLOATS` with contiguous rows, which may lie in a mapped file; bias float32
    [out] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def out(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    @property
    def size(self) -> int:
        """Inputs."""
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.weight.numel() * self.weight.element_size()


def dense_weight(linear: DenseLinear, device: torch.device) -> DenseWeight:
    """The linear on `device`, as it lies where that will do."""
    dtype = linear.weight.dtype if linear.weight.dtype in FLOATS else torch.float32
    weight = linear.weight.to(device, dtype)
    return DenseWeight(weight if weight.stride(-1) == 1 else weight.contiguous(), float_bias(linear.bias, device))


def float_bias(bias: Tensor | None, device: torch.device) -> Tensor | None:
    """float32 and contiguous on `device`."""
    return None if bias is None else bias.to(device, torch.float32).contiguous()
