"""Perplexity of several checkpoints on one text, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resq.checkpoint.manifest import MANIFEST_FILE, read_manifest
from resq.measure.perplexity import check_windows, open_streamed, paired_interval, perplexity, window_nll
from resq.models.text import all_windows, load_tokenizer
from resq.progress import Progress, silent

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Row:
    """One checkpoint's figures. nll in nats per token; ratio, delta and its 95 % interval are to the first row, None
    there and where the windows differ (another tokenizer)."""

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
    rows: list[Row] = []
    first: tuple[str, Tensor] | None = None
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
    for model, chosen in zip(models, windows, strict=True):
        started = time.perf_counter()
        packed = (model.path / MANIFEST_FILE).is_file()
        name = read_manifest(model.path).recipe.name if packed else "16-bit"
        losses = window_nll(model, chosen.tokens, lambda done, total, name=model.name: progress(name, done, total))
        mean, digest = float(losses.mean()), chosen.sha256
        row = Row(
            checkpoint=model.name,
            recipe=name,
            perplexity=perplexity(losses),
            nll=mean,
            tokens=chosen.tokens[:, 1:].numel(),
            windows=len(losses),
            window_length=window_length,
            text_sha256=digest,
            seconds=time.perf_counter() - started,
            backend=model.ops.name,
        )
        if first is not None and first[0] == digest:
            interval = paired_interval(losses, first[1])
            ratio = float(torch.tensor(interval.mean).double().exp())
            row = Row(
                **{
                    **vars(row),
                    "ratio": ratio,
                    "delta": interval.mean,
                    "delta_low": interval.low,
                    "delta_high": interval.high,
                }
            )
        elif first is None:
            first = (digest, losses)
        rows.append(row)
    return rows
