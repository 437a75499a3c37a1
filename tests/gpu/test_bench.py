"""`resq bench --device cuda` on a card: graphs, ceilings, rows that name it."""

from __future__ import annotations

import json

import torch
from tests.conftest import run

from resq.measure.gpu.bench import BlockPlan, bench_block
from resq.measure.gpu.timer import CudaTimer, timer_on


def test_a_captured_run_repeats_what_it_was(name_of_card: str) -> None:
    timer = timer_on(torch.device("cuda"))
    assert isinstance(timer, CudaTimer)
    counter = torch.zeros(1, device="cuda")
    replay = timer.captured(lambda: counter.add_(1))
    before = float(counter)
    assert timer.seconds(replay, 100) > 0
    assert float(counter) == before + 100


def test_a_block_is_measured_between_nothing_and_the_ceilings(name_of_card: str) -> None:
    """Beyond the ceilings would be a mistake in counting; a tiny block is far below them."""
    report = bench_block(BlockPlan("llama-3.2-1b", prefill=(512,), batches=(4,), contexts=(256,), rounds=3))
    assert report.card == name_of_card
    for result in report.results:
        assert 0 < result.tops < 1.1 * max(report.ceilings.int8, report.ceilings.bf16) / 1e12
        assert 0 < result.terabytes < 1.1 * report.ceilings.copy / 1e12


def test_the_command_measures_on_the_card(name_of_card: str) -> None:
    given = ["--prefill", "64", "--batch", "1", "--context", "32", "--rounds", "2", "--json"]
    done = run("bench", "--device", "cuda", "--shape", "tiny", *given)
    assert done.returncode == 0, done.stderr
    assert {row["card"] for row in json.loads(done.stdout)["rows"]} == {name_of_card}
