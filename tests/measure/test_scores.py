"""Scores beside a 16-bit original: they are those of whole logits, streamed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import float64_logits
from torch.nn import functional as F

import resq
from resq.errors import InputError
from resq.measure import perplexity as passes
from resq.measure import scores as scoring
from resq.measure.evaluate import evaluate
from resq.measure.perplexity import mean_interval, open_streamed, window_nll
from resq.measure.scores import Original, keep_states, score
from resq.models.source import Source
from resq.models.text import all_windows, load_tokenizer


@pytest.fixture
def pair(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    source, out = checkpoint(), tmp_path / "packed"
    resq.quantize(source, out, recipe="rtn")
    windows = all_windows(text, load_tokenizer(source), 48).tokens[:9]
    return source, out, windows


def expected_scores(source: Path, packed: Path, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """From all logits at once."""
    p = F.log_softmax(float64_logits(Source.open(source), windows)[:, :-1], dim=-1)
    q = F.log_softmax(resq.load(packed)(windows)[:, :-1].double(), dim=-1)
    nll = -q.gather(-1, windows[:, 1:, None])[..., 0]
    return nll, (p.exp() * (p - q)).sum(dim=-1), p.argmax(dim=-1) == q.argmax(dim=-1)


def test_streamed_scores_are_those_of_whole_logits(
    pair: tuple[Path, Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, packed, windows = pair
    # Groups of 4 windows, blocks of 25 rows of logits, 7 compared at once: none divides what it cuts.
    monkeypatch.setattr(passes, "HIDDEN_BYTES", 4 * 48 * 64 * 4)
    monkeypatch.setattr(passes, "LOGIT_BYTES", 25 * 259 * 4)
    monkeypatch.setattr(scoring, "COMPARED_BYTES", 7 * 259 * 4)
    original = Original(open_streamed(source), tmp_path / "states.npy")
    kept = keep_states(original.model, windows, original.file)
    model = open_streamed(packed)
    found = score(model, windows, original)
    nll, kl, agreement = expected_scores(source, packed, windows)
    assert found.kl is not None
    assert found.agreement is not None
    # float32 logits and their softmax against float64.
    torch.testing.assert_close(found.nll.double(), nll, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.kl.double(), kl, rtol=0, atol=2e-4)
    assert (found.agreement == agreement).float().mean() > 0.99
    assert 0.2 < found.agreement.float().mean() < 1
    assert found.kl.mean() > 0.01
    torch.testing.assert_close(found.window_nll, window_nll(model, windows), rtol=0, atol=1e-5)
    torch.testing.assert_close(kept.window_nll, window_nll(original.model, windows), rtol=0, atol=1e-5)
    assert score(model, windows).kl is None


def test_a_model_beside_itself_has_no_divergence(pair: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    source, _, windows = pair
    original = Original(open_streamed(source), tmp_path / "states.npy")
    keep_states(original.model, windows, original.file)
    found = score(open_streamed(source), windows, original)
    kl, agreement = found.kl_interval(), found.agreement_interval()
    assert kl is not None
    assert agreement is not None
    assert (kl.low, kl.mean, kl.high) == (0, 0, 0)
    assert (agreement.low, agreement.mean, agreement.high) == (1, 1, 1)


def test_a_bootstrap_interval_is_that_of_a_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 + 5
    error = float(values.std()) / 400**0.5
    for tail, deviations in ((0.025, 1.960), (0.05, 1.645)):
        found = mean_interval(values, tail=tail)
        assert found.mean == float(values.mean())
        # 10,000 resamples place a quantile within some hundredths of a standard error.
        assert found.high - found.mean == pytest.approx(deviations * error, rel=0.06)
        assert found.mean - found.low == pytest.approx(deviations * error, rel=0.06)


def test_a_disk_that_is_too_small_is_refused_before_the_pass(
    pair: tuple[Path, Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, windows = pair
    monkeypatch.setattr(scoring.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="hidden states take"):
        keep_states(open_streamed(source), windows, tmp_path / "states.npy")
    assert not (tmp_path / "states.npy").exists()


def test_rows_have_scores_beside_a_16_bit_original_only(pair: tuple[Path, Path, torch.Tensor], text: Path) -> None:
    source, packed, _ = pair
    first, second = evaluate([source, packed], text, window_length=64)
    assert first.kl is None
    assert second.kl is not None
    assert second.agreement is not None
    assert second.kl_low is not None
    assert second.kl_high is not None
    assert 0 < second.kl_low <= second.kl <= second.kl_high
    assert 0 < second.agreement < 1
    turned = evaluate([packed, source], text, window_length=64)
    assert [row.kl for row in turned] == [None, None]
    assert turned[1].delta == pytest.approx(-(second.delta or 0), abs=1e-6)


def test_one_window_has_no_interval(pair: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    source, packed, _ = pair
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox jumps over a lazy dog", encoding="utf-8")
    row = evaluate([source, packed], short, window_length=32)[1]
    assert row.windows == 1
    assert row.kl is not None
    assert (row.kl_low, row.delta_low, row.agreement_high) == (None, None, None)
