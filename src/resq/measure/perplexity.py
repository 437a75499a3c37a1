"""Perplexity of a source or a packed checkpoint, layer by layer over all windows, with paired intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from resq.backends.backend import Backend
from resq.backends.choose import backend_named
from resq.backends.reference import dense
from resq.checkpoint.manifest import MANIFEST_FILE
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import Shape
from resq.models.decoder import Ends, Layer, Positions
from resq.models.source import Source, locate
from resq.runtime.load import Opened

# Bytes of hidden states and of logits held at once.
HIDDEN_BYTES, LOGIT_BYTES = 2**31, 2**28


@dataclass(frozen=True)
class Streamed:
    """A model as a stream of layers, for passes that visit each layer once: a 16-bit source or a packed checkpoint."""

    name: str
    path: Path
    shape: Shape
    ops: Backend
    read_ends: Callable[[], Ends]
    read_layer: Callable[[int], Layer]

    def ends(self) -> Ends:
        """Embedding, norm and head, prepacked."""
        return self.read_ends().prepacked(self.ops)

    def layers(self) -> Iterator[Layer]:
        """Decoder layers in order, prepacked; the one before is free to go."""
        for index in range(self.shape.layers):
            yield self.read_layer(index).prepacked(self.ops)


def open_streamed(checkpoint: str | Path, backend: str | Backend | None = None) -> Streamed:
    """A packed checkpoint (run by `backend`) or a 16-bit source (float32), told apart by resq.json; a directory or a
    hub id."""
    path = locate(checkpoint)
    if (path / MANIFEST_FILE).is_file():
        opened = Opened(path)
        return Streamed(str(checkpoint), path, opened.shape, backend_named(backend), opened.ends, opened.layer)
    source = Source(path, str(checkpoint))
    return Streamed(str(checkpoint), path, source.shape, dense(torch.float32), source.ends, source.layer)


def check_windows(model: Streamed, windows: Tensor) -> None:
    """Raises InputError when windows int64 [windows, length] do not suit a model."""
    if windows.shape[1] > model.shape.max_positions:
        raise InputError(
            f"windows of {windows.shape[1]} tokens are longer than the context of {model.name}, "
            f"{model.shape.max_positions}; use a shorter --window-length"
        )
    if windows.shape[1] < 2:
        raise InputError(f"a window of {windows.shape[1]} tokens predicts nothing; use at least 2")
    if int(windows.max()) >= model.shape.vocab:
        raise InputError(f"token {int(windows.max())} is outside the vocabulary of {model.name}, {model.shape.vocab}")


@torch.inference_mode()
def window_nll(
    model: Streamed, windows: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """Mean negative log-likelihood in nats of each window, float64 [windows]; windows int64 [windows, length].

    The first token of a window has nothing before it and is not predicted. Logits and log-softmax are float32.
    """
    shape, (count, length) = model.shape, windows.shape
    check_windows(model, windows)
    batch = max(1, min(count, 2048 // length))
    group = max(batch, HIDDEN_BYTES // (4 * length * shape.hidden) // batch * batch)
    ends = model.ends()
    total = -(-count // group) * shape.layers * -(-min(group, count) // batch) + -(-count // batch)
    done, losses = 0, []
    for first in range(0, count, group):
        parts = windows[first : first + group].split(batch)
        hidden = [decoder.embed(model.ops, ends, part) for part in parts]
        positions = [Positions.following(shape, 0, len(part), length) for part in parts]
        for layer in model.layers():
            for index, at in enumerate(positions):
                hidden[index] = decoder.forward_layer(model.ops, shape, layer, hidden[index], at)
                done += 1
                progress(min(done, total), total)
            del layer
        for part, states in zip(parts, hidden, strict=True):
            losses.append(_losses(model.ops, ends, states, part, shape.vocab))
            done += 1
            progress(min(done, total), total)
    return torch.cat(losses)


def _losses(ops: Backend, ends: Ends, hidden: Tensor, tokens: Tensor, vocab: int) -> Tensor:
    rows = max(1, LOGIT_BYTES // (4 * vocab))
    targets = tokens[:, 1:].reshape(-1)
    states = hidden[:, :-1].reshape(1, -1, hidden.shape[-1])
    parts = [
        F.cross_entropy(
            decoder.logits(ops, ends, states[:, at : at + rows])[0].float(), targets[at : at + rows], reduction="none"
        )
        for at in range(0, states.shape[1], rows)
    ]
    return torch.cat(parts).view(tokens.shape[0], -1).mean(dim=1, dtype=torch.float64)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % paired bootstrap interval."""

    mean: float
    low: float
    high: float


def paired_interval(first: Tensor, second: Tensor, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of first - second over windows (same windows, nats), with a 95 % percentile bootstrap interval."""
    difference = (first - second).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(difference), (resamples, len(difference)), generator=generator)
    means = difference[draws].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(difference.mean()), low, high)


def perplexity(losses: Iterable[float] | Tensor) -> float:
    """exp of the mean loss in nats."""
    return float(torch.as_tensor(losses, dtype=torch.float64).mean().exp())
