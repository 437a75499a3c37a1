"""Heads of the Triton backend: stored as the reference stores them, attended to within a derived bound.

What operators allocate is filled beforehand with NaN, or the largest integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.backends.cases import naive_attention, normal, poisoned
from tests.backends.test_cpu import LAYERS, ROUNDING, Heads, formats_with, heads_of, stored, turned
from torch import Tensor

from resq.backends.reference import REFERENCE
from resq.backends.triton import TRITON, attention
from resq.backends.triton.cache import Cache
from resq.backends.triton.configs import using
from resq.backends.triton.kernels import attention as kernels
from resq.errors import InputError
from resq.numerics.bands import Bands
from resq.numerics.formats import ActivationFormat, Norm

# Two bfloat16 parts, even if each is cut off and not rounded (the interpreter does): 2 · 7 bits.
SPLIT = 2.0**-14
HALF = torch.float16


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def bands_of(*pairs: tuple[int, int], clip: tuple[float, ...] | None = None) -> ActivationFormat:
    return ActivationFormat(bands=Bands.of(*pairs), scale_dtype=HALF, clip=clip)


CASES: dict[str, Heads] = {
    name: LAYERS[name]
    for name in (
        "h6-gqa-2",
        "h16-8-to-1-dense-8-bit",
        "h80-hadamard-value-map",
        "h20-float16",
        "h16-only-values-rounded",
    )
} | {
    "h32-2-4-6": heads_of(32, 4, 1, key=bands_of((2, 6), (4, 20), (6, 6)), value=bands_of((2, 4), (4, 24), (6, 4))),
    "h24-3-and-5-clipped": heads_of(
        24, 2, 2, map=turned(24), norms=True, key=bands_of((3, 21), (5, 3), clip=(0.8, 1.0)), value=bands_of((1, 24))
    ),
    "h34-float32-scales": LAYERS["h34-uneven-bands"],
}


def new_cache(layer: Heads) -> Cache:
    cache = TRITON.cache(layer.formats)
    assert isinstance(cache, Cache)
    return cache


def append(layer: Heads, cache: Any, parts: Sequence[Tensor], ops: Any = TRITON) -> Tensor:
    q, k, v, cos, sin = parts
    return ops.rope_project_append(q, k, v, cos, sin, layer.formats, cache)


def assert_stored_alike(layer: Heads, got: Any, want: Any) -> None:
    """The reference's integers, but where float32 falls on the other side of a border: sums of h products move by less
    than h · 2^-24 of the head, which crosses the border of one of 2^8 steps in less than one of 2^8 heads."""
    assert (got.length, got.batch) == (want.length, want.batch)
    formats = (layer.formats.key, layer.formats.value)
    for mine, theirs, format in zip(got.read(), want.read(), formats, strict=True):
        mine, theirs = mine.double(), theirs.double()
        ulp = 2.0**-22 if format.bands is None or format.scale_dtype != HALF else 0.0
        off = (mine - theirs).abs() > theirs.abs() * ulp
        assert off.double().mean() <= 1 / 250
        narrow = 8 if format.bands is None else min(band.bits for band in format.bands)
        step = 1.01 * (theirs.amax(-1, keepdim=True).clamp(min=0) - theirs.amin(-1, keepdim=True).clamp(max=0))
        assert ((mine - theirs).abs() <= step / (2**narrow - 1)).all()


def check_attention(
    layer: Heads, cache: Cache, q: Tensor, starts: list[int] | None, window: int | None, slots: int | None = None
) -> Tensor:
    """Against one query at a time in float64, over the stored keys and values.

    A score is off by SPLIT and h + 8 roundings of Σ |q k|, that is the relative error of a weight, counted twice (the
    softmax divides by their sum); a weight times its scale by SPLIT, and the sums over slots by a rounding each.
    """
    scale = layer.size**-0.5
    got = TRITON.attend(q, cache, scale, None if starts is None else torch.tensor(starts), window)
    length = cache.length if slots is None else slots
    keys, values = (
        store.dense(slice(0, cache.batch), slice(0, length), torch.float32).transpose(1, 2)
        for store in (cache.keys, cache.values)
    )
    want = naive_attention(q, keys, values, scale, starts or [0] * q.shape[0], window)
    share = layer.heads // layer.kv_heads
    every = keys.double().abs().repeat_interleave(share, dim=2)
    most = float(torch.einsum("bthd,bshd->bths", q.double().abs(), every).max()) * scale
    bound = 2 * most * (SPLIT + (layer.size + 8) * ROUNDING) + SPLIT + (length + 64) * ROUNDING
    assert got.dtype == torch.float32
    assert float((got.double() - want).abs().max()) <= bound * float(values.abs().max())
    return got


@pytest.mark.parametrize("name", CASES)
def test_heads_are_stored_as_the_reference_stores_them_and_attended_to(name: str) -> None:
    layer = CASES[name]
    mine, theirs = new_cache(layer), REFERENCE.cache(layer.formats)
    for number, tokens in enumerate((1, 12, 3)):
        parts = layer.drawn(2, tokens, seed=10 * number)
        got, want = append(layer, mine, parts), append(layer, theirs, parts, REFERENCE)
        if layer.formats.query.map_input_bits is None:
            assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())
    assert_stored_alike(layer, mine, theirs)
    if layer.formats.value.map is None:
        assert torch.equal(mine.read()[1], theirs.read()[1].float())  # nothing but rounding: bit for bit
    for tokens, starts, window in ((3, None, None), (1, [15, 9], 5)):
        check_attention(layer, mine, got[:, -tokens:], starts, window)


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(4, 4, 2), (4, 1, 8), (8, 1, 1), (48, 1, 1)])
def test_padding_and_windows_hide_what_they_should(heads: int, kv_heads: int, tokens: int) -> None:
    """Few and many rows in a tile, and more than the packed kernel takes; parts that see nothing."""
    layer = heads_of(16, heads, kv_heads)
    cache = new_cache(layer)
    with using("rope", rows=256):
        q = append(layer, cache, layer.drawn(2, 100))[:, -tokens:]
    for starts, window in ((None, None), ([0, 99], 3), ([90, 30], 60)):
        check_attention(layer, cache, q, starts, window)


@pytest.mark.parametrize("name", ["h16-8-to-1-dense-8-bit", "h20-float16"])
def test_long_inputs_are_attended_to_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CASES[name]
    cache = new_cache(layer)
    with using("rope", rows=256):
        q = append(layer, cache, layer.drawn(2, 60))
    for chunk, workspace in ((1024, 2**29), (16, 1)):
        monkeypatch.setattr(attention, "CHUNK", chunk)
        monkeypatch.setattr(attention, "WORKSPACE", workspace)
        for tokens, starts, window in (
            (60, None, None),
            (40, None, None),
            (40, [0, 20], None),
            (60, [40, 3], 5),
            (40, None, 20),
        ):
            check_attention(layer, cache, q[:, -tokens:], starts, window)


def test_one_massive_coordinate_is_stored_and_attended_to() -> None:
    layer = heads_of(16, 4, 2, map=turned(16))
    parts = layer.drawn(1, 9)
    for part in parts[:3]:
        part[:, 4, :, 3] *= 1000
    mine, theirs = new_cache(layer), REFERENCE.cache(layer.formats)
    q = append(layer, mine, parts)
    append(layer, theirs, parts, REFERENCE)
    assert_stored_alike(layer, mine, theirs)
    check_attention(layer, mine, q[:, -1:], None, None)


@pytest.mark.parametrize("name", ["h16-8-to-1-dense-8-bit", "h32-2-4-6", "h20-float16"])
def test_tokens_one_by_one_are_stored_as_all_at_once_are(name: str) -> None:
    layer = CASES[name]
    parts = layer.drawn(2, 9)
    whole, cache = new_cache(layer), new_cache(layer)
    q = append(layer, whole, parts)
    for first, last in ((0, 6), (6, 7), (7, 8), (8, 9)):
        assert torch.equal(append(layer, cache, [part[:, first:last] for part in parts]), q[:, first:last])
    for mine, theirs in zip(cache.read(), whole.read(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["h6-gqa-2", "h20-float16"])
def test_a_step_that_reads_the_clock_is_the_step_that_is_told_the_length(name: str) -> None:
    layer, starts = CASES[name], torch.tensor([0, 30])
    before, step = layer.drawn(2, 37), layer.drawn(2, 1, seed=7)
    told, clocked = new_cache(layer), new_cache(layer)
    for cache in (told, clocked):
        append(layer, cache, before)
    clocked.crop(20)  # what Python counts is not what counts
    clocked.clock = torch.tensor([37], dtype=torch.int32, device=TRITON.device)
    at = clocked.storage()
    q, q_clocked = append(layer, told, step), append(layer, clocked, step)
    assert torch.equal(q, q_clocked)
    for first, window in ((None, None), (starts, 20)):
        rows = None if first is None else first.tolist()
        want = check_attention(layer, told, q, rows, window)
        got = check_attention(layer, clocked, q, rows, window, slots=38)
        assert torch.equal(got, want) or layer.formats.key.bands is None  # torch's attention adds in another order
    clocked.clock = None
    clocked.advance(38 - clocked.length)
    for mine, theirs in zip(clocked.read(), told.read(), strict=True):
        assert torch.equal(mine, theirs)
    assert clocked.storage() == at


def halves(word: Tensor) -> list[Tensor]:
    """The two bfloat16 of 32-bit words, int64 [n], as float64."""
    return [((word >> shift & 0xFFFF) << 16).to(torch.int32).view(torch.float32).double() for shift in (0, 16)]


def word(*parts: Tensor) -> Tensor:
    """The inverse of `halves`, rounding."""
    low, high = (part.to(torch.bfloat16).view(torch.int16).long() & 0xFFFF for part in parts)
    return low | high << 16


def executed(assembly: str, registers: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the few instructions of our inline assembly do to 32-bit words, each int64 [n]."""
    for line in assembly.replace("{", "").replace("}", "").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *names = (name.strip() for name in rest.split(","))
        given = [registers[name] if name in registers else torch.tensor(int(name, 0)) for name in names]
        match operation:
            case "mov.b32":
                made = given[0]
            case "and.b32":
                made = given[0] & given[1]
            case "shr.u32":
                made = given[0] >> given[1]
            case "prmt.b32":
                both = given[0] | given[1] << 32
                picked = [int(given[2]) >> 4 * place & 7 for place in range(4)]
                made = sum((both >> 8 * byte & 0xFF) << 8 * place for place, byte in enumerate(picked))
            case "fma.rn.bf16x2":
                made = word(*(a * b + c for a, b, c in zip(*map(halves, given), strict=True)))
            case _:
                raise AssertionError(f"no such instruction here: {operation}")
        assert isinstance(made, Tensor)
        registers[target] = made
    return registers


def test_inline_assembly_makes_the_integers_of_the_plain_path() -> None:
    """Every byte with every zero point that its band can have, in each of a word's four places."""
    byte, zero = (part.flatten() for part in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij"))
    packed = byte | (byte ^ 255) << 8 | (255 - byte) * 0x10000 | byte << 24
    bytes = [byte, byte ^ 255, 255 - byte, byte]
    away = word(-zero.double(), -zero.double())
    made = executed(kernels.BYTES_ASM.value, {"$2": packed, "$3": away, "$4": away})
    for values, want in zip([*halves(made["$0"]), *halves(made["$1"])], bytes, strict=True):
        assert torch.equal(values, (want - zero).double())
    low = zero < 16
    away = word(*[-128.0 - zero.double()] * 2)
    made = executed(kernels.NIBBLES_ASM.value, {"$4": packed, "$5": away, "$6": away})
    for names, shift in ((("$0", "$1"), 0), (("$2", "$3"), 4)):
        for values, want in zip([each for name in names for each in halves(made[name])], bytes, strict=True):
            assert torch.equal(values[low], ((want >> shift & 15) - zero).double()[low])


SMALL = heads_of(16, 4, 2)


def filled(batch: int = 2, kv_heads: int = 2) -> Cache:
    layer = replace(SMALL, kv_heads=kv_heads)
    cache = new_cache(layer)
    append(layer, cache, layer.drawn(batch, 3))
    return cache


def appended(cache: Cache | None = None, *, formats: Any = None, **changes: Tensor) -> None:
    parts = dict(zip(("q", "k", "v", "cos", "sin"), SMALL.drawn(2, 3), strict=True)) | changes
    layer = SMALL if formats is None else replace(SMALL, formats=formats)
    append(layer, new_cache(layer) if cache is None else cache, list(parts.values()))


def attended(q: Tensor, starts: Tensor | None = None, cache: Cache | None = None) -> None:
    TRITON.attend(q, filled() if cache is None else cache, 0.25, starts, None)


MISFITS: dict[str, Any] = {
    "keys-and-values": lambda: appended(v=normal(2, 3, 1, 16)),
    "keys-of-fewer-tokens": lambda: appended(k=normal(2, 2, 2, 16), v=normal(2, 2, 2, 16)),
    "cosines": lambda: appended(cos=normal(2, 3, 8)),
    "key-bands-of-another-size": lambda: appended(formats=formats_with(key=stored(8))),
    "query-map-of-another-size": lambda: appended(formats=formats_with(query=ActivationFormat(turned(8)))),
    "key-map-of-another-size": lambda: appended(formats=formats_with(key=replace(stored(16), map=turned(8)))),
    "key-norm-of-another-size": lambda: appended(formats=formats_with(key_norm=Norm(1e-5, normal(8)))),
    "several-ranges-of-a-head": lambda: appended(formats=formats_with(value=replace(stored(16), groups=2))),
    "a-cache-of-more-rows": lambda: appended(filled(batch=3)),
    "a-cache-of-more-kv-heads": lambda: appended(filled(kv_heads=4)),
    "more-queries-than-tokens": lambda: attended(normal(2, 4, 4, 16)),
    "queries-of-another-batch": lambda: attended(normal(1, 3, 4, 16)),
    "heads-no-multiple-of-kv-heads": lambda: attended(normal(2, 3, 3, 16)),
    "queries-of-another-head-size": lambda: attended(normal(2, 3, 4, 8)),
    "starts-of-another-batch": lambda: attended(normal(2, 3, 4, 16), torch.tensor([0])),
    "an-empty-cache": lambda: attended(normal(2, 1, 4, 16), cache=new_cache(SMALL)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as refused:
        MISFITS[name]()
    assert "\n" not in str(refused.value)
