"""Cards that are not here, for which tests compile kernels: compute capabilities, and shared memory of a program."""

from __future__ import annotations

import pytest

# Bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# The oldest and the newest, the others with the slow tests.
CARDS = [80, 90, *(pytest.param(each, marks=pytest.mark.slow) for each in (86, 89))]
# For long sweeps. sm_89 has the tiles, registers and shared memory of sm_86: of 152 kernels in results/gpu-code.jsonl
# 151 have the same registers, spills and instructions, and the other spills on sm_86 alone.
SWEPT = (80, 86, 90)
