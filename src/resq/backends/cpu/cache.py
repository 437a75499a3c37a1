"""The packed KV cache of the CPU backend: one record of bytes per token and head (csrc/kernels.h: Store)."""

from __future__ import annotations

import torch
from torch import Tensor

from resq.backends.cpu.formats import native_format
from resq.errors import InputError
from resq.numerics.affine import Quantized
from resq.numerics.formats import ActivationFormat, HeadFormats

# Room grows by whole blocks of this many tokens.
BLOCK = 16


class Store:
    """State: the keys or the values of one layer, uint8 [batch, kv heads, capacity, record].

    A record holds each band's integers (4 bits for widths up to 4: byte j has coordinate j low and coordinate
    j + ceil(n / 2) high; a byte each for 5, 6 and 8), the bands' scales, the bands' zero points (uint8). Without bands
    it is the head in float16.
    """

    def __init__(self, format: ActivationFormat) -> None:
        self.format = format
        self._native = native_format(format)
        self.record = 0
        self.data: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return 0 if self.data is None else self.data.shape[2]

    def reserve(self, batch: int, kv_heads: int, head_dim: int, length: int, needed: int) -> None:
        """Room for `needed` tokens; the `length` first are kept."""
        if self.data is None:
            self.record = record_bytes(self.format, head_dim)
        elif needed <= self.data.shape[2]:
            return
        room = -(-max(needed, length * 3 // 2) // BLOCK) * BLOCK
        grown = torch.empty(batch, kv_heads, room, self.record, dtype=torch.uint8)
        if self.data is not None:
            grown[:, :, :length] = self.data[:, :, :length]
        self.data = grown

    @property
    def argument(self) -> tuple[int, int, int, object]:
        """What the native operators take."""
        assert self.data is not None
        return self.data.data_ptr(), self.data.shape[2], self.record, self._native.handle

    def nbytes(self, length: int) -> int:
        """Bytes of the first `length` tokens."""
        return 0 if self.data is None else self.data.shape[0] * self.data.shape[1] * length * self.record

    def read(self, length: int) -> Tensor:
        """The first `length` tokens as float32 [b, G, length, h]."""
        assert self.data is not None
        data, bands = self.data[:, :, :length].contiguous(), self.format.bands
        if bands is None:
            return data.view(torch.float16).to(torch.float32)
        parts, at = [], 0
        for band in bands:
            size = stored_bytes(band.bits, band.size)
            raw = data[..., at : at + size]
            if band.bits > 4:
                parts.append(raw)
            else:
                parts.append(torch.cat([raw & 15, raw >> 4], dim=-1)[..., : band.size])
            at += size
        wide = self.format.scale_dtype.itemsize * len(bands)
        # A copy even where the slice is contiguous already: a view as floats must start at a multiple of their size.
        raw = data[..., at : at + wide].clone(memory_format=torch.contiguous_format)
        scale = raw.view(self.format.scale_dtype).to(torch.float32)
        zero = data[..., at + wide :]
        return Quantized(torch.cat(parts, dim=-1), scale[..., None], zero[..., None], bands).dequantize()


def stored_bytes(bits: int, size: int) -> int:
    """Bytes of a band of `size` integers in a record."""
    return size if bits > 4 else (size + 1) // 2


def record_bytes(format: ActivationFormat, head_dim: int) -> int:
    """Bytes of one token of one head."""
    if format.bands is None:
        return 2 * head_dim
    integers = sum(stored_bytes(band.bits, band.size) for band in format.bands)
    return integers + len(format.bands) * (format.scale_dtype.itemsize + 1)


class Cache:
    """State: the stored keys (after RoPE and their map) and values of one layer."""

    def __init__(self, formats: HeadFormats) -> None:
        self.keys, self.values = Store(formats.key), Store(formats.value)
        self._length = 0
        self.size = 0  # coordinates of a head, once there is one

    def extend(self, batch: int, kv_heads: int, head_dim: int, tokens: int) -> int:
        """Make room for `tokens` more; returns the first one's slot."""
        start = self._length
        held = self.keys.data
        if held is not None and (held.shape[0], held.shape[1], self.size) != (batch, kv_heads, head_dim):
            raise InputError(
                f"keys of {batch} rows and {kv_heads} heads of {head_dim} cannot follow {held.shape[0]} rows and "
                f"{held.shape[1]} heads of {self.size} in a cache"
            )
        self.size = head_dim
        for store in (self.keys, self.values):
            store.reserve(batch, kv_heads, head_dim, start, start + tokens)
        self._length = start + tokens
        return start

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self._length

    @property
    def batch(self) -> int:
        """Rows stored; only meaningful once a token is."""
        assert self.keys.data is not None
        return self.keys.data.shape[0]

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as stored, dequantized, float32 [b, G, tokens, h] each."""
        return self.keys.read(self._length), self.values.read(self._length)

    def crop(self, length: int) -> None:
        """Forget every token from `length` on."""
        self._length = min(length, self._length)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` int64 [new batch], in that order."""
        for store in (self.keys, self.values):
            if store.data is not None:
                store.data = store.data.index_select(0, rows)

    def nbytes(self) -> int:
        """Bytes of the stored tokens."""
        return sum(store.nbytes(self._length) for store in (self.keys, self.values))
