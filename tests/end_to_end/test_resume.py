"""Whatever stops a job, `resume` goes on from what is finished, to the bytes of a run that nothing stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.conftest import make_checkpoint, run
from tests.faults import checkpoint_bytes, in_small_tmpfs

import resq.api
from resq import durable
from resq.checkpoint.work import work_path
from resq.errors import InputError
from resq.models.architecture import Site
from resq.ptq import pipeline, resume, statistics
from resq.ptq.basis.fixed import GatherHeads
from resq.ptq.basis.pca import pca
from resq.ptq.basis.peaks import SearchStrength, smooth
from resq.ptq.learning import learn_rotations
from resq.ptq.recipes import RESQ

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 3,
}
# Two leaves of windows, the second with one.
CALIBRATION: dict[str, Any] = {"windows": 9, "window_length": 16}
MOMENTS, ENDS, ROUNDING = "collecting moments", "embedding and head", "rounding"
SEARCH, LEARNING = "searching the strength of smoothing", "learning rotations"
# A recipe with two tunings, of three and four steps.
TWICE = replace(
    RESQ,
    name="twice",
    basis=(pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY), GatherHeads(), smooth(Site.MLP_HIDDEN)),
    tuning=(SearchStrength((0.2, 0.5, 0.8), windows=2), learn_rotations(Site.RESIDUAL, Site.VALUE, steps=4, batch=2)),
)
OURS = {TWICE.name: TWICE}


class Stopped(BaseException):
    """Stands in for what stops a process: nothing that handles errors handles it."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of three layers and a text."""
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "source", **TINY)
    (home / "text.txt").write_text("the quick brown fox jumps over a lazy dog while it rains. " * 200, encoding="utf-8")
    return home


@pytest.fixture(autouse=True)
def every_layer_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are saved after every layer: at their usual pace a tiny model's hardly ever are."""
    monkeypatch.setattr(resume, "SHARE", 1)


def quantize(home: Path, out: Path, recipe: str = "resq+", **more: Any) -> None:
    given = {"calibration": home / "text.txt", "recipe": OURS.get(recipe, recipe), **CALIBRATION, **more}
    resq.api.quantize(home / "source", out, **given)


@cache
def unstopped(home: Path, recipe: str) -> dict[str, bytes]:
    out = home / recipe / "out"
    quantize(home, out, recipe=recipe)
    return checkpoint_bytes(out)


def stop_at(phase: str, step: int) -> Callable[[str, int, int], None]:
    def progress(now: str, done: int, total: int) -> None:
        if (now, done) == (phase, step):
            raise Stopped

    return progress


def stopped(home: Path, out: Path, phase: str, step: int, **more: Any) -> Path:
    """A job's work directory after it was stopped."""
    with pytest.raises(Stopped):
        quantize(home, out, progress=stop_at(phase, step), **more)
    assert not out.exists()
    return work_path(out)


def goes_on(home: Path, out: Path, recipe: str = "resq+", **more: Any) -> None:
    """Resume; nothing but the same checkpoint is left."""
    quantize(home, out, recipe=recipe, resume=True, **more)
    assert checkpoint_bytes(out) == unstopped(home, recipe)
    assert [file.name for file in out.parent.iterdir()] == [out.name]


STEPS = [
    *((MOMENTS, step) for step in range(1, 28)),
    *((SEARCH, step) for step in range(1, 4)),
    *((LEARNING, step) for step in range(1, 5)),
    *((ENDS, step) for step in range(2)),
    *((ROUNDING, step) for step in range(22)),
]
# The first of each kind, and around the ends of layers.
FEW = [(MOMENTS, 1), (MOMENTS, 10), (MOMENTS, 27), *((ENDS, step) for step in range(2))]
FEW += [(ROUNDING, step) for step in (0, 1, 7, 8, 11, 15, 21)]


@pytest.mark.parametrize(("phase", "step"), FEW)
def test_a_stopped_job_goes_on_to_the_same_bytes(home: Path, tmp_path: Path, phase: str, step: int) -> None:
    stopped(home, tmp_path / "out", phase, step)
    goes_on(home, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["resq", "resq+", "quik", "gptq", "rtn", "twice"])
def test_a_job_stopped_at_any_step_goes_on_to_the_same_bytes(home: Path, tmp_path: Path, recipe: str) -> None:
    told: list[tuple[str, int]] = []
    quantize(home, tmp_path / "told", recipe=recipe, progress=lambda phase, done, total: told.append((phase, done)))
    steps = [step for step in STEPS if step in told]
    assert len(steps) >= 23
    for phase, step in steps:
        out = tmp_path / f"{phase} {step}" / "out"
        out.parent.mkdir()
        stopped(home, out, phase, step, recipe=recipe)
        goes_on(home, out, recipe)


@pytest.mark.parametrize("recipe", ["resq+", "rtn"])
def test_a_job_that_is_stopped_in_every_layer_ends(home: Path, tmp_path: Path, recipe: str) -> None:
    out, passed = tmp_path / "out", list[tuple[str, int]]()
    for phase, step in ((MOMENTS, 15), (MOMENTS, 25), (ROUNDING, 3), (ROUNDING, 10), (ROUNDING, 18)):
        if recipe == "rtn" and phase == MOMENTS:
            continue
        with pytest.raises(Stopped):
            quantize(home, out, recipe=recipe, resume=True, progress=stop_at(phase, step))
        passed.append((phase, step))
    goes_on(home, out, recipe)
    assert len(passed) >= 3


def snapshots(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int, **more: Any) -> Iterator[Path]:
    """What a process that is killed leaves: copies of the job's files, taken whenever something is flushed to disk,
    files half-written then included. Every `each`-th of them."""
    out, taken, real = tmp_path / "whole" / "out", list[Path](), durable.sync
    out.parent.mkdir()

    def sync(path: Path) -> None:
        real(path)
        if work_path(out).is_dir():
            copy = tmp_path / str(len(taken)) / "out"
            shutil.copytree(work_path(out), work_path(copy))
            taken.append(copy)

    with monkeypatch.context() as patch:
        for module in (durable, sys.modules["resq.checkpoint.work"], sys.modules["resq.checkpoint.writer"]):
            patch.setattr(module, "sync", sync)
        quantize(home, out, **more)
    assert len(taken) > 60
    yield from taken[::each]


@pytest.mark.parametrize(
    ("recipe", "each"),
    [("resq+", 12), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("resq+", "quik", "twice"))],
)
def test_what_a_killed_process_leaves_at_any_moment_goes_on_to_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, each: int
) -> None:
    halves = 0
    for out in snapshots(home, tmp_path, monkeypatch, each, recipe=recipe):
        halves += any(".partial-" in file.name for file in work_path(out).rglob("*"))
        goes_on(home, out, recipe)
    assert halves


def position(work: Path) -> tuple[str, int]:
    found = json.loads((work / "position.json").read_text("utf-8"))
    return found["phase"], found["layer"]


def test_what_is_finished_is_not_done_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unstopped(home, "resq+")
    out, calls = tmp_path / "out", list[Any]()

    def counted(module: Any, name: str, said: Callable[..., Any]) -> None:
        real = getattr(module, name)

        def call(*given: Any, **more: Any) -> Any:
            calls.append(said(*given))
            return real(*given, **more)

        monkeypatch.setattr(module, name, call)

    counted(pipeline, "round_layer", lambda shape, layer, recipe, index, *rest: index)
    counted(pipeline, "collect", lambda *given: "pass 1")
    counted(pipeline, "store_ends", lambda *given: "ends")
    counted(statistics, "fold_norms", lambda *given: "layer of pass 1")

    def made() -> list[Any]:
        done = list(calls)
        calls.clear()
        return done

    passing = "layer of pass 1"
    work = stopped(home, out, MOMENTS, 20)  # in the third layer
    assert made() == ["pass 1", passing, passing, passing]
    assert position(work) == ("moments", 2)
    with pytest.raises(Stopped):
        quantize(home, out, resume=True, progress=stop_at(ROUNDING, 2 * 7 + 3))
    assert made() == ["pass 1", passing, "ends", 0, 1, 2]
    assert position(work) == ("rounding", 2)
    names = {file.name for file in work.glob("*.npy")}
    assert names == {f"rounding-2-{name}-{leaf}.npy" for name in ("hidden", "exact") for leaf in range(2)}
    goes_on(home, out)
    assert made() == [2]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 4, len(content) // 2):  # one bit may be padding, or of what is finished
        content[place] ^= 0x7F
    file.write_bytes(content)


DAMAGED = [
    ("rounding-2-hidden-0.npy", cut),
    ("rounding-2-hidden-1.npy", flip),
    ("rounding-2-exact-1.npy", Path.unlink),
    ("maps-1.pt", flip),
    ("maps.json", empty),
    ("position.json", cut),
    ("position.json", Path.unlink),
    ("layer-0.json", cut),
    ("golden-layer-1.safetensors", flip),
    ("checkpoint/model-layer-0.safetensors", flip),
    ("checkpoint/model-layer-1.safetensors", cut),
    ("checkpoint/model-ends.safetensors", Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_what_is_damaged_is_done_again(home: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    work = stopped(home, tmp_path / "out", ROUNDING, 2 * 7 + 3)
    damage(work / name)
    goes_on(home, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "damage"),
    [("moments-2-hidden-1.npy", empty), ("moments-2-sums-0-of-1.pt", flip), ("moments-2-sums-0-of-1.pt", empty)],
)
def test_damaged_moments_are_collected_again(
    home: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    work = stopped(home, tmp_path / "out", MOMENTS, 20)
    damage(work / name)
    goes_on(home, tmp_path / "out")


def told(home: Path, out: Path, *phases: str) -> list[tuple[str, int]]:
    """The steps of some phases that the job of two tunings still takes, to the same bytes."""
    steps: list[tuple[str, int]] = []
    goes_on(home, out, "twice", progress=lambda phase, done, total: steps.append((phase, done)))
    return [step for step in steps if step[0] in phases]


def all_of(phase: str, after: int = 0) -> list[tuple[str, int]]:
    return [(phase, step) for step in range(after + 1, {SEARCH: 4, LEARNING: 5}[phase])]


@pytest.mark.parametrize(
    ("phase", "step", "left"),
    [
        (SEARCH, 2, [*all_of(SEARCH, 2), *all_of(LEARNING)]),
        (SEARCH, 3, all_of(LEARNING)),
        (LEARNING, 1, all_of(LEARNING, 1)),
        (LEARNING, 4, []),
    ],
)
def test_a_stopped_tuning_goes_on_at_its_step_and_what_is_before_it_is_not_done_again(
    home: Path, tmp_path: Path, phase: str, step: int, left: list[tuple[str, int]]
) -> None:
    stopped(home, tmp_path / "out", phase, step, recipe="twice")
    assert told(home, tmp_path / "out", MOMENTS, SEARCH, LEARNING) == left


def test_a_tuning_that_looks_at_no_moments_goes_on_without_them(home: Path, tmp_path: Path) -> None:
    work = stopped(home, tmp_path / "out", LEARNING, 2, recipe="twice")
    for file in (*work.glob("moments-*"), work / "position.json"):
        file.unlink()
    assert told(home, tmp_path / "out", MOMENTS, SEARCH, LEARNING) == all_of(LEARNING, 2)


@pytest.mark.parametrize(
    ("name", "damage", "left"),
    [
        ("tuning-2.pt", flip, all_of(LEARNING)),
        ("tuning-2.pt", Path.unlink, all_of(LEARNING)),
        ("tuning.json", empty, all_of(LEARNING)),
        ("maps-2.pt", cut, [*all_of(SEARCH), *all_of(LEARNING)]),
        ("maps.json", Path.unlink, [*all_of(SEARCH), *all_of(LEARNING)]),
    ],
)
def test_a_tuning_whose_files_are_damaged_begins_anew(
    home: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], left: list[tuple[str, int]]
) -> None:
    work = stopped(home, tmp_path / "out", LEARNING, 2, recipe="twice")
    assert {file.name for file in (*work.glob("maps*"), *work.glob("tuning*"))} == {
        *("maps.json", "maps-2.pt", "tuning.json", "tuning-2.pt")
    }
    damage(work / name)
    assert told(home, tmp_path / "out", SEARCH, LEARNING) == left


def test_a_tuning_of_other_maps_begins_anew(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = stopped(home, tmp_path / "out", SEARCH, 2, recipe="twice")
    (work / "maps-1.pt").unlink()
    real = pipeline.fit_maps
    monkeypatch.setattr(pipeline, "fit_maps", lambda recipe, moments, shape, *rest: real(recipe, moments, shape, 1))
    steps: list[tuple[str, int]] = []
    quantize(
        home,
        tmp_path / "out",
        "twice",
        resume=True,
        progress=lambda phase, done, total: steps.append((phase, done)),
    )
    assert [step for step in steps if step[0] == SEARCH] == all_of(SEARCH)


def test_a_tuning_leaves_no_file_when_its_maps_are_kept(home: Path, tmp_path: Path) -> None:
    work = stopped(home, tmp_path / "out", ENDS, 0, recipe="twice")
    assert not list(work.glob("tuning*"))
    assert [file.name for file in work.glob("maps-*")] == ["maps-3.pt"]


def test_work_whose_inputs_nobody_knows_is_left_alone(home: Path, tmp_path: Path) -> None:
    work = stopped(home, tmp_path / "out", ROUNDING, 2 * 7 + 3)
    cut(work / "job.json")
    for asked in (False, True):
        with pytest.raises(InputError, match=r"job\.json cannot be read, .*; remove .*\.out\.partial to begin anew"):
            quantize(home, tmp_path / "out", resume=asked)
    assert (work / "position.json").is_file()


def test_layers_of_other_maps_are_forgotten(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that are lost are made again, on another machine maybe to other bits: nothing of the old ones may stay."""
    work = stopped(home, tmp_path / "out", ROUNDING, 2 * 7 + 3)
    (work / "maps-1.pt").unlink()
    real = pipeline.fit_maps
    monkeypatch.setattr(pipeline, "fit_maps", lambda recipe, moments, shape, *rest: real(recipe, moments, shape, 1))
    quantize(home, tmp_path / "out", resume=True)
    quantize(home, tmp_path / "whole")
    for file in (tmp_path / "whole").glob("model-*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def change_weight(home: Path) -> None:
    file = home / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def change_text(home: Path) -> None:
    (home / "text.txt").write_text("a quite different text, of other words. " * 200, encoding="utf-8")


def change_nothing(home: Path) -> None: ...


CHANGES: list[tuple[str, Callable[[Path], None], dict[str, Any]]] = [
    ("source model.safetensors differs", change_weight, {}),
    ("calibration tokens_sha256 differs", change_text, {}),
    ("seed is 1, was 0", change_nothing, {"seed": 1}),
    ("recipe name is resq, was resq+", change_nothing, {"recipe": "resq"}),
    ("recipe precision", change_nothing, {"bits": 3}),
    ("calibration windows is 10, was 9", change_nothing, {"windows": 10}),
    ("calibration window_length is 17, was 16", change_nothing, {"window_length": 17}),
    ("rounding windows is 5, was 9", change_nothing, {"rounding_windows": 5}),
    ("tied head is False, was True", change_nothing, {"untie": True}),
]


@pytest.mark.parametrize(("what", "change", "given"), CHANGES)
def test_a_job_whose_inputs_changed_is_refused_by_name_and_kept(
    home: Path, tmp_path: Path, what: str, change: Callable[[Path], None], given: dict[str, Any]
) -> None:
    mine = shutil.copytree(
        home,
        tmp_path / "mine",
        ignore=lambda place, names: set(names) - {"source", "text.txt"} if Path(place) == home else set(),
    )
    out = tmp_path / "made" / "out"
    out.parent.mkdir()
    work = stopped(mine, out, ROUNDING, 9)
    before = {file: file.read_bytes() for file in work.rglob("*") if file.is_file()}
    change(mine)
    with pytest.raises(InputError) as caught:
        quantize(mine, out, resume=True, **given)
    assert what in str(caught.value)
    assert str(caught.value).startswith(f"{out} was begun with other inputs: ")
    assert {file: file.read_bytes() for file in work.rglob("*") if file.is_file()} == before


def test_without_resume_a_job_that_was_begun_is_left_alone(home: Path, tmp_path: Path) -> None:
    work = stopped(home, tmp_path / "out", ROUNDING, 9)
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/out was begun and not finished; go on with --resume, or remove"
    ):
        quantize(home, tmp_path / "out")
    assert (work / "position.json").is_file()
    goes_on(home, tmp_path / "out")


def test_the_command_says_how_to_go_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = resume.Position.save

    def full(position: Any, phase: str, layer: int, *rest: Any) -> None:
        real(position, phase, layer, *rest)
        if (phase, layer) == ("rounding", 2):
            raise InputError("the disk is full")

    monkeypatch.setattr(resume.Position, "save", full)
    command = ["quantize", home / "source", "--recipe", "resq+", "--out", tmp_path / "out"]
    command += ["--calibration", home / "text.txt", "--windows", 9, "--window-length", 16]
    done = run(*command)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: the disk is full; what is finished is kept: go on with --resume"
    monkeypatch.undo()
    done = run(*command, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert {row["layer"] for row in json.loads(done.stdout)["linears"]} == {0, 1, 2}
    assert checkpoint_bytes(tmp_path / "out") == unstopped(home, "resq+")


ON_A_FULL_DISK = """
import gc, subprocess, sys, shutil
from pathlib import Path
import torch
torch.set_num_threads(1)
import resq.api
from resq.errors import InputError
from resq.ptq import resume
resume.SHARE = 1
home, disk, kept, activations = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
def quantize(**more):
    resq.api.quantize(home / "source", disk / "out", calibration=home / "text.txt", recipe="resq+", windows=9,
                      window_length=16, activations=activations, **more)
def size(pages):
    subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", str(disk)], check=True)
for pages in range(int(sys.argv[5]), 150, int(sys.argv[6])):
    size(pages)
    try:
        quantize()
    except InputError as error:
        print("; ".join([str(error), *getattr(error, "__notes__", ())]))
        size(1000)
        quantize(resume=True)
        shutil.move(disk / "out", kept / str(pages) / "out")
        left = list(disk.iterdir())
        assert not left, left
    else:
        print("done")
        break
    gc.collect()  # the spilled states of the job that failed
"""


@pytest.mark.parametrize(
    ("activations", "first", "each"),
    [("disk", 13, 17), *(pytest.param(where, 2, 3, marks=pytest.mark.slow) for where in ("memory", "disk"))],
)
def test_a_disk_that_is_full_at_any_moment_is_one_line_and_with_space_the_job_goes_on(
    home: Path, tmp_path: Path, activations: str, first: int, each: int
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    script = [sys.executable, "-c", ON_A_FULL_DISK, str(home), str(disk), str(kept), activations, str(first), str(each)]
    done = in_small_tmpfs(disk, "16k", *script)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "done"
    assert all("the disk is full; free some space" in line or "has no room" in line for line in lines)
    assert sum("what is finished is kept: go on with --resume" in line for line in lines) >= 2
    made = [checkpoint_bytes(out) for out in kept.glob("*/out")]
    assert len(made) == len(lines)
    assert all(each == unstopped(home, "resq+") for each in made)


KILLS = 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sees in /proc that the work began")
def test_killed_at_random_moments_the_command_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    make_checkpoint(home / "source", **{**TINY, "num_hidden_layers": 8})
    (home / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 500, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        """The real command, at work."""
        command = [sys.executable, "-m", "resq", "quantize", home / "source", "--recipe", "resq+", "--resume"]
        command += ["--calibration", home / "text.txt", "--windows", "9", "--window-length", "16", "--out", out]
        with open(out.parent / "log", "wb") as log:
            process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
        lock = str(work_path(out) / "lock")
        while process.poll() is None and lock not in opened(process.pid):
            time.sleep(0.002)
        return process

    whole, moments = tmp_path / "whole" / "out", random.Random(0)
    whole.parent.mkdir()
    process, started = start(whole), time.monotonic()
    assert process.wait(timeout=300) == 0
    took, wanted = time.monotonic() - started, checkpoint_bytes(whole)
    kills, seen = 0, set[str]()
    for job in range(5 * KILLS):
        out = tmp_path / f"from-{job}" / "out"
        out.parent.mkdir()
        for _ in range(3):
            process = start(out)
            try:
                process.wait(timeout=moments.uniform(0, took))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills += process.wait() == -signal.SIGKILL
                position = work_path(out) / "position.json"
                seen.add(position.read_text("utf-8") if position.is_file() else "")
        if not out.exists():
            assert start(out).wait(timeout=300) == 0, (out.parent / "log").read_text("utf-8")
        assert checkpoint_bytes(out) == wanted
        if kills >= KILLS:
            break
    assert kills >= KILLS
    assert len(seen) >= 4, seen


KILLED_IN_A_TUNING = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import resq.api
from resq.ptq import resume
resume.SHARE = 1
home, out, recipe, kill = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
seen = []
def progress(phase, done, total):
    seen.append([phase, done])
    if [phase, done] == kill:
        os.kill(os.getpid(), signal.SIGKILL)
resq.api.quantize(home / "source", out, recipe=recipe, calibration=home / "text.txt", windows=9, window_length=16,
                  resume=True, progress=progress)
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "phase", "steps", "kills"),
    [("resq-learned", LEARNING, 100, (30, 31, 99)), ("smoothquant+", SEARCH, 9, (1, 7))],
)
def test_killed_in_a_tuning_a_job_goes_on_at_its_step_to_the_same_bytes(
    home: Path, tmp_path: Path, recipe: str, phase: str, steps: int, kills: tuple[int, ...]
) -> None:
    def job(out: Path, *kill: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED_IN_A_TUNING, home, out, recipe, json.dumps(kill)]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)

    def taken(done: subprocess.CompletedProcess[str]) -> list[int]:
        assert done.returncode == 0, done.stderr
        return [step for name, step in json.loads(done.stdout) if name == phase]

    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    whole.parent.mkdir()
    assert taken(job(whole)) == [*range(1, steps + 1)]
    for kill in kills:
        assert job(out, phase, kill).returncode == -signal.SIGKILL
    assert taken(job(out)) == [*range(kills[-1] + 1, steps + 1)]
    assert checkpoint_bytes(out) == checkpoint_bytes(whole)


def opened(process: int) -> set[str]:
    """The files that a process has open."""
    found = set()
    with suppress(OSError):
        for link in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(link))
    return found
