"""Several processes on one job under torchrun: the bytes of one, and what happens when one of them dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import brief, make_checkpoint
from tests.faults import checkpoint_bytes

import resq.api
from resq.checkpoint.work import work_path
from resq.ptq import layers

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
}
# Rows of a block: small enough that every rank has some of every linear.
ROWS = 8
# The command with smaller blocks, states saved after every layer, and, of FATE "1 moments 2", SIGKILL to rank 1 in the
# second layer of pass 1.
COMMAND = f"""
import os, signal, sys
import torch
from resq.cli import main
from resq.ptq import layers, pipeline, resume, statistics
layers.ROWS, resume.SHARE = {ROWS}, 1
rank, phase, layer = os.environ.get("FATE", "-1 none 0").split()
def fatal(module, name):
    real, calls = getattr(module, name), []
    def call(*given):
        calls.append(name)
        if len(calls) == int(layer):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    setattr(module, name, call)
if os.environ["RANK"] == rank:
    fatal(statistics, "fold_norms") if phase == "moments" else fatal(pipeline, "round_layer")
main()
"""
# Several jobs, one after the other in the same processes: `recipe windows` each.
JOBS = f"""
import sys
import torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import resq.api
from resq.ptq import layers
from tests.conftest import brief
layers.ROWS = {ROWS}
torch.set_num_threads(1)
home, out = Path(sys.argv[1]), Path(sys.argv[2])
for job in sys.argv[3:]:
    name, windows = job.split()
    resq.api.quantize(home / "source", out / job / "out", recipe=brief(name), calibration=home / "text.txt",
                      windows=int(windows), window_length=24)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of three layers and a text."""
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "source", **SMALL)
    (home / "text.txt").write_text("the quick brown fox jumps over a lazy dog while it rains. " * 300, encoding="utf-8")
    return home


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `COMMAND` and `JOBS`: blocks belong to what decides the bits."""
    monkeypatch.setattr(layers, "ROWS", ROWS)


def alone(home: Path, out: Path, recipe: str = "resq+", windows: int = 40, **more: Any) -> dict[str, bytes]:
    """The checkpoint that this process makes."""
    text, method = home / "text.txt", brief(recipe)
    resq.api.quantize(home / "source", out, recipe=method, calibration=text, windows=windows, window_length=24, **more)
    return checkpoint_bytes(out)


@dataclass(frozen=True)
class Ended:
    """A torchrun that ended: exit code, seconds, and what every rank said on standard error."""

    code: int
    seconds: float
    said: list[str]
    log: str


def torchrun(processes: int, logs: Path, program: list[str], **environment: str) -> Ended:
    """Run a program in so many processes of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--redirects=3", f"--log-dir={logs}", *program]
    started = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    files = sorted(logs.rglob("stderr.log"), key=lambda file: int(file.parent.name))
    said = [file.read_text("utf-8") for file in files]
    return Ended(done.returncode, time.monotonic() - started, said, done.stderr + "".join(said))


def script(place: Path, content: str) -> Path:
    file = place / "script.py"
    file.write_text(content, encoding="utf-8")
    return file


def command(home: Path, out: Path) -> list[str]:
    given = ["quantize", home / "source", "--recipe", "resq+", "--calibration", home / "text.txt", "--out", out]
    return [*map(str, given), "--windows", "40", "--window-length", "24"]


# 40 windows are five leaves, 5 are one: all ranks but the first then have none.
ONES = ["resq 40", "gptq 40", "resq+ 40", "quik 20", "smoothquant+ 20", "resq+ 5", "quik 5", "rtn 5"]


@pytest.mark.parametrize(
    ("processes", "jobs"),
    [
        (2, ["resq+ 40", "quik 5"]),
        *(pytest.param(count, [*ONES, "resq-learned 9"], marks=pytest.mark.slow) for count in (2, 4)),
    ],
)
def test_several_processes_make_the_bytes_of_one(home: Path, tmp_path: Path, processes: int, jobs: list[str]) -> None:
    program = [str(script(tmp_path, JOBS)), str(home), str(tmp_path), *jobs]
    done = torchrun(processes, tmp_path / "logs", program)
    assert done.code == 0, done.log
    for job in jobs:
        recipe, windows = job.split()
        one = alone(home, tmp_path / job / "one" / "out", recipe, int(windows))
        assert checkpoint_bytes(tmp_path / job / "out") == one, job
        assert [file.name for file in (tmp_path / job).iterdir() if file.name != "one"] == ["out"]


FATES = [(2, "1 rounding 2")]
SLOW_FATES = [(2, "1 moments 2"), (2, "0 moments 2"), (2, "0 rounding 2")]
SLOW_FATES += [(4, "3 moments 3"), (4, "0 rounding 2"), (4, "2 rounding 3")]


@pytest.mark.parametrize(
    ("processes", "fate"), [*FATES, *(pytest.param(*fate, marks=pytest.mark.slow) for fate in SLOW_FATES)]
)
def test_when_a_process_is_killed_all_end_and_the_job_goes_on(
    home: Path, tmp_path: Path, processes: int, fate: str
) -> None:
    file, out = str(script(tmp_path, COMMAND)), tmp_path / "made" / "out"
    ended = torchrun(processes, tmp_path / "logs", [file, *command(home, out)], FATE=fate)
    assert ended.code == 1  # torchrun's
    assert not out.exists()
    victim = int(fate.split()[0])
    assert ended.said[victim] == ""
    for rank, said in enumerate(ended.said):
        if rank != victim:
            assert len(said.splitlines()) == 1, said
            assert "another process of the job is gone" in said or "stopped by torchrun" in said
    wanted = alone(home, tmp_path / "one" / "out")
    others = {1: 4, 2: 1, 4: 2}[processes]
    assert (work_path(out) / "position.json").is_file()
    if others == 1:
        assert alone(home, out, resume=True) == wanted
    else:
        done = torchrun(others, tmp_path / "again", [file, *command(home, out), "--resume"])
        assert done.code == 0, done.log
        assert checkpoint_bytes(out) == wanted
    assert [file.name for file in out.parent.iterdir()] == ["out"]


# Leaving in order never ends while another process waits, as it is with nccl. `fails` says which rank does.
FAILS = """
import sys, time
import torch, torch.distributed
from resq.ptq.ranks import joined

leave = torch.distributed.destroy_process_group
torch.distributed.destroy_process_group = lambda: time.sleep(600) if fails else leave()
fails = len(sys.argv) > 1
with joined(torch.device("cpu")) as (ranks, _):
    assert ranks.agree(True)
    if fails and ranks.rank == int(sys.argv[1]):
        raise SystemExit("trouble of its own")
    ranks.gathered(ranks.rank)
"""


@pytest.mark.parametrize("fails", ["", "0", "1"])
def test_a_process_that_fails_does_not_wait_for_those_that_wait_for_it(tmp_path: Path, fails: str) -> None:
    ended = torchrun(2, tmp_path / "logs", [str(script(tmp_path, FAILS)), *([fails] if fails else [])])
    assert ended.code == (1 if fails else 0), ended.log
    if fails:
        assert ended.said[int(fails)] == "trouble of its own\n"
    else:
        assert ended.said == ["", ""]


def test_what_cannot_be_used_is_said_once(home: Path, tmp_path: Path) -> None:
    arguments = [*command(home, tmp_path / "out"), "--calibration", str(tmp_path / "nothing.txt")]
    ended = torchrun(2, tmp_path / "logs", ["-m", "resq", *arguments])
    assert ended.code == 1
    assert "".join(ended.said).count("nothing.txt") == 1
    assert all(len(said.splitlines()) <= 1 for said in ended.said), ended.said
    assert not list(tmp_path.glob("*out*"))
