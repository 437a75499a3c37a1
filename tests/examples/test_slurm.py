"""The script for SLURM, with a `srun` that starts both machines' processes on this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import make_checkpoint
from tests.faults import checkpoint_bytes

import resq.api

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
SRUN = """#!/bin/bash
shift
"$@" &
one=$!
"$@" &
wait $one && wait $!
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$ASKED"
if [ "$1 $2" = "show hostnames" ]; then
    printf 'localhost\\nother\\n'
fi
"""


def environment(place: Path, srun: str) -> dict[str, str]:
    """A job of two machines without cards, on which these commands are found first."""
    place.mkdir()
    for name, content in {"srun": srun, "scontrol": SCONTROL}.items():
        (place / name).write_text(content, encoding="utf-8")
        (place / name).chmod(0o755)
    path = f"{place}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a[1-2]"}
    return {
        **os.environ,
        **job,
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_GPUS_ON_NODE": "0",
        "PATH": path,
        "ASKED": str(place / "asked"),
    }


@pytest.mark.slow
def test_two_machines_make_the_bytes_of_one_process(tmp_path: Path, text: Path) -> None:
    source, out = make_checkpoint(tmp_path / "source"), tmp_path / "made" / "out"
    out.parent.mkdir()
    given = ["--calibration", text, "--windows", 20, "--window-length", 32]
    done = subprocess.run(
        list(map(str, [SCRIPT, source, "--out", out, *given])),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment(tmp_path / "bin", SRUN),
    )
    assert done.returncode == 0, done.stderr
    resq.api.quantize(source, tmp_path / "one" / "out", calibration=text, windows=20, window_length=32)
    assert checkpoint_bytes(out) == checkpoint_bytes(tmp_path / "one" / "out")


def test_a_job_whose_time_is_nearly_over_is_queued_again_and_its_exit_code_kept(tmp_path: Path) -> None:
    started = tmp_path / "started"
    srun = f'#!/bin/bash\necho "$@" > {started}\nsleep 1\nexit 7\n'
    job = environment(tmp_path / "bin", srun)
    process = subprocess.Popen([SCRIPT, "model", "--out", "packed"], env=job)
    while not (started.is_file() and started.read_text("utf-8")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 7
    assert Path(job["ASKED"]).read_text("utf-8").splitlines() == [
        "show hostnames a[1-2]",
        f"requeue {job['SLURM_JOB_ID']}",
    ]
    assert started.read_text("utf-8").endswith(" -m resq quantize model --out packed --device cpu --resume\n")
