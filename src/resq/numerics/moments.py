"""Streaming second moments with a fixed summation tree, and the eigenbasis of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.bands import cuts

# Windows summed one after the other before the tree begins: fewer partial sums to hold, and the smallest shard.
LEAF_WINDOWS = 8
# Leaves of the statistics' tree, at most: each holds a sum of its own until all layers are through, [d, d] float64.
MOST_LEAVES = 16
# Columns of X^T X multiplied at once, and at most so many such panels: narrower ones leave the matrix product at n =
# 4096 as slow as one product, wider ones multiply more below the diagonal. 512 tokens on one core of a Xeon with
# AVX-512: 1.3 × as fast as one product at n = 896, 1.5 × at 4096, 2.0 × at 8192.
PANEL, PANELS = 256, 16


@dataclass(frozen=True)
class Node:
    """The sum of a whole subtree: leaves first … first + 2**level - 1, first a multiple of 2**level."""

    level: int
    first: int
    total: Tensor

    @property
    def stop(self) -> int:
        """The leaf after the last."""
        return self.first + (1 << self.level)


class Tree:
    """State: the sums of neighbouring whole subtrees, from left to right; two that make a larger subtree are added.

    What is added to what depends on the leaves' numbers only: runs of leaves summed anywhere and joined in any order
    give the same bits as one run. Holds about 2·log2(leaves) nodes. They are never written, unless the tree owns them:
    then sums are taken in place.
    """

    def __init__(self, *, owns: bool = False) -> None:
        self.nodes: list[Node] = []
        self._owns = owns

    def push(self, node: Node) -> None:
        """Append the subtree that starts where the last one ends."""
        while self.nodes and self.nodes[-1].level == node.level and self.nodes[-1].first % (2 << node.level) == 0:
            left = self.nodes.pop()
            total = left.total.add_(node.total) if self._owns else left.total + node.total
            node = Node(node.level + 1, left.first, total)
        self.nodes.append(node)

    def total(self) -> Tensor:
        """The sum of all nodes, a tensor of its own; the right-most are added first. A tree that owns its nodes gives
        them up for it. Raises ValueError without any."""
        if not self.nodes:
            raise ValueError("no window was added")
        nodes = self.nodes
        if self._owns:
            self.nodes = []
        result = nodes[-1].total if self._owns else nodes[-1].total.clone()
        for node in reversed(nodes[:-1]):
            result += node.total
        return result


def subtrees(first: int, stop: int) -> list[tuple[int, int]]:
    """(first leaf, leaf after the last) of the nodes that a `Tree` of the leaves first … stop - 1 holds."""
    found = []
    while first < stop:
        size = 1 << ((stop - first).bit_length() - 1)
        size = min(size, first & -first) if first else size
        found.append((first, first + size))
        first += size
    return found


@dataclass(frozen=True)
class Leaves:
    """How so many calibration windows lie under the leaves of the statistics' tree: `size` neighbours each, the last
    leaf maybe fewer; `LEAF_WINDOWS`, doubled until there are at most `MOST_LEAVES`."""

    windows: int

    @property
    def size(self) -> int:
        """Windows of a leaf."""
        size = LEAF_WINDOWS
        while size * MOST_LEAVES < self.windows:
            size *= 2
        return size

    @property
    def count(self) -> int:
        """Leaves."""
        return -(-self.windows // self.size)

    def shard(self, number: int, of: int) -> tuple[int, int]:
        """(first leaf, leaf after the last) of shard `number` of 1 … `of`; sizes differ by one leaf at most. Raises
        InputError when there are fewer leaves than shards."""
        if not 1 <= number <= of:
            raise InputError(f"--shard {number}/{of} is none of {of} shards; write 1/{of} … {of}/{of}")
        if of > self.count:
            raise InputError(
                f"--shard {number}/{of}: {self.windows} windows are summed as {self.count} neighbours of {self.size}, "
                f"which are not cut; use at most {self.count} shards, or more --windows"
            )
        return (number - 1) * self.count // of, number * self.count // of

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """(first window, window after the last) of the leaves first … stop - 1."""
        return first * self.size, min(stop * self.size, self.windows)


class LeafSums:
    """State: X^T X of every leaf of a run of windows, float64. What is added for one window again, of the next layer,
    goes to the same leaf; windows are numbered from the first of the run, which starts a leaf. `sums`, one per leaf,
    can be given to another to go on."""

    def __init__(self, size: int, sums: list[Tensor] | None = None) -> None:
        self.size = size
        self.sums = [] if sums is None else sums

    def add(self, window: int, x: Tensor) -> None:
        """Add x [..., tokens, n] of a window; a new window follows the one before."""
        leaf = window // self.size
        if leaf == len(self.sums):
            self.sums.append(no_moment(x))
        add_second_moment(self.sums[leaf], x)

    def tree(self, first: int) -> Tree:
        """The leaves' tree, where the first of them has this number; the sums are given away to it."""
        summed = Tree(owns=True)
        for number in range(first, first + len(self.sums)):
            summed.push(Node(0, number, mirrored(self.sums.pop(0))))
        tree = Tree()
        tree.nodes = summed.nodes
        return tree


class TreeSum:
    """State: the sum of X^T Y over a run of whole leaves whose windows come once and in order, numbered from the first
    of the run; holds one matrix for the leaf under way and at most log2(leaves) for those before.

    `tree` and `total` give the sums away; nothing can be added after.
    """

    def __init__(self, leaves: Leaves, first_leaf: int = 0) -> None:
        self.leaves = leaves
        self._window = leaves.span(first_leaf, first_leaf)[0]
        self._first = self._window
        self._tree = Tree(owns=True)
        self._leaf: Tensor | None = None

    def add(self, window: int, x: Tensor, y: Tensor) -> None:
        """Add X^T Y of the next window's x [tokens, n] and y [tokens, m], taken in float64."""
        wanted = self._window - self._first
        if window != wanted or self._window == self.leaves.windows:
            raise ValueError(f"window {wanted} is next of {self.leaves.windows}; got {window}")
        if self._leaf is None:
            self._leaf = x.new_zeros(x.shape[-1], y.shape[-1], dtype=torch.float64)
        self._leaf.addmm_(x.to(torch.float64).mT, y.to(torch.float64))
        self._window += 1
        if self._window % self.leaves.size == 0 or self._window == self.leaves.windows:
            self._tree.push(Node(0, (self._window - 1) // self.leaves.size, self._leaf))
            self._leaf = None

    def tree(self) -> Tree:
        """The tree of the run's leaves, to be pushed node by node to that of the leaves before. Raises ValueError where
        the run stops inside a leaf."""
        if self._window % self.leaves.size and self._window != self.leaves.windows:
            raise ValueError(
                f"the sum stops at window {self._window} of {self.leaves.windows}, inside a leaf of {self.leaves.size}"
            )
        tree, self._tree = self._tree, Tree(owns=True)
        self._window = self.leaves.windows
        return tree

    def total(self) -> Tensor:
        """The sum over the windows added, float64; as `tree` otherwise."""
        return self.tree().total()


class MomentSum:
    """State: the sum of X^T X over a run as in `TreeSum`, to the bits of `LeafSums`, by panels of rows from the
    diagonal on: half of what whole matrices would hold."""

    def __init__(self, size: int, leaves: Leaves, first_leaf: int = 0) -> None:
        self.size = size
        self._sums = {panel.start: TreeSum(leaves, first_leaf) for panel in panels(size)}

    def add(self, window: int, x: Tensor) -> None:
        """Add X^T X of the next window's x [tokens, n], taken in float64."""
        x = x.to(torch.float64)
        for panel in panels(self.size):
            self._sums[panel.start].add(window, x[:, panel], x[:, panel.start :])

    def total(self, device: torch.device, summed: Callable[[Tree, tuple[int, int]], Tensor]) -> Tensor:
        """The sum float64 [n, n] on a device, exactly symmetric, each panel as `summed` from its tree of panels of this
        shape; they are given up one by one. Raises ValueError as `TreeSum.tree`."""
        found = torch.empty(self.size, self.size, dtype=torch.float64, device=device)
        for panel in panels(self.size):
            shape = (panel.stop - panel.start, self.size - panel.start)
            found[panel, panel.start :] = summed(self._sums.pop(panel.start).tree(), shape)
        return mirrored(found)


def no_moment(x: Tensor) -> Tensor:
    """Zeros float64 [..., n, n] on the device of x [..., tokens, n]."""
    return x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64)


def add_second_moment(total: Tensor, x: Tensor) -> None:
    """Add X^T X, taken in float64, to total float64 [..., n, n], x [..., tokens, n], by panels of columns: of what lies
    below the diagonal only the part inside a panel, so that the total means something after `mirrored`."""
    if x.dim() > 2:
        for head, part in zip(total.view(-1, *total.shape[-2:]), x.flatten(0, -3), strict=True):
            add_second_moment(head, part)
        return
    x = x.to(torch.float64)
    for panel in panels(x.shape[-1]):
        total[panel, panel.start :].addmm_(x[:, panel].mT, x[:, panel.start :])


def mirrored(total: Tensor) -> Tensor:
    """A sum of `add_second_moment` float64 [..., n, n], what lies above the diagonal copied to below, in place."""
    for panel in panels(total.shape[-1]):
        total[..., panel, panel] = symmetric(total[..., panel, panel])
        total[..., panel.stop :, panel] = total[..., panel, panel.stop :].mT
    return total


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric [..., n, n] of which only what lies on and above the diagonal is given."""
    upper = upper.triu()
    return upper + upper.triu(1).mT


def panels(size: int) -> list[slice]:
    """Of the rows or columns of a moment [size, size]."""
    return cuts(size, max(PANEL, -(-size // PANELS)))


def half(size: int) -> int:
    """Entries of a moment [size, size] that a `MomentSum` holds."""
    return sum((panel.stop - panel.start) * (size - panel.start) for panel in panels(size))


def second_moment(x: Tensor) -> Tensor:
    """X^T X in float64: x [..., tokens, n] -> [..., n, n]."""
    total = no_moment(x)
    add_second_moment(total, x)
    return mirrored(total)


def eigenbasis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ascending and eigenvectors in columns of a symmetric float64 [..., n, n]; every vector's largest
    entry is positive, so that the basis does not depend on the solver's choice of sign."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    pivot = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return values, vectors * torch.where(pivot < 0, -1.0, 1.0)
