"""What memory a process holds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from resq.processes import Peak, held

SIZE = 64 << 20
linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")


@linux
def test_a_peak_is_what_was_held_at_once_by_phase() -> None:
    before = held()
    with Peak() as peak:
        tell = peak.watched()
        one = np.ones(SIZE, np.uint8)
        tell("one", 1, 1)
        del one
        tell("two", 0, 1)
        two = [np.ones(SIZE, np.uint8) for _ in range(2)]
        tell("two", 1, 1)
        del two
    assert peak.bytes == max(most for _, most in peak.phases.values())
    assert peak.phases["one"][1] >= before + 0.9 * SIZE
    assert peak.phases["two"][1] - peak.phases["one"][1] > 0.9 * SIZE
    assert list(peak.phases) == ["one", "before two", "two"]
    assert sum(seconds for seconds, _ in peak.phases.values()) <= peak.seconds
    assert peak.bytes < before + 3 * SIZE


@linux
def test_mapped_files_are_not_held() -> None:
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        before = held()
        mapped = np.memmap(file, np.uint8, mode="r")
        assert int(mapped[::4096].sum()) == 0
        assert held() < before + SIZE // 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_large_blocks_are_returned_as_they_are_freed() -> None:
    # A block of 16 MB that is freed raises glibc's threshold; the next one then lies under one that stays.
    program = """
from resq.processes import held, return_blocks
import numpy as np, sys
if sys.argv[1] == "yes":
    return_blocks()
del (first := [np.ones(16 << 20, np.uint8)])[:]
before = held()
blocks = [np.ones(8 << 20, np.uint8) for _ in range(8)]
last = np.ones(200 << 10, np.uint8)
del blocks
print(held() - before)
"""

    def kept(asked: str) -> int:
        done = subprocess.run([sys.executable, "-c", program, asked], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kept("yes") < 8 << 20 < 48 << 20 < kept("no")
