"""A trained model on a card beside the reference: loss, greedy text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import resq
from resq.embedded import MODEL, TEXT
from resq.measure.perplexity import open_streamed, window_nll
from resq.models.text import all_windows, load_tokenizer

WINDOWS, LENGTH = 64, 256
# Where the reference's two best tokens are nearer than this, either may come first.
MARGIN = 0.01


def windows_of(directory: Path) -> Tensor:
    """Windows of held-out text, evenly spread, int64 [WINDOWS, LENGTH]."""
    tokens = all_windows(Path(TEXT), load_tokenizer(directory), LENGTH).tokens
    return tokens[:: len(tokens) // WINDOWS][:WINDOWS]


def loss(directory: Path, windows: Tensor, backend: str) -> float:
    """Nats per token."""
    return float(window_nll(open_streamed(directory, backend), windows).double().mean())


def test_the_loss_is_the_references(packed: Path) -> None:
    windows = windows_of(packed)
    found = {backend: loss(packed, windows, backend) for backend in ("triton", "reference")}
    assert abs(found["triton"] - found["reference"]) <= 1e-3, found


def test_greedy_text_is_the_references_where_its_margin_tells(packed: Path) -> None:
    """Both follow the reference's tokens, so that a tie does not make two texts of one."""
    models = [resq.load(packed, backend=name) for name in ("triton", "reference")]
    tokens = windows_of(packed)[:4, :64]
    caches, told = [model.cache() for model in models], 0
    for _ in range(48):
        mine, theirs = (
            model(tokens, cache, last=True)[:, -1].float().cpu() for model, cache in zip(models, caches, strict=True)
        )
        best = theirs.topk(2, dim=-1).values
        clear = best[:, 0] - best[:, 1] >= MARGIN
        assert torch.equal(mine.argmax(-1)[clear], theirs.argmax(-1)[clear])
        told += int(clear.sum())
        tokens = theirs.argmax(-1, keepdim=True)
    assert told > 0.8 * 4 * 48


def test_quantizing_on_the_card_gives_a_model_as_good(packed: Path, tmp_path: Path) -> None:
    """Sums in another order move roundings to neighbours: another draw of the same error. The losses of four seeds on
    the CPU lie within 0.007 nats."""
    there = resq.quantize(
        MODEL, tmp_path / "packed", calibration=TEXT, windows=16, window_length=128, device="cuda"
    ).directory
    windows = windows_of(packed)
    assert abs(loss(there, windows, "triton") - loss(packed, windows, "triton")) <= 0.01
