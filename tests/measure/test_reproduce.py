"""`resq reproduce`: a checkpoint's manifest is enough to make it again, and what is not the same is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import brief, make_checkpoint, run
from tests.measure.test_verify import rehash
from torch import Tensor

import resq
from resq.api import calibrate
from resq.errors import CheckpointError, InputError
from resq.reproduce import reproduce
from resq.runtime.load import Opened

SIZES: dict[str, Any] = {"windows": 8, "window_length": 32}
# Every option that decides the integers, off its default.
MADE: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"head_bits": 8, "rounding_windows": 3, **SIZES},
    "quik": {"untie": True, "bits": 3, **SIZES},
    "resq": {"seed": 5, "rounding_windows": 5, **SIZES},
    "resq-learned": {"seed": 2, **SIZES},
    "resq-kv": SIZES,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its text, and checkpoints of it as they are asked for; to read only."""
    place = tmp_path_factory.mktemp("reproduce")
    make_checkpoint(place / "source", seed=2)
    (place / "text").write_text("the quick brown fox jumps over a lazy dog while it rains. " * 20, encoding="utf-8")
    (place / "more").write_text("a second text, of which some windows are made as well. " * 10, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def made(place: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        if not (place / name).exists():
            texts = [] if name == "rtn" else [place / "text", place / "more"]
            resq.quantize(place / "source", place / name, recipe=brief(name), calibration=texts, **MADE[name])
        return place / name

    return make


@pytest.fixture
def packed(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same to change, in a directory of its own."""
    return lambda name: shutil.copytree(made(name), tmp_path / name)


def edit(directory: Path, path: str, value: Any) -> None:
    """Set a value of the manifest, or take the key away for None."""
    manifest = json.loads((directory / "resq.json").read_text("utf-8"))
    *steps, last = path.split("/")
    node = manifest
    for step in steps:
        node = node[step]
    if value is None:
        del node[last]
    else:
        node[last] = value
    (directory / "resq.json").write_text(json.dumps(manifest), encoding="utf-8")
    rehash(directory)


def alter(directory: Path, file: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file; every hash then fits."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / file).items()}
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})
    rehash(directory)


def refused(*arguments: object) -> str:
    """The one line on standard error of a command that cannot run."""
    done = run("reproduce", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("recipe", MADE)
def test_the_manifest_alone_makes_it_again(made: Callable[[str], Path], recipe: str) -> None:
    found = reproduce(made(recipe))
    assert found.differences.identical
    assert found.environment == []
    assert (found.differences.tensors, found.differences.fields) == ([], {})
    there = {file.name for file in made(recipe).iterdir()} - {"README.md", "SHA256SUMS.txt", "resq.json"}
    assert set(found.differences.files) == there
    assert [file for file in made(recipe).parent.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("recipe", ["quarot", "smoothquant+"])
def test_a_renamed_checkpoint_made_from_elsewhere_is_still_identical(place: Path, recipe: str, tmp_path: Path) -> None:
    shutil.copytree(place / "source", tmp_path / "original")
    shutil.copy(place / "text", tmp_path / "words")
    resq.quantize(tmp_path / "original", tmp_path / "made", recipe=recipe, calibration=tmp_path / "words", **SIZES)
    for name in ("original", "words"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    shutil.move(tmp_path / "made", tmp_path / "sub" / "renamed")
    said = refused(tmp_path / "sub" / "renamed")
    assert f"the source was {tmp_path / 'original'}, which is no directory here; say where it is with --source" in said
    said = refused(tmp_path / "sub" / "renamed", "--source", tmp_path / "moved-original")
    assert f"the calibration text {tmp_path / 'words'} is not here (sha256 " in said
    assert said.endswith("is recorded); say where it is with --calibration\n")
    where = ["--source", tmp_path / "moved-original", "--calibration", tmp_path / "moved-words"]
    done = run("reproduce", tmp_path / "sub" / "renamed", *where, "--work", tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("files: 9 of 9 identical\nidentical\n")
    assert done.stdout.startswith(f"made again from {tmp_path / 'moved-original'} in ")
    assert {file.name for file in tmp_path.iterdir()} == {"moved-original", "moved-words", "sub"}


@pytest.fixture(scope="module")
def from_statistics(place: Path) -> tuple[Path, Path]:
    """A checkpoint whose windows another seed chose than its rotations, and the statistics that it was made with."""
    file, out = place / "stats", place / "from-stats"
    calibrate(place / "source", file, recipe="resq", calibration=place / "text", seed=3, **SIZES)
    options = {"recipe": "resq", "statistics": file, "calibration": place / "text", "seed": 4}
    resq.quantize(place / "source", out, **options)
    return out, file


@pytest.mark.parametrize("given", [False, True], ids=["collected again", "given"])
def test_with_statistics_their_seed_chooses_the_windows(from_statistics: tuple[Path, Path], given: bool) -> None:
    out, file = from_statistics
    phases: set[str] = set()
    found = reproduce(out, statistics=file if given else None, progress=lambda phase, done, of: phases.add(phase))
    assert found.differences.identical
    assert ("collecting moments" in phases) is not given


def test_other_statistics_are_refused_by_name(place: Path, from_statistics: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = from_statistics
    calibrate(place / "source", tmp_path / "other", recipe="resq", calibration=place / "text", seed=4, **SIZES)
    said = refused(out, "--statistics", tmp_path / "other")
    want = json.loads((out / "resq.json").read_text("utf-8"))["calibration"]["statistics"]["sha256"]
    assert f"{tmp_path / 'other'} is not the statistics file that the checkpoint was made with" in said
    assert f"{want} is recorded" in said
    assert "no statistics file" in refused(out, "--statistics", tmp_path / "nowhere")


def test_one_flipped_integer_is_named_and_counted(packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    entry = Opened(directory).manifest.layers[1]
    name = f"{entry.linears['gate'].name}.qweight.0"
    bits, size = (entry.linears["gate"].bands or [])[0]
    values = entry.linears["gate"].shape[0] * size
    assert bits == 4

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[name][7, 3] ^= 0b0001_0010  # the low half by 2, the high half by 1

    alter(directory, entry.file, flip)
    done = run("reproduce", directory)
    assert done.returncode == 3
    assert done.stdout.endswith("not identical\n")
    files = len([*directory.iterdir()]) - 3
    assert f"files: {files - 1} of {files} identical\n" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(name))
    assert line.split()[1:] == ["2", f"{values:,}", "2"]
    facts = json.loads(run("reproduce", directory, "--json").stdout)
    assert facts["identical"] is False
    assert [name for name, same in facts["differences"]["files"].items() if not same] == [entry.file]
    (tensor,) = facts["differences"]["tensors"]
    want = {"file": entry.file, "tensor": name, "differing": 2, "values": values, "largest": 2.0}
    assert tensor == {**want, "packed": True, "problem": None}
    assert f"integers: 2 of {values:,} in 1 qweight tensors differ, by at most 2\n" in done.stdout
    assert facts["differences"]["same"] == len(load_file(directory / entry.file)) - 1


def test_every_kind_of_change_of_a_tensor_is_found(packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    entry = Opened(directory).manifest.layers[0]
    q, k, v, o = (entry.linears[role].name for role in "qkvo")
    key = entry.key.map
    assert key is not None
    assert key.tensor is not None
    scale = float(load_file(directory / entry.file)[f"{q}.scale"][1, 0])

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{q}.scale"][1, 0] *= 3
        tensors[f"{k}.scale"][0] = torch.nan
        tensors[f"{v}.scale"] = tensors[f"{v}.scale"][:-1].clone()
        tensors["extra"] = tensors.pop(f"{o}.scale")
        tensors[key.tensor or ""][0, 0] += 2**-20

    alter(directory, entry.file, change)
    found = {each.tensor: each for each in reproduce(directory).differences.tensors}
    assert set(found) == {f"{q}.scale", f"{k}.scale", f"{v}.scale", f"{o}.scale", "extra", key.tensor}
    assert found[f"{q}.scale"].differing == 1
    assert found[f"{q}.scale"].largest == pytest.approx(2 * scale, rel=1e-6)
    assert (found[f"{k}.scale"].differing, found[f"{k}.scale"].largest) == (2, None)
    assert found[f"{v}.scale"].problem == "float32 [31, 2] and float32 [32, 2]"
    assert found["extra"].problem == "it is in the first alone"
    assert found[f"{o}.scale"].problem == "it is in the second alone"
    assert 0 < (found[key.tensor].largest or 0) <= 2**-19


def test_another_seed_in_the_manifest_makes_another_checkpoint(packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    edit(directory, "recipe/seed", 6)
    found = reproduce(directory).differences
    assert not found.identical
    assert not found.files["model-layer-0.safetensors"]
    integers = [each for each in found.tensors if ".qweight.0" in each.tensor]
    # Another rotation: most 4-bit integers are others.
    assert all(each.differing > each.values / 2 and (each.largest or 0) > 4 for each in integers)
    assert len(integers) == 14


def test_fields_of_the_manifest_are_compared(packed: Callable[[str], Path]) -> None:
    directory = packed("rtn")
    edit(directory, "notes", ["a remark"])
    edit(directory, "source/dtype", "float16")
    done = run("reproduce", directory)
    assert done.returncode == 3
    assert 'manifest: source.dtype is "float16", made again "bfloat16"\n' in done.stdout
    assert 'manifest: notes is ["a remark"], made again []\n' in done.stdout


def test_what_of_the_machine_is_another_is_said_in_words(packed: Callable[[str], Path]) -> None:
    directory = packed("rtn")
    edit(directory, "made_by/torch", "1.2.3")
    edit(directory, "made_by/card", "a card")
    done = run("reproduce", directory)
    assert done.returncode == 0
    assert f"not as it was: torch: 1.2.3, now {torch.__version__}\n" in done.stdout
    assert "not as it was: card: a card, now none\n" in done.stdout
    assert done.stdout.count("not as it was") == 2


def test_it_runs_with_the_recorded_threads(packed: Callable[[str], Path]) -> None:
    directory, before, seen = packed("rtn"), torch.get_num_threads(), set[int]()
    edit(directory, "made_by/threads", str(before + 1))

    def progress(phase: str, done: int, of: int) -> None:
        if phase == "rounding":
            seen.add(torch.get_num_threads())

    assert reproduce(directory, progress=progress).threads == before + 1
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


def test_a_checkpoint_of_before_is_made_again_as_far_as_it_records(packed: Callable[[str], Path]) -> None:
    directory = packed("resq")
    for path in ("calibration/seed", "calibration/texts", "calibration/statistics", "source/sha256/config.json"):
        edit(directory, path, None)
    for name in ("processor", "instructions", "threads", "device"):
        edit(directory, f"made_by/{name}", None)
    found = reproduce(directory)
    assert found.differences.identical
    said = f"threads: not recorded, now {torch.get_num_threads()}"
    assert (said in found.environment, len(found.environment)) == (True, 4)


def test_a_changed_text_is_refused_by_name(packed: Callable[[str], Path], place: Path, tmp_path: Path) -> None:
    directory = packed("resq")
    changed = tmp_path / "changed"
    changed.write_text((place / "more").read_text("utf-8") + "\n", encoding="utf-8")
    first, second = json.loads((directory / "resq.json").read_text("utf-8"))["calibration"]["texts"]
    assert (first["name"], second["name"]) == (str(place / "text"), str(place / "more"))
    said = refused(directory, "--calibration", place / "text", "--calibration", changed)
    assert f"{changed} is not the calibration text {place / 'more'} that the checkpoint was made with" in said
    assert f"{second['sha256']} is recorded; give that text" in said
    said = refused(directory, "--calibration", place / "more", "--calibration", place / "text")
    assert f"{first['sha256']} is recorded" in said
    said = refused(directory, "--calibration", place / "text")
    assert "was made with 2 texts" in said
    # Without recorded texts the windows' own hash is left.
    edit(directory, "calibration/texts", None)
    said = refused(directory, "--calibration", changed)
    assert f"{changed} gives other windows than were recorded" in said
    assert "leave --calibration out" in refused(packed("rtn"), "--calibration", changed)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_another_source_is_refused_by_the_file_that_differs(
    packed: Callable[[str], Path], place: Path, tmp_path: Path, file: str
) -> None:
    directory, source = packed("rtn"), shutil.copytree(place / "source", tmp_path / "source")
    if file == "config.json":
        config = json.loads((source / file).read_text("utf-8"))
        (source / file).write_text(json.dumps({**config, "rms_norm_eps": 1e-6}), encoding="utf-8")
    else:
        tensors = load_file(source / file)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, source / file)
    want = json.loads((directory / "resq.json").read_text("utf-8"))["source"]["sha256"][file]
    said = refused(directory, "--source", source)
    assert f"{source / file} is not what the checkpoint was made from" in said
    assert f"{want} is recorded; give the original with --source" in said


def test_another_tokenizer_is_found_by_its_windows(packed: Callable[[str], Path], place: Path, tmp_path: Path) -> None:
    source = shutil.copytree(place / "source", tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    said = refused(packed("resq"), "--source", source)
    assert "gives other windows than were recorded" in said
    assert "the source with the tokenizer that it was made with" in said


def test_a_source_from_the_hub_is_asked_for(packed: Callable[[str], Path]) -> None:
    directory = packed("rtn")
    edit(directory, "source/name", "someone/llama")
    assert "the source was someone/llama, which is no directory here" in refused(directory)


def test_what_cannot_be_run_is_one_line(packed: Callable[[str], Path], place: Path, tmp_path: Path) -> None:
    directory = packed("rtn")
    assert "no checkpoint directory" in refused(tmp_path / "nowhere")
    assert "has no resq.json" in refused(place / "source")
    assert "cannot write to /dev/null" in refused(directory, "--work", "/dev/null")
    assert "--device 'card' is no device" in refused(directory, "--device", "card")
    assert "leave --statistics out" in refused(directory, "--statistics", place / "text")
    edit(directory, "recipe/definition", {})
    assert "does not record its recipe rtn" in refused(directory)


def test_a_damaged_checkpoint_is_not_run(packed: Callable[[str], Path]) -> None:
    directory = packed("rtn")
    (directory / "model-layer-1.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model-layer-1\.safetensors has 0 bytes"):
        reproduce(directory)


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_an_interrupted_rerun_leaves_nothing(packed: Callable[[str], Path], error: type[BaseException]) -> None:
    directory, seen = packed("resq"), []

    def progress(phase: str, done: int, of: int) -> None:
        if phase == "rounding" and done == 9:
            seen.extend(directory.parent.glob(".resq.reproduce-*/*"))
            raise error

    with pytest.raises(error) as caught:
        reproduce(directory, progress=progress)
    assert not hasattr(caught.value, "__notes__")  # nothing can be resumed
    assert len(seen) == 1  # it was there
    assert [file.name for file in directory.parent.iterdir()] == ["resq"]


def test_the_tiny_model_is_made_again_from_its_name(tmp_path: Path) -> None:
    made = run("quantize", "--recipe", "rtn", "--out", tmp_path / "tiny")
    assert made.returncode == 0, made.stderr
    done = run("reproduce", tmp_path / "tiny")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("made again from tiny in ")
