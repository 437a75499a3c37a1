"""Properties of resq.numerics.moments."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch

from resq.errors import InputError
from resq.numerics.moments import (
    LEAF_WINDOWS,
    MOST_LEAVES,
    LeafSums,
    Leaves,
    MomentSum,
    Tree,
    eigenbasis,
    second_moment,
    subtrees,
)

COUNTS = (1, 7, 8, 9, 16, 24, 40, 61, 64, 100)


def windows(count: int, tokens: int = 6, size: int = 5) -> list[torch.Tensor]:
    """Float32 windows of very different magnitudes, so that another order of summation shows in the last bits."""
    generator = torch.Generator().manual_seed(count)
    magnitude = torch.exp(3 * torch.randn(count, 1, 1, generator=generator))
    return list(torch.randn(count, tokens, size, generator=generator) * magnitude)


def accumulated(parts: Iterable[torch.Tensor], first_window: int = 0) -> MomentSum:
    total = MomentSum(first_window)
    for part in parts:
        total.add(part)
    return total


def splits(count: int) -> list[list[int]]:
    """Leaf-aligned edges 0 < … < count of several splits: none, every leaf, halves, uneven and random ones."""
    leaves = list(range(LEAF_WINDOWS, count, LEAF_WINDOWS))
    generator = torch.Generator().manual_seed(count)
    chosen = [[], leaves, leaves[:1], leaves[-1:], leaves[len(leaves) // 2 :][:1], leaves[::2], leaves[1::3]]
    for _ in range(4):
        keep = torch.rand(len(leaves), generator=generator) < 0.4
        chosen.append([leaf for leaf, kept in zip(leaves, keep.tolist(), strict=True) if kept])
    return [[0, *edges, count] for edges in chosen]


@pytest.mark.parametrize("count", COUNTS)
def test_a_split_into_shards_changes_no_bit(count: int) -> None:
    data = windows(count)
    whole = accumulated(data)
    for edges in splits(count):
        shards = [accumulated(data[start:stop], start) for start, stop in pairwise(edges)]
        merged = MomentSum()
        for shard in shards:
            merged.extend(shard)
        assert torch.equal(merged.total(), whole.total())
        assert (merged.rows, merged.next_window) == (whole.rows, whole.next_window)
        # Merging neighbours first, from the right, is the same tree.
        while len(shards) > 1:
            last = shards.pop()
            shards[-1].extend(last)
        assert torch.equal(shards[0].total(), whole.total())


def test_a_merged_sum_continues_like_a_single_run() -> None:
    data = windows(61)
    merged = accumulated(data[:24])
    merged.extend(accumulated(data[24:45], 24))
    for window in data[45:]:
        merged.add(window)
    assert torch.equal(merged.total(), accumulated(data).total())


@pytest.mark.parametrize("count", COUNTS)
def test_the_total_is_the_plain_float64_sum(count: int) -> None:
    data = windows(count)
    total = accumulated(data)
    rows = torch.cat(data).double()
    plain = rows.T @ rows
    assert total.total().dtype == torch.float64
    assert total.rows == rows.shape[0]
    assert total.next_window == count
    # |(X^T X)_ij| ≤ the larger diagonal entry, to which the rounding errors of both sums are relative.
    assert (total.total() - plain).abs().max() <= 1e-12 * plain.diagonal().max()


def test_heads_are_summed_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(3, 6, 4, generator=generator) for _ in range(11)]
    total = accumulated(data)
    assert total.total().shape == (3, 4, 4)
    assert total.rows == 66
    for head in range(3):
        expected = accumulated([window[head] for window in data]).total()
        assert (total.total()[head] - expected).abs().max() <= 1e-12 * expected.diagonal().max()


def test_the_number_of_held_matrices_is_logarithmic() -> None:
    total = MomentSum()
    for count in range(1, 300):
        total.add_moment(torch.ones(1, 1, dtype=torch.float64), 1)
        assert len(total.tree.nodes) == (count // LEAF_WINDOWS).bit_count()
    assert float(total.total()) == 299.0


def test_extend_refuses_a_gap_or_an_overlap() -> None:
    data = windows(32)
    for start in (0, 8, 24):
        with pytest.raises(ValueError, match=rf"must start at window 16, got {start}$"):
            accumulated(data[:16]).extend(accumulated(data[start:], start))


def test_extend_refuses_to_follow_an_unfinished_leaf() -> None:
    data = windows(32)
    with pytest.raises(ValueError, match="must start at window 13, got 16"):
        accumulated(data[:13]).extend(accumulated(data[16:], 16))


@pytest.mark.parametrize("start", [1, 7, 12])
def test_a_shard_starts_at_a_leaf(start: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of {LEAF_WINDOWS} windows, got {start}"):
        MomentSum(start)


def test_an_empty_shard_adds_nothing_and_has_no_total() -> None:
    data = windows(16)
    total = accumulated(data)
    total.extend(MomentSum(16))
    assert torch.equal(total.total(), accumulated(data).total())
    with pytest.raises(ValueError, match="no window was added"):
        MomentSum().total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_added_windows_are_not_written(dtype: torch.dtype) -> None:
    data = [window.to(dtype) for window in windows(24)]
    kept = [window.clone() for window in data]
    accumulated(data).total().fill_(0)
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))


def test_added_moments_are_not_written() -> None:
    moments = [second_moment(window) for window in windows(24)]
    kept = [moment.clone() for moment in moments]
    total = MomentSum()
    for moment in moments:
        total.add_moment(moment, 6)
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))
    before = total.total()
    moments[0].fill_(0)
    assert torch.equal(total.total(), before)


def test_taking_a_total_changes_no_state() -> None:
    for count in COUNTS:
        total = accumulated(windows(count))
        first = total.total()
        kept = first.clone()
        first.fill_(0)
        assert torch.equal(total.total(), kept)


def test_merged_sums_share_no_memory() -> None:
    data = windows(44)
    left, right = accumulated(data[:16]), accumulated(data[16:29], 16)
    expected = right.total()
    left.extend(right)
    for window in data[29:]:
        left.add(window)
    assert torch.equal(right.total(), expected)
    merged = left.total()
    for window in data[29:]:
        right.add(window)
    assert torch.equal(left.total(), merged)
    assert torch.equal(merged, accumulated(data).total())


def test_the_second_moment_is_taken_in_float64() -> None:
    x = torch.tensor([[1.0, 2.0**-13], [0.0, 1.0]], dtype=torch.float32)
    assert second_moment(x).tolist() == [[1.0, 2.0**-13], [2.0**-13, 1.0 + 2.0**-26]]


# The statistics' tree.


def leaf_tree(data: list[torch.Tensor], leaves: Leaves, first: int, stop: int) -> Tree:
    """The tree of a run of leaves, of two tensors for each window as of two layers."""
    start, end = leaves.span(first, stop)
    sums = LeafSums(leaves.size)
    for scale in (1.0, 3.0):
        for number, window in enumerate(data[start:end]):
            sums.add(number, scale * window)
    return sums.tree(first)


@pytest.mark.parametrize("count", [1, 8, 9, 29, 61, 128, 129, 300])
def test_shards_of_leaves_joined_in_any_order_give_the_bits_of_one_run(count: int) -> None:
    data, leaves = windows(count), Leaves(count)
    whole = leaf_tree(data, leaves, 0, leaves.count)
    assert leaves.count <= MOST_LEAVES
    for of in range(1, leaves.count + 1):
        shards = [leaves.shard(number, of) for number in range(1, of + 1)]
        assert [first for first, _ in shards] == [0, *(stop for _, stop in shards[:-1])]
        assert shards[-1][1] == leaves.count
        trees = [leaf_tree(data, leaves, *shard) for shard in shards]
        assert [[(node.first, node.stop) for node in tree.nodes] for tree in trees] == [
            subtrees(*run) for run in shards
        ]
        # All from the left, and the later ones among themselves first.
        for cut in range(of):
            later, merged = Tree(), Tree()
            for node in (node for tree in trees[cut:] for node in tree.nodes):
                later.push(node)
            for node in (node for tree in (*trees[:cut], later) for node in tree.nodes):
                merged.push(node)
            assert torch.equal(merged.total(), whole.total())
            assert [(node.first, node.stop) for node in merged.nodes] == subtrees(0, leaves.count)


@pytest.mark.parametrize(("number", "of", "words"), [(0, 2, "0/2"), (3, 2, "3/2"), (1, 5, "at most 4"), (1, 0, "1/0")])
def test_a_shard_that_the_tree_does_not_have_is_refused(number: int, of: int, words: str) -> None:
    with pytest.raises(InputError, match=rf"--shard.*{words}"):
        Leaves(29).shard(number, of)


# Eigenbases.


def random_moment(*shape: int, tokens: int = 40) -> torch.Tensor:
    """The second moment of correlated rows, [..., n, n]."""
    generator = torch.Generator().manual_seed(sum(shape))
    mix = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    x = torch.randn(*shape[:-1], tokens, shape[-1], generator=generator, dtype=torch.float64)
    return second_moment(x * torch.exp(torch.randn(shape[-1], generator=generator)) @ mix)


MOMENTS = {
    "of one": random_moment(1),
    "random": random_moment(12),
    "heads": random_moment(3, 8),
    "rank deficient": random_moment(12, tokens=5),
    "identity": torch.eye(6, dtype=torch.float64),
    "zero": torch.zeros(4, 4, dtype=torch.float64),
    "diagonal": torch.diag(torch.tensor([4.0, 1.0, 9.0], dtype=torch.float64)),
}
every_moment = pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())


@every_moment
def test_an_eigenbasis_reconstructs_its_moment(moment: torch.Tensor) -> None:
    kept = moment.clone()
    values, vectors = eigenbasis(moment)
    assert (values.dtype, vectors.dtype) == (torch.float64, torch.float64)
    assert torch.equal(moment, kept)
    largest = moment.abs().amax()
    assert (vectors @ torch.diag_embed(values) @ vectors.mT - moment).abs().max() <= 1e-12 * largest
    assert (vectors.mT @ vectors - torch.eye(moment.shape[-1])).abs().max() <= 1e-12


@every_moment
def test_eigenvalues_ascend_and_every_vectors_largest_entry_is_positive(moment: torch.Tensor) -> None:
    values, vectors = eigenbasis(moment)
    assert (values.diff(dim=-1) >= 0).all()
    assert (vectors.amax(dim=-2) == vectors.abs().amax(dim=-2)).all()


def test_the_most_energetic_coordinate_comes_last() -> None:
    values, vectors = eigenbasis(MOMENTS["diagonal"])
    assert values.tolist() == [1.0, 4.0, 9.0]
    assert torch.equal(vectors, torch.eye(3, dtype=torch.float64)[:, [1, 0, 2]])


def test_an_asymmetric_rounding_of_the_moment_is_averaged() -> None:
    moment = random_moment(6)
    skew = torch.triu(torch.full((6, 6), 1e-3, dtype=torch.float64), 1)
    values, vectors = eigenbasis(moment + skew - skew.T)
    expected_values, expected_vectors = eigenbasis(moment)
    # (a + s) + (a - s) rounds to 2a within an ulp; Weyl bounds what that moves the eigenvalues by.
    assert (values - expected_values).abs().max() <= 1e-13 * expected_values.max()
    assert vectors.shape == expected_vectors.shape


@pytest.mark.parametrize("rank", [1, 2, 5, 11, 12])
def test_the_last_eigenvectors_capture_at_least_any_other_subspaces_energy(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    size = 12
    x = torch.randn(80, size, generator=generator, dtype=torch.float64)
    x = x * torch.exp(torch.randn(size, generator=generator)) @ torch.randn(size, size, generator=generator).double()
    values, vectors = eigenbasis(second_moment(x))

    def energy(basis: torch.Tensor) -> float:
        """||X Q||² of an orthonormal basis Q [n, rank]."""
        return float((x @ basis).square().sum())

    captured = energy(vectors[:, -rank:])
    total = float(x.square().sum())
    assert captured == pytest.approx(float(values[-rank:].sum()), rel=1e-12)
    rounding = 1e-12 * total
    for _ in range(50):
        other, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))
        assert energy(other) <= captured + rounding
        # Near the optimum too: the top eigenvectors, slightly turned.
        nudge = 1e-2 * torch.randn(size, rank, generator=generator, dtype=torch.float64)
        turned, _ = torch.linalg.qr(vectors[:, -rank:] + nudge)
        assert energy(turned) <= captured + rounding
    identity = torch.eye(size, dtype=torch.float64)
    for magnitude in (x.abs().amax(0), x.square().sum(0)):
        assert energy(identity[:, magnitude.argsort()[-rank:]]) <= captured + rounding
    assert energy(vectors[:, :rank]) <= captured + rounding
    if rank == size:
        assert captured == pytest.approx(total, rel=1e-12)
