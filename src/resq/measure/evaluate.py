"""Several checkpoints on one text, side by side: perplexity, and what tells them from a 16-bit original."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from resq.checkpoint.manifest import MANIFEST_FILE, read_manifest
from resq.measure.perplexity import Interval, Streamed, open_streamed, perplexity
from resq.measure.scores import Original, Scores, keep_states, score
from resq.measure.windows import check_windows
from resq.models.text import Windows, all_windows, load_tokenizer
from resq.progress import Progress, silent

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Row:
    """One checkpoint's figures. nll in nats per token; delta, the difference to the first row's, and ratio = exp(delta)
    of the perplexities are None there and where the windows differ (another tokenizer). kl, KL(first ‖ this) in nats
    per token, and agreement, the share of tokens that both find most probable, are None too unless the first row is
    16-bit. low and high: 95 % paired bootstrap intervals over windows, None for a single window."""

    checkpoint: str
    recipe: str
    perplexity: float
    nll: float
    tokens: int
    windows: int
    window_length: int
    text_sha256: str
    seconds: float
    backend: str
    ratio: float | None = None
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    agreement: float | None = None
    agreement_low: float | None = None
    agreement_high: float | None = None


def evaluate(
    checkpoints: Sequence[str | Path],
    text: Path,
    *,
    window_length: int | None = None,
    wikitext: bool = False,
    backend: str | None = None,
    progress: Progress = silent,
) -> list[Row]:
    """One row per checkpoint; each is tokenized by its own tokenizer. window_length: tokens, default 2048 or the
    shortest context. backend: of the packed ones, by name. Raises InputError for anything unusable."""
    # Everything that can be refused is refused before the first long run.
    models = [open_streamed(path, backend) for path in checkpoints]
    if window_length is None:
        window_length = min([DEFAULT_LENGTH, *(model.shape.max_positions for model in models)])
    windows = []
    for number, model in enumerate(models):
        progress("tokenizing", number, len(models))
        windows.append(all_windows(text, load_tokenizer(model.path), window_length, wikitext=wikitext))
        check_windows(model, windows[-1].tokens)
    progress("tokenizing", len(models), len(models))
    beside = [comparable(model, each, models[0], windows[0]) for model, each in zip(models, windows, strict=True)]
    scores: list[Scores] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="resq-states-") as folder:
        original = Original(models[0], Path(folder) / "states.npy") if any(beside[1:]) else None
        for number, (model, chosen) in enumerate(zip(models, windows, strict=True)):
            started = time.perf_counter()

            def step(done: int, total: int, name: str = model.name) -> None:
                progress(name, done, total)

            if original is not None and number == 0:
                scores.append(keep_states(model, chosen.tokens, original.file, step))
            else:
                scores.append(score(model, chosen.tokens, original if beside[number] else None, step))
            same = number > 0 and chosen.sha256 == windows[0].sha256
            first = scores[0] if same else None
            rows.append(_row(model, chosen, scores[number], first, time.perf_counter() - started))
    return rows


def is_packed(model: Streamed) -> bool:
    """Whether a model is a packed checkpoint, no 16-bit source."""
    return (model.path / MANIFEST_FILE).is_file()


def comparable(model: Streamed, windows: Windows, first: Streamed, first_windows: Windows) -> bool:
    """Whether a KL divergence from `first` means something: a 16-bit original, the same tokens and vocabulary."""
    return not is_packed(first) and windows.sha256 == first_windows.sha256 and model.shape.vocab == first.shape.vocab


def _row(model: Streamed, windows: Windows, scores: Scores, first: Scores | None, seconds: float) -> Row:
    losses = scores.window_nll
    delta = None if first is None else scores.delta(first)
    return Row(
        checkpoint=model.name,
        recipe=read_manifest(model.path).recipe.name if is_packed(model) else "16-bit",
        perplexity=perplexity(losses),
        nll=float(losses.mean()),
        tokens=scores.nll.numel(),
        windows=len(losses),
        window_length=windows.tokens.shape[1],
        text_sha256=windows.sha256,
        seconds=seconds,
        backend=model.ops.name,
        ratio=None if delta is None else math.exp(delta.mean),
        **_columns("delta", delta, losses),
        **_columns("kl", scores.kl_interval(), losses),
        **_columns("agreement", scores.agreement_interval(), losses),
    )


def _columns(name: str, interval: Interval | None, losses: Tensor) -> dict[str, float | None]:
    if interval is None:
        return {}
    wide = len(losses) > 1
    low, high = (interval.low, interval.high) if wide else (None, None)
    return {name: interval.mean, f"{name}_low": low, f"{name}_high": high}
