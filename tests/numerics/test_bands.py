"""Properties of resq.numerics.bands."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resq.errors import InputError
from resq.numerics.bands import INT4, INT4_INT8, INT8, PACKABLE_BITS, Band, Bands, Layout

PAIRS = st.lists(st.tuples(st.sampled_from(PACKABLE_BITS), st.integers(1, 300)), min_size=1, max_size=5)
EIGHTH = Fraction(1, 8)
ISO = Layout(4, last=((6, EIGHTH),), first=((2, EIGHTH),))
repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=100)


@repeatable
@given(pairs=PAIRS)
def test_slices_tile_the_dimension_in_order(pairs: list[tuple[int, int]]) -> None:
    bands = Bands.of(*pairs)
    covered = [index for cut in bands.slices() for index in range(cut.start, cut.stop)]
    assert covered == list(range(bands.size))
    assert [cut.stop - cut.start for cut in bands.slices()] == [band.size for band in bands]


@repeatable
@given(pairs=PAIRS)
def test_pairs_rebuild_the_bands(pairs: list[tuple[int, int]]) -> None:
    bands = Bands.of(*pairs)
    assert bands.pairs == pairs
    assert len(bands) == len(pairs)
    assert Bands.of(*bands.pairs) == bands
    assert hash(Bands.of(*bands.pairs)) == hash(bands)


@repeatable
@given(pairs=PAIRS, times=st.integers(1, 40))
def test_repeating_scales_every_band_and_keeps_the_mean_width(pairs: list[tuple[int, int]], times: int) -> None:
    bands, repeated = Bands.of(*pairs), Bands.of(*pairs).repeated(times)
    assert repeated.size == times * bands.size
    assert repeated.pairs == [(bits, size * times) for bits, size in pairs]
    # The same rational number, rounded once in each division.
    assert repeated.bits_per_value == bands.bits_per_value


@repeatable
@given(pairs=PAIRS)
def test_bits_per_value_is_the_stored_bits_over_the_coordinates(pairs: list[tuple[int, int]]) -> None:
    bands = Bands.of(*pairs)
    expanded = [bits for bits, size in pairs for _ in range(size)]
    assert bands.bits_per_value == float(Fraction(sum(expanded), len(expanded)))
    assert min(expanded) <= bands.bits_per_value <= max(expanded)


@pytest.mark.parametrize("bits", [-4, -1, 0, 7, 9, 16])
def test_a_width_that_cannot_be_packed_is_refused(bits: int) -> None:
    with pytest.raises(InputError, match=rf"^a band has {bits} bits; accepted are 1, 2, 3, 4, 5, 6, 8$"):
        Band(bits, 8)


@pytest.mark.parametrize("size", [-8, 0])
def test_a_band_of_no_coordinates_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=rf"^a band holds {size} coordinates; it needs at least 1$"):
        Band(4, size)


def test_a_cut_into_no_bands_is_refused() -> None:
    with pytest.raises(InputError, match=r"^a dimension was cut into no bands"):
        Bands(())


def test_the_papers_layouts() -> None:
    assert INT4.bands(172).pairs == [(4, 172)]
    assert INT8.bands(172).pairs == [(8, 172)]
    assert INT4_INT8.bands(2048).pairs == [(4, 1792), (8, 256)]
    assert INT4_INT8.bands(2048).bits_per_value == 4.5
    assert INT4_INT8.bands(64).pairs == [(4, 56), (8, 8)]
    assert ISO.bands(2048).pairs == [(2, 256), (4, 1536), (6, 256)]
    assert ISO.bands(2048).bits_per_value == 4.0


@repeatable
@given(
    size=st.integers(1, 8192),
    multiple=st.sampled_from([1, 8, 16, 32, 64]),
    fractions=st.lists(st.fractions(Fraction(1, 64), Fraction(1, 3)), max_size=4),
    firsts=st.integers(0, 2),
)
def test_named_parts_are_the_nearest_positive_multiple(
    size: int, multiple: int, fractions: list[Fraction], firsts: int
) -> None:
    named = [(PACKABLE_BITS[index], fraction) for index, fraction in enumerate(fractions)]
    layout = Layout(8, last=tuple(named[firsts:]), first=tuple(named[:firsts]))
    try:
        bands = layout.bands(size, multiple)
    except InputError:
        # Refused only when the parts, each at most half a multiple (or one minimum) too large, fill the dimension.
        assert sum(fraction * size + multiple for fraction in fractions) >= size
        return
    assert bands.size == size
    low = min(firsts, len(named))
    assert bands.pairs[low][0] == 8
    parts = [*bands.pairs[:low], *bands.pairs[low + 1 :]]
    assert [bits for bits, _ in parts] == [bits for bits, _ in named]
    for (_, count), fraction in zip(parts, fractions, strict=True):
        assert count >= multiple
        assert count % multiple == 0
        assert count == multiple or abs(count - fraction * size) <= Fraction(multiple, 2)


@pytest.mark.parametrize(
    ("size", "multiple", "last"),
    [(64, 1, 8), (64, 16, 16), (64, 32, 32), (172, 1, 22), (172, 32, 32), (896, 32, 128), (900, 64, 128), (8, 1, 1)],
)
def test_an_eighth_is_rounded_to_the_multiple(size: int, multiple: int, last: int) -> None:
    assert INT4_INT8.bands(size, multiple).pairs == [(4, size - last), (8, last)]


@pytest.mark.parametrize(
    ("layout", "size", "multiple"),
    [
        (INT4_INT8, 1, 1),
        (INT4_INT8, 32, 32),
        (ISO, 2, 1),
        (ISO, 64, 32),
        (Layout(4, ((8, Fraction(1)),)), 64, 1),
        (Layout(4, ((8, Fraction(1, 2)),), ((2, Fraction(1, 2)),)), 64, 1),
        (Layout(4, ((8, Fraction(3, 2)),)), 64, 1),
    ],
)
def test_parts_that_leave_no_low_band_are_refused(layout: Layout, size: int, multiple: int) -> None:
    with pytest.raises(InputError, match=rf"leave -?\d+ of {size} coordinates .*use smaller fractions$") as refusal:
        layout.bands(size, multiple)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("layout", [INT4, INT4_INT8])
@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_with_low_changes_the_low_band_only(layout: Layout, bits: int) -> None:
    stressed = layout.with_low(bits)
    assert (stressed.first, stressed.last) == (layout.first, layout.last)
    low = len(layout.first)
    before, after = layout.bands(256).pairs, stressed.bands(256).pairs
    assert after[low] == (bits, before[low][1])
    assert after[:low] + after[low + 1 :] == before[:low] + before[low + 1 :]
    assert stressed.with_low(layout.low) == layout


def test_with_low_moves_every_part_where_some_come_first() -> None:
    low = ISO.with_low(3)
    assert low.bands(256).pairs == [(1, 32), (3, 192), (5, 32)]
    assert low.bands(256).bits_per_value == low.mean_bits == 3
    assert low.with_low(4) == ISO
    assert ISO.with_low(6).bands(256).pairs == [(4, 32), (6, 192), (8, 32)]
    with pytest.raises(InputError, match=r"^a band has 0 bits; accepted are 1, 2, 3, 4, 5, 6, 8$"):
        ISO.with_low(2).bands(256)


def test_a_layout_reads_in_order_of_coordinates() -> None:
    assert str(ISO) == "first 1/8 2 bit, 4 bit, last 1/8 6 bit"
    assert str(INT4_INT8.with_low(3)) == "3 bit, last 1/8 8 bit"


@pytest.mark.parametrize(
    ("part", "size", "multiple", "count"),
    [(16, 64, 8, 16), (3, 16, 1, 3), (3, 64, 8, 8), (20, 64, 8, 16), (1, 8, 1, 1)],
)
def test_a_part_may_be_a_count_whatever_the_size(part: int, size: int, multiple: int, count: int) -> None:
    layout = Layout(4, ((8, part),))
    assert layout.bands(size, multiple).pairs == [(4, size - count), (8, count)]
    assert layout.bands(8 * size, multiple).pairs[-1] == (8, count)
    assert math.isnan(layout.mean_bits)
    assert str(layout) == f"4 bit, last {part} 8 bit"


def test_a_rank_changes_the_last_part_and_0_takes_the_last_parts_away() -> None:
    three = Layout(4, ((6, Fraction(1, 8)), (8, 16)), ((2, Fraction(1, 8)),))
    assert three.with_rank(Fraction(1, 4)) == Layout(4, ((6, Fraction(1, 8)), (8, Fraction(1, 4))), three.first)
    assert three.with_rank(0) == Layout(4, (), three.first)
    assert INT4.with_rank(24) == Layout(4, ((8, 24),))
    assert INT4_INT8.with_rank(Fraction(1, 8)) == INT4_INT8
    assert INT4_INT8.with_rank(0) == INT4_INT8.with_rank(Fraction(0)) == INT4


def test_a_cut_is_where_parts_lie_whatever_their_widths() -> None:
    assert Layout(3, ((6, Fraction(1, 8)),)).cut == INT4_INT8.cut == ((), (Fraction(1, 8),))
    assert INT4_INT8.with_rank(8).cut != INT4_INT8.cut
    assert INT4.cut == INT8.cut == ((), ())
    assert INT4_INT8.mean_bits == 4.5
