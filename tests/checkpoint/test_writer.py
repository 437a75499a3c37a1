"""Writing: all or nothing, in one place, each tensor once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.checkpoint.conftest import LAYERS, end_parts, fill, header, layer_parts

from resq.checkpoint import files
from resq.checkpoint.files import CheckpointReader, CheckpointWriter, layer_file
from resq.checkpoint.manifest import read_manifest
from resq.errors import InputError
from resq.numerics.linear import DenseLinear
from resq.numerics.maps import Dense


def same(a: Any, b: Any) -> bool:
    """Equal dataclasses, dicts and tuples, tensors bit by bit with their dtypes."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


def names_in(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*"))


@pytest.mark.parametrize("tied", [True, False])
def test_reading_gives_back_what_was_written(tmp_path: Path, tied: bool) -> None:
    with CheckpointWriter(tmp_path / "packed") as writer:
        fill(writer, tied=tied)
        manifest = writer.close(**header())
    reader = CheckpointReader(tmp_path / "packed")
    assert reader.manifest == read_manifest(tmp_path / "packed") == manifest
    assert same(reader.ends(), end_parts(tied=tied))
    for index in range(LAYERS):
        assert same(reader.layer(index), layer_parts(index))


def test_the_manifest_survives_a_round_trip_as_text(written: Path) -> None:
    text = (written / "resq.json").read_text("utf-8")
    assert read_manifest(written).to_json() == text


def test_a_shared_tensor_is_stored_once_and_named_twice(written: Path) -> None:
    reader = CheckpointReader(written)
    for index, entry in enumerate(reader.manifest.layers):
        assert entry.key.map is not None
        assert entry.query.map is not None
        assert entry.query.map.tensor == entry.key.map.tensor
        stored = load_file(written / entry.file)
        assert sum(tensor.shape == (8, 8) for tensor in stored.values()) == 1
        heads = reader.layer(index).heads
        query, key = heads.query.map, heads.key.map
        assert isinstance(query, Dense)
        assert isinstance(key, Dense)
        assert query.matrix is key.matrix


def test_a_tied_head_adds_no_tensor(written: Path) -> None:
    assert sorted(load_file(written / "model-ends.safetensors")) == [
        "head_input.matrix",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    ends = CheckpointReader(written).ends()
    assert isinstance(ends.head, DenseLinear)
    assert ends.head.weight is ends.embed


def test_the_final_norm_is_an_empty_sentinel(written: Path) -> None:
    assert load_file(written / "model-ends.safetensors")["model.norm.weight"].shape == (0,)


def test_the_index_names_every_tensor_of_every_file(written: Path) -> None:
    index = json.loads((written / "model.safetensors.index.json").read_text("utf-8"))
    stored = {name: file for file in read_manifest(written).files for name in load_file(written / file)}
    assert index["weight_map"] == stored
    tensors = [tensor for file in read_manifest(written).files for tensor in load_file(written / file).values()]
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("index", "layers", "name"), [(0, 1, "0"), (3, 10, "3"), (3, 11, "03"), (10, 11, "10"), (7, 126, "007")]
)
def test_layer_files_sort_in_order(index: int, layers: int, name: str) -> None:
    assert layer_file(index, layers) == f"model-layer-{name}.safetensors"


def test_all_files_are_as_readable_as_the_directory(written: Path) -> None:
    want = written.stat().st_mode & 0o666
    assert {file.stat().st_mode & 0o777 for file in written.glob("*.safetensors")} == {want}


def write(out: Path, before_close: Callable[[Path], None] = lambda work: None) -> None:
    """A whole checkpoint; `before_close` is told the hidden directory once everything else is written."""
    with CheckpointWriter(out) as writer:
        fill(writer)
        (work,) = out.parent.glob(f".{out.name}.partial-*")
        before_close(work)
        writer.close(**header())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_checkpoint_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(work: Path) -> None:
        assert names_in(tmp_path)[0] == work.name
        assert not (tmp_path / "packed").exists()
        raise error

    with pytest.raises(error):
        write(tmp_path / "packed", fail)
    assert names_in(tmp_path) == []


def test_a_checkpoint_that_was_not_closed_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "packed") as writer:
        fill(writer)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("stage", ["fsync", "rename"])
def test_a_failing_close_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(InputError, match=r"packed failed: .*Input/output error"):
        write(tmp_path / "packed", lambda work: monkeypatch.setattr(files.os, stage, fail))
    assert names_in(tmp_path) == []


def make_directory(out: Path) -> None:
    out.mkdir()


def make_file(out: Path) -> None:
    out.touch()


def make_dangling_link(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


@pytest.mark.parametrize("make", [make_directory, make_file, make_dangling_link])
def test_an_existing_output_is_refused_and_kept(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "packed")
    with pytest.raises(InputError, match=r"packed exists already; choose another --out or remove it first"):
        CheckpointWriter(tmp_path / "packed")
    assert names_in(tmp_path) == ["packed"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def appear(work: Path) -> None:
        make_directory(tmp_path / "packed")
        (tmp_path / "packed" / "other").touch()

    with pytest.raises(InputError, match="packed exists already"):
        write(tmp_path / "packed", appear)
    assert names_in(tmp_path) == ["packed", "packed/other"]


def test_what_a_killed_run_left_does_not_stop_the_next(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path / "packed")  # as if the process had been killed here; the process id comes back
    left = names_in(tmp_path)
    with CheckpointWriter(tmp_path / "packed") as writer:
        fill(writer)
        writer.close(**header())
    assert left
    assert [name for name in names_in(tmp_path) if "/" not in name] == [*left, "packed"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^cannot write to .*file.*: .*; choose another --out$"):
        CheckpointWriter(tmp_path / "file" / "packed")


FULL = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["os", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, files_written = files.save_file, []

    def third_fails(*given: Any, **more: Any) -> None:
        if len(files_written) == 2:
            raise error
        files_written.append(given)
        real(*given, **more)

    monkeypatch.setattr(files, "save_file", third_fails)
    with pytest.raises(InputError) as caught:
        write(tmp_path / "packed")
    assert str(caught.value).startswith(f"writing {tmp_path / 'packed'} failed: the disk is full")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_text_that_meets_a_full_device_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def fill_up(work: Path) -> None:
        (work / "resq.json").symlink_to("/dev/full")

    with pytest.raises(InputError, match="the disk is full; free some space"):
        write(tmp_path / "packed", fill_up)
    assert names_in(tmp_path) == []


ON_A_TINY_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from resq.checkpoint.files import CheckpointWriter, EndParts
from resq.errors import InputError
from resq.numerics.formats import PLAIN, Norm
from resq.numerics.linear import DenseLinear
disk, table = Path(sys.argv[2]), torch.zeros(1000, 100)
try:
    with CheckpointWriter(disk / "packed") as writer:
        names = {"embed": "e", "norm": "n", "head": "h"}
        writer.add_ends(names, EndParts(table, Norm(1e-5), PLAIN, DenseLinear(table), True))
except InputError as error:
    print(error)
print(list(disk.iterdir()))
"""


def test_a_really_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def in_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = f'mount -t tmpfs -o size=64k tmpfs "{tmp_path}" && {script}'
        return subprocess.run(
            ["unshare", "-rm", "sh", "-c", command, *arguments], capture_output=True, text=True, check=False
        )

    try:
        usable = in_namespace("true").returncode == 0
    except FileNotFoundError:
        usable = False
    if not usable:
        pytest.skip("no private mount of a small tmpfs here (unshare -rm)")
    source = str(Path(files.__file__).parents[2])
    done = in_namespace('"$0" -c "$1" "$2" "$3"', sys.executable, ON_A_TINY_DISK, source, str(tmp_path))
    assert done.stdout.splitlines() == [
        f"writing {tmp_path / 'packed'} failed: the disk is full; free some space, nothing was kept",
        "[]",
    ], done.stderr
