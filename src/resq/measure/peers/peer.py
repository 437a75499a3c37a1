"""An engine as a peer of ours: the contract, and what a prefill and a decode step are for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import Config, Shape
from resq.progress import Progress, silent

# Tokens in one forward while a cache is filled: bounds the hidden states of a batch of long rows.
FILL_TOKENS = 2048
# Decode steps for which a cache has room; then it is made anew and filled again, outside any timing.
ROOM = 256
# Standard deviation of random weights, as at the start of training: activations stay in the range of a trained model.
DEVIATION = 0.02


class Engine(Protocol):
    """State: a model of random weights, and the cache of one batch.

    version: of the engine. weight_bytes: as the engine was given them, what several parts share counted once.
    about: how it is configured, in words. vocab: tokens.
    """

    version: str
    weight_bytes: int
    about: str
    vocab: int

    def empty(self, rows: int, tokens: int) -> None:
        """Forget everything; the cache is to hold up to `tokens` tokens for each of `rows` rows."""
        ...

    def forward(self, tokens: np.ndarray, start: int) -> float:
        """Seconds of one call on tokens int64 [rows, t] at positions start … of every row, up to the logits of each
        row's last token."""
        ...

    def logits(self) -> Tensor:
        """float32 [rows, vocab] of the last call."""
        ...

    def close(self) -> None:
        """Free the weights and the cache."""
        ...


class Build(Protocol):
    """Makes an engine for a configuration: its head in `head_bits` bits where the engine quantizes the head."""

    def __call__(self, config: Config, threads: int, head_bits: int, progress: Progress = silent) -> Engine:
        """The engine, ready to be timed."""
        ...


class Peer:
    """State: an engine under its name, and how far each row of the batch it decodes has come."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine
        self._batch = self._context = self._room = 0

    def prefill(self, tokens: int) -> float:
        """Seconds of one prefill of `tokens` tokens of a fresh context, up to the last token's logits.

        Empties the cache: decoding needs another `start_decode`.
        """
        self._batch = 0
        self.engine.empty(1, tokens)
        return self._forward(1, 0, tokens)

    def start_decode(self, batch: int, context: int) -> None:
        """Fill the cache with `context` tokens for each of `batch` rows."""
        self._batch, self._context, self._room = batch, context, context + ROOM
        self.engine.empty(batch, self._room)
        step = max(1, FILL_TOKENS // batch)
        for start in range(0, context, step):
            self._forward(batch, start, min(context, start + step))

    def decode(self) -> float:
        """Seconds of one decode step of the batch, up to the logits of every row; the next token is given, not chosen.

        Every row is one token longer afterwards.
        """
        if not self._batch:
            raise ValueError("decode() has no context to continue; call start_decode(batch, context) first")
        if self._context == self._room:
            self.start_decode(self._batch, self._context)
        seconds = self._forward(self._batch, self._context, self._context + 1)
        self._context += 1
        return seconds

    def _forward(self, batch: int, start: int, stop: int) -> float:
        return self.engine.forward(tokens_of(self.engine.vocab, batch, start, stop), start)


def tokens_of(vocab: int, batch: int, start: int, stop: int) -> np.ndarray:
    """Tokens int64 [batch, stop - start] at positions start … stop - 1 of an endless text for each row.

    The strides are primes, so that neither a row's tokens nor the rows at one position repeat soon.
    """
    positions = np.arange(start, stop, dtype=np.int64)
    rows = np.arange(batch, dtype=np.int64)
    return (positions * 7919 + rows[:, None] * 104729 + 1) % vocab


def signed(scale: float, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """±scale float16 of a shape: integers in -8 … 7 have a mean, times scales of either sign they have none."""
    return np.where(random.integers(0, 2, shape, np.uint8), scale, -scale).astype(np.float16)


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def check_full_attention(name: str, shape: Shape) -> None:
    """Raises InputError for a model with sliding windows."""
    if any(window is not None for window in shape.windows):
        raise InputError(f"{name} is built with full attention only, this model has sliding windows; leave {name} out")


def check_groups(name: str, shape: Shape, group: int) -> None:
    """Raises InputError where a linear's inputs are no multiple of `group`."""
    for size in (shape.hidden, shape.heads * shape.head_dim, shape.ffn):
        if size % group:
            raise InputError(f"{name} rounds groups of {group} weights, which {size} inputs are not; leave {name} out")
