"""The Triton backend: the packed checkpoint on NVIDIA cards from Ampere on, with the reference's integers."""

from resq.backends.triton.backend import TRITON

__all__ = ["TRITON"]
