"""Choosing the next token, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from resq.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0 (the default); otherwise softmax(logits / temperature) restricted to the most probable
    tokens whose mass reaches top_p, drawn with `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """One token id from logits float32 [vocab]."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        logits = logits.cpu()  # where the generator is
        probability, order = torch.softmax((logits - logits.max()).double() / self.temperature, dim=-1).sort(
            descending=True
        )
        # Keep a token while the mass before it is below top_p: at least one always stays.
        probability[probability.cumsum(-1) - probability >= self.top_p] = 0.0
        return int(order[torch.multinomial(probability, 1, generator=generator)])


class Runnable(Protocol):
    """A model with a cache, as `continue_tokens` needs it."""

    def cache(self) -> list[Any]:
        """An empty cache."""
        ...

    def __call__(self, tokens: Tensor, cache: list[Any], *, last: bool) -> Tensor:
        """Logits [b, t, vocab]."""
        ...


def continue_tokens(
    model: Runnable, tokens: Tensor, count: int, sampling: Sampling, ends: frozenset[int]
) -> Iterator[int]:
    """Up to `count` tokens after the prompt tokens int64 [1, t]; stops after a token of `ends`."""
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = model.cache()
    for _ in range(count):
        token = sampling.choose(model(tokens, cache, last=True)[0, -1], generator)
        yield token
        if token in ends:
            return
        tokens = torch.tensor([[token]])
