"""Perplexity of a source or a packed checkpoint, layer by layer over all windows, with paired intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from resq.backends.backend import Backend
from resq.backends.choose import backend_named, device_of
from resq.backends.reference import dense
from resq.checkpoint.manifest import MANIFEST_FILE
from resq.measure.windows import check_windows
from resq.models import decoder
from resq.models.architecture import Shape
from resq.models.decoder import Ends, Layer, Positions
from resq.models.source import Source, locate
from resq.runtime.load import Opened

# Bytes of hidden states and of logits held at once.
HIDDEN_BYTES, LOGIT_BYTES = 2**31, 2**28
# A bootstrap interval's resamples, and how many are drawn at once: 500 of 10,000 windows take 40 MB.
RESAMPLES, DRAWN = 10_000, 500

Steps = Callable[[int, int], None]


def unseen(done: int, total: int) -> None:
    """Shows no steps."""


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
    """A packed checkpoint (run by `backend`) or a 16-bit source (float32, on the backend's device), told apart by
    resq.json; a directory or a hub id."""
    path = locate(checkpoint)
    if (path / MANIFEST_FILE).is_file():
        opened = Opened(path)
        return Streamed(str(checkpoint), path, opened.shape, backend_named(backend), opened.ends, opened.layer)
    source = Source(path, str(checkpoint))
    ops = dense(torch.float32, device_of(backend))
    return Streamed(str(checkpoint), path, source.shape, ops, source.ends, source.layer)


def final_states(
    model: Streamed, ends: Ends, windows: Tensor, progress: Steps = unseen
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pass over a model: some windows' tokens int64 [b, length] and their hidden states [b, length, d] before the
    final norm, in the order of `windows` int64 [windows, length]. A layer is read once for as many windows as
    `HIDDEN_BYTES` hold."""
    shape, (count, length) = model.shape, windows.shape
    check_windows(model, windows)
    batch = max(1, min(count, 2048 // length))
    group = max(batch, HIDDEN_BYTES // (4 * length * shape.hidden) // batch * batch)
    total = -(-count // group) * shape.layers * -(-min(group, count) // batch) + -(-count // batch)
    done = 0
    for first in range(0, count, group):
        parts = windows[first : first + group].split(batch)
        hidden = [decoder.embed(model.ops, ends, part) for part in parts]
        positions = [Positions.following(shape, 0, len(part), length, device=model.ops.device) for part in parts]
        for layer in model.layers():
            for index, at in enumerate(positions):
                hidden[index] = decoder.forward_layer(model.ops, shape, layer, hidden[index], at)
                done += 1
                progress(min(done, total), total)
            del layer
        for part, states in zip(parts, hidden, strict=True):
            yield part, states
            done += 1
            progress(min(done, total), total)


@torch.inference_mode()
def window_nll(model: Streamed, windows: Tensor, progress: Steps = unseen) -> Tensor:
    """Mean negative log-likelihood in nats of each window, float64 [windows]; windows int64 [windows, length].

    The first token of a window has nothing before it and is not predicted. Logits and log-softmax are float32.
    """
    ends = model.ends()
    losses = [_losses(model, ends, states, part) for part, states in final_states(model, ends, windows, progress)]
    return torch.cat(losses)


def logit_rows(model: Streamed, ends: Ends, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """states [n, d] before the final norm -> logits float32 [rows, vocab] of one range of them after the other, each of
    at most `LOGIT_BYTES`."""
    rows = max(1, LOGIT_BYTES // (4 * model.shape.vocab))
    for at in range(0, len(states), rows):
        cut = slice(at, min(at + rows, len(states)))
        yield cut, decoder.logits(model.ops, ends, states[None, cut].to(model.ops.device))[0].float()


def _losses(model: Streamed, ends: Ends, hidden: Tensor, tokens: Tensor) -> Tensor:
    targets = tokens[:, 1:].reshape(-1).to(model.ops.device)
    parts = [
        F.cross_entropy(logits, targets[cut], reduction="none")
        for cut, logits in logit_rows(model, ends, hidden[:, :-1].flatten(0, 1))
    ]
    return torch.cat(parts).view(tokens.shape[0], -1).mean(dim=1, dtype=torch.float64).cpu()


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Tensor, *, tail: float = 0.025, seed: int = 0) -> Interval:
    """Mean over windows of values [windows] and its percentile bootstrap interval, which leaves out `tail` on each
    side: 0.025 is the two-sided 95 % interval, 0.05 has both one-sided 95 % bounds."""
    values = values.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(values), (DRAWN, len(values)), generator=generator) for _ in range(RESAMPLES // DRAWN))
    means = torch.cat([values[draw].mean(dim=1) for draw in draws])
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def paired_interval(first: Tensor, second: Tensor) -> Interval:
    """Mean of first - second over windows (the same windows, nats), with its 95 % bootstrap interval."""
    return mean_interval(first.to(torch.float64) - second.to(torch.float64))


def perplexity(losses: Iterable[float] | Tensor) -> float:
    """exp of the mean loss in nats."""
    return float(torch.as_tensor(losses, dtype=torch.float64).mean().exp())
