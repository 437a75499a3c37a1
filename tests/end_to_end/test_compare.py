"""`resq compare`: what is in its directory, and that finished work outlives whatever ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import make_checkpoint, run

from resq import compare as comparing
from resq import processes
from resq.compare import BASE, Plan, Row, compare, locked
from resq.errors import InputError
from resq.measure.perplexity import open_streamed, window_nll
from resq.measure.rows import read_rows
from resq.measure.scores import Original, keep_states, score
from resq.models.text import all_windows, load_tokenizer


def small(source: Path, text: Path, *recipes: str, **changes: object) -> Plan:
    plan = Plan(str(source), str(text), recipes, (3,), calibration=(str(text),), windows=8, window_length=32)
    return replace(plan, evaluation_windows=6, speed_rounds=1, **changes)  # pyright: ignore[reportArgumentType]


def hidden(out: Path) -> list[str]:
    return [file.name for file in (out / "cases").glob(".*")]


def test_the_directory_holds_what_was_measured(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = checkpoint(), tmp_path / "made" / "out"
    seen: list[str] = []
    plan = small(source, text, "resq", "rtn", keep_checkpoints=True)
    found = compare(plan, out, progress=lambda phase, done, total: seen.append(phase))
    base, ours, rtn = found.rows
    assert [row.case for row in found.rows] == [BASE, "resq-3bit", "rtn-3bit"]
    facts = json.loads((out / "compare.json").read_text())
    assert facts["state"] == "done"
    assert facts["cases"] == [BASE, "resq-3bit", "rtn-3bit"]
    assert facts["windows"]["count"] == 6
    assert [Row(**line).case for line in read_rows(out / "rows.jsonl")] == facts["cases"]
    assert {"16-bit: evaluating", "resq-3bit: rounding", "cases", "speed: prefill"} <= set(seen)

    # The same figures by another way: the kept checkpoint, evaluated here.
    every = all_windows(text, load_tokenizer(source), 32).tokens
    windows = load_file(out / "cases" / BASE / "tokens.safetensors")["tokens"]
    assert torch.equal(windows[[0, -1]], every[[0, -1]])
    original = Original(open_streamed(source), tmp_path / "states.npy")
    kept = keep_states(original.model, windows, original.file)
    for row in (ours, rtn):
        tensors = load_file(found.checkpoint(row.case).parent / "tokens.safetensors")
        again = score(open_streamed(found.checkpoint(row.case)), windows, original)
        assert again.kl is not None
        assert tensors["nll"].shape == tensors["kl"].shape == tensors["agreement"].shape == (6, 31)
        assert tensors["agreement"].dtype == torch.bool
        torch.testing.assert_close(tensors["nll"], again.nll, rtol=0, atol=1e-4)
        torch.testing.assert_close(tensors["kl"], again.kl, rtol=0, atol=1e-4)
        assert row.delta is not None
        assert row.kl is not None
        assert row.agreement is not None
        assert row.delta.mean == pytest.approx(float((again.window_nll - kept.window_nll).mean()), abs=1e-4)
        assert row.kl.mean == pytest.approx(float(again.kl.mean()), abs=1e-4)
        assert row.kl.low < row.kl.mean < row.kl.high
        assert row.agreement.mean == pytest.approx(float(tensors["agreement"].float().mean()))
        assert row.ledger is not None
        assert row.bytes == sum(f.stat().st_size for f in found.checkpoint(row.case).glob("model-*.safetensors"))
        assert row.peak_bytes is not None
        assert row.start_bytes is not None
        assert row.peak_bytes > row.start_bytes > 50e6
        assert row.speed is not None
        assert row.speed.ratio == pytest.approx(row.speed.tokens_per_second / row.speed.source_tokens_per_second)
        linears = json.loads((found.checkpoint(row.case).parent / "linears.json").read_text())
        assert len(linears) == 2 * 7
        assert {"layer", "role", "error", "damping", "seconds"} <= set(linears[0])
    assert ours.ledger is not None
    assert rtn.ledger is not None
    assert ours.ledger.weight_bits > rtn.ledger.weight_bits
    assert base.nll == pytest.approx(float(window_nll(original.model, windows).mean()), abs=1e-5)
    assert found.between(ours, rtn).mean == pytest.approx((ours.nll or 0) - (rtn.nll or 0))
    assert hidden(out) == []
    assert not (out / "cases" / BASE / "states.npy").exists()


def test_only_what_is_missing_or_stale_is_made(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out, lines = checkpoint(), tmp_path / "out", list[str]()

    def made() -> dict[str, int]:
        return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("cases/*/linears.json")}

    compare(small(source, text, "rtn"), out, tell=lines.append)
    first = made()
    assert not (out / "cases" / "rtn-3bit" / "checkpoint").exists()
    compare(small(source, text, "rtn", "gptq"), out, tell=lines.append)
    assert made()["rtn-3bit"] == first["rtn-3bit"]
    assert "finished before: rtn-3bit" in lines
    # Cases of earlier calls stay in the table.
    alone = compare(small(source, text, "gptq"), out)
    assert [row.case for row in alone.rows] == [BASE, "rtn-3bit", "gptq-3bit"]

    before, lines = made(), []
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1], encoding="utf-8")
    compare(small(source, text, "gptq", calibration=(str(other),)), out, tell=lines.append)
    assert "gptq-3bit was made with another calibration: made again" in lines
    assert made()["gptq-3bit"] != before["gptq-3bit"]
    assert made()["rtn-3bit"] == before["rtn-3bit"]

    lines = []
    (out / "cases" / "rtn-3bit" / "row.json").write_text("{", encoding="utf-8")
    weights = source / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    found = compare(small(source, text, "rtn", "gptq", calibration=(str(other),)), out, tell=lines.append)
    assert "gptq-3bit was made with another source: made again" in lines
    assert [row.case for row in found.rows] == [BASE, "rtn-3bit", "gptq-3bit"]
    # Another evaluation text is another table.
    found = compare(small(source, other, "rtn", calibration=(str(other),)), out)
    assert [row.case for row in found.rows] == [BASE, "rtn-3bit"]


def test_a_case_that_cannot_be_made_is_a_line_and_the_others_go_on(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = checkpoint(), tmp_path / "out"
    common = ["compare", source, "--out", out, "--calibration", text, "--text", text, "--bits", 4, "--windows", 1]
    common += ["--window-length", 32, "--speed-rounds", 0]
    done = run(*common, "--recipes", "resq, rtn,")
    assert done.returncode == 0, done.stderr
    assert "resq-4bit failed:" in done.stdout
    assert "at least 128" in done.stdout
    assert f"resq report {out}" in done.stdout
    rows = read_rows(out / "rows.jsonl")
    assert [row["failed"] is None for row in rows] == [True, False, True]
    assert not (out / "cases" / "rtn-4bit" / "checkpoint").exists()
    none = run(*common[:3], tmp_path / "other", *common[4:], "--recipes", "resq")
    assert none.returncode == 2
    assert "no case could be made" in none.stderr


def test_a_plan_that_cannot_be_carried_out_is_one_line(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = checkpoint(), tmp_path / "out"
    common = ["compare", source, "--out", out, "--calibration", text, "--window-length", 32]
    for said, arguments in {
        "no evaluation text": [],
        "did you mean resq?": ["--text", text, "--recipes", "rtn,rseq"],
        "--bits 'four'": ["--text", text, "--bits", "four"],
        "2, 3, 4 and 6": ["--text", text, "--bits", 5],
        "at least one recipe": ["--text", text, "--recipes", ","],
        "no text at": ["--text", tmp_path / "nothing"],
        "at least 2": ["--text", text, "--evaluation-windows", 1],
        "no.txt": ["--text", text, "--calibration", tmp_path / "no.txt"],
    }.items():
        refused = run(*common, *arguments)
        assert refused.returncode == 2, said
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("", encoding="utf-8")
    assert "thesis.tex" in run(*common, "--text", text).stderr


def test_one_process_works_in_a_directory(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(InputError, match="another resq compare"):
        locked(tmp_path / "out").__enter__()
    with locked(tmp_path / "out"):
        pass


def killed(*arguments: object, progress: object) -> None:
    """Stands in for a case whose process the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def broken(*arguments: object, progress: object) -> None:
    """Stands in for a bug."""
    raise LookupError("not what it seems")


def test_a_killed_process_fails_its_case_and_a_bug_has_its_traceback(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = small(checkpoint(), text, "rtn"), tmp_path / "out"
    monkeypatch.setattr(comparing, "make_case", killed)
    row = compare(plan, out).rows[1]
    assert row.failed == "its process was killed, probably for lack of memory"
    monkeypatch.setattr(comparing, "make_case", broken)
    with pytest.raises(RuntimeError, match=r"rtn-3bit failed[\s\S]*Traceback[\s\S]*not what it seems"):
        compare(plan, out)
    assert hidden(out) == []


def identify(*, progress: object) -> int:
    return os.getpid()


def test_every_task_has_a_process_of_its_own() -> None:
    tasks = [processes.Task(str(number), identify) for number in range(3)]
    found = dict(processes.run_apart(tasks, at_once=2, threads=1, preload=comparing.PRELOADED))
    assert set(found) == {"0", "1", "2"}
    assert len({*found.values(), os.getpid()}) == 4


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_finished_cases_outlive_the_process(stop: signal.Signals, text: Path, tmp_path: Path) -> None:
    source, out = make_checkpoint(tmp_path / "source", num_hidden_layers=8), tmp_path / "out"
    command = [sys.executable, "-m", "resq", "compare", source, "--recipes", "rtn,resq", "--out", out, "--bits", 3]
    command += ["--calibration", text, "--text", text, "--windows", 200, "--window-length", 32]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("cases/.resq-3bit*/.checkpoint.partial/checkpoint/model-layer-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if stop is signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does
    else:
        process.kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if stop is signal.SIGINT else -stop), said
    if stop is signal.SIGINT:
        assert f"what was finished is kept in {out}" in said
        assert "Traceback" not in said
        assert hidden(out) == []
    until = time.monotonic() + 30
    while alive(process.pid):
        assert time.monotonic() < until, "a process of the group is still running"
        time.sleep(0.1)

    rtn = out / "cases" / "rtn-3bit"
    before = (rtn / "tokens.safetensors").stat().st_mtime_ns
    done = run(*command[3:])
    assert done.returncode == 0, done.stderr
    assert "finished before: rtn-3bit" in done.stderr
    assert (rtn / "tokens.safetensors").stat().st_mtime_ns == before
    assert [row["case"] for row in read_rows(out / "rows.jsonl")] == [BASE, "rtn-3bit", "resq-3bit"]
    assert hidden(out) == []


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_fewer_learning_steps_are_another_recipe_and_leave_others_alone() -> None:
    plan = Plan("tiny", "stdlib", learning_steps=7)
    learned, fixed = (comparing.Case(name, name, 3, 0) for name in ("spinquant", "resq"))
    assert "7 steps" in str(plan.recipe(learned).describe())
    assert plan.recipe(learned) != replace(plan, learning_steps=None).recipe(learned)
    assert plan.recipe(fixed) == replace(plan, learning_steps=None).recipe(fixed)
