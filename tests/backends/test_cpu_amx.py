"""The AMX kernels, under an emulator of the instructions: its own tests, then the integers of the CPU backend on it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.backends.cases import instruction_sets

from resq.backends.cpu import native

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests" / "native"
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="AMX is x86-64's; Linux only"),
    pytest.mark.skipif(COMPILER is None, reason="needs g++ to build the emulator"),
]


def compiled(*arguments: object) -> None:
    done = subprocess.run(
        [str(COMPILER), "-std=c++17", "-O2", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("amx") / "libamx_emulator.so"
    compiled("-shared", "-fPIC", NATIVE / "amx_emulator.cpp", "-o", library, "-ldl")
    return library


def emulated(emulator: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    preload = " ".join([str(emulator), *os.environ.get("LD_PRELOAD", "").split()])
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": preload, **environment},
    )


def test_the_emulator_does_what_the_manual_says(emulator: Path, tmp_path: Path) -> None:
    program = tmp_path / "test_amx"
    compiled(NATIVE / "test_amx.cpp", "-o", program, "-pthread")
    done = emulated(emulator, program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AMX: as specified" in done.stdout


# Runs chosen tests and tells how many passed and what the emulator saw.
RUN = """
import ctypes, json, sys
import pytest

class Count:
    passed = failed = 0
    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.passed += report.passed
            self.failed += report.failed

count = Count()
code = pytest.main(sys.argv[1:], plugins=[count])
process = ctypes.CDLL(None)
process.resq_emulated_amx_instructions.restype = ctypes.c_long
from resq.backends.cpu import native
print()
print(json.dumps({
    "code": int(code),
    "passed": count.passed,
    "failed": count.failed,
    "usable": [each.name for each in native.instruction_sets() if each.missing is None],
    "instructions": process.resq_emulated_amx_instructions(),
    "configured": process.resq_emulated_amx_configured(),
}))
"""


@pytest.mark.skipif(
    "avx512-vnni" not in instruction_sets(), reason="the AMX kernels need AVX-512 VNNI beside the tiles"
)
def test_the_amx_kernels_make_the_references_integers_and_release_their_tiles(emulator: Path) -> None:
    chosen = "amx-int8 and (integers or overflow or linear or linears or activations_lie or beside)"
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen, "tests/backends/test_cpu.py"]
    done = emulated(emulator, sys.executable, "-c", RUN, *options, **{native.FORCE: "amx-int8"})
    assert done.stdout.strip(), done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stdout
    assert found["usable"][0] == "amx-int8"
    assert found["failed"] == 0
    assert found["passed"] > 100
    # One tile product is 16 rows, 16 outputs, 64 columns: a linear of 33 rows, 100 outputs and 2048 columns alone is
    # 768 of them.
    assert found["instructions"] > 10_000
    assert found["configured"] == 0
