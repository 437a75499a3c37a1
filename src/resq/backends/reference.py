"""The reference backend: the definition of every operator, in exact integers and float64; and its unrounded twin.

Each non-integer step is taken in float64 and cast to float32 once, before it is rounded, so that prefill and
token-by-token decoding agree. `dense(dtype)` runs the same operators without any rounding of activations or of the
cache: float64 is the invariance test, float32 the calibration forward. `straight_through()` rounds to the same values
in floating point and passes gradients through: what rotations are learned with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resq.backends.backend import Activations, Backend
from resq.errors import InputError
from resq.numerics.affine import FLOAT16_MAX, Quantized
from resq.numerics.bands import Bands
from resq.numerics.device import CPU, moved
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, Linear, PackedLinear
from resq.numerics.packing import pack, unpack

# The cache grows by whole blocks of this many tokens.
CACHE_BLOCK = 16
# float32 holds every integer below this, so a float32 matmul of integers whose partial sums stay below is exact.
EXACT_FLOAT32 = 2**24


@dataclass(frozen=True)
class UnpackedLinear:
    """A packed linear with its integers as int8 [out, in]: the reference's own layout."""

    bands: Bands
    integers: Tensor
    scale: Tensor
    bias: Tensor | None


def _unpacked(linear: Linear) -> UnpackedLinear | DenseLinear:
    if isinstance(linear, PackedLinear):
        return UnpackedLinear(linear.bands, linear.integers(), linear.scale, linear.bias)
    return linear


def integer_matmul(q: Tensor, w: Tensor, q_bits: int, w_bits: int) -> Tensor:
    """Exact q w^T as float64: q uint8 [..., n] of `q_bits`, w int8 [out, n] of `w_bits`.

    On a CPU, blocks of the inner dimension are short enough that every partial sum is exact in float32
    (n·(2^q_bits - 1)·2^(w_bits - 1) < 2^24), their sums are taken in float64: the result is the integer dot product in
    any order. Elsewhere the product is taken in float64, exact whether or not float32 products are TF32 there.
    """
    if q.device.type != "cpu":
        return q.to(torch.float64) @ w.to(torch.float64).T
    step = (EXACT_FLOAT32 - 1) // ((2**q_bits - 1) * 2 ** (w_bits - 1))
    total: Tensor | None = None
    for start in range(0, w.shape[1], step):
        part = q[..., start : start + step].to(torch.float32) @ w[:, start : start + step].to(torch.float32).T
        total = part.to(torch.float64) if total is None else total.add_(part)
    assert total is not None
    return total


def accumulate(x: Quantized, w: UnpackedLinear) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The integer part of a linear: per weight band and activation group (Σ (q_x - z_x) q_w [..., out] float64,
    activation scale [...], weight scale [out]).

    A weight band must lie inside one activation band; with several groups the two cuts must be equal.
    """
    parts = []
    for index, (band, cut) in enumerate(zip(w.bands, w.bands.slices(), strict=True)):
        outers = enumerate(x.bands.slices())
        source = next((i for i, outer in outers if outer.start <= cut.start and cut.stop <= outer.stop), None)
        if source is None or (x.groups > 1 and x.bands.bands[source].size != band.size):
            raise InputError(
                f"weight bands {w.bands.pairs} do not fit activation bands {x.bands.pairs} of {x.groups} groups; "
                "a weight band lies inside one activation band, and is all of it where there are several groups"
            )
        step = band.size // x.groups
        for group in range(x.groups):
            at = slice(cut.start + group * step, cut.start + (group + 1) * step)
            weights = w.integers[:, at]
            zero = x.zero[..., source, group].to(torch.float64)
            sums = integer_matmul(x.q[..., at], weights, x.bands.bands[source].bits, band.bits)
            sums.addcmul_(zero[..., None], weights.sum(dim=1, dtype=torch.float64), value=-1)
            parts.append((sums, x.scale[..., source, group], w.scale[:, index]))
    return parts


def integer_sums(x: Quantized, w: UnpackedLinear) -> Tensor:
    """The sums of `accumulate` as int64 [rows, segments, out]: segments are weight bands, each with its groups."""
    return torch.stack([sums.flatten(0, -2) for sums, _, _ in accumulate(x, w)], dim=1).to(torch.int64)


def _quantized_linear(x: Quantized, w: UnpackedLinear) -> Tensor:
    """y = Σ_bands s_x s_w Σ (q_x - z_x) q_w + b in float64, returned as float32."""
    total: Tensor | None = None
    for sums, x_scale, w_scale in accumulate(x, w):
        # The product of two float32 scales is exact in float64.
        part = (x_scale.to(torch.float64)[..., None] * w_scale.to(torch.float64)).mul_(sums)
        total = part if total is None else total.add_(part)
    assert total is not None
    if w.bias is not None:
        total = total + w.bias.to(torch.float64)
    return total.to(torch.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split form: x [b, t, heads, h], cos and sin [b, t, h]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, :, None, :] + turned * sin[:, :, None, :]


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """Each head [..., h] through its norm, where the model has one."""
    return x if norm is None else norm.apply(x)


class Store:
    """State: the keys or the values of one layer, tokens appended along axis 1 of every part [b, tokens, G, …]."""

    def __init__(self, encode: Callable[[Tensor], tuple[Tensor, ...]], decode: Callable[..., Tensor]) -> None:
        self._encode, self._decode = encode, decode
        self._parts: list[Tensor] = []
        self.length = 0

    def append(self, x: Tensor) -> None:
        """x [b, t, G, h]."""
        new = self._encode(x)
        need = self.length + x.shape[1]
        if not self._parts or need > self._parts[0].shape[1]:
            room = -(-max(need, self.length * 3 // 2) // CACHE_BLOCK) * CACHE_BLOCK
            grown = [part.new_zeros(part.shape[0], room, *part.shape[2:]) for part in new]
            for part, old in zip(grown, self._parts, strict=False):
                part[:, : self.length] = old[:, : self.length]
            self._parts = grown
        elif self._parts[0].is_inference() and not torch.is_inference_mode_enabled():
            self._parts = [part.clone() for part in self._parts]  # made inside inference mode, continued outside
        for part, values in zip(self._parts, new, strict=True):
            part[:, self.length : need] = values
        self.length = need

    def read(self, compute: torch.dtype) -> Tensor:
        """[b, G, tokens, h] in `compute`."""
        return self._decode([part[:, : self.length] for part in self._parts], compute).transpose(1, 2)

    @property
    def batch(self) -> int:
        """Rows stored."""
        return self._parts[0].shape[0]

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        self._parts = [part.index_select(0, rows.to(part.device)) for part in self._parts]

    def nbytes(self) -> int:
        """Bytes of the stored tokens."""
        return sum(part[:, : self.length].numel() * part.element_size() for part in self._parts)


def packed_store(format: ActivationFormat) -> Store:
    """Per token and head: packed bytes of every band, scales in `format.scale_dtype`, zero points in a byte each."""
    bands = format.bands
    assert bands is not None
    assert format.groups == 1

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        q = format.quantize(x)
        packed = [pack(q.q[..., cut], band.bits) for band, cut in zip(bands, bands.slices(), strict=True)]
        return *packed, q.scale[..., 0].to(format.scale_dtype), q.zero[..., 0]

    def decode(parts: list[Tensor], compute: torch.dtype) -> Tensor:
        *packed, scale, zero = parts
        q = torch.cat([unpack(p, band.bits, band.size) for band, p in zip(bands, packed, strict=True)], dim=-1)
        return Quantized(q, scale[..., None], zero[..., None], bands).dequantize(compute)

    return Store(encode, decode)


def half_store() -> Store:
    """Keys or values in float16, clamped to its range."""

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return (x.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16),)

    return Store(encode, lambda parts, compute: parts[0].to(compute))


class Cache:
    """State: the stored keys (after RoPE and their map) and values of one layer."""

    def __init__(self, keys: Store, values: Store, dtype: torch.dtype) -> None:
        self.keys, self.values, self._dtype = keys, values, dtype

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as stored, dequantized, [b, G, tokens, h] each."""
        return self.keys.read(self._dtype), self.values.read(self._dtype)

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.keys.length

    @property
    def batch(self) -> int:
        """Rows stored; only meaningful once a token is."""
        return self.keys.batch

    def crop(self, length: int) -> None:
        """Forget every token from `length` on."""
        self.keys.length = self.values.length = min(length, self.length)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` int64 [new batch], in that order."""
        self.keys.select(rows)
        self.values.select(rows)

    def nbytes(self) -> int:
        """Bytes of the stored tokens."""
        return self.keys.nbytes() + self.values.nbytes()


def visible(
    t: int, length: int, starts: Tensor | None, window: int | None, device: torch.device = CPU
) -> Tensor | None:
    """Which slots the last `t` tokens may see: bool [b or 1, 1, t, length], None when plainly causal from slot 0; on
    `device`, where `starts` lies too.
    """
    if starts is None and window is None and t == length:
        return None
    slot = torch.arange(length, device=device)
    return allowed(slot[length - t :], slot, starts, window)


def allowed(query: Tensor, slot: Tensor, starts: Tensor | None, window: int | None) -> Tensor:
    """Which slots [s] the queries at slots [t] may see, bool [b or 1, 1, t, s]; starts [b].

    A query always sees its own slot, so that a padded row stays finite.
    """
    query, slot = query[:, None], slot[None, :]
    seen = slot <= query
    if window is not None:
        seen = seen & (slot > query - window)
    seen = seen[None, None]
    if starts is not None:
        seen = seen & (slot[None, None] >= starts[:, None, None, None])
    return seen | (slot == query)


def _unrounded(x: Tensor, format: ActivationFormat) -> Tensor:
    return x


def _straight_through(x: Tensor, format: ActivationFormat) -> Tensor:
    # The value of the rounded tensor, the gradient of the identity.
    return x + (format.quantize(x.detach()).dequantize(x.dtype) - x).detach()


def _operators(
    name: str,
    compute: torch.dtype,
    point: torch.dtype,
    rounding: Callable[[Tensor, ActivationFormat], Tensor] | None,
    device: torch.device,
) -> Backend:
    """rounding: of an activation whose format has bands, in floating point on plain weights; None for integers, in
    weights and cache too, and for inputs of online maps that are rounded where the format asks for it."""
    packed = rounding is None

    def simulated(y: Tensor, format: ActivationFormat) -> Tensor:
        return y.to(point) if format.bands is None or rounding is None else rounding(y.to(point), format)

    def finish(y: Tensor, format: ActivationFormat) -> Activations:
        return format.quantize(y.to(point)) if packed and format.bands is not None else simulated(y, format)

    def norm_quantize(x: Tensor, norm: Norm, format: ActivationFormat) -> Activations:
        y = norm.apply(x.to(compute))
        return finish(format.project(y.to(point), compute, rounded=packed), format)

    def linears(
        x: Activations, weights: Sequence[UnpackedLinear | DenseLinear], onto: Tensor | None = None
    ) -> list[Tensor]:
        first, *others = [product(x, weight) for weight in weights]
        return [first if onto is None else onto + first, *others]

    def product(x: Activations, weight: UnpackedLinear | DenseLinear) -> Tensor:
        if isinstance(x, Quantized):
            if isinstance(weight, UnpackedLinear):
                return _quantized_linear(x, weight)
            x = x.dequantize(compute)
        if isinstance(weight, UnpackedLinear):
            sizes = torch.tensor([band.size for band in weight.bands], device=weight.scale.device)
            scale = torch.repeat_interleave(weight.scale.to(compute), sizes, dim=1)
            weight = DenseLinear(weight.integers.to(compute) * scale, weight.bias)
        bias = None if weight.bias is None else weight.bias.to(compute)
        return F.linear(x.to(compute), weight.weight.to(compute), bias).to(point)

    def rope_project_append(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, formats: HeadFormats, cache: Cache
    ) -> Tensor:
        cos, sin = cos.to(compute), sin.to(compute)
        q = rotate(normed(q.to(compute), formats.query_norm), cos, sin).to(point)
        k = rotate(normed(k.to(compute), formats.key_norm), cos, sin).to(point)
        cache.keys.append(formats.key.project(k, compute, rounded=packed).to(point))
        cache.values.append(formats.value.project(v, compute, rounded=packed).to(point))
        return formats.query.project(q, compute, rounded=packed).to(point)

    def attend(q: Tensor, cache: Cache, scale: float, starts: Tensor | None, window: int | None) -> Tensor:
        k, v = cache.read()
        mask = visible(q.shape[1], cache.length, starts, window, q.device)
        out = F.scaled_dot_product_attention(
            q.to(compute).transpose(1, 2), k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(-2).to(point)

    def gather_quantize(x: Tensor, format: ActivationFormat) -> Activations:
        return finish(format.project(x, compute, rounded=packed), format)

    def act_hadamard_quantize(gate: Tensor, up: Tensor, format: ActivationFormat) -> Activations:
        hidden = F.silu(gate.to(compute)) * up.to(compute)
        return finish(format.project(hidden, compute, rounded=packed), format)

    def store(format: ActivationFormat) -> Store:
        if packed:
            return half_store() if format.bands is None else packed_store(format)
        return Store(lambda x: (simulated(x, format),), lambda parts, dtype: parts[0].to(dtype))

    def cache(formats: HeadFormats) -> Cache:
        return Cache(store(formats.key), store(formats.value), compute)

    def prepack(linear: Linear, inputs: ActivationFormat = PLAIN) -> UnpackedLinear | DenseLinear:
        here = moved(linear, device)
        if packed:
            return _unpacked(here)
        return here.dense(compute) if isinstance(here, PackedLinear) else here

    return Backend(
        name=name,
        dtype=point,
        device=device,
        unusable=lambda: None,
        prepack=prepack,
        norm_quantize=norm_quantize,
        linears=linears,
        rope_project_append=rope_project_append,
        attend=attend,
        gather_quantize=gather_quantize,
        act_hadamard_quantize=act_hadamard_quantize,
        cache=cache,
        accumulate=integer_sums if packed else None,
    )


def reference(device: torch.device = CPU) -> Backend:
    """The definition evaluated on `device`: `reference(torch.device("cuda"))`."""
    return _operators("reference", torch.float64, torch.float32, None, device)


REFERENCE = reference()


def dense(dtype: torch.dtype, device: torch.device = CPU) -> Backend:
    """The same operators in `dtype` with activations and cache left unrounded."""
    return _operators(f"dense {str(dtype).removeprefix('torch.')}", dtype, dtype, _unrounded, device)


def straight_through(device: torch.device = CPU) -> Backend:
    """The same operators in float32 on plain weights; activations and cache are rounded to the values that the integers
    stand for, and a gradient passes the rounding unchanged (Bengio et al., arXiv 1308.3432). Inputs of online maps are
    not rounded."""
    return _operators("straight-through", torch.float32, torch.float32, _straight_through, device)
