"""Exact dense packing of 1- to 6- and 8-bit integers into bytes: a little-endian bit stream per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.bands import PACKABLE_BITS


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a packed row of `count` values; the last byte's unused high bits are zero."""
    return (count * bits + 7) // 8


def _group(bits: int) -> tuple[int, int]:
    """The smallest (values, bytes) after which the bit stream meets a byte edge again."""
    if bits not in PACKABLE_BITS:
        raise InputError(f"cannot pack {bits}-bit values; accepted are {', '.join(map(str, PACKABLE_BITS))}")
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def _word(size: int) -> torch.dtype:
    """An integer that holds `size` bytes; 5-bit values meet a byte edge after 5 of them."""
    return torch.int32 if size < 4 else torch.int64


def pack(values: Tensor, bits: int) -> Tensor:
    """Bit i of a row's stream is bit i % 8 of byte i // 8; value k holds bits k·bits … (k+1)·bits - 1, low bit first.

    values [..., n] uint8 or int8; only the low `bits` bits of each are kept. Returns uint8 [..., ceil(n·bits / 8)].
    """
    per_group, group_bytes = _group(bits)
    count = values.shape[-1]
    raw = values.contiguous().view(torch.uint8) & (2**bits - 1)
    if bits == 8:
        return raw.clone()
    groups = -(-count // per_group)
    raw = torch.nn.functional.pad(raw, (0, groups * per_group - count)).unflatten(-1, (groups, per_group))
    word = torch.zeros(raw.shape[:-1], dtype=_word(group_bytes), device=raw.device)
    for position in range(per_group):
        word |= raw[..., position].to(word.dtype) << (position * bits)
    out = torch.stack([((word >> (8 * byte)) & 0xFF).to(torch.uint8) for byte in range(group_bytes)], dim=-1)
    return out.flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., ceil(count·bits / 8)] -> uint8 [..., count] in 0 … 2^bits - 1."""
    per_group, group_bytes = _group(bits)
    if packed.shape[-1] != packed_bytes(count, bits):
        raise InputError(
            f"{count} values of {bits} bits take {packed_bytes(count, bits)} bytes a row, got {packed.shape[-1]}"
        )
    if bits == 8:
        return packed.clone()
    groups = -(-count // per_group)
    raw = torch.nn.functional.pad(packed, (0, groups * group_bytes - packed.shape[-1]))
    raw = raw.unflatten(-1, (groups, group_bytes)).to(_word(group_bytes))
    word = raw[..., 0].clone()
    for byte in range(1, group_bytes):
        word |= raw[..., byte] << (8 * byte)
    mask = 2**bits - 1
    out = torch.stack([((word >> (position * bits)) & mask).to(torch.uint8) for position in range(per_group)], dim=-1)
    return out.flatten(-2)[..., :count].contiguous()


def pack_signed(values: Tensor, bits: int) -> Tensor:
    """Values int8 [..., n] in two's complement; 1-bit values are -1 and 1, stored as 0 and 1."""
    return pack((values > 0).to(torch.uint8) if bits == 1 else values, bits)


def unpack_signed(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_signed`: uint8 [..., bytes] -> int8 [..., count]."""
    if bits == 1:
        return unpack(packed, bits, count).view(torch.int8) * 2 - 1
    shift = 8 - bits
    return (unpack(packed, bits, count) << shift).view(torch.int8) >> shift
