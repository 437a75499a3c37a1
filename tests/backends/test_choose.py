"""Which backend and which instruction set run: the fastest that can, or the one that was named, never another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.backends.cases import instruction_sets
from tests.conftest import run

import resq
from resq.backends.choose import BACKENDS, backend_named, describe_system
from resq.backends.cpu import CPU, native
from resq.backends.reference import REFERENCE
from resq.errors import BackendUnavailable, InputError


@pytest.fixture(autouse=True)
def same_instruction_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests may force one; afterwards the one before is back."""
    monkeypatch.delenv(native.FORCE, raising=False)
    before = native.module().active()
    yield
    native.use(before)


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_the_cpu_backend_is_the_first_choice_without_a_card_and_the_reference_the_last() -> None:
    assert list(BACKENDS) == ["triton", "cpu", "reference"]
    assert backend_named() is backend_named("cpu") is CPU
    assert backend_named("reference") is REFERENCE
    other = replace(REFERENCE, name="other")
    assert backend_named(other) is other


def test_the_environment_names_what_is_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESQ_BACKEND", "reference")
    assert backend_named() is REFERENCE
    assert backend_named("cpu") is CPU
    assert describe_system()["preferred"] == "reference"
    monkeypatch.setenv("RESQ_BACKEND", "cuda")
    with pytest.raises(InputError) as refused:
        backend_named()
    assert "RESQ_BACKEND is set to a backend that does not exist; no backend 'cuda'" in one_line(refused.value)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError) as refused:
        backend_named("referense")
    said = one_line(refused.value)
    assert "triton, cpu, reference" in said
    assert "did you mean reference?" in said


def test_a_backend_that_cannot_run_says_why_and_no_other_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_MISSING", "its kernels are not built")
        patch.setattr(native, "_native", None)
        for name in (None, "cpu", CPU):
            with pytest.raises(
                BackendUnavailable, match="cpu cannot be used here: its kernels are not built; backend ref"
            ):
                backend_named(name)
        with pytest.raises(BackendUnavailable, match="not built"):
            instruction_sets()  # the other tests' way to what they run on: they fail, they are not skipped
        assert backend_named("reference") is REFERENCE
        facts = describe_system()
        assert facts["backends"][1:] == [
            {"name": "cpu", "unusable": "its kernels are not built"},
            {"name": "reference", "unusable": None},
        ]
        assert (facts["instruction_sets"], facts["active"]) == ([], None)
        shown = run("inspect", "--system")
        assert shown.returncode == 0, shown.stderr
        assert "not usable: its kernels are not built" in shown.stdout


def test_any_usable_instruction_set_can_be_put_to_use() -> None:
    assert instruction_sets()[-1] == "scalar"
    for name in instruction_sets():
        native.use(name)
        assert native.module().active() == name


def test_an_instruction_set_that_is_unknown_or_missing_here_is_refused_with_those_there_are() -> None:
    before = native.module().active()
    with pytest.raises(BackendUnavailable) as refused:
        native.use("avx3")
    said = one_line(refused.value)
    assert "'avx3'" in said
    assert all(each.name in said for each in native.instruction_sets())
    for name in ("", "AVX2", "scalar "):
        with pytest.raises(BackendUnavailable):
            native.use(name)
    for each in native.instruction_sets():
        if each.missing is not None:
            with pytest.raises(BackendUnavailable) as refused:
                native.use(each.name)
            usable = ", ".join(instruction_sets())
            want = f"instruction set {each.name} cannot be used: {each.missing}; usable are {usable}"
            assert one_line(refused.value) == want
            with pytest.raises(ValueError) as passed:  # nor does the native module let it through
                native.module().use(each.name)
            assert str(passed.value) == each.missing
    with pytest.raises(ValueError, match="no such"):
        native.module().use("avx3")
    assert native.module().active() == before


def test_a_forced_instruction_set_is_used_or_the_backend_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.FORCE, "scalar")
    assert backend_named() is CPU
    assert native.module().active() == "scalar"
    missing = [each.name for each in native.instruction_sets() if each.missing is not None]
    for name in ("avx3", *missing):
        monkeypatch.setenv(native.FORCE, name)
        with pytest.raises(BackendUnavailable, match=f"RESQ_CPU_ISA is set: .*{name}"):
            backend_named()
        facts = describe_system()
        assert facts["forced"] == name
        assert "RESQ_CPU_ISA" in facts["backends"][1]["unusable"]
        # Nothing is taken in its place, and nothing is said to be.
        assert facts["active"] is None
        assert len(facts["instruction_sets"]) == len(native.instruction_sets())
        words = " ".join(run("inspect", "--system").stdout.split())
        assert "backend cpu not usable: RESQ_CPU_ISA is set" in words
        assert "backend reference usable when asked for: --backend reference" in words
        assert "reference used" not in words
        assert "used:" not in words.replace("cannot be used:", "")


def test_inspect_tells_what_runs_here_and_why_not_the_others() -> None:
    facts = json.loads(run("inspect", "--system", "--json").stdout)
    assert facts == describe_system()
    assert facts["active"] == native.module().active()
    assert [each["name"] for each in facts["instruction_sets"]][-1] == "scalar"
    assert [each["name"] for each in facts["instruction_sets"] if each["missing"] is None] == instruction_sets()
    assert facts["backends"][1] == {"name": "cpu", "unusable": None}
    assert facts["preferred"] == "cpu"
    assert facts["threads"] >= 1
    shown = run("inspect", "--system")
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    for each in facts["instruction_sets"]:
        assert each["name"] in words
        if each["missing"]:
            assert each["missing"] in words
    assert "backend cpu used" in words
    assert "backend reference usable when asked for: --backend reference" in words
    for wrong in (run("inspect"), run("inspect", "somewhere", "--system")):
        assert wrong.returncode == 2
        assert "--system" in wrong.stderr


def test_a_command_takes_the_forced_instruction_set_from_its_environment() -> None:
    command = [sys.executable, "-m", "resq", "inspect", "--system", "--json"]
    environment = {**os.environ, native.FORCE: "scalar"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["forced"] == facts["active"] == "scalar"
    assert facts["backends"][1]["unusable"] is None


def test_generating_with_an_unusable_instruction_set_ends_in_one_line(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resq.quantize(checkpoint(), tmp_path / "out", recipe="rtn")
    monkeypatch.setenv(native.FORCE, "avx3")
    done = run("generate", tmp_path / "out", "the", "--max-new-tokens", 2)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "RESQ_CPU_ISA" in done.stderr
    monkeypatch.setenv(native.FORCE, "scalar")
    assert run("generate", tmp_path / "out", "the", "--max-new-tokens", 2).returncode == 0
    assert native.module().active() == "scalar"
