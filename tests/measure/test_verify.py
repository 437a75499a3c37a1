"""`resq verify`: whatever differs from what was written or recorded is found, and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import brief, make_checkpoint, run
from torch import Tensor

import resq
from resq.backends.backend import Backend
from resq.backends.cpu import CPU
from resq.backends.reference import REFERENCE
from resq.backends.triton import TRITON
from resq.checkpoint.files import read_sums
from resq.measure.verify import verify
from resq.numerics.packing import pack_signed
from resq.runtime.load import Opened

INTEGER = ("rtn", "quik", "quarot", "resq", "resq-246", "resq-paper")
FLOAT = ("resq-weight-only", "resq-kv")
LINEARS = [f"layers.{index}.{role}" for index in range(2) for role in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a recipe, made once, to read only; its head has 8 bits where its inputs are integers."""
    place = tmp_path_factory.mktemp("verify")
    source = make_checkpoint(place / "source", seed=2)
    text = place / "text"
    text.write_text("the quick brown fox jumps over a lazy dog while it rains. " * 20, encoding="utf-8")

    def make(name: str) -> Path:
        if not (place / name).exists():
            head = 8 if name in INTEGER else None
            options = {"calibration": [text], "windows": 8, "window_length": 32, "head_bits": head}
            resq.quantize(source, place / name, recipe=brief(name), **options)
        return place / name

    return make


@pytest.fixture
def packed(every: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same to damage."""
    return lambda name: shutil.copytree(every(name), tmp_path / name)


def rehash(directory: Path) -> None:
    """Make manifest and list of hashes say what the files are."""
    manifest = json.loads((directory / "resq.json").read_text("utf-8"))
    for name, entry in (manifest["files"] | manifest["copied"] | {"golden.safetensors": manifest["golden"]}).items():
        content = (directory / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "resq.json").write_text(json.dumps(manifest), encoding="utf-8")
    names = read_sums(directory)
    assert names is not None
    lines = [f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (directory / "SHA256SUMS.txt").write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=lambda backend: backend.name)
@pytest.mark.parametrize("recipe", INTEGER)
def test_a_good_checkpoint_is_good(every: Callable[[str], Path], recipe: str, backend: Backend) -> None:
    report = verify(every(recipe), backend=backend)
    assert report.problems == []
    assert report.unchecked == []
    assert sorted(report.linears.exact) == sorted([*LINEARS, "head"])
    assert report.linears.plain == []
    assert set(report.files) == {str(file.relative_to(every(recipe))) for file in every(recipe).rglob("*.*")}


@pytest.mark.parametrize("recipe", FLOAT)
def test_without_integers_on_both_sides_there_is_nothing_to_replay(every: Callable[[str], Path], recipe: str) -> None:
    report = verify(every(recipe))
    assert (report.problems, report.unchecked, report.linears.exact) == ([], [], [])
    assert sorted(report.linears.plain) == sorted([*LINEARS, "head"])
    assert not (every(recipe) / "golden.safetensors").exists()
    said = run("verify", every(recipe))
    assert said.returncode == 0
    assert "nothing to replay in 15 linears" in said.stdout


@pytest.mark.slow
def test_triton_replays_the_same_integers(every: Callable[[str], Path]) -> None:
    if reason := TRITON.unusable():
        pytest.skip(reason)
    report = verify(every("resq-paper"), backend=TRITON)
    assert report.problems == []
    assert len(report.linears.exact) == 15


NAMES = (
    "README.md",
    "SHA256SUMS.txt",
    "config.json",
    "generation_config.json",
    "golden.safetensors",
    "model-ends.safetensors",
    "model-layer-0.safetensors",
    "model-layer-1.safetensors",
    "model.safetensors.index.json",
    "resq.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_in_any_file_is_found(packed: Callable[[str], Path], name: str) -> None:
    directory = packed("resq")
    assert sorted(NAMES) == sorted(file.name for file in directory.iterdir())
    whole = (directory / name).read_bytes()
    for at, bit in ((0, 1), (len(whole) // 3, 4), (len(whole) // 2, 0), (len(whole) - 1, 2)):
        changed = bytearray(whole)
        changed[at] ^= 1 << bit
        (directory / name).write_bytes(changed)
        done = run("verify", directory, "--backend", "cpu")
        assert done.returncode == 3, (at, done.stdout, done.stderr)
        assert name in done.stdout or "SHA256SUMS.txt" in done.stdout
        assert done.stdout.endswith("not as recorded\n")
    (directory / name).write_bytes(whole)
    assert run("verify", directory, "--backend", "cpu").returncode == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors.index.json", "golden.safetensors"])
def test_a_missing_file_is_found(packed: Callable[[str], Path], name: str) -> None:
    directory = packed("resq")
    (directory / name).unlink()
    problem = verify(directory).files[name]
    assert problem is not None
    assert f"{name} is missing" in problem


def alter(directory: Path, file: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change a stored tensor; sizes and hashes then fit."""
    tensors = load_file(directory / file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, directory / file)
    rehash(directory)


@pytest.mark.parametrize(
    ("recipe", "role", "channel"), [("resq-paper", "o", 5), ("resq-paper", "down", 0), ("rtn", "gate", 101)]
)
def test_one_flipped_weight_whose_hashes_fit_is_named(
    packed: Callable[[str], Path], recipe: str, role: str, channel: int
) -> None:
    directory = packed(recipe)
    entry = Opened(directory).manifest.layers[1]
    linear = Opened(directory).layer(1).linears[role]  # pyright: ignore[reportArgumentType]
    before, size = linear.integers(), linear.bands.bands[0].size

    def flip(bytes: Tensor) -> Tensor:
        bytes[channel, 3] ^= 4
        return bytes

    alter(directory, entry.file, f"{entry.linears[role].name}.qweight.0", flip)
    assert {*verify(directory, backend="reference").files.values()} == {None}
    moved = Opened(directory).layer(1).linears[role].integers() - before  # pyright: ignore[reportArgumentType]
    ((where, column),) = moved.nonzero().tolist()
    assert where == channel
    assert column < size
    report = verify(directory)
    assert [*report.linears.problems] == [f"layers.1.{role}"]
    (line,) = report.problems
    assert line.startswith(f"layers.1.{role}: channel {channel} gives ")
    # Row 0 has the largest input everywhere: 15 of 4 bits.
    got, want = (int(word) for word in (line.split("gives ")[1].split(",")[0], line.split(", ")[1].split(" ")[0]))
    assert got - want == 15 * int(moved[channel, column])
    assert len(report.linears.exact) == 14


def test_a_wrong_layer_of_another_seed_is_several_channels(packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    entry = Opened(directory).manifest.layers[0]

    def other(bytes: Tensor) -> Tensor:
        values = torch.randint(-8, 8, (bytes.shape[0], 2 * bytes.shape[1]), generator=torch.Generator().manual_seed(1))
        return pack_signed(values.to(torch.int8), 4)

    alter(directory, entry.file, f"{entry.linears['up'].name}.qweight.0", other)
    assert [*verify(directory).linears.problems] == ["layers.0.up"]


def test_a_tensor_of_another_shape_whose_hashes_fit_is_found(packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    entry = Opened(directory).manifest.layers[0]
    alter(directory, entry.file, f"{entry.linears['k'].name}.scale", lambda scale: scale[:-1].clone())
    report = verify(directory)
    assert [name for name, problem in report.files.items() if problem] == [entry.file]


@pytest.mark.parametrize(("least", "said"), [(1, "(row 0, segment 0)"), (2, "4 rows at once"), (5, "68 rows at once")])
def test_a_wrong_kernel_is_found_in_every_linear(every: Callable[[str], Path], least: int, said: str) -> None:
    right = CPU.accumulate
    assert right is not None

    def off_by_one(x: object, weight: object) -> Tensor:
        sums = right(x, weight)  # pyright: ignore[reportArgumentType]
        if len(sums) >= least:
            sums[:, 0, 6] += 1
        return sums

    report = verify(every("resq"), backend=replace(CPU, accumulate=off_by_one))
    assert sorted(report.linears.problems) == sorted([*LINEARS, "head"])
    assert all(line.startswith("channel 6 gives ") for line in report.linears.problems.values())
    assert all(said in line for line in report.linears.problems.values())


def test_a_backend_without_integers_says_that_it_replays_none(every: Callable[[str], Path]) -> None:
    report = verify(every("resq"), backend=replace(CPU, accumulate=None))
    assert report.problems == []
    assert report.unchecked == ["integers of 15 linears: backend cpu has no integers"]


def test_a_checkpoint_of_before_is_read_and_says_what_was_not_checked(packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    manifest = json.loads((directory / "resq.json").read_text("utf-8"))
    manifest["golden"] = None
    (directory / "resq.json").write_text(json.dumps(manifest), encoding="utf-8")
    for name in ("golden.safetensors", "SHA256SUMS.txt"):
        (directory / name).unlink()
    done = run("verify", directory)
    assert done.returncode == 0, done.stdout
    for name in ("resq.json", "model.safetensors.index.json", "integers of 15 linears"):
        assert f"not checked: {name}: " in done.stdout
    assert resq.load(directory, backend="reference")(torch.arange(3, 9)[None]).isfinite().all()


def test_what_is_not_fetched_from_the_hub_is_no_mistake(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = packed("resq")
    (directory / "README.md").unlink()
    assert [name for name, problem in verify(directory).files.items() if problem] == ["README.md"]
    monkeypatch.setattr("resq.measure.verify.locate", lambda name: directory)
    report = verify("someone/resq")
    assert report.problems == []
    assert report.unchecked == ["README.md: it is not fetched from the hub"]


def test_an_altered_layer_leaves_the_others_checked(packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    (directory / "model-layer-0.safetensors").write_bytes(b"")
    report = verify(directory)
    assert len(report.problems) == 1
    assert "model-layer-0.safetensors has 0 bytes" in report.problems[0]
    assert sorted(report.linears.exact) == sorted([*LINEARS[7:], "head"])
    assert report.unchecked == ["model-layer-0.safetensors: shapes and integers, as it was altered"]


def test_the_command_names_the_kernels_and_prints_json(every: Callable[[str], Path]) -> None:
    done = run("verify", every("resq"), "--backend", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"integers: 15 of 15 linears as recorded, on backend cpu ({CPU.kernels()})\n" in done.stdout
    assert done.stdout.startswith("files: 12 of 12 as written\n")
    assert done.stdout.endswith("good\n")
    facts = json.loads(run("verify", every("resq"), "--json", "--backend", "reference").stdout)
    assert (facts["good"], facts["problems"], facts["backend"]) == (True, [], "reference")
    assert len(facts["linears"]["exact"]) == 15
    assert set(facts["files"]) == set(NAMES)


def test_what_is_no_checkpoint_is_one_line_and_exit_code_2(tmp_path: Path, packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    (directory / "resq.json").unlink()
    assert run("verify", directory).returncode == 3  # SHA256SUMS.txt says that there was one
    (directory / "SHA256SUMS.txt").unlink()
    for given, words in ((tmp_path / "nowhere", "no checkpoint directory"), (directory, "has no resq.json")):
        done = run("verify", given)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.startswith("error: ")
    assert run("verify", directory, "--backend", "quantum").returncode == 2
