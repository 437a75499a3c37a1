"""The packed cache of the Triton backend: how bytes lie, how room grows, what is kept."""

from __future__ import annotations

import pytest
import torch
from tests.backends.cases import stored_format
from tests.backends.test_cpu import heads_of
from tests.backends.triton.test_attention import CASES, append, assert_stored_alike, bands_of, new_cache

from resq.backends.reference import REFERENCE
from resq.backends.triton import TRITON
from resq.backends.triton.cache import GROUP
from resq.backends.triton.configs import using
from resq.numerics.affine import quantize
from resq.numerics.formats import HeadFormats


@pytest.mark.parametrize(("size", "bytes"), [(64, 42), (128, 78)])
def test_a_token_takes_little_more_than_its_bits(size: int, bytes: int) -> None:
    cache = TRITON.cache(HeadFormats(key=stored_format(size), value=stored_format(size)))
    cache.reserve(3, 2, size, 22)
    cache.advance(22)
    assert cache.nbytes() == 2 * bytes * 3 * 22 * 2


def test_bytes_lie_where_the_layout_says() -> None:
    """Two coordinates of a narrow band share a byte; equal bytes of 16 tokens' values lie together."""
    format = bands_of((3, 7), (5, 4), (4, 5))
    layer = heads_of(16, 1, 1, key=format, value=format)
    cache, parts = new_cache(layer), layer.drawn(1, 35)
    append(layer, cache, parts)
    assert format.bands is not None
    want = quantize(parts[2][0, :, 0], format.bands, scale_dtype=torch.float16)
    nibbles, bytes, scales, zeros = (plane[0, 0] for plane in cache.values.planes)
    narrow = nibbles.view(-1, 7, GROUP).transpose(1, 2).reshape(-1, 7)[:35]
    wide = bytes.view(-1, 4, GROUP).transpose(1, 2).reshape(-1, 4)[:35]
    assert torch.equal(torch.cat([narrow[:, :4] & 15, narrow[:, :3] >> 4], dim=1), want.q[:, :7])
    assert torch.equal(wide, want.q[:, 7:11])
    assert torch.equal(torch.cat([narrow[:, 4:] & 15, narrow[:, 4:6] >> 4], dim=1), want.q[:, 11:])
    assert torch.equal(scales[:35].float(), want.scale[..., 0])
    assert torch.equal(zeros[:35], want.zero[..., 0])


@pytest.mark.parametrize("name", ["h6-gqa-2", "h20-float16"])
def test_room_doubles_and_keeps_what_is_stored(name: str) -> None:
    layer = CASES[name]
    grown, roomy = new_cache(layer), new_cache(layer)
    roomy.reserve(2, layer.kv_heads, layer.size, 200)
    assert roomy.capacity == 256
    for number, (tokens, capacity) in enumerate(((7, 128), (119, 128), (3, 256))):
        parts, at = layer.drawn(2, tokens, seed=number), grown.storage()
        with using("rope", rows=256):
            append(layer, grown, parts)
            append(layer, roomy, parts)
        assert grown.capacity == capacity
        assert (grown.storage() == at) == (number == 1)
    for mine, theirs in zip(grown.read(), roomy.read(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["h32-2-4-6", "h20-float16"])
def test_a_cropped_or_reordered_cache_goes_on_as_the_references_does(name: str) -> None:
    layer = CASES[name]
    mine, theirs = new_cache(layer), REFERENCE.cache(layer.formats)
    for ops, cache in ((TRITON, mine), (REFERENCE, theirs)):
        append(layer, cache, layer.drawn(3, 20), ops)
        cache.crop(60)
        assert cache.length == 20
        cache.crop(9)
        append(layer, cache, layer.drawn(3, 2, seed=5), ops)
        cache.select(torch.tensor([2, 0, 2, 2]))
        append(layer, cache, layer.drawn(4, 10, seed=6), ops)
    assert mine.length == 21
    assert_stored_alike(layer, mine, theirs)
    at = mine.storage()
    for cache in (mine, theirs):
        cache.select(torch.tensor([3, 1, 0, 1]))
    assert mine.storage() == at  # as many rows: recorded steps stay good
    assert_stored_alike(layer, mine, theirs)
    mine.crop(0)
    assert (mine.length, mine.nbytes()) == (0, 0)


def test_a_cache_made_in_inference_mode_goes_on_outside_it() -> None:
    layer = CASES["h20-float16"]
    cache, theirs = new_cache(layer), REFERENCE.cache(layer.formats)
    parts = layer.drawn(2, 5)
    with torch.inference_mode():
        append(layer, cache, parts)
    append(layer, cache, parts)
    cache.select(torch.tensor([1, 0]))
    for _ in range(2):
        append(layer, theirs, parts, REFERENCE)
    theirs.select(torch.tensor([1, 0]))
    assert_stored_alike(layer, cache, theirs)
