"""The reference backend is exact in its integers, keeps its cache in the bytes it says, and treats every row alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from tests.backends.cases import CUTS, integers, naive_attention, normal, packed, stored_format, weights
from tests.conftest import Kept, make_checkpoint
from torch import Tensor

from resq.backends.backend import Activations, Backend
from resq.backends.reference import (
    REFERENCE,
    Cache,
    UnpackedLinear,
    accumulate,
    dense,
    integer_matmul,
    packed_store,
    rotate,
    straight_through,
    visible,
)
from resq.checkpoint.writer import CheckpointWriter
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import Shape
from resq.models.decoder import Ends, Layer
from resq.models.source import Source
from resq.numerics import hadamard
from resq.numerics.affine import Quantized, quantize, symmetric_limits
from resq.numerics.bands import PACKABLE_BITS, Bands
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, PackedLinear
from resq.numerics.maps import Dense, Hadamard, Permutation, random_orthogonal
from resq.numerics.packing import unpack
from resq.ptq.pipeline import Job
from resq.ptq.pipeline import quantize as quantize_model
from resq.ptq.recipes import recipe_named
from resq.runtime.load import ends_from, layer_from


def new_cache(formats: HeadFormats, ops: Backend = REFERENCE) -> Cache:
    cache = ops.cache(formats)
    assert isinstance(cache, Cache)
    return cache


def rounded(x: Activations) -> Quantized:
    assert isinstance(x, Quantized)
    return x


def plain(x: Activations) -> Tensor:
    assert isinstance(x, Tensor)
    return x


def unpacked(linear: PackedLinear) -> UnpackedLinear:
    weight = REFERENCE.prepack(linear)
    assert isinstance(weight, UnpackedLinear)
    return weight


@pytest.mark.parametrize("w_bits", PACKABLE_BITS)
@pytest.mark.parametrize("q_bits", PACKABLE_BITS)
def test_integer_products_are_exact_for_long_rows_of_every_width(q_bits: int, w_bits: int) -> None:
    inner = 30_011
    q = integers(0, 2**q_bits - 1, 3, inner)
    w = weights(w_bits, 4, inner, seed=1)
    q[0] = 2**q_bits - 1
    w[0], w[1] = symmetric_limits(w_bits)  # the largest sums there are
    got = integer_matmul(q.to(torch.uint8), w.to(torch.int8), q_bits, w_bits)
    assert got.dtype == torch.float64
    assert torch.equal(got.to(torch.int64), q @ w.T)
    assert torch.equal(got, got.round())


@pytest.mark.parametrize("name", CUTS)
def test_accumulated_sums_are_those_of_int64_arithmetic(name: str) -> None:
    inputs, weights, groups = CUTS[name]
    x, linear = quantize(normal(2, 3, 40) * 3 + 1, inputs, groups=groups), packed(weights, 6)
    parts = accumulate(x, unpacked(linear))
    assert len(parts) == len(weights) * groups
    q, w = x.q.to(torch.int64), linear.integers().to(torch.int64)
    width = {index: band.size // groups for index, band in enumerate(weights)}
    at = 0
    for number, (sums, x_scale, w_scale) in enumerate(parts):
        band, group = divmod(number, groups)
        cut = slice(at, at + width[band])
        at = cut.stop
        outer = next(i for i, c in enumerate(inputs.slices()) if c.start <= cut.start and cut.stop <= c.stop)
        want = (q[..., cut] - x.zero[..., outer, group, None].to(torch.int64)) @ w[:, cut].T
        assert torch.equal(sums.to(torch.int64), want)
        assert torch.equal(sums, sums.round())
        assert torch.equal(x_scale, x.scale[..., outer, group])
        assert torch.equal(w_scale, linear.scale[:, band])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CUTS)
def test_a_quantized_linear_is_the_product_of_the_dequantized_parts(name: str, bias: bool) -> None:
    inputs, weights, groups = CUTS[name]
    x, linear = quantize(normal(2, 3, 40) * 3 + 1, inputs, groups=groups), packed(weights, 6, bias=bias)
    exact = x.dequantize(torch.float64) @ linear.dequantize(torch.float64).T
    if linear.bias is not None:
        exact = exact + linear.bias.double()
    total = sum(s * a.double()[..., None] * b.double() for s, a, b in accumulate(x, unpacked(linear)))
    if linear.bias is not None:
        total = total + linear.bias.double()
    torch.testing.assert_close(total, exact, rtol=0, atol=1e-12 * float(exact.abs().max()))
    got = REFERENCE.linear(x, unpacked(linear))
    assert got.dtype == torch.float32
    # One rounding to float32 of a float64 value that is off by 1e-15 or so.
    torch.testing.assert_close(got.double(), exact, rtol=6.0e-8, atol=1e-12 * float(exact.abs().max()))


@pytest.mark.parametrize("groups", [1, 4])
def test_a_weight_band_that_crosses_the_inputs_cut_is_refused(groups: int) -> None:
    x = quantize(normal(2, 40), Bands.of((4, 32), (8, 8)), groups=groups)
    with pytest.raises(InputError, match=r"weight bands .* do not fit .*activation bands"):
        REFERENCE.linear(x, unpacked(packed(Bands.of((4, 40)), 6)))


def test_ranges_per_head_need_the_same_cut_in_the_weights() -> None:
    x = quantize(normal(2, 40), Bands.of((8, 40)), groups=4)
    with pytest.raises(InputError, match=r"weight bands .* do not fit .*activation bands"):
        REFERENCE.linear(x, unpacked(packed(Bands.of((4, 32), (8, 8)), 6)))


def test_mixed_linears_use_whatever_side_is_not_rounded_as_it_is() -> None:
    bands = Bands.of((4, 32), (8, 8))
    x, weights = normal(2, 3, 40), DenseLinear(normal(6, 40, seed=1), normal(6, seed=2))
    linear, q = packed(bands, 6), quantize(x, bands)
    cases = [
        (q, weights, q.dequantize(torch.float64), weights.weight, weights.bias),
        (x, unpacked(linear), x, linear.dequantize(torch.float64), linear.bias),
        (x, weights, x, weights.weight, weights.bias),
    ]
    for inputs, weight, left, right, bias in cases:
        exact = left.double() @ right.double().T + bias.double()
        torch.testing.assert_close(REFERENCE.linear(inputs, weight).double(), exact, rtol=6.0e-8, atol=1e-13)


def test_norm_quantize_is_rms_norm_then_map_then_rounding() -> None:
    bands, gain, x = Bands.of((4, 32), (8, 8)), normal(40, seed=1) + 2, normal(2, 3, 40) * 5
    index = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * gain.double()
    want = quantize(y.float()[..., index], bands)
    got = rounded(REFERENCE.norm_quantize(x, Norm(0.1, gain), ActivationFormat(Permutation(index), bands)))
    assert int((got.q.int() - want.q.int()).abs().max()) == 0
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        plain(REFERENCE.norm_quantize(x, Norm(0.1, gain), PLAIN)), y.float(), rtol=1.2e-7, atol=0
    )


def test_act_hadamard_quantize_is_silu_times_up_then_map_then_rounding() -> None:
    bands, gate, up = Bands.of((4, 96)), normal(2, 3, 96), normal(2, 3, 96, seed=1)
    format = ActivationFormat(Hadamard(hadamard.plan(96)), bands)
    y = (gate.double() * torch.sigmoid(gate.double()) * up.double()) @ hadamard.matrix(96)
    got = rounded(REFERENCE.act_hadamard_quantize(gate, up, format))
    assert torch.equal(got.q, quantize(y.float(), bands).q)
    unrounded = plain(REFERENCE.act_hadamard_quantize(gate, up, replace(format, bands=None)))
    torch.testing.assert_close(unrounded.double(), y, rtol=1e-7, atol=1e-12)


def test_gather_quantize_ranges_every_head_alone_when_asked() -> None:
    x = normal(2, 3, 40) * torch.linspace(0.1, 10, 40)
    bands = Bands.of((4, 32), (8, 8))
    got = rounded(REFERENCE.gather_quantize(x, ActivationFormat(bands=bands, groups=4)))
    assert got.scale.shape == got.zero.shape == (2, 3, 2, 4)
    for band, cut in enumerate(bands.slices()):
        for group in range(4):
            step = (cut.stop - cut.start) // 4
            at = slice(cut.start + group * step, cut.start + (group + 1) * step)
            alone = quantize(x[..., at], Bands.of((bands.bands[band].bits, step)))
            assert torch.equal(got.q[..., at], alone.q)
            assert torch.equal(got.scale[..., band, group], alone.scale[..., 0, 0])


def test_a_rounded_map_rounds_its_input_too() -> None:
    x, turn = normal(2, 3, 16), Dense(random_orthogonal(16, torch.Generator().manual_seed(0)).float(), orthogonal=False)
    format = ActivationFormat(turn, map_input_bits=8)
    want = quantize(x, Bands.of((8, 16))).dequantize(torch.float64) @ turn.matrix.double()
    assert torch.equal(format.project(x, torch.float64), want)
    exact = x.double() @ turn.matrix.double()
    assert torch.equal(format.project(x, torch.float64, rounded=False), exact)
    assert torch.equal(plain(dense(torch.float64).gather_quantize(x, format)), exact)


@pytest.mark.parametrize("map_input_bits", [None, 8])
def test_queries_and_keys_are_turned_after_rope_and_keys_and_values_rounded(map_input_bits: int | None) -> None:
    q, k, v = normal(2, 3, 4, 16), normal(2, 3, 2, 16, seed=1), normal(2, 3, 2, 16, seed=2)
    cos, sin = normal(2, 3, 16, seed=3), normal(2, 3, 16, seed=4)
    turn = Dense(random_orthogonal(16, torch.Generator().manual_seed(0)).float())
    key = replace(stored_format(16), map=turn, map_input_bits=map_input_bits)
    formats = HeadFormats(ActivationFormat(turn, map_input_bits=map_input_bits), key, stored_format(16))
    cache = new_cache(formats)
    got = REFERENCE.rope_project_append(q, k, v, cos, sin, formats, cache)

    def turned(x: Tensor) -> Tensor:
        x = rotate(x.double(), cos.double(), sin.double()).float()
        if map_input_bits is not None:
            x = quantize(x, Bands.of((map_input_bits, 16))).dequantize(torch.float64)
        return (x.double() @ turn.matrix.double()).float()

    assert torch.equal(got, turned(q))
    for store, x in ((cache.keys, turned(k)), (cache.values, v)):
        want = stored_format(16).quantize(x).dequantize(torch.float64)
        assert torch.equal(store.read(torch.float64), want.transpose(1, 2))


def test_rotation_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin = normal(2, 5, 4, 8), normal(2, 5, 2, 8, seed=1), normal(2, 5, 8, seed=2), normal(2, 5, 8, seed=3)
    want = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, turned in zip((q, k), want, strict=True):
        torch.testing.assert_close(rotate(x, cos, sin), turned.transpose(1, 2), rtol=0, atol=1e-6)


def filled(keys: Tensor, values: Tensor) -> Cache:
    cache = new_cache(HeadFormats())
    cache.keys.append(keys)
    cache.values.append(values)
    return cache


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("tokens", [1, 4, 11])
@pytest.mark.parametrize("starts", [None, [0, 0], [3, 10], [8, 5]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_naive_one(kv_heads: int, starts: list[int] | None, tokens: int, window: int | None) -> None:
    q = normal(2, tokens, 4, 6)
    k, v = (normal(2, 11, kv_heads, 6, seed=seed).half() for seed in (1, 2))
    got = REFERENCE.attend(q, filled(k, v), 0.4, None if starts is None else torch.tensor(starts), window)
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    want = naive_attention(q, k, v, 0.4, starts or [0, 0], window)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


def test_a_mask_is_only_made_where_plain_causal_attention_would_not_do() -> None:
    assert visible(5, 5, None, None) is None
    for arguments in ((4, 5, None, None), (5, 5, torch.tensor([0]), None), (5, 5, None, 2)):
        assert visible(*arguments) is not None
    mask = visible(2, 4, torch.tensor([3]), 2)
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(("size", "expected"), [(64, 42), (128, 78)])
def test_a_cached_head_takes_the_bytes_the_format_says(size: int, expected: int) -> None:
    cache = new_cache(HeadFormats(key=stored_format(size), value=stored_format(size)))
    assert cache.length == 0
    for tokens in (1, 20, 1):
        for store in (cache.keys, cache.values):
            store.append(normal(3, tokens, 2, size))
    assert cache.length == 22
    assert cache.nbytes() == 2 * expected * 3 * 22 * 2
    assert cache.keys.nbytes() == cache.values.nbytes() == expected * 3 * 22 * 2


def test_an_unrounded_cache_is_16_bit_in_the_reference_and_exact_in_its_twin() -> None:
    x = normal(2, 5, 3, 8) * 1e4
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1e6, -1e6
    for ops, size in ((REFERENCE, 2), (dense(torch.float32), 4), (dense(torch.float64), 8)):
        cache = new_cache(HeadFormats(), ops)
        cache.keys.append(x)
        assert cache.keys.nbytes() == x.numel() * size
        want = x.clamp(-65504, 65504).half() if ops is REFERENCE else x
        assert torch.equal(cache.keys.read(torch.float64), want.double().transpose(1, 2))


def test_the_stored_integers_and_ranges_are_those_of_the_quantizer() -> None:
    format, x = stored_format(16), normal(2, 5, 3, 16) * 4
    store = packed_store(format)
    for part in x.split([1, 3, 1], dim=1):
        store.append(part)
    got, want = store.read(torch.float64), format.quantize(x)
    assert torch.equal(got, want.dequantize(torch.float64).transpose(1, 2))
    assert torch.equal(want.scale, want.scale.half().float())


@pytest.mark.parametrize("format", [stored_format(16), PLAIN], ids=["packed", "16-bit"])
def test_cropping_forgets_and_appending_goes_on_from_there(format: ActivationFormat) -> None:
    cache, fresh = (new_cache(HeadFormats(key=format, value=format)) for _ in range(2))
    x, y = normal(2, 40, 3, 16), normal(2, 7, 3, 16, seed=1)
    for store in (cache.keys, cache.values):
        store.append(x)
    cache.crop(60)
    assert cache.length == 40
    cache.crop(11)
    for store in (cache.keys, cache.values):
        store.append(y)
    for store in (fresh.keys, fresh.values):
        store.append(x[:, :11])
        store.append(y)
    assert (cache.length, cache.nbytes()) == (fresh.length, fresh.nbytes())
    assert torch.equal(cache.keys.read(torch.float64), fresh.keys.read(torch.float64))
    cache.crop(0)
    assert (cache.length, cache.nbytes()) == (0, 0)


@pytest.mark.parametrize("format", [stored_format(16), PLAIN], ids=["packed", "16-bit"])
def test_selecting_rows_reorders_and_repeats_them(format: ActivationFormat) -> None:
    cache, rows = new_cache(HeadFormats(key=format, value=format)), torch.tensor([2, 0, 2, 2])
    x = normal(3, 9, 2, 16)
    cache.keys.append(x)
    cache.values.append(-x)
    before = cache.keys.read(torch.float64), cache.values.read(torch.float64)
    cache.select(rows)
    assert torch.equal(cache.keys.read(torch.float64), before[0][rows])
    assert torch.equal(cache.values.read(torch.float64), before[1][rows])
    cache.keys.append(normal(4, 1, 2, 16))
    cache.values.append(normal(4, 1, 2, 16))
    assert cache.length == 10
    assert torch.equal(cache.keys.read(torch.float64)[:, :, :9], before[0][rows])


@dataclass(frozen=True)
class Model:
    shape: Shape
    ends: Ends
    layers: Sequence[Layer]

    def caches(self) -> list[Cache]:
        return [new_cache(layer.heads) for layer in self.layers]

    def __call__(
        self, tokens: Tensor, caches: list[Cache] | None = None, starts: Tensor | None = None, ops: Backend = REFERENCE
    ) -> Tensor:
        return decoder.forward(ops, self.shape, self.ends, self.layers, tokens, caches, starts)


# (recipe, source): GQA with a head dimension of its own, biases, MHA, rows that end inside a byte.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resq": ("resq", {}),
    "resq-paper": ("resq-paper", {"num_key_value_heads": 1}),
    "resq-qwen2": ("resq", {"model_type": "qwen2", "num_key_value_heads": 8}),
    "rtn": ("rtn", {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 10, "intermediate_size": 107}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name, changes = MODELS[request.param]
    source = Source.open(make_checkpoint(tmp_path_factory.mktemp("source") / "model", **changes))
    job = Job(recipe_named(name), integers(3, 258, 6, 32, seed=9), 4, 0, keep_tied=True)
    kept = Kept([])
    quantize_model(source, job, cast(CheckpointWriter, kept), lambda what, done, steps: None)
    assert kept.ends is not None
    layers = [layer_from(parts, source.shape, "kept").prepacked(REFERENCE) for parts in kept.layers]
    return Model(source.shape, ends_from(kept.ends, source.shape).prepacked(REFERENCE), layers)


class Recorder:
    """State: every quantized input a linear was given, as integers [rows of the batch, tokens, n]."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    @property
    def ops(self) -> Backend:
        def linears(x: Any, weights: Any, onto: Tensor | None = None) -> list[Tensor]:
            if isinstance(x, Quantized):
                self.inputs.append(x.q)
            return REFERENCE.linears(x, weights, onto)

        return replace(REFERENCE, linears=linears)


def cached_integers(cache: Cache, layer: Layer) -> Tensor:
    """Integers and zero points of the stored keys and values, int64 [b, tokens, …]."""
    found = []
    for store, format in ((cache.keys, layer.heads.key), (cache.values, layer.heads.value)):
        assert format.bands is not None
        *bytes_of, _, zero = (part[:, : store.length] for part in store._parts)
        for part, band in zip(bytes_of, format.bands, strict=True):
            found.append(unpack(part, band.bits, band.size).flatten(2).to(torch.int64))
        found.append(zero.flatten(2).to(torch.int64))
    return torch.cat(found, dim=-1)


def assert_same_integers(got: Tensor, want: Tensor) -> None:
    """At least 99.99 % equal, the rest neighbours: a float64 sum in another order moves a rounding now and then."""
    difference = (got.to(torch.int64) - want.to(torch.int64)).abs()
    assert int(difference.max()) <= 1
    assert int((difference > 0).sum()) <= 1e-4 * difference.numel()


@pytest.mark.parametrize("steps", [[1] * 24, [7, 1, 1, 9, 6]], ids=["one-by-one", "in-chunks"])
def test_prefill_and_decoding_make_the_same_integers_and_logits(model: Model, steps: list[int]) -> None:
    tokens = integers(3, 258, 3, 24)
    whole, pieces = Recorder(), Recorder()
    one, many = model.caches(), model.caches()
    want = model(tokens, one, ops=whole.ops)
    got = torch.cat([model(part, many, ops=pieces.ops) for part in tokens.split(steps, dim=1)], dim=1)
    linears = len(whole.inputs)
    assert len(pieces.inputs) == linears * len(steps)
    for index in range(linears):
        assert_same_integers(torch.cat(pieces.inputs[index::linears], dim=1), whole.inputs[index])
    for a, b, layer in zip(many, one, model.layers, strict=True):
        assert a.length == b.length == 24
        assert_same_integers(cached_integers(a, layer), cached_integers(b, layer))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_a_forward_without_a_cache_has_the_bits_of_one_with_a_cache(model: Model) -> None:
    tokens = integers(3, 258, 2, 13)
    assert torch.equal(model(tokens), model(tokens, model.caches()))
    starts = torch.tensor([0, 5])
    assert torch.equal(model(tokens, None, starts), model(tokens, model.caches(), starts))


def test_a_left_padded_batch_has_the_logits_of_its_rows_alone(model: Model) -> None:
    lengths = [12, 5, 1]
    rows = [integers(3, 258, 1, length, seed=length) for length in lengths]
    longest = max(lengths)
    starts = torch.tensor([longest - length for length in lengths])
    batch = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    caches, alone = model.caches(), [model.caches() for _ in rows]
    got = model(batch, caches, starts)
    assert torch.isfinite(got).all()
    for index, row in enumerate(rows):
        want = model(row, alone[index])
        torch.testing.assert_close(got[index, starts[index] :], want[0], rtol=0, atol=1e-5 * float(want.abs().max()))
    step = integers(3, 258, 3, 1, seed=77)
    got = model(step, caches, starts)
    for index in range(3):
        want = model(step[index : index + 1], alone[index])
        torch.testing.assert_close(got[index], want[0], rtol=0, atol=1e-5 * float(want.abs().max()))


def test_a_row_does_not_depend_on_its_neighbours_or_their_number(model: Model) -> None:
    tokens = integers(3, 258, 5, 9)
    every = model(tokens)
    other = tokens.clone()
    other[1:] = integers(3, 258, 4, 9, seed=3)
    assert torch.equal(model(other)[0], every[0])
    for rows in (1, 2, 4):
        torch.testing.assert_close(model(tokens[:rows]), every[:rows], rtol=0, atol=0)


def test_a_linears_row_has_the_same_bits_for_any_number_of_rows() -> None:
    bands = Bands.of((4, 210), (8, 30))
    x, linear = normal(65, 240), unpacked(packed(bands, 33))
    every = REFERENCE.linear(quantize(x, bands), linear)
    for rows in (1, 2, 3, 16, 64):
        assert torch.equal(REFERENCE.linear(quantize(x[:rows], bands), linear), every[:rows])


def test_cropping_takes_back_tokens(model: Model) -> None:
    tokens, wrong = integers(3, 258, 2, 10), integers(3, 258, 2, 6, seed=4)
    straight, back = model.caches(), model.caches()
    want = [model(tokens[:, :7], straight), model(tokens[:, 7:], straight)][1]
    model(tokens[:, :7], back)
    model(wrong, back)
    for cache in back:
        cache.crop(7)
    assert torch.equal(model(tokens[:, 7:], back), want)


def test_selecting_rows_of_the_cache_continues_those_rows(model: Model) -> None:
    tokens, rows = integers(3, 258, 3, 10), torch.tensor([2, 2, 0])
    caches, chosen = model.caches(), model.caches()
    model(tokens[:, :9], caches)
    for cache in caches:
        cache.select(rows)
    model(tokens[rows, :9], chosen)
    assert torch.equal(model(tokens[rows, 9:], caches), model(tokens[rows, 9:], chosen))


def test_every_query_sees_rounded_keys_and_values_its_own_too(model: Model) -> None:
    """One token attends to itself alone: the output of attention is its rounded value."""
    layer, shape = model.layers[0], model.shape
    v = normal(1, 1, shape.kv_heads, shape.head_dim, seed=2)
    q, k = normal(1, 1, shape.heads, shape.head_dim), normal(1, 1, shape.kv_heads, shape.head_dim, seed=1)
    cos, sin = shape.rope.tables(torch.zeros(1, 1, dtype=torch.int64))
    cache = new_cache(layer.heads)
    q = REFERENCE.rope_project_append(q, k, v, cos, sin, layer.heads, cache)
    out = REFERENCE.attend(q, cache, 1.0, None, None)
    stored = layer.heads.value.quantize(v).dequantize(torch.float64)
    want = stored.repeat_interleave(shape.heads // shape.kv_heads, dim=2).flatten(-2)
    torch.testing.assert_close(out.double(), want, rtol=6.0e-8, atol=0)
    assert not torch.equal(stored.float(), v)


def test_a_sliding_window_forgets_what_lies_before_it(model: Model) -> None:
    windowed = replace(model, layers=[replace(layer, window=4) for layer in model.layers])
    tokens = integers(3, 258, 1, 20)
    # Two layers reach back 3 tokens each: the last token does not see slots below 19 - 6.
    other = tokens.clone()
    other[:, :13] = integers(3, 258, 1, 13, seed=8)
    assert torch.equal(windowed(tokens)[:, -1], windowed(other)[:, -1])
    assert not torch.equal(model(tokens)[:, -1], model(other)[:, -1])
    other[:, 13] = (other[:, 13] - 3 + 1) % 256 + 3
    assert not torch.equal(windowed(tokens)[:, -1], windowed(other)[:, -1])


def test_rounding_activations_is_all_that_the_unrounded_twin_leaves_out(model: Model) -> None:
    tokens, twin = integers(3, 258, 1, 8), dense(torch.float64)
    layers = [
        replace(
            layer,
            linears={
                role: DenseLinear(linear.integers.double() * _spread(linear), linear.bias)
                for role, linear in layer.linears.items()
            },
        )
        for layer in model.layers
    ]
    exact = decoder.forward(twin, model.shape, model.ends, layers, tokens)
    got = model(tokens)
    assert exact.dtype == torch.float64
    assert 0 < float((got - exact).abs().max()) < float(exact.abs().max())


def _spread(linear: UnpackedLinear) -> Tensor:
    return linear.scale.double().repeat_interleave(torch.tensor([band.size for band in linear.bands]), dim=1)


STRAIGHT, DENSE = straight_through(), dense(torch.float32)
# Bands, map and ranges of a 40-wide input.
ROUNDED = {
    "one-band": ActivationFormat(bands=Bands.of((4, 40))),
    "two-bands": ActivationFormat(bands=Bands.of((4, 35), (8, 5))),
    "permuted": ActivationFormat(Permutation(torch.arange(40).flip(0)), Bands.of((3, 35), (8, 5))),
    "turned": ActivationFormat(Hadamard(hadamard.plan(40)), Bands.of((4, 40))),
    "ranged-per-head": ActivationFormat(bands=Bands.of((4, 32), (8, 8)), groups=4),
}


def three_inputs(ops: Backend, format: ActivationFormat, x: Tensor, y: Tensor) -> list[Activations]:
    """The inputs that a layer rounds, by each of their operators."""
    return [
        ops.norm_quantize(x, Norm(1e-5, normal(40, seed=9).abs() + 0.5), format),
        ops.gather_quantize(x, format),
        ops.act_hadamard_quantize(x, y, format),
    ]


@pytest.mark.parametrize("name", ROUNDED)
def test_straight_through_rounds_to_the_values_of_the_reference(name: str) -> None:
    format, x, y = ROUNDED[name], normal(6, 50, 40) * 3 + 1, normal(6, 50, 40, seed=1)
    got, want = (three_inputs(ops, format, x, y) for ops in (STRAIGHT, REFERENCE))
    for a, b in zip(got, want, strict=True):
        values, step = rounded(b).dequantize(), rounded(b).scale.amax()
        away = (plain(a) - values).abs()
        same = away <= 1e-5 * values.abs().amax()
        # A float32 product in place of a float64 one moves what lies within some ulps of the middle of a step.
        assert float(same.float().mean()) > 0.999
        assert float(away.max()) <= float(step) * 1.001
    # No product before it: every value is the reference's, up to the last digit of x + (x̂ - x).
    if format.map is None or isinstance(format.map, Permutation):
        values = rounded(want[1]).dequantize()
        torch.testing.assert_close(
            plain(got[1]), values, rtol=0, atol=2.0**-23 * float(x.abs().max() + values.abs().max())
        )
        assert not torch.equal(plain(got[1]), x if format.map is None else format.map.apply(x))


@pytest.mark.parametrize("name", ROUNDED)
def test_a_gradient_passes_the_rounding_unchanged(name: str) -> None:
    format, found = ROUNDED[name], []
    for ops in (STRAIGHT, DENSE):
        x, y = (tensor.requires_grad_() for tensor in (normal(6, 40) * 3, normal(6, 40, seed=1)))
        outputs = three_inputs(ops, format, x, y)
        found.append([torch.autograd.grad((plain(out) * normal(6, 40, seed=2)).sum(), x)[0] for out in outputs])
    for straight, unrounded in zip(*found, strict=True):
        assert torch.equal(straight, unrounded)
        assert float(straight.norm()) > 0


def test_straight_through_keys_and_values_are_those_of_the_packed_cache() -> None:
    turn = Dense(random_orthogonal(16, torch.Generator().manual_seed(0)).float())
    formats = HeadFormats(ActivationFormat(turn), replace(stored_format(16), map=turn), stored_format(16))
    angles = normal(2, 9, 8, seed=5).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    q, k, v = normal(2, 9, 4, 16), normal(2, 9, 2, 16, seed=1), normal(2, 9, 2, 16, seed=2)
    k.requires_grad_()
    v.requires_grad_()
    caches, queries = [], []
    for ops in (STRAIGHT, REFERENCE):
        caches.append(new_cache(formats, ops))
        given = (k, v) if ops is STRAIGHT else (k.detach(), v.detach())
        queries.append(ops.rope_project_append(q, *given, cos, sin, formats, caches[-1]))
    torch.testing.assert_close(queries[0], queries[1], rtol=0, atol=1e-5)
    (keys, values), (packed_keys, packed_values) = (cache.read() for cache in caches)
    for got, want in ((keys, packed_keys.float()), (values, packed_values.float())):
        same = (got - want).abs() <= 1e-5 * float(want.abs().max())
        assert float(same.float().mean()) > 0.995
    # No product before the values' rounding.
    torch.testing.assert_close(values, packed_values.float(), rtol=0, atol=1e-6 * float(v.detach().abs().max()))
    upstream = normal(2, 2, 9, 16, seed=3)
    (gradient,) = torch.autograd.grad((values * upstream).sum(), v, retain_graph=True)
    assert torch.equal(gradient, upstream.transpose(1, 2))
    (gradient,) = torch.autograd.grad((keys * upstream).sum(), k)
    back = rotate(upstream.transpose(1, 2) @ turn.matrix.T, cos, -sin)
    torch.testing.assert_close(gradient, back, rtol=0, atol=1e-5)


def test_straight_through_leaves_alone_what_is_16_bit() -> None:
    x = normal(5, 40)
    assert plain(STRAIGHT.gather_quantize(x, PLAIN)) is x
    linear = packed(Bands.of((4, 35), (8, 5)), 6)
    weight = STRAIGHT.prepack(linear)
    assert isinstance(weight, DenseLinear)
    torch.testing.assert_close(STRAIGHT.linear(x, weight), x @ linear.dequantize(torch.float32).T + linear.bias)
