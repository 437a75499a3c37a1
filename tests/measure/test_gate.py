"""Verdicts with their statistics, and the command's exit codes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import run, write_json

import resq
from resq.errors import InputError
from resq.measure.gate import Criterion, Measure, Verdict, criteria, judge


def normal(mean: float, deviation: float, count: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + deviation * (values - values.mean()) / values.std()


@pytest.mark.parametrize(
    ("measure", "mean", "bound", "verdict"),
    [
        (Measure.KL, 0.02, 0.03, Verdict.PASS),
        (Measure.KL, 0.04, 0.03, Verdict.FAIL),
        (Measure.KL, 0.0301, 0.03, Verdict.UNDECIDED),
        (Measure.AGREEMENT, 0.99, 0.98, Verdict.PASS),
        (Measure.AGREEMENT, 0.97, 0.98, Verdict.FAIL),
        (Measure.AGREEMENT, 0.9801, 0.98, Verdict.UNDECIDED),
        (Measure.PERPLEXITY, math.log(1.02), 0.03, Verdict.PASS),
        (Measure.PERPLEXITY, math.log(1.04), 0.03, Verdict.FAIL),
    ],
)
def test_a_verdict_needs_the_whole_interval(measure: Measure, mean: float, bound: float, verdict: Verdict) -> None:
    # A standard error of 0.001, 1.6 of which make the interval's half.
    found = judge(Criterion(measure, bound), normal(mean, 0.02, 400))
    assert found.verdict is verdict
    assert found.low < found.estimate < found.high
    expected = math.expm1(mean) if measure is Measure.PERPLEXITY else mean
    assert found.estimate == pytest.approx(expected)
    assert (found.windows_needed is None) is (verdict is not Verdict.UNDECIDED)


def test_as_many_windows_as_it_says_decide_four_times_in_five() -> None:
    criterion, decided = Criterion(Measure.KL, 0.03), 0
    needed = judge(criterion, normal(0.028, 0.02, 40)).windows_needed
    assert needed is not None
    for seed in range(50):
        values = 0.028 + 0.02 * torch.randn(needed, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        decided += judge(criterion, values).verdict is Verdict.PASS
    # 40 of 50 in the mean, three deviations of a binomial distribution are 8.5.
    assert 31 <= decided <= 48


@pytest.mark.parametrize("given", ["3", "three%", "-3%", "nan%", "", "%", "3%%", "1e3%"])
def test_nonsense_is_no_percentage(given: str) -> None:
    with pytest.raises(InputError, match="no percentage"):
        criteria(given, None, None)


def test_percentages_are_read_with_and_without_a_sign() -> None:
    found = criteria(" +3 %", 0.05, "98.5%")
    assert [criterion.bound for criterion in found] == pytest.approx([0.03, 0.05, 0.985])
    assert criteria("3%", None, None)[0].bound == pytest.approx(0.03)
    with pytest.raises(InputError, match="at most 100%"):
        criteria(None, None, "101%")
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="--max-kl"):
            criteria(None, bad, None)


def test_exit_codes_tell_good_from_bad_from_unusable(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = checkpoint(), tmp_path / "packed"
    resq.quantize(source, out, recipe="rtn")
    common = ["gate", out, "--text", text, "--window-length", 64]
    good = run(*common, "--max-ppl", "+500%", "--max-kl", 50, "--min-agreement", "1%")
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("pass ") == 3
    bad = run(*common, "--max-kl", 1e-6, "--max-ppl", "500%", "--json")
    assert bad.returncode == 3, bad.stderr
    found = json.loads(bad.stdout)
    assert found["passed"] is False
    assert [finding["verdict"] for finding in found["findings"]] == ["pass", "fail"]
    # A bound at the estimate itself is undecided, and a failure unless asked otherwise.
    kl = found["findings"][1]["estimate"]
    assert run(*common, "--max-kl", kl).returncode == 3
    assert run(*common, "--max-kl", kl, "--undecided", "pass").returncode == 0
    for words, arguments in {
        "nothing was asked for": [],
        "no percentage": ["--max-ppl", "much"],
        "--against": ["--max-kl", 1, "--against", out],
        "at least 10": ["--max-kl", 1, "--window-length", 250, "--text", write_json(tmp_path / "short", "x" * 600)],
    }.items():
        refused = run(*common, *arguments)
        assert refused.returncode == 2, words
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1 or "done in" in refused.stderr


def test_the_original_is_the_one_the_manifest_names(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, other, out = checkpoint(), checkpoint(seed=1, vocab_size=300), tmp_path / "packed"
    resq.quantize(source, out, recipe="rtn")
    common = ["gate", out, "--text", text, "--window-length", 64, "--max-kl", 50]
    assert json.loads(run(*common, "--json").stdout)["source"] == str(source)
    refused = run(*common, "--against", other)
    assert refused.returncode == 2
    assert "do not share" in refused.stderr
    source.rename(tmp_path / "away")
    assert "--against" in run(*common).stderr
    assert run(*common, "--against", tmp_path / "away").returncode == 0
    other.rename(source)
    assert "was made from" in run(*common).stderr
