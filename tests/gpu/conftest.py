"""What only a card can show: everything here is skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

import resq
from resq.backends.triton.device import card, unusable
from resq.embedded import MODEL, TEXT


@pytest.fixture(autouse=True, scope="session")
def name_of_card() -> str:
    """The card that the tests run on."""
    found = card()
    if found is None:
        pytest.skip(f"these tests need an NVIDIA card: {unusable() or 'kernels are interpreted here'}")
    return found


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, name_of_card: str) -> Path:
    """The embedded model, quantized on the CPU."""
    directory = tmp_path_factory.mktemp("embedded") / "packed"
    return resq.quantize(MODEL, directory, calibration=TEXT, windows=16, window_length=128).directory
