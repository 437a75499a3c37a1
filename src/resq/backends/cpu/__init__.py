"""The CPU backend: native kernels that run the packed checkpoint with the reference's integers."""

from resq.backends.cpu.operators import CPU

__all__ = ["CPU"]
