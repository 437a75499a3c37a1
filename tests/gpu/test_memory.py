"""What a block takes of a card's memory, as its allocator counts."""

from __future__ import annotations

import gc

import pytest
import torch

from resq.backends.triton import TRITON
from resq.measure.gpu.roofline import cache_bytes, weight_bytes
from resq.measure.shapes import shape_named
from resq.measure.synthetic import one_layer
from resq.models.decoder import Positions, forward_layer
from resq.ptq.recipes import recipe_named

TOKENS = 4096
SHAPES = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b")


def held() -> int:
    """Bytes allocated on the card."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("name", SHAPES)
def test_weights_and_cache_take_what_the_ledger_counts(name: str) -> None:
    """Bytes as measure/ledger.py counts them, which measure/gpu/roofline.py does from the recipe."""
    recipe = recipe_named("resq")
    shape, layer = one_layer(shape_named(name), recipe)
    before = held()
    packed = layer.prepacked(TRITON)
    want = sum(weight_bytes(shape, recipe.precision).values())
    assert want <= held() - before <= 1.05 * want
    at = Positions.following(shape, 0, 1, TOKENS, device=TRITON.device)
    hidden = torch.randn(1, TOKENS, shape.hidden, device=TRITON.device)
    # The first run makes what every layer shares: maps, room for sums.
    caches = [TRITON.cache(layer.heads) for _ in range(2)]
    stored = TOKENS * cache_bytes(shape, recipe.precision)
    for number, cache in enumerate(caches):
        before = held()
        with torch.inference_mode():
            forward_layer(TRITON, shape, packed, hidden, at, cache)
        assert cache.nbytes() == stored
        if number:
            assert stored <= held() - before <= 1.05 * stored
