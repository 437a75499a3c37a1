"""Decoding one token per row as a recorded step, for backends that repeat one at less cost than calling operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resq.backends.backend import Backend, ReplayedCache
from resq.models import decoder
from resq.models.architecture import Shape
from resq.models.decoder import Ends, Layer, Positions


@dataclass
class _Recording:
    """State: a step over one cache: its inputs, the tokens stored before it, where the cache lay when it last ran, and
    once it has been recorded what repeats it."""

    tokens: Tensor
    clock: Tensor
    starts: Tensor | None
    storage: tuple[int, ...]
    length: int = 0
    replay: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Steps:
    """Steps of one model. The first step after a cache has moved is run operator by operator, the second is recorded:
    beam search, whose caches move at every step, never pays for a recording."""

    backend: Backend
    shape: Shape
    ends: Ends
    layers: Sequence[Layer]

    def __call__(self, tokens: Tensor, caches: Sequence[ReplayedCache], starts: Tensor | None) -> Tensor:
        """tokens int64 [b, 1] -> logits float32 [b, 1, vocab]; the caches, one per layer, grow by a token."""
        length, shape, first = caches[0].length, self.shape, caches[0]
        for cache in caches:
            cache.reserve(len(tokens), shape.kv_heads, shape.head_dim, length + 1)
        storage = tuple(address for cache in caches for address in cache.storage())
        known: _Recording | None = first.recording
        moved = known is None or known.storage != storage or (known.starts is None) != (starts is None)
        if known is None or moved:
            known = first.recording = self._fresh(tokens, starts, storage)
        known.length = length
        known.tokens.copy_(tokens)
        known.clock.fill_(length)
        if known.starts is not None and starts is not None:
            known.starts.copy_(starts)
        try:
            for cache in caches:
                cache.clock = known.clock
            return self._run(known, caches, record=not moved)
        finally:
            for cache in caches:
                cache.clock = None
                cache.advance(length + 1 - cache.length)

    def _fresh(self, tokens: Tensor, starts: Tensor | None, storage: tuple[int, ...]) -> _Recording:
        device = self.backend.device
        fixed = None if starts is None else torch.empty_like(starts, device=device)
        clock = torch.zeros(1, dtype=torch.int32, device=device)
        return _Recording(torch.empty_like(tokens, device=device), clock, fixed, storage)

    def _run(self, known: _Recording, caches: Sequence[ReplayedCache], *, record: bool) -> Tensor:
        def step() -> Tensor:
            for cache in caches:  # recording runs it twice
                cache.crop(known.length)
            slots = known.clock.to(torch.int64).expand(len(known.tokens))[:, None]
            at = Positions.at(self.shape, slots, known.starts)
            return decoder.forward_at(self.backend, self.shape, self.ends, self.layers, known.tokens, at, caches)

        if not record:
            return step()
        if known.replay is None:
            assert self.backend.record is not None
            known.replay = self.backend.record(step)
        # The next step overwrites a recorded result.
        return known.replay().clone()
