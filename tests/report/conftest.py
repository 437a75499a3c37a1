"""A real comparison of a random model whose name and files are as unfriendly as names may be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import make_checkpoint

from resq.cases import Plan
from resq.compare import compare
from resq.report.report import Written, report

UNFRIENDLY = "<img src=x onerror=alert(1)> $a_b$ |*_`"
TEXT = "the quick brown fox jumps over a lazy dog while it rains. " * 40


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `resq compare` leaves of two recipes at two widths, checkpoints kept; tests that write take a copy."""
    place = tmp_path_factory.mktemp("compared")
    source = make_checkpoint(place / UNFRIENDLY, seed=3)
    (place / "text").write_text(TEXT, encoding="utf-8")
    plan = Plan(
        source=str(source),
        text=str(place / "text"),
        recipes=("rtn", "resq"),
        bits=(4, 3),
        calibration=(str(place / "text"),),
        windows=8,
        window_length=32,
        evaluation_windows=12,
        speed_rounds=0,
        keep_checkpoints=True,
    )
    before = torch.get_num_threads()
    compare(plan, place / "out")
    torch.set_num_threads(before)
    return place / "out"


@pytest.fixture(scope="session")
def written(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Its report, with every diagnostic; tests only read."""
    place = tmp_path_factory.mktemp("written") / "copy"
    shutil.copytree(compared, place)
    return report(place)


@pytest.fixture
def copy(compared: Path, tmp_path: Path) -> Path:
    """A comparison of one's own, never reported on."""
    return Path(shutil.copytree(compared, tmp_path / "copy"))


@pytest.fixture
def reported(written: Written, tmp_path: Path) -> Path:
    """A comparison of one's own with its report and diagnostics."""
    return Path(shutil.copytree(written.html.parent, tmp_path / "reported"))
