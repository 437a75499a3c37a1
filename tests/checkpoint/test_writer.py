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
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.checkpoint.conftest import LAYERS, end_parts, header, layer_parts, stopped, write

from resq.checkpoint import writer as writing
from resq.checkpoint.files import CheckpointReader, layer_file
from resq.checkpoint.golden import Golden, golden_input
from resq.checkpoint.manifest import read_manifest
from resq.checkpoint.work import WorkDirectory
from resq.checkpoint.writer import CheckpointWriter
from resq.errors import InputError
from resq.numerics.bands import Bands
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
    manifest = write(tmp_path / "packed", tied=tied)
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_was_finished_is_kept_and_the_error_says_so(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(work: Path) -> None:
        assert names_in(tmp_path)[0] == work.name
        assert not (tmp_path / "packed").exists()
        raise error

    with pytest.raises(error) as caught:
        write(tmp_path / "packed", fail)
    assert caught.value.__notes__ == ["what is finished is kept: go on with --resume"]
    with WorkDirectory(tmp_path / "packed", {}, resume=True) as work:
        writer = CheckpointWriter(work)
        assert writer.has_ends
        assert writer.finished == LAYERS
        writer.close(**header())
    assert [file.name for file in tmp_path.iterdir()] == ["packed"]
    write(tmp_path / "straight")
    for file in (tmp_path / "straight").iterdir():
        assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes()


def test_a_job_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError), WorkDirectory(tmp_path / "packed", {}):
        raise ValueError
    assert names_in(tmp_path) == []


def test_work_is_refused_without_resume_with_other_inputs_and_twice(tmp_path: Path) -> None:
    out, inputs = tmp_path / "packed", {"seed": 1, "source": {"config.json": "a" * 64}, "recipe": {"name": "resq"}}
    with WorkDirectory(out, inputs), pytest.raises(InputError, match="packed is being made by another process"):
        WorkDirectory(out, inputs)
    stopped(out, inputs)
    with pytest.raises(InputError, match=r"was begun and not finished; go on with --resume, or remove .*\.partial$"):
        WorkDirectory(out, inputs)
    other = {"seed": 2, "source": {"config.json": "b" * 64}, "recipe": {"name": "rtn"}}
    with pytest.raises(
        InputError, match=r"seed is 2, was 1; source config.json differs; recipe name is rtn, was resq;"
    ):
        WorkDirectory(out, other, resume=True)
    with WorkDirectory(out, inputs, resume=True, about={"threads": "2"}) as work:
        assert work.resumed
        assert work.about == {}
        assert CheckpointWriter(work).finished == LAYERS


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "golden"])
def test_a_finished_layer_that_is_not_as_written_counts_as_not_finished(tmp_path: Path, damage: str) -> None:
    bands = Bands.of((4, 6))
    sums = torch.arange(4 * 1 * 3).view(4, 1, 3)
    work = stopped(tmp_path / "packed", golden=Golden.of(golden_input(bands), sums))
    file = work.checkpoint / layer_file(1, LAYERS) if damage != "golden" else work.file("golden-layer-1.safetensors")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with WorkDirectory(tmp_path / "packed", {}, resume=True) as again:
        assert CheckpointWriter(again).finished == 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="it reads /proc")
def test_every_file_is_flushed_before_the_checkpoint_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, real = set[str](), os.fsync

    def watch(handle: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    monkeypatch.setattr(os, "fsync", watch)
    write(tmp_path / "packed")
    names = {file.name for file in (tmp_path / "packed").rglob("*")}
    written_whole = {name for name in names if name.endswith(".safetensors")}  # under another name, then renamed
    assert names - written_whole <= flushed
    for name in written_whole:
        assert any(each.startswith(f".{name}.partial-") for each in flushed), name


@pytest.mark.parametrize("stage", ["fsync", "rename"])
def test_a_failing_close_is_one_line_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def break_it(work: Path) -> None:
        monkeypatch.setattr(os if stage == "fsync" else Path, stage, fail)

    with pytest.raises(InputError, match=r"packed failed: .*Input/output error"):
        write(tmp_path / "packed", break_it)
    monkeypatch.undo()
    with WorkDirectory(tmp_path / "packed", {}, resume=True) as work:
        CheckpointWriter(work).close(**header())
    assert [file.name for file in tmp_path.iterdir()] == ["packed"]


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
        WorkDirectory(tmp_path / "packed", {})
    assert names_in(tmp_path) == ["packed"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def appear(work: Path) -> None:
        make_directory(tmp_path / "packed")
        (tmp_path / "packed" / "other").touch()

    with pytest.raises(InputError, match="packed exists already"):
        write(tmp_path / "packed", appear)
    assert [name for name in names_in(tmp_path) if not name.startswith(".")] == ["packed", "packed/other"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^cannot write to .*file.*: .*; choose another --out$"):
        WorkDirectory(tmp_path / "file" / "packed", {})


FULL = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["os", "safetensors"])
def test_a_full_disk_is_one_line_and_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, files_written = safetensors.torch.save_file, []

    def third_fails(*given: Any, **more: Any) -> None:
        if len(files_written) == 2:
            raise error
        files_written.append(given)
        real(*given, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", third_fails)
    with pytest.raises(InputError) as caught:
        write(tmp_path / "packed")
    assert str(caught.value).startswith(f"writing {tmp_path / 'packed'} failed: the disk is full")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    with WorkDirectory(tmp_path / "packed", {}, resume=True) as work:
        assert CheckpointWriter(work).finished == 1


ON_A_TINY_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from resq.checkpoint.files import EndParts
from resq.checkpoint.work import WorkDirectory
from resq.checkpoint.writer import CheckpointWriter
from resq.errors import InputError
from resq.numerics.formats import PLAIN, Norm
from resq.numerics.linear import DenseLinear
disk, table = Path(sys.argv[2]), torch.zeros(1000, 100)
try:
    with WorkDirectory(disk / "packed", {}) as work:
        names = {"embed": "e", "norm": "n", "head": "h"}
        CheckpointWriter(work).add_ends(names, EndParts(table, Norm(1e-5), PLAIN, DenseLinear(table), True))
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
    source = str(Path(writing.__file__).parents[2])
    done = in_namespace('"$0" -c "$1" "$2" "$3"', sys.executable, ON_A_TINY_DISK, source, str(tmp_path))
    assert done.stdout.splitlines() == [
        f"writing {tmp_path / 'packed'} failed: the disk is full; free some space",
        "[]",
    ], done.stderr
