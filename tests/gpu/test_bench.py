"""`resq bench --device cuda` on a card: graphs, ceilings, rows that name it."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from tests.conftest import run

from resq.measure.gpu.bench import BlockPlan, bench_block
from resq.measure.gpu.roofline import Ceilings
from resq.measure.gpu.timer import CudaTimer, timer_on


def test_a_captured_run_repeats_what_it_was(name_of_card: str) -> None:
    timer = timer_on(torch.device("cuda"))
    assert isinstance(timer, CudaTimer)
    counter = torch.zeros(1, device="cuda")
    replay = timer.captured(lambda: counter.add_(1))
    before = float(counter)
    assert timer.seconds(replay, 100) > 0
    assert float(counter) == before + 100


def test_every_contender_of_a_block_runs_by_calls_and_by_graphs(name_of_card: str) -> None:
    plan = BlockPlan("llama-3.2-1b", prefill=(512,), batches=(4,), contexts=(256,), rounds=2)
    for capture in (False, True):
        report = bench_block(
            replace(plan, capture_prefill=capture), ceilings=lambda _: Ceilings(1e15, 2e15, 1e15, 5e12)
        )
        assert report.card == name_of_card
        assert len(report.results) == 2 * 4
        assert all(result.median > 0 for result in report.results)
    assert report.memory.weights_ratio <= 0.30
    assert report.memory.cache_ratio <= 0.38


def test_the_command_measures_on_the_card(name_of_card: str) -> None:
    given = ["--prefill", "64", "--batch", "1", "--context", "32", "--rounds", "2", "--json"]
    done = run("bench", "--device", "cuda", "--shape", "tiny", *given)
    assert done.returncode == 0, done.stderr
    assert {row["card"] for row in json.loads(done.stdout)["rows"]} == {name_of_card}
