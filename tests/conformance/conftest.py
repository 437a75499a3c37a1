"""Kernels of the Triton backend run in Triton's interpreter where there is no card."""

from tests.backends.triton.interpreted import _quick

__all__ = ["_quick"]
