"""`resq bench --quantizing`: what it refuses, its rows, and that its forward is the decoder's."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
import torch
from tests.conftest import run

from resq import show
from resq.backends.reference import dense
from resq.errors import InputError
from resq.measure import quantizing
from resq.measure.quantizing import (
    QuantizingPlan,
    Timed,
    checked,
    multiplying,
    plain_forward,
    shortened,
    write_source,
)
from resq.measure.rows import read_rows
from resq.measure.shapes import SHAPES
from resq.models import decoder
from resq.models.source import Source

OPTIONS = ["bench", "--quantizing", "--shape", "tiny", "--rounds", "3", "--threads", "1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "rtn"], "recipe rtn rounds no down_proj by GPTQ"),
        (["--recipe", "resq-kv"], "recipe resq-kv rounds no down_proj by GPTQ"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--processes", "0"], "--processes is 0"),
        (["--shape", "tinny"], "did you mean tiny"),
        (["--prefill", "12"], "--prefill"),
        (["--device", "cuda"], "--device cuda"),
        (["somewhere"], "a checkpoint"),
    ],
)
def test_what_cannot_be_timed_is_refused(options: list[str], words: str) -> None:
    done = run(*OPTIONS, *options)
    assert done.returncode == 2
    assert words in done.stderr


def test_rows_hold_every_round_and_what_it_is_held_against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "PRODUCT", 64)
    file = tmp_path / "rows.jsonl"
    done = run(*OPTIONS, "--out", str(file), "--json")
    assert done.returncode == 0, done.stderr
    gptq, passed = rows = read_rows(file)
    shown = json.loads(done.stdout)["rows"]
    assert [row["ratio"] for row in shown] == [row["ratio"] for row in rows]
    assert [row["name"] for row in rows] == ["gptq", "pass 1"]
    for row in rows:
        assert row["kind"] == "quantizing"
        assert row["plan"]["shape"] == "tiny"
        assert row["threads"] == 1
        assert len(row["seconds"]) == len(row["against"]) == 3
        ratios = [a / b for a, b in zip(row["seconds"], row["against"], strict=True)]
        assert row["ratio"] == pytest.approx(statistics.median(ratios))
    about = gptq["about"]
    size, out = SHAPES["tiny"]["intermediate_size"], SHAPES["tiny"]["hidden_size"]
    assert (about["in"], about["out"]) == (size, out)
    for number, against in enumerate(gptq["against"]):
        rate = 2 * 64**3 / about["parts"]["product"][number]
        least = about["parts"]["cholesky"][number] + (size**3 / 3 + size**2 * out) / rate
        assert against == pytest.approx(least)
        assert gptq["seconds"][number] > about["parts"]["factor"][number]
    assert passed["about"]["needs"] == ["key", "residual", "value"]


@pytest.mark.slow
def test_several_processes_are_timed_beside_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = run(*OPTIONS, "--rounds", "1", "--processes", "2", "--out", str(file))
    assert done.returncode == 0, done.stderr
    row = read_rows(file)[-1]
    assert row["name"] == "one process beside 2"
    (ceiling,) = row["about"].pop("ceiling")
    assert ceiling > 0
    assert row["about"] == {"processes": 2, "windows": 64, "length": 512}
    assert f"× {row['ratio']:.2f} of × {ceiling:.2f}" in done.stdout
    assert row["ratio"] == pytest.approx(row["seconds"][0] / row["against"][0])


def test_processes_that_share_nothing_time_their_products_alone() -> None:
    with multiplying(2, size=32, count=3) as multiplied:
        for number in (1, 2, 1):
            began = time.perf_counter()
            found = multiplied(number)
            assert len(found) == number
            assert 0 < max(found) <= time.perf_counter() - began  # without the start of Python
    with pytest.raises(InputError, match="a process that multiplies for --processes ended: RuntimeError"):
        multiplying(1, size=-1).__enter__()


def test_a_ceiling_stands_beside_a_ratio_that_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Timed("gptq", (2.0,), (1.0,), {})
    shared = Timed("one process beside 2", (3.0, 3.0, 3.0), (2.0, 2.0, 2.0), {"ceiling": [1.2, 1.9, 1.6]})
    assert (plain.ceiling, shared.ceiling) == (None, 1.6)
    show.quantizing_timed([plain, shared])
    said = capsys.readouterr().out
    assert "× 1.50 of × 1.60 at most here" in said
    assert said.count("at most") == 1


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_the_plain_forward_is_the_decoders_on_a_source_of_random_weights(name: str, tmp_path: Path) -> None:
    config = shortened(SHAPES[name], 1)
    small = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_source(config | small | {"head_dim": 32}, tmp_path)
    source = Source.open(tmp_path)
    ops = dense(torch.float32)
    tokens = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    found = plain_forward(source, ops, tokens)
    want = []
    for window in tokens:
        hidden = torch.nn.functional.embedding(window[None], source.embedding()).float()
        at = decoder.Positions.following(source.shape, 0, 1, 7)
        want.append(decoder.forward_layer(dense(torch.float64), source.shape, source.layer(0), hidden.double(), at))
    for a, b in zip(found, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_plan_of_no_windows_is_refused() -> None:
    with pytest.raises(InputError, match="windows is 0"):
        checked(QuantizingPlan(shape="tiny", windows=0))
