"""Tuning the linears' tiles: candidates, what is timed, what is proposed; in Triton's interpreter without a card."""

from __future__ import annotations

import pytest
import torch

from resq.backends.triton.configs import chosen, listed
from resq.errors import InputError
from resq.measure.gpu import sweep as module
from resq.measure.gpu.sweep import (
    CANDIDATES,
    KERNEL,
    Timing,
    by_bands,
    candidates,
    compile_part,
    linears_of,
    proposals,
    sweep,
)
from resq.measure.gpu.timer import HostTimer
from resq.measure.shapes import shape_named
from resq.measure.synthetic import one_layer
from resq.models.architecture import Role, Shape
from resq.models.decoder import Layer
from resq.ptq.recipes import recipe_named

HOST = HostTimer(torch.device("cpu"))


def small(recipe: str = "resq") -> tuple[Shape, Layer]:
    """A block whose linears the interpreter runs in a second."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return one_layer(shape_named("tiny") | sizes, recipe_named(recipe))


def test_candidates_are_whole_choices_and_the_default_comes_first() -> None:
    for rows, changes in CANDIDATES.items():
        found = list(candidates(rows, 2, changes))
        plain = chosen(KERNEL, rows=rows, groups=1, bands=2)
        assert found[0] == plain
        assert all(plain.keys() <= use.keys() for use in found)
        assert all(use not in found[:number] for number, use in enumerate(found))
        assert len(found) > 4


def test_all_linears_of_a_block_are_run() -> None:
    shape, layer = small()
    points = by_bands(layer)
    assert {bands: len(each) for bands, each in points.items()} == {2: 3, 1: 1}
    outs = [out for each in points.values() for out in linears_of(layer, shape, each, 3, copies=2)()]
    assert [out.shape for out in outs] == [(1, 3, shape.sizes()[role][0]) for role in Role]


def test_a_sweep_times_what_runs_and_says_why_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, layer = small()
    before = chosen(KERNEL, rows=1, groups=1, bands=1)
    whole = module.linears_of

    def failing(*given: object) -> object:
        run = whole(*given)  # pyright: ignore

        def sometimes() -> object:
            use = chosen(KERNEL, rows=1, groups=1, bands=1)
            if use["channels"] == 16:
                raise RuntimeError("out of resource: shared memory\nRequired: many")
            outs = run()
            return [out + 1 for out in outs] if use["waves"] == 3 else outs

        return sometimes

    monkeypatch.setattr(module, "linears_of", failing)
    changes = ({}, {"channels": 32}, {"channels": 16}, {"waves": 3})
    found = sweep(layer, shape, HOST, wanted={1: changes})
    assert [each.bands for each in found] == [2] * 4 + [1] * 4
    assert [each.use for each in found] == [before | change for change in changes] * 2
    why = [None, None, "out of resource: shared memory", "not what the default computes"]
    assert [each.failed for each in found] == why * 2
    assert [each.seconds is None for each in found] == [False, False, True, True] * 2
    assert chosen(KERNEL, rows=1, groups=1, bands=1) == before


def test_the_parts_of_a_compilation_are_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, layer = small()
    seen = []
    monkeypatch.setattr(
        module, "linears_of", lambda *_: lambda: seen.append(chosen(KERNEL, rows=1, groups=1, bands=1)) or []
    )
    wanted = {1: ({}, {"channels": 32}, {"channels": 16})}
    assert [compile_part(layer, shape, part, 2, wanted) for part in range(2)] == [3, 3]
    assert {use["channels"] for use in seen} == {chosen(KERNEL, rows=1, groups=1, bands=1)["channels"], 32, 16}


def test_proposals_are_the_fastest_of_each_range() -> None:
    def timing(rows: int, bands: int, name: int, seconds: float | None) -> Timing:
        return Timing(rows, bands, {"tokens": name}, seconds)

    timings = [timing(64, 2, 1, 3.0), timing(64, 2, 2, 2.0), timing(64, 1, 3, 1.0), timing(16, 2, 4, 1.0)]
    timings += [timing(16, 2, 5, None), timing(512, 2, 6, 9.0)]
    assert proposals(timings) == [
        {"when": {"rows": 16, "bands": 2, "groups": 1}, "use": {"tokens": 4}},
        {"when": {"rows": 64, "bands": 1, "groups": 1}, "use": {"tokens": 3}},
        {"when": {"rows": 64, "bands": 2, "groups": 1}, "use": {"tokens": 2}},
        {"when": {"bands": 2, "groups": 1}, "use": {"tokens": 6}},
        *listed(KERNEL),
    ]
    assert proposals([timing(1, 1, 1, None)]) == listed(KERNEL)


def test_linears_of_another_kernel_are_refused() -> None:
    shape, layer = small("resq-weight-only")
    with pytest.raises(InputError, match="only rounded linears with rounded inputs"):
        sweep(layer, shape, HOST)
