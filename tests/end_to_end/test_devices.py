"""`--devices`: several processes on one machine without typing torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resq.cli.devices import counted, without
from resq.errors import InputError


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose processes inherit what it prints to."""
    command = [sys.executable, "-m", "resq", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


SMALL = ["--windows", "16", "--window-length", "32"]


def test_two_processes_write_what_one_writes_and_fail_as_one_fails(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = checkpoint()
    for name, devices in (("one", []), ("two", ["--devices", "2"])):
        done = run("quantize", source, "--calibration", text, *SMALL, "--out", tmp_path / name, *devices)
        assert done.returncode == 0, done.stderr
        assert "Next: resq generate" in done.stdout.replace("\n", " ")
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    failed = run("quantize", source, "--calibration", tmp_path / "no.txt", "--out", tmp_path / "x", "--devices=2")
    assert failed.returncode == 2
    assert failed.stderr.count("no.txt") == 1
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.glob(".x*"))


def test_numbers_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert counted("auto", "cuda") == 4
    assert counted("3", "cpu") == 3
    for devices, device, words in (("auto", "cpu", "--device cuda"), ("0", "cpu", "no number"), ("x", "cuda", "'x'")):
        with pytest.raises(InputError, match=words):
            counted(devices, device)


def test_the_processes_get_every_other_argument() -> None:
    given = ["quantize", "a", "--devices", "2", "--out", "b", "--devices=3", "--device", "cuda"]
    assert without(given, "--devices") == ["quantize", "a", "--out", "b", "--device", "cuda"]
