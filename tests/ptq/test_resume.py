"""A tuning that was stopped goes on at its bookmark to the same bits; a bookmark is what was saved, or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resq.backends.reference import dense
from resq.checkpoint import work as directory
from resq.checkpoint.work import WorkDirectory
from resq.errors import InputError
from resq.models.architecture import Site
from resq.models.source import Source
from resq.numerics.device import changed
from resq.numerics.maps import Dense, LinearMap
from resq.progress import silent
from resq.ptq import resume
from resq.ptq.basis.peaks import SearchStrength
from resq.ptq.learning import LearnRotations
from resq.ptq.pipeline import fit_maps
from resq.ptq.recipe import At, Bookmark, Fitted, Recipe, Setting, Tuning
from resq.ptq.recipes import RESQ, SMOOTHQUANT_PLUS
from resq.ptq.resume import Position, Stage
from resq.ptq.statistics import collect

START = Stage({At(Site.RESIDUAL): Dense(torch.eye(4, dtype=torch.float64))}, ("a note",))


class Stopped(BaseException):
    """Stands in for what stops a process."""


@pytest.fixture
def work(tmp_path: Path) -> Iterator[WorkDirectory]:
    """A job's directory, of this process."""
    with WorkDirectory(tmp_path / "out", {}) as work:
        yield work


@pytest.fixture(autouse=True)
def every_step_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the usual pace a tiny model's steps hardly ever are."""
    monkeypatch.setattr(resume, "SHARE", 1)


def process(work: WorkDirectory) -> Position:
    """The position of another process on the job."""
    return Position(work.path, work)


def bits(maps: Any) -> list[bytes]:
    """Every tensor of some maps."""
    found: list[bytes] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor.numpy().tobytes())
        return tensor

    changed(dict(maps), add)
    return found


TUNINGS: list[tuple[Recipe, Tuning, int]] = [
    (RESQ, LearnRotations((Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY), steps=4, batch=2), 4),
    (RESQ, LearnRotations((Site.RESIDUAL, Site.VALUE), steps=3, batch=4, whole=True, round_weights=True), 3),
    (SMOOTHQUANT_PLUS, SearchStrength((0.2, 0.5, 0.9), windows=2), 3),
]


@pytest.mark.parametrize(("recipe", "tuning", "steps"), TUNINGS)
def test_a_tuning_stopped_at_every_step_ends_with_the_bits_of_one_that_was_not(
    recipe: Recipe, tuning: Tuning, steps: int, checkpoint: Callable[..., Path], work: WorkDirectory
) -> None:
    source = Source.open(checkpoint())
    tokens = torch.randint(3, 259, (6, 32), generator=torch.Generator().manual_seed(9))
    moments = collect(source, dense(torch.float32), tokens, recipe.needs, silent)
    setting = Setting(source.shape, recipe.precision, 0)
    maps = fit_maps(recipe, moments, source.shape, 0)

    def fitted(maps: Any, bookmark: Bookmark) -> Fitted:
        return Fitted(source, recipe, maps, moments, tokens, setting, bookmark)

    whole = tuning(fitted(maps, Bookmark()), silent)
    process(work).keep_stage(Stage(maps))
    taken: list[int] = []

    def stops(phase: str, done: int, total: int) -> None:
        taken.append(done)
        raise Stopped

    for _ in range(steps):
        position = process(work)
        stage = position.stage()
        assert stage is not None
        with pytest.raises(Stopped):
            tuning(fitted(stage.maps, position.bookmark()), stops)
    tuned = tuning(fitted(maps, process(work).bookmark()), stops)
    assert taken == [*range(1, steps + 1)]
    assert len(whole.losses) == steps
    assert (tuned.losses, tuned.notes) == (whole.losses, whole.notes)
    assert tuned.maps.keys() == whole.maps.keys()
    assert bits(tuned.maps) == bits(whole.maps)
    assert bits(tuned.maps) != bits(maps)


def test_a_stage_comes_back_with_its_maps_and_notes(work: WorkDirectory) -> None:
    assert process(work).stage() is None
    process(work).keep_stage(START)
    turned = Stage({At(Site.VALUE, 1): Dense(torch.randn(3, 3).T)}, ("a", "b"), 1)
    for stage in (START, turned):
        process(work).keep_stage(stage)
        found = process(work).stage()
        assert found is not None
        assert (found.notes, found.tunings, found.maps.keys()) == (stage.notes, stage.tunings, stage.maps.keys())
        for at, map in stage.maps.items():
            assert torch.equal(matrix(found.maps[at]), matrix(map))
            assert matrix(found.maps[at]).stride() == matrix(map).stride()


def matrix(map: LinearMap) -> Tensor:
    assert isinstance(map, Dense)
    return map.matrix


def test_the_last_save_is_loaded_by_the_next_process(work: WorkDirectory) -> None:
    process(work).keep_stage(START)
    assert process(work).bookmark().load() is None
    bookmark = process(work).bookmark()
    for step in range(3):
        at = torch.full((2,), step)
        bookmark.save(lambda at=at: {"losses": [0.1, 0.2], "at": at})
        found = process(work).bookmark().load()
        assert found["losses"] == [0.1, 0.2]
        assert found["at"].tolist() == [step, step]
    assert [file.name for file in work.path.glob("tuning-*")] == ["tuning-3.pt"]


def test_a_save_that_fails_leaves_the_one_before(work: WorkDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is the file or its record that cannot be written."""
    process(work).keep_stage(START)
    bookmark = process(work).bookmark()
    bookmark.save(lambda: 1)

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    for module, name in ((resume, "write_object"), (directory, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(InputError, match="the disk is full"):
                bookmark.save(lambda: 2)
        assert process(work).bookmark().load() == 1


def test_a_bookmark_is_of_the_maps_kept_last(work: WorkDirectory) -> None:
    process(work).keep_stage(START)
    process(work).bookmark().save(lambda: 1)
    files = {name: (work.path / name).read_bytes() for name in ("tuning.json", "tuning-1.pt")}
    process(work).keep_stage(Stage(START.maps, START.notes, START.tunings + 1))  # as after a tuning without a step
    assert not list(work.path.glob("tuning*"))
    for name, content in files.items():  # as a process killed before it removed them leaves them
        (work.path / name).write_bytes(content)
    assert process(work).bookmark().load() is None


def test_saves_keep_to_their_share_of_the_time(work: WorkDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SHARE", 10**9)
    process(work).keep_stage(START)
    bookmark, made = process(work).bookmark(), list[int]()
    for _ in range(3):
        bookmark.save(lambda: made.append(len(made)))
    assert made == [0]


def test_where_nothing_is_kept_nothing_is_made(tmp_path: Path) -> None:
    for bookmark in (Bookmark(), Position().bookmark(), Position(tmp_path).bookmark()):
        bookmark.save(lambda: pytest.fail("made"))
        assert bookmark.load() is None
    assert not os.listdir(tmp_path)
