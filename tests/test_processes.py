"""What memory a process holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SIZE = 64 << 20
linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")


def said_by(program: str, *arguments: str) -> Any:
    """What a program prints, as JSON. It has a process to itself: in this one the garbage of other tests may be
    collected between two looks at the memory."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
def test_a_peak_is_what_was_held_at_once_by_phase() -> None:
    said = said_by(f"""
from resq.processes import Peak, held
import json, numpy as np
before = held()
with Peak() as peak:
    tell = peak.watched()
    one = np.ones({SIZE}, np.uint8)
    tell("one", 1, 1)
    del one
    tell("two", 0, 1)
    two = [np.ones({SIZE}, np.uint8) for _ in range(2)]
    tell("two", 1, 1)
    del two
print(json.dumps([before, peak.bytes, peak.seconds, peak.phases]))
""")
    before, most, seconds, phases = said
    assert list(phases) == ["one", "before two", "two"]
    assert most == max(held for _, held in phases.values())
    assert phases["one"][1] >= before + 0.9 * SIZE
    assert phases["two"][1] - phases["one"][1] > 0.9 * SIZE
    assert most < before + 3 * SIZE
    assert sum(took for took, _ in phases.values()) <= seconds


@linux
def test_mapped_files_are_not_held(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    grown = said_by(
        """
from resq.processes import held
import numpy as np, sys
before = held()
mapped = np.memmap(sys.argv[1], np.uint8, mode="r")
assert int(mapped[::4096].sum()) == 0
print(held() - before)
""",
        str(file),
    )
    assert grown < SIZE // 2


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
    assert said_by(program, "yes") < 8 << 20 < 48 << 20 < said_by(program, "no")
