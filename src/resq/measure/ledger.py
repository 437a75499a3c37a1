"""True bits per weight, activation and KV value of a packed checkpoint, scales and zero points included."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from resq.checkpoint.manifest import FormatEntry, LinearEntry, Manifest
from resq.numerics.packing import packed_bytes

SCALE_BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True)
class Ledger:
    """Bits are per value and count everything stored beside it.

    weight_bits: decoder linears. activation_bits: inputs of the decoder linears, weighted by their size, with a float32
    scale and a one-byte zero point for each token, band and group. key_bits, value_bits: per cached value; the
    kv_bytes are of one token in all layers. bytes: weight files. source_bytes: the original's.
    """

    weight_bits: float
    activation_bits: float
    key_bits: float
    value_bits: float
    kv_bytes_per_token: int
    kv_bytes_per_token_16bit: int
    layer_bytes: int
    end_bytes: int
    bytes: int
    source_bytes: int


def _weight_bits(linear: LinearEntry) -> float:
    out, inner = linear.shape
    if linear.bands is None:
        return 16.0 * out * inner
    packed = sum(packed_bytes(size, bits) for bits, size in linear.bands)
    return 8.0 * out * packed + 32.0 * out * len(linear.bands)


def _activation_bits(format: FormatEntry, size: int) -> float:
    if format.bands is None:
        return 16.0 * size
    payload = sum(bits * count for bits, count in format.bands)
    return payload + (8.0 * SCALE_BYTES[format.scale_dtype] + 8.0) * len(format.bands) * format.groups


def head_bytes(format: FormatEntry, head_dim: int) -> int:
    """Bytes of one token's key or value of one head in the packed cache: packed bands, then a scale and a one-byte
    zero point for each band; 16-bit values without bands."""
    if format.bands is None:
        return 2 * head_dim
    packed = sum(packed_bytes(size, bits) for bits, size in format.bands)
    return packed + (SCALE_BYTES[format.scale_dtype] + 1) * len(format.bands)


def ledger(manifest: Manifest, head_dim: int) -> Ledger:
    """Count everything from the manifest's shapes and bands."""
    weights = weight_bits = values = value_bits = 0.0
    key_bytes = value_bytes = cached = 0
    for layer in manifest.layers:
        readers = {"attn_in": "q", "o_in": "o", "mlp_in": "gate", "down_in": "down"}
        for linear in layer.linears.values():
            weights += prod(linear.shape)
            weight_bits += _weight_bits(linear)
        for point, format in layer.inputs.items():
            size = layer.linears[readers[point]].shape[1]
            values += size
            value_bits += _activation_bits(format, size)
        kv_heads = layer.linears["k"].shape[0] // head_dim
        key_bytes += kv_heads * head_bytes(layer.key, head_dim)
        value_bytes += kv_heads * head_bytes(layer.value, head_dim)
        cached += kv_heads * head_dim
    total = sum(file.bytes for file in manifest.files.values())
    end_bytes = manifest.files[manifest.ends.file].bytes
    return Ledger(
        weight_bits=weight_bits / weights,
        activation_bits=value_bits / values,
        key_bits=8.0 * key_bytes / cached,
        value_bits=8.0 * value_bytes / cached,
        kv_bytes_per_token=key_bytes + value_bytes,
        kv_bytes_per_token_16bit=4 * cached,
        layer_bytes=total - end_bytes,
        end_bytes=end_bytes,
        bytes=total,
        source_bytes=manifest.source.bytes,
    )
