"""Hidden states between layers: the same bits wherever they lie, and on disk a file that nobody sees."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import make_checkpoint
from tests.faults import checkpoint_bytes, in_small_tmpfs
from torch import Tensor

import resq.api
from resq.errors import InputError
from resq.ptq.activations import Activations, Buffers, Place, save, saved

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_hidden_layers": 2,
}


def windows(count: int) -> list[Tensor]:
    # 7 · 5 floats: no multiple of a page, so that a window's place in the file is not its size.
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 7, 5, generator=generator) for _ in range(count)]


def same(states: Activations, wanted: list[Tensor]) -> bool:
    return len(states) == len(wanted) and all(torch.equal(states[number], each) for number, each in enumerate(wanted))


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("count", [0, 1, 5])
def test_states_come_back_and_one_can_be_replaced(tmp_path: Path, place: Place, count: int) -> None:
    given = windows(count)
    states = Buffers(place, directory=tmp_path).keep(iter(given), count)
    assert same(states, given)
    for number in reversed(range(count)):
        states[number] = states[number] * 2
        assert same(states, [*given[:number], *(each * 2 for each in given[number:])])


def test_what_is_read_from_disk_does_not_change_with_the_file(tmp_path: Path) -> None:
    states = Buffers(Place.DISK, directory=tmp_path).keep(iter(windows(2)), 2)
    before = states[1]
    states[1] = before + 1
    assert torch.equal(before, windows(2)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="files without a name are Linux's")
def test_a_spill_file_has_no_name_and_lies_in_its_directory(tmp_path: Path) -> None:
    states = Buffers(Place.DISK, directory=tmp_path).keep(iter(windows(3)), 3)
    assert list(tmp_path.iterdir()) == []
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert f"{tmp_path}/" in mapped
    del states
    assert f"{tmp_path}/" not in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", ["resq", "resq+", "quik", "rtn"])
def test_a_checkpoint_has_the_same_bytes_wherever_its_states_lay(tmp_path: Path, text: Path, recipe: str) -> None:
    source, found, seen = make_checkpoint(tmp_path / "source", **SMALL), [], set[str]()

    def look(phase: str, done: int, total: int) -> None:
        seen.update(file.name for file in (tmp_path / place / ".out.partial").glob("*") if not file.suffix)

    for place in Place:
        out = tmp_path / place / "out"
        out.parent.mkdir()
        resq.api.quantize(
            source,
            out,
            recipe=recipe,
            calibration=text,
            windows=10,
            window_length=24,
            activations=place,
            progress=look,
        )
        found.append(checkpoint_bytes(out))
    assert found[0] == found[1] == found[2]
    assert seen <= {"checkpoint", "lock"}


def test_another_place_is_one_line(tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match=r"^--activations 'tape' is none of device, memory, disk$"):
        resq.api.quantize("tiny", tmp_path / "out", calibration=text, activations="tape")


ON_A_TINY_DISK = """
import sys
from pathlib import Path
from typing import Any
import torch
from resq.errors import InputError
from resq.ptq.activations import Buffers, Place
disk = Path(sys.argv[1])
try:
    Buffers(Place.DISK, directory=disk).keep((torch.zeros(1, 64, 64) for _ in range(9)), 9)
except InputError as error:
    print(error)
print(list(disk.iterdir()))
"""


def test_a_disk_too_small_for_the_states_is_one_line_before_any_is_written(tmp_path: Path) -> None:
    done = in_small_tmpfs(tmp_path, "64k", sys.executable, "-c", ON_A_TINY_DISK, str(tmp_path))
    assert done.stdout.splitlines() == [
        f"{tmp_path} has no room for the states of 9 windows (No space left on device); free some space, or use fewer "
        "or shorter windows",
        "[]",
    ], done.stderr


@pytest.mark.parametrize("place", [Place.MEMORY, Place.DISK])
def test_saved_windows_come_back_in_order(tmp_path: Path, place: Place) -> None:
    given = windows(7)
    states = Buffers(place, directory=tmp_path).keep(iter(given), 7)
    files = [tmp_path / "first.npy", tmp_path / "second.npy"]
    save(states, 0, 4, files[0])
    save(states, 4, 7, files[1])
    assert all(map(torch.equal, saved(files), given))
    assert np.load(files[1]).shape == (3, 1, 7, 5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first.npy", "second.npy"]


@pytest.mark.parametrize("size", [0, 40, 200, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    states, file = Buffers().keep(iter(windows(2)), 2), tmp_path / "states.npy"
    save(states, 0, 2, file)
    os.truncate(file, size % file.stat().st_size)
    with pytest.raises((OSError, ValueError, EOFError)):
        list(saved([file]))
