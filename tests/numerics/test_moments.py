"""Properties of resq.numerics.moments."""

import pytest
import torch

from resq.errors import InputError
from resq.numerics.moments import (
    MOST_LEAVES,
    PANEL,
    LeafSums,
    Leaves,
    MomentSum,
    Tree,
    TreeSum,
    add_second_moment,
    eigenbasis,
    half,
    mirrored,
    second_moment,
    subtrees,
)

COUNTS = (1, 7, 8, 9, 29, 61, 128, 129, 300)
every_count = pytest.mark.parametrize("count", COUNTS)


def windows(count: int, tokens: int = 6, size: int = 5) -> list[torch.Tensor]:
    """Float32 windows of very different magnitudes, so that another order of summation shows in the last bits."""
    generator = torch.Generator().manual_seed(count)
    magnitude = torch.exp(3 * torch.randn(count, 1, 1, generator=generator))
    return list(torch.randn(count, tokens, size, generator=generator) * magnitude)


# Products.


@pytest.mark.parametrize("size", [1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 3])
def test_a_moment_by_panels_is_the_product_and_exactly_symmetric(size: int) -> None:
    first, second = windows(2, 40, size)
    total = second_moment(first)
    add_second_moment(total, second)
    mirrored(total)
    rows = torch.cat([first, second]).double()
    plain = rows.T @ rows
    assert torch.equal(total, total.T)
    # |(X^T X)_ij| ≤ the larger diagonal entry, to which the rounding errors of both sums are relative.
    assert (total - plain).abs().max() <= 1e-13 * plain.diagonal().max()


def test_the_second_moment_is_taken_in_float64() -> None:
    x = torch.tensor([[1.0, 2.0**-13], [0.0, 1.0]], dtype=torch.float32)
    assert second_moment(x).tolist() == [[1.0, 2.0**-13], [2.0**-13, 1.0 + 2.0**-26]]


def test_heads_are_summed_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(3, 6, 4, generator=generator) for _ in range(11)]
    total = leaf_sum(data, Leaves(11))
    assert total.shape == (3, 4, 4)
    for head in range(3):
        assert torch.equal(total[head], leaf_sum([window[head] for window in data], Leaves(11)))


# Sums over windows that come once.


def added(data: list[torch.Tensor], leaves: Leaves, first: int = 0, stop: int | None = None) -> TreeSum:
    """A run of leaves."""
    start, end = leaves.span(first, leaves.count if stop is None else stop)
    total = TreeSum(leaves, first)
    for number, window in enumerate(data[start:end]):
        total.add(number, window, window)
    return total


def leaf_sum(data: list[torch.Tensor], leaves: Leaves) -> torch.Tensor:
    """The sum by leaves that are all held."""
    sums = LeafSums(leaves.size)
    for number, window in enumerate(data):
        sums.add(number, window)
    return sums.tree(0).total()


@every_count
def test_the_total_is_the_plain_float64_sum(count: int) -> None:
    data = windows(count)
    total = added(data, Leaves(count)).total()
    rows = torch.cat(data).double()
    plain = rows.T @ rows
    assert total.dtype == torch.float64
    assert (total - plain).abs().max() <= 1e-12 * plain.diagonal().max()


@every_count
def test_a_run_cut_at_leaves_and_joined_has_the_bits_of_one(count: int) -> None:
    data, leaves = windows(count), Leaves(count)
    whole = added(data, leaves).total()
    for of in range(1, leaves.count + 1):
        for owns in (False, True):
            joined = Tree(owns=owns)
            for number in range(1, of + 1):
                run = leaves.shard(number, of)
                nodes = added(data, leaves, *run).tree().nodes
                assert [(node.first, node.stop) for node in nodes] == subtrees(*run)
                for node in nodes:
                    joined.push(node)
            assert torch.equal(joined.total(), whole)


@pytest.mark.parametrize("size", [1, 5, PANEL, PANEL + 1, 2 * PANEL + 3])
@pytest.mark.parametrize("count", [1, 9, 29])
def test_sums_by_panels_have_the_bits_of_leaf_sums(count: int, size: int) -> None:
    data, leaves = windows(count, size=size), Leaves(count)
    shapes, sums = list[tuple[int, int]](), MomentSum(size, leaves)

    def summed(tree: Tree, shape: tuple[int, int]) -> torch.Tensor:
        shapes.append(shape)
        assert all(tuple(node.total.shape) == shape for node in tree.nodes)
        return tree.total()

    for number, window in enumerate(data):
        sums.add(number, window)
    assert torch.equal(sums.total(torch.device("cpu"), summed), leaf_sum(data, leaves))
    assert sum(rows * columns for rows, columns in shapes) == half(size)


def test_sums_by_panels_hold_little_more_than_half() -> None:
    assert half(14336) <= 0.54 * 14336**2


@every_count
def test_a_cross_moment_has_the_same_tree(count: int) -> None:
    left, right, leaves = windows(count), windows(count, size=3), Leaves(count)
    both = [torch.cat(pair, dim=1) for pair in zip(left, right, strict=True)]
    total = TreeSum(leaves)
    for number, (x, y) in enumerate(zip(left, right, strict=True)):
        total.add(number, x, y)
    crossed, wide = total.total(), added(both, leaves).total()
    assert crossed.shape == (5, 3)
    assert (crossed - wide[:5, 5:]).abs().max() <= 1e-13 * wide.diagonal().max()


def test_only_an_owning_tree_writes_its_nodes() -> None:
    data, leaves = windows(40), Leaves(40)
    nodes = [node for first in range(5) for node in added(data, leaves, first, first + 1).tree().nodes]
    kept = [node.total.clone() for node in nodes]
    for owns in (False, True):
        tree = Tree(owns=owns)
        for node in nodes:
            tree.push(node)
        total = tree.total()
        assert (total is nodes[-1].total) == owns
        assert all(torch.equal(node.total, total) for node, total in zip(nodes, kept, strict=True)) != owns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_added_windows_are_not_written(dtype: torch.dtype) -> None:
    data = [window.to(dtype) for window in windows(24)]
    kept = [window.clone() for window in data]
    added(data, Leaves(24)).total().fill_(0)
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))


def test_windows_come_once_and_in_order() -> None:
    data = windows(20)
    total = TreeSum(Leaves(20), 1)
    total.add(0, data[0], data[0])
    for wrong in (0, 2, 9):
        with pytest.raises(ValueError, match=rf"window 1 is next .*got {wrong}$"):
            total.add(wrong, data[wrong], data[wrong])
    for number in range(1, 12):
        total.add(number, data[number], data[number])
    with pytest.raises(ValueError, match=r"of 20; got 12$"):
        total.add(12, data[12], data[12])


def test_a_run_that_stops_inside_a_leaf_or_has_no_window_has_no_total() -> None:
    data, total = windows(20), TreeSum(Leaves(20))
    with pytest.raises(ValueError, match="no window was added"):
        total.total()
    total = TreeSum(Leaves(20))
    for number in range(12):
        total.add(number, data[number], data[number])
    with pytest.raises(ValueError, match="stops at window 12 of 20, inside a leaf of 8"):
        total.total()


# The statistics' tree.


def leaf_tree(data: list[torch.Tensor], leaves: Leaves, first: int, stop: int) -> Tree:
    """The tree of a run of leaves, of two tensors for each window as of two layers."""
    start, end = leaves.span(first, stop)
    sums = LeafSums(leaves.size)
    for scale in (1.0, 3.0):
        for number, window in enumerate(data[start:end]):
            sums.add(number, scale * window)
    return sums.tree(first)


@every_count
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
