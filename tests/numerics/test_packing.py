"""Properties of resq.numerics.packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq.errors import InputError
from resq.numerics.bands import PACKABLE_BITS
from resq.numerics.packing import pack, pack_signed, packed_bytes, unpack, unpack_signed

COUNTS = (0, 1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 129)


def random_unsigned(*shape: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + bits)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)


def random_signed(*shape: int, bits: int) -> torch.Tensor:
    unsigned = random_unsigned(*shape, bits=bits).to(torch.int16)
    return (unsigned * 2 - 1 if bits == 1 else unsigned - 2 ** (bits - 1)).to(torch.int8)


def stream(values: list[int], bits: int) -> list[int]:
    """The bytes of one row from a single Python integer whose bits k·bits … (k+1)·bits - 1 are value k."""
    word = sum((value % 2**bits) << (k * bits) for k, value in enumerate(values))
    return list(word.to_bytes((len(values) * bits + 7) // 8, "little"))


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_unpack_inverts_pack(bits: int, count: int) -> None:
    values = random_unsigned(3, count, bits=bits)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, packed_bytes(count, bits))
    assert packed.is_contiguous()
    back = unpack(packed, bits, count)
    assert back.dtype == torch.uint8
    assert torch.equal(back, values)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_unpack_signed_inverts_pack(bits: int, count: int) -> None:
    values = random_signed(3, count, bits=bits)
    back = unpack_signed(pack_signed(values, bits), bits, count)
    assert back.dtype == torch.int8
    assert torch.equal(back, values)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_every_value_of_a_width_survives_at_every_position(bits: int) -> None:
    # 8 neighbours cover every alignment of a value to the byte grid.
    every = torch.arange(2**bits).to(torch.uint8)[:, None].expand(-1, 8)
    assert torch.equal(unpack(pack(every, bits), bits, 8), every)
    integers = torch.tensor([-1, 1]) if bits == 1 else torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    signed = integers.to(torch.int8)[:, None].expand(-1, 8)
    assert torch.equal(unpack_signed(pack_signed(signed, bits), bits, 8), signed)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_a_row_is_one_little_endian_bit_stream(bits: int, count: int) -> None:
    values = random_unsigned(4, count, bits=bits)
    assert pack(values, bits).tolist() == [stream(row, bits) for row in values.tolist()]


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(bits=st.sampled_from(PACKABLE_BITS), values=st.lists(st.integers(-128, 127), max_size=40))
def test_only_the_low_bits_of_a_signed_value_are_stored(bits: int, values: list[int]) -> None:
    packed = pack(torch.tensor(values, dtype=torch.int8), bits)
    assert packed.tolist() == stream(values, bits)
    wrapped = [(value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for value in values]
    wrapped = [1 if value else -1 for value in wrapped] if bits == 1 else wrapped
    assert unpack_signed(packed, bits, len(values)).tolist() == wrapped


def test_the_layout_of_known_rows() -> None:
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([-1, 1, -2], dtype=torch.int8), 2).tolist() == [0b100111]
    assert pack(torch.tensor([7, 0, 5], dtype=torch.uint8), 3).tolist() == [0b01000111, 0b1]
    assert pack(torch.tensor([0x3F, 1], dtype=torch.uint8), 6).tolist() == [0b01111111, 0]
    assert pack(torch.tensor([-1, 5], dtype=torch.int8), 8).tolist() == [0xFF, 5]
    assert pack_signed(torch.tensor([1, -1, -1, 1, 1, -1, 1, 1, 1], dtype=torch.int8), 1).tolist() == [0b11011001, 1]
    assert pack_signed(torch.tensor([-16, 15, 1, -1], dtype=torch.int8), 5).tolist() == [0xF0, 0x85, 0x0F]


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 0), (2, 3, 5), (5,)])
def test_leading_axes_are_rows_and_may_be_empty(bits: int, shape: tuple[int, ...]) -> None:
    values = random_unsigned(*shape, bits=bits)
    packed = pack(values, bits)
    assert packed.shape == (*shape[:-1], packed_bytes(shape[-1], bits))
    assert torch.equal(unpack(packed, bits, shape[-1]), values)
    assert unpack_signed(packed, bits, shape[-1]).shape == shape


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_memory_layout_of_the_input_is_irrelevant(bits: int) -> None:
    values = random_signed(6, 22, bits=bits)
    for view in (values.T, values[:, ::3], values[1::2, 3:10], values[0].expand(4, -1)):
        assert not view.is_contiguous()
        packed = pack_signed(view, bits)
        assert torch.equal(packed, pack_signed(view.clone(memory_format=torch.contiguous_format), bits))
        wide = torch.zeros(packed.shape[-1] * 2, packed.shape[0], dtype=torch.uint8).T
        wide[:, ::2] = packed
        assert torch.equal(unpack_signed(wide[:, ::2], bits, view.shape[1]), view)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_inputs_are_not_written_and_outputs_share_no_memory(bits: int) -> None:
    values = random_unsigned(2, 13, bits=bits)
    kept = values.clone()
    packed = pack(values, bits)
    stored = packed.clone()
    unpack(packed, bits, 13).fill_(0)
    unpack_signed(packed, bits, 13).fill_(0)
    assert torch.equal(packed, stored)
    packed.fill_(0)
    assert torch.equal(values, kept)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_unused_high_bits_of_the_last_byte_are_zero(bits: int) -> None:
    for count in range(1, 9):
        last = int(pack(torch.full((count,), -1, dtype=torch.int8), bits)[-1])
        used = count * bits - 8 * (packed_bytes(count, bits) - 1)
        assert last == 2**used - 1


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("excess", [-1, 1])
def test_a_wrong_number_of_bytes_is_refused(bits: int, excess: int) -> None:
    wrong = torch.zeros(2, packed_bytes(17, bits) + excess, dtype=torch.uint8)
    for read in (unpack, unpack_signed):
        with pytest.raises(InputError, match=rf"take {packed_bytes(17, bits)} bytes a row, got {wrong.shape[1]}$"):
            read(wrong, bits, 17)


@pytest.mark.parametrize("bits", [-1, 0, 7, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    values = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(InputError, match=rf"^cannot pack {bits}-bit values; accepted are 1, 2, 3, 4, 5, 6, 8$"):
        pack(values, bits)
    with pytest.raises(InputError, match=f"{bits}-bit"):
        unpack(values, bits, 8)
