"""Families and recipes on the Triton backend, as on the reference: on a card where there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.test_backends import differences
from tests.conformance.test_families import FAMILIES, packed

import resq
from resq.ptq.recipes import RECIPES
from resq.runtime.generate import Sampling, continue_tokens

# A step of an interpreted kernel takes a millisecond: few tokens, and what takes more with the slow tests.
TOKENS = torch.randint(3, 259, (4, 5), generator=torch.Generator().manual_seed(5))
# Other integers in the formats of rtn, and of resq: the same kernels with the same constants.
ALIKE = ("gptq", "smoothquant+", "resq-learned")
CASES = [(family, "resq") for family in FAMILIES] + [
    ("llama", recipe) for recipe in RECIPES if recipe not in ("resq", *ALIKE)
]


def assert_agrees(got: torch.Tensor, want: torch.Tensor) -> None:
    """As tests/conformance/test_backends.py, for rows so few that one integer on the other side of its border is one
    row of four, from there on: logits [b, t, vocab]."""
    difference = differences(got, want)
    assert float(difference.median()) <= 1e-5
    assert int((difference <= 1e-4).all(dim=1).sum()) >= len(difference) - 1
    assert float(difference.max()) <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("family", "recipe"), [*CASES, ("qwen3-sliding", "resq-paper")])
def test_logits_are_the_references_in_prefill_in_steps_and_with_padding(
    family: str, recipe: str, checkpoint: Callable[..., Path], text: Path
) -> None:
    directory = packed(family, recipe, checkpoint, text)
    ours, theirs = (resq.load(directory, backend=name) for name in ("triton", "reference"))
    assert ours.backend.name == "triton"
    assert_agrees(ours(TOKENS).cpu(), theirs(TOKENS))
    # Steps, of padded rows and of others: run, recorded, and repeated.
    lengths = torch.tensor([0, 2, 1, 0])
    valid = torch.arange(TOKENS.shape[1]) >= lengths[:, None]
    parts = (TOKENS * valid).split([2, 1, 1, 1], dim=1)
    both = []
    for model in (ours, theirs):
        cache = model.cache()
        both.append(torch.cat([model(part, cache, lengths).cpu() for part in parts], dim=1) * valid[:, :, None])
        assert cache[0].length == TOKENS.shape[1]
    assert_agrees(*both)


def test_recorded_steps_follow_what_becomes_of_their_cache(checkpoint: Callable[..., Path], text: Path) -> None:
    directory = packed("qwen2-sliding", "resq", checkpoint, text)
    model = resq.load(directory, backend="triton")
    tokens = TOKENS[:3]
    whole: torch.Tensor = model(tokens)
    cache: Any = model.cache()

    def step(at: int) -> torch.Tensor:
        return model(tokens[:, at : at + 1], cache)[:, 0]

    model(tokens[:, :2], cache)
    for at in (2, 3):
        torch.testing.assert_close(step(at), whole[:, at], rtol=1e-3, atol=1e-3)
    for each in cache:  # a speculative token that was not taken
        each.crop(3)
    torch.testing.assert_close(step(3), whole[:, 3], rtol=1e-3, atol=1e-3)
    turn = torch.tensor([2, 0, 1])  # beams
    for each in cache:
        each.select(turn)
    got = model(tokens[turn, 4:5], cache)[:, 0]
    torch.testing.assert_close(got, whole[turn, 4], rtol=1e-3, atol=1e-3)
    assert [each.length for each in cache] == [5, 5]
    # A cache that grows moves, and its step is recorded anew.
    before, room = cache[0].recording, cache[0].storage()
    for each in cache:
        each.crop(4)
        each.reserve(3, model.shape.kv_heads, model.shape.head_dim, each.capacity + 1)
    assert cache[0].storage() != room
    got = model(tokens[turn, 4:5], cache)[:, 0]
    torch.testing.assert_close(got, whole[turn, 4], rtol=1e-3, atol=1e-3)
    assert cache[0].recording is not before


def test_logits_and_greedy_text_are_the_references(checkpoint: Callable[..., Path], text: Path) -> None:
    directory = packed("llama", "resq", checkpoint, text)
    ours, theirs = (resq.load(directory, backend=name) for name in ("triton", "reference"))
    assert_agrees(ours(TOKENS).cpu(), theirs(TOKENS))
    made = [list(continue_tokens(each, TOKENS[:1], 4, Sampling(), each.end_tokens)) for each in (ours, theirs)]
    assert made[0] == made[1]
