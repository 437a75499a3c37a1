"""`resq bench`: what it refuses before it builds anything, its rows, and what it prints."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import run
from torch import Tensor

import resq
from resq import show
from resq.errors import InputError
from resq.measure import bench, speed
from resq.measure.bench import Plan, Report
from resq.measure.peers import choose
from resq.measure.rows import append_row, check_appendable, read_rows
from resq.measure.speed import Limits, Operator, Point, Result

SHORT = ["--prefill", "12", "--batch", "2", "--context", "6", "--rounds", "3"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits and pauses as short as they can be: what is tested is not how fast this machine is."""
    monkeypatch.setattr(speed, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "PEAK_SECONDS", 0.001)
    monkeypatch.setattr(speed, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(show.out, "width", 160)  # no cell is folded


@pytest.fixture
def packed(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A packed checkpoint whose context holds 256 tokens."""
    return resq.quantize(checkpoint(), tmp_path / "packed", recipe="rtn").directory


class Fixed:
    """An engine that takes a second for every call."""

    version, about, weight_bytes, vocab = "engine 1", "nothing at all", 2_000_000, 512
    closed = False

    def empty(self, rows: int, tokens: int) -> None: ...

    def forward(self, tokens: np.ndarray, start: int) -> float:
        return 1.0

    def logits(self) -> Tensor:
        return torch.zeros(1, self.vocab)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a packed checkpoint or --shape, one of them"),
        (["somewhere", "--shape", "tiny"], "give a packed checkpoint or --shape, one of them"),
        (["nowhere"], "nowhere"),
        (["--shape", "tinny"], "did you mean tiny?"),
        (["--shape", "tiny", "--recipe", "rseq"], "did you mean resq?"),
        (["--shape", "tiny", "--head-bits", "5"], "5"),
        (["--shape", "tiny", "--against", "opnvino"], "did you mean openvino?"),
        (["--shape", "tiny", "--against", "rtn,rtn"], "rtn would be measured twice"),
        (["--shape", "tiny", "--against", "resq"], "resq would be measured twice"),
        (["--shape", "tiny", "--prefill", "0"], "--prefill is 0"),
        (["--shape", "tiny", "--batch", "0"], "--batch is 0"),
        (["--shape", "tiny", "--context", "0"], "--context is 0"),
        (["--shape", "tiny", "--rounds", "0"], "--rounds and --threads must be at least 1"),
        (["--shape", "tiny", "--threads", "0"], "--rounds and --threads must be at least 1"),
        (
            ["--shape", "tiny", "--prefill", "12", "--prefill", "2049"],
            "--prefill is 2049; the model's context holds 2048",
        ),
        (["--shape", "tiny", "--context", "2035"], "--context is 2035; the model's context of 2048 tokens holds 2034"),
        (["--shape", "tiny", "--backend", "gpu"], "no backend 'gpu'"),
        (["--shape", "tiny", "--out", "/nonexistent/x.jsonl"], "/nonexistent is no directory"),
        (["--shape", "tiny", "--out", "/"], "it is a directory"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_before_anything_is_built(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "synthetic", lambda *_, **__: pytest.fail("a model was built"))
    done = run("bench", *arguments)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr


def test_a_checkpoint_is_measured_within_its_context_and_not_against_recipes(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "load", lambda *_, **__: pytest.fail("the checkpoint was loaded"))
    for arguments, words in (
        (["--prefill", "100000"], "--prefill is 100000; the model's context holds 256 tokens"),
        (["--prefill", "9", "--context", "243"], "--context is 243"),
        (["--prefill", "9", "--against", "rtn"], "nothing called 'rtn' to measure against; there are torch-bf16"),
    ):
        done = run("bench", packed, *arguments)
        assert done.returncode == 2, done.stdout
        assert len(done.stderr.strip().splitlines()) == 1
        assert words in done.stderr


def test_the_longest_prompt_and_context_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = Plan(shape="tiny", prefill=(2048,), context=2048 - speed.STEPS - speed.WARM_STEPS, rounds=1)
    report = bench.bench(longest)
    assert [str(result.point) for result in report.results] == ["prefill 2048", "decode, batch 1, context 2034"]
    assert all(result.rate > 0 for result in report.results)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_have_everything_in_them(backend: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["--shape", "tiny", *SHORT, "--against", "rtn", "--backend", backend, "--out", file, "--json"]
    done = run("bench", *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["name"], row["mode"]) for row in rows] == [
        ("resq", "prefill"),
        ("rtn", "prefill"),
        ("resq", "decode"),
        ("rtn", "decode"),
    ]
    for ours, other in (rows[:2], rows[2:]):
        assert len(ours["seconds"]) == len(other["seconds"]) == 3
        pairs = zip(ours["seconds"], other["seconds"], strict=True)
        assert ours["ratios"] == {"rtn": statistics.median(b / a for a, b in pairs)}
        assert other["ratios"] == {}
        processed = 12 if ours["mode"] == "prefill" else 2
        assert ours["tokens_per_second"] == processed / statistics.median(ours["seconds"])
        assert ours["memory"]["weights"] > 0
        assert ours["memory"]["cache"] > 0
        assert backend in ours["about"]
        assert ours["operators"].keys() >= {"q, k, v", "gate, up", "down", "lm_head", "attention"}
    kept = read_rows(file)
    assert [{key: row[key] for key in rows[0].keys() & row.keys()} for row in kept] == rows
    for row in kept:
        assert row["kind"] == "speed"
        assert row["plan"]["prefill"] == [12]
        assert row["plan"]["head_bits"] == 8
        assert row.keys() >= {"commit", "torch", "machine", "threads", "command", "time"}


def test_a_peer_stands_beside_ours_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Fixed] = []

    def build(config: Any, threads: int, head_bits: int, progress: Any) -> Fixed:
        assert config["hidden_size"] == 256
        assert (threads, head_bits) == (1, 4)
        engines.append(Fixed())
        return engines[-1]

    monkeypatch.setitem(choose.PEERS, "torch-bf16", build)
    before = torch.get_num_threads()
    plan = Plan(shape="tiny", head_bits=4.5, prefill=(12,), batches=(2,), context=6, against=("torch-bf16",), threads=1)
    report = bench.bench(plan)
    assert torch.get_num_threads() == before
    assert [engine.closed for engine in engines] == [True]
    rows = {(row["name"], row["mode"]): row for row in report.rows()}
    for mode, tokens in (("prefill", 12), ("decode", 2)):
        peer, ours = rows["torch-bf16", mode], rows["resq", mode]
        assert peer["tokens_per_second"] == tokens
        assert peer["about"] == "engine 1: nothing at all, 0.00 GB"
        assert ours["ratios"]["torch-bf16"] == pytest.approx(statistics.median(1 / s for s in ours["seconds"]))


def test_a_checkpoint_is_shown_with_its_operators(packed: Path) -> None:
    done = run("bench", packed, *SHORT)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert str(packed) in done.stdout.replace("\n", "")
    assert "where the time of prefill 12 goes" in words
    assert "where the time of decode, batch 2, context 6 goes" in words
    assert "SiLU, Hadamard, quantize" in words
    assert "of anonymous memory, beside the packed weights" in words
    assert "×" not in words.split("memory:")[1]


def report(weights: int, **about: str) -> Report:
    limits = Limits(read=20.0, integer=1000.0, instruction_set="scalar", threads=2)
    point = Point("decode", batch=1, context=6)
    operators = {"down": Operator(0.5, 4, 5 * 10**9, 10**11), "norm, quantize": Operator(0.25, 8)}
    results = [Result("resq", point, (1.0, 1.0, 1.0), operators), Result("other", point, (3.0, 2.5, 2.0))]
    memory = {"anonymous": 2 * weights, "weights": weights, "anonymous at the end": 3 * weights, "cache": weights}
    return Report("tiny", limits, results, memory, {"resq": "backend cpu", **about})


def test_a_report_has_rates_ratios_and_shares_of_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    show.timed(report(100_000_000))
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    text = " ".join(lines)
    assert "2 threads, scalar. This machine at its best: 20.0 GB/s of reading, 1.00 TOPS" in text
    assert "decode, batch 1, context 6 resq 1.0 1,000.0" in lines
    assert "other 0.4 2,500.0 × 2.50" in lines
    assert "down 4 500.00 50.0% 10.0 50% 0.20 20%" in lines
    assert "norm, quantize 8 250.00 25.0%" in lines
    assert "between operators 250.00 25.0%" in lines
    assert "loading took 200.0 MB of anonymous memory, 2.00 × the packed weights (100.0 MB)" in text
    assert "at the end 300.0 MB anonymous, 1.50 × weights and cache" in text


def test_memory_beside_few_weights_or_peers_is_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    show.timed(report(1_000_000))
    text = " ".join(capsys.readouterr().out.split())
    assert "loading took 2.0 MB of anonymous memory, beside the packed weights (1.0 MB)" in text
    assert text.endswith("at the end 3.0 MB anonymous")
    show.timed(report(100_000_000, other="a peer"))
    assert "at the end" not in capsys.readouterr().out


def test_rows_are_appended_where_they_can_be(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for number in range(2):
        check_appendable(file)
        append_row(file, {"number": number})
    assert read_rows(file) == [{"number": 0}, {"number": 1}]
    for path, reason in (
        (tmp_path, "a directory"),
        (tmp_path / "a" / "b.jsonl", "no directory"),
        (file / "x", "no dir"),
    ):
        with pytest.raises(InputError, match=reason) as refused:
            check_appendable(path)
        assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == [file]
