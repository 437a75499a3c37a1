"""The packed KV cache on a card: planes of bytes, in each of which the tokens of one head are one stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resq.backends.triton.device import DEVICE
from resq.backends.triton.kernels.attention import dequantize
from resq.backends.triton.launch import launch, power_of_two
from resq.errors import InputError
from resq.numerics.bands import Bands
from resq.numerics.formats import ActivationFormat, HeadFormats

# Room is this many tokens times a power of two.
BLOCK = 128
# Values are multiplied token by token: equal bytes of this many lie together, keys' bytes of one token do.
GROUP = 16
# Tokens that one program dequantizes.
TOKENS = 16


@dataclass(frozen=True)
class Places:
    """Where the bands of a head lie, as kernels/attention.py's `STORE`: what a token takes in the plane of nibbles (of
    bands up to 4 bits: byte j has coordinate j low and coordinate j + ceil(size / 2) high) and in that of bytes; how
    many tokens' equal bytes lie together; and the bands."""

    nibbles: int
    bytes: int
    group: int
    bands: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, bands: Bands, group: int) -> Places:
        """Bands one after the other in each plane."""
        found, widths = [], {True: 0, False: 0}
        for band, cut in zip(bands, bands.slices(), strict=True):
            narrow = band.bits <= 4
            low = (band.size + 1) // 2 if narrow else band.size
            # Columns of a tile: powers of two that tensor cores take.
            where = (widths[narrow], power_of_two(low, 16))
            found.append((band.bits, cut.start, cut.start + low, low, band.size - low, *where))
            widths[narrow] += low
        return cls(widths[True], widths[False], group, tuple(found))

    @property
    def constant(self) -> tuple[Any, ...]:
        """What kernels are compiled for."""
        return (self.nibbles, self.bytes, self.group), *self.bands


# Of a store without bands.
NO_PLACES = Places(0, 0, 1, ())


class Store:
    """State: the keys or the values of one layer in planes [batch, kv heads, capacity, …] on `DEVICE`.

    With bands: nibbles uint8, bytes uint8 (kernels/attention.py: offsets), scales in the format's type and zero points
    uint8, one a band. Without: the head in float16. Slots that hold no token are finite.
    """

    def __init__(self, format: ActivationFormat, group: int) -> None:
        self.format = format
        self.places = None if format.bands is None else Places.of(format.bands, group)
        self.planes: tuple[Tensor, ...] = ()
        self.size = 0  # coordinates of a head, once there is one

    def _widths(self) -> list[tuple[int, torch.dtype]]:
        if self.places is None:
            return [(self.size, torch.float16)]
        bands, byte = len(self.places.bands), torch.uint8
        return [
            (self.places.nibbles, byte),
            (self.places.bytes, byte),
            (bands, self.format.scale_dtype),
            (bands, byte),
        ]

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.planes[0].shape[2] if self.planes else 0

    def reserve(self, batch: int, kv_heads: int, head_dim: int, length: int, capacity: int) -> None:
        """Room for `capacity` tokens at least; the `length` first are kept."""
        if self.planes and capacity <= self.capacity:
            return
        self.size = head_dim
        room = BLOCK * power_of_two(-(-capacity // BLOCK), 1)
        # Not of inference mode, so that it can be written outside it.
        with torch.inference_mode(False):
            grown = [
                torch.zeros(batch, kv_heads, room, width, dtype=dtype, device=DEVICE) for width, dtype in self._widths()
            ]
            whole = -(-length // GROUP) * GROUP
            for new, old in zip(grown, self.planes, strict=False):
                new[:, :, :whole] = old[:, :, :whole]
        self.planes = tuple(grown)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`; where their number stays, so do the addresses."""
        with torch.inference_mode(False):
            kept = [plane.index_select(0, rows) for plane in self.planes]
            if self.planes and len(rows) == len(self.planes[0]):
                for plane, new in zip(self.planes, kept, strict=True):
                    plane.copy_(new)
            else:
                self.planes = tuple(kept)

    def nbytes(self, length: int) -> int:
        """Bytes of the first `length` tokens."""
        return sum(plane[:, :, :length].numel() * plane.element_size() for plane in self.planes)

    def dense(self, rows: slice, slots: slice, dtype: torch.dtype) -> Tensor:
        """Dequantized batch rows and slots, [rows, G, slots, h]; beyond float16's range clamped to it."""
        planes = [plane[rows] for plane in self.planes]
        if self.places is None:
            return planes[0][:, :, slots].to(dtype)
        batch, kv_heads, count = planes[0].shape[0], planes[0].shape[1], slots.stop - slots.start
        out = torch.empty(batch, kv_heads, count, self.size, dtype=dtype, device=DEVICE)
        if not out.numel():
            return out
        launch(
            dequantize,
            (-(-count // TOKENS), batch * kv_heads),
            *planes,
            out,
            slots.start,
            count,
            self.capacity,
            HEAD=self.size,
            TOKENS=TOKENS,
            STORE=self.places.constant,
        )
        return out


class Cache:
    """State: the stored keys (after RoPE and their map) and values of one layer. While `clock` is set (int32 [1] on
    `DEVICE`), operators take the number of tokens stored before a step from it, and write where that says."""

    def __init__(self, formats: HeadFormats) -> None:
        self.keys, self.values = Store(formats.key, 1), Store(formats.value, GROUP)
        self.clock: Tensor | None = None
        self.recording: Any = None
        self._length = 0

    @property
    def size(self) -> int:
        """Coordinates of a head, 0 before there is one."""
        return self.keys.size

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and heads, once there are any."""
        return (self.keys.planes[0].shape[0], self.keys.planes[0].shape[1]) if self.keys.planes else None

    @property
    def capacity(self) -> int:
        """Slots: a power of two times 128, however long the cache is."""
        return self.keys.capacity

    def reserve(self, batch: int, kv_heads: int, head_dim: int, capacity: int) -> None:
        """Room for `capacity` tokens at least. Raises InputError when others of another shape are stored."""
        if self.shape not in (None, (batch, kv_heads)) or self.size not in (0, head_dim):
            held = self.shape or (0, 0)
            raise InputError(
                f"keys of {batch} rows and {kv_heads} heads of {head_dim} cannot follow {held[0]} rows and "
                f"{held[1]} heads of {self.size} in a cache"
            )
        for store in (self.keys, self.values):
            store.reserve(batch, kv_heads, head_dim, self._length, capacity)

    def extend(self, batch: int, kv_heads: int, head_dim: int, tokens: int) -> int:
        """Make room for `tokens` more; returns the first one's slot."""
        start = self._length
        self.reserve(batch, kv_heads, head_dim, start + tokens)
        self._length = start + tokens
        return start

    def advance(self, tokens: int) -> None:
        """Count tokens that a replayed step stored."""
        self._length += tokens

    def storage(self) -> tuple[int, ...]:
        """Addresses of the planes."""
        return tuple(plane.data_ptr() for store in (self.keys, self.values) for plane in store.planes)

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self._length

    @property
    def batch(self) -> int:
        """Rows stored; only meaningful once a token is."""
        assert self.shape is not None
        return self.shape[0]

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as stored, dequantized, float32 [b, G, tokens, h] each."""
        assert self.shape is not None
        every, slots = slice(0, self.batch), slice(0, self._length)
        return self.keys.dense(every, slots, torch.float32), self.values.dense(every, slots, torch.float32)

    def crop(self, length: int) -> None:
        """Forget every token from `length` on."""
        self._length = min(length, self._length)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` int64 [new batch], in that order."""
        for store in (self.keys, self.values):
            store.select(rows.to(DEVICE))

    def nbytes(self) -> int:
        """Bytes of the stored tokens."""
        return sum(store.nbytes(self._length) for store in (self.keys, self.values))
