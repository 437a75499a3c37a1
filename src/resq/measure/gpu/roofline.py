"""The least time that a decoder block can take on a card, from what the card was measured to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resq.measure.speed import Point
from resq.models.architecture import READERS, Role, Shape
from resq.numerics.bands import Bands
from resq.numerics.packing import packed_bytes
from resq.ptq.precision import Precision

HALF = 2  # bytes of a bfloat16
# Beside a band's integers: a float16 scale and a one-byte zero point of a head in the cache, a float32 scale of a row
# of weights.
HEAD_BAND_BYTES, ROW_BAND_BYTES = 3, 4


@dataclass(frozen=True)
class Ceilings:
    """What a card was measured to do: operations per second (a multiply-add is two) of bfloat16 and int8 matrix
    products and of causal attention, bytes per second of a copy, read and written bytes counted."""

    bf16: float
    int8: float
    attention: float
    copy: float


@dataclass(frozen=True)
class Step:
    """Operations on one of the units of `Ceilings` (none where the unit is empty), and the bytes that must move."""

    unit: str
    operations: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The longer of computing and moving."""
        computing = self.operations / getattr(ceilings, self.unit) if self.unit else 0.0
        return max(computing, self.bytes / ceilings.copy)


def least_seconds(steps: Sequence[Step], ceilings: Ceilings) -> float:
    """Steps follow one another: each overlaps its own arithmetic with its own traffic, none with another's."""
    return sum(step.seconds(ceilings) for step in steps)


def head_bytes(bands: Bands | None, size: int) -> int:
    """Bytes of one token's key or value of one head in the cache; 16 bit without bands."""
    if bands is None:
        return HALF * size
    return sum(packed_bytes(band.size, band.bits) + HEAD_BAND_BYTES for band in bands)


def weight_bytes(shape: Shape, precision: Precision | None) -> dict[Role, int]:
    """Bytes of every linear of a block's first layer; bfloat16 without a precision."""
    found = {}
    for role, (out, inner) in shape.sizes().items():
        bands = None if precision is None else precision.weight_bands(0, role, shape)
        if bands is None:
            found[role] = HALF * out * inner
        else:
            found[role] = out * sum(packed_bytes(band.size, band.bits) + ROW_BAND_BYTES for band in bands)
    return found


def cache_bytes(shape: Shape, precision: Precision | None) -> int:
    """Bytes of one token's keys and values in one layer; bfloat16 without a precision."""
    bands = (None, None) if precision is None else (precision.key_bands(0, shape), precision.value_bands(0, shape))
    return shape.kv_heads * sum(head_bytes(each, shape.head_dim) for each in bands)


def steps(shape: Shape, point: Point, precision: Precision | None) -> list[Step]:
    """What a block must do at a point: of a packed precision, or of bfloat16 where there is none.

    F FFN size, d hidden size, A = H·h. What passes between operators is bfloat16, and quantized activations are bytes:
    an ideal implementation's, not ours, so that ideals of different implementations can be compared.
    """
    tokens = point.processed
    seen = point.context + 1 if point.mode == "decode" else point.tokens
    d, ffn, wide, narrow = shape.hidden, shape.ffn, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    unit = "bf16" if precision is None else "int8"
    bytes_in = HALF if precision is None else 1
    held, sizes = weight_bytes(shape, precision), shape.sizes()
    found = []
    for roles in READERS.values():
        inner = sizes[roles[0]][1]
        out = sum(sizes[role][0] for role in roles)
        moved = sum(held[role] for role in roles) + tokens * (bytes_in * inner + HALF * out)
        found.append(Step(unit, 2.0 * tokens * inner * out, moved))
    # Each query meets half of the keys in a causal prefill, all of them in decoding.
    pairs = tokens * seen / 2 if point.mode == "prefill" else tokens * seen
    stored = cache_bytes(shape, precision)
    in_cache = HALF * 2 * narrow if point.mode == "prefill" else stored
    reads = seen * in_cache * (1 if point.mode == "prefill" else point.batch)
    found.append(Step("attention", 4.0 * pairs * wide, reads + HALF * 2 * tokens * wide))
    # Two norms, two sums with the residual, SiLU·mul, the token's keys and values.
    norms, residual = 2 * (HALF + bytes_in) * d, 2 * 3 * HALF * d
    between = norms + residual + (2 * HALF + bytes_in) * ffn + HALF * 2 * narrow
    if precision is None:
        between += HALF * 2 * narrow
    else:  # o's input is rounded, and the rounded keys and values are written for attention to read
        between += (HALF + 1) * wide + stored + (HALF * 2 * narrow if point.mode == "prefill" else 0)
    found.append(Step("", 0.0, tokens * between))
    return found
