"""Every family with every recipe runs on the CPU backend as on the reference, and alike through both hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backends.cases import instruction_sets
from tests.conformance.test_families import FAMILIES, PROMPT, decoded, packed
from torch import Tensor

import resq
from resq.backends.cpu import native
from resq.ptq.recipes import RECIPES
from resq.runtime.generate import Sampling, continue_tokens

# Many short rows: where one integer differs, the later positions of its row may.
TOKENS = torch.randint(3, 259, (24, 10), generator=torch.Generator().manual_seed(5))


def differences(got: Tensor, want: Tensor) -> Tensor:
    """Of each position's logits, the largest, in parts of the largest logit there is."""
    assert got.shape == want.shape
    return (got - want).abs().amax(dim=-1) / want.abs().max()


def assert_agrees(got: Tensor, want: Tensor) -> None:
    """Where every integer is equal only float32 sums differ: some 30 follow one another in two layers, each a few
    2^-24 of its magnitudes off. That is 10^-5 of the largest logit, and 10^-4 with room for cancellation.

    An input within such a difference of the border between two integers becomes the neighbour of what it is in the
    reference, a step of its scale: its position's logits then differ by something like the rounding error itself, and
    those of later positions in its row a little. A position has some 1,000 inputs, each off by about 10^-6 of a step
    (10^-4 of one where it is a float16 in the cache): one position in a hundred, and what follows it, or fewer.
    """
    difference = differences(got, want)
    assert float(difference.median()) <= 1e-5
    assert float((difference <= 1e-4).double().mean()) >= 0.85
    assert float(difference.max()) <= 0.5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_references_and_prefill_and_decoding_have_the_same_bits(
    family: str, recipe: str, checkpoint: Callable[..., Path], text: Path
) -> None:
    directory = packed(family, recipe, checkpoint, text)
    models = [resq.load(directory, backend=name) for name in ("cpu", "reference")]
    assert [model.backend.name for model in models] == ["cpu", "reference"]
    whole, want = (model(TOKENS) for model in models)
    assert_agrees(whole, want)
    # Left-padded rows, and tokens after a prompt.
    lengths = torch.arange(len(TOKENS)) % 6
    valid = torch.arange(TOKENS.shape[1]) >= lengths[:, None]
    padded, parts = TOKENS * valid, []
    for model in models:
        cache = model.cache()
        parts.append(torch.cat([model(part, cache, lengths) for part in padded.split([7, 1, 2], dim=1)], dim=1))
    assert_agrees(parts[0][valid], parts[1][valid])
    # A row of the kernels does not depend on the number of rows: there is nothing to tolerate.
    mine = models[0]
    assert torch.equal(decoded(mine, TOKENS), whole)
    assert torch.equal(mine(TOKENS[3:5]), whole[3:5])
    alone = mine(TOKENS[5:6, 5:])
    assert torch.equal(parts[0][5:6, 5:], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_generates_what_our_own_runtime_does(
    family: str, checkpoint: Callable[..., Path], text: Path
) -> None:
    from transformers import AutoModelForCausalLM

    directory = packed(family, "resq", checkpoint, text)
    own = resq.load(directory, backend="cpu")
    hosted: Any = AutoModelForCausalLM.from_pretrained(directory)
    row = PROMPT[:1]
    with torch.inference_mode():
        assert torch.equal(hosted(row).logits, own(row))
    made = hosted.generate(row, max_new_tokens=16, do_sample=False)[0, row.shape[1] :].tolist()
    assert made == list(continue_tokens(own, row, 16, Sampling(), own.end_tokens))


@pytest.mark.parametrize("name", instruction_sets())
def test_a_model_runs_alike_on_every_instruction_set(name: str, checkpoint: Callable[..., Path], text: Path) -> None:
    directory = packed("qwen3", "resq", checkpoint, text)
    theirs, before = resq.load(directory, backend="reference"), native.module().active()
    try:
        native.use(name)
        assert_agrees(resq.load(directory, backend="cpu")(TOKENS), theirs(TOKENS))
    finally:
        native.use(before)
