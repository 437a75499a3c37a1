"""Streaming second moments with a fixed summation tree, and the eigenbasis of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.errors import InputError

# Windows summed one after the other before the tree begins: fewer partial sums to hold, and the smallest shard.
LEAF_WINDOWS = 8
# Leaves of the statistics' tree, at most: each holds a sum of its own until all layers are through, [d, d] float64.
MOST_LEAVES = 16


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
    give the same bits as one run. Holds about 2·log2(leaves) nodes, which are never written.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def push(self, node: Node) -> None:
        """Append the subtree that starts where the last one ends."""
        while self.nodes and self.nodes[-1].level == node.level and self.nodes[-1].first % (2 << node.level) == 0:
            left = self.nodes.pop()
            node = Node(node.level + 1, left.first, left.total + node.total)
        self.nodes.append(node)

    def total(self, last: Tensor | None = None) -> Tensor:
        """The sum of all nodes and of an unfinished leaf after them; the right-most are added first."""
        parts = [node.total for node in self.nodes] + ([] if last is None else [last])
        if not parts:
            raise ValueError("no window was added")
        result = parts[-1].clone()
        for part in reversed(parts[:-1]):
            result = part + result
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
    goes to the same leaf; windows are numbered from the first of the run, which starts a leaf."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._sums: list[Tensor] = []

    def add(self, window: int, x: Tensor) -> None:
        """Add x [..., tokens, n] of a window; a new window follows the one before."""
        moment, leaf = second_moment(x), window // self.size
        if leaf == len(self._sums):
            self._sums.append(moment)
        else:
            self._sums[leaf] += moment

    def tree(self, first: int) -> Tree:
        """The leaves' tree, where the first of them has this number."""
        tree = Tree()
        for number, total in enumerate(self._sums, start=first):
            tree.push(Node(0, number, total))
        return tree


class MomentSum:
    """State: the running sum of X^T X over calibration windows, float64.

    Windows are leaves of a binary tree over their index: `LEAF_WINDOWS` neighbours are added in order, then equal
    neighbouring subtrees are merged. The tree depends on the window numbers only, so shards that are whole subtrees,
    accumulated anywhere and merged in order, give the same bits as one run. Holds at most log2(windows) matrices.
    """

    def __init__(self, first_window: int = 0) -> None:
        if first_window % LEAF_WINDOWS:
            raise ValueError(f"a shard starts at a multiple of {LEAF_WINDOWS} windows, got {first_window}")
        self.start = self.next_window = first_window
        self.rows = 0
        self.tree = Tree()
        self._leaf: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add one window: x [..., tokens, n] or, for several heads, any leading axes kept by `second_moment`."""
        self.add_moment(second_moment(x), x.shape[-2])

    def add_moment(self, moment: Tensor, rows: int) -> None:
        """Add the next window's moment (float64, summed over `rows` rows)."""
        self._leaf = moment.clone() if self._leaf is None else self._leaf.add_(moment)
        self.rows += rows
        self.next_window += 1
        if self.next_window % LEAF_WINDOWS == 0:
            self.tree.push(Node(0, self.next_window // LEAF_WINDOWS - 1, self._leaf))
            self._leaf = None

    def extend(self, following: MomentSum) -> None:
        """Append the shard that starts where this one ends; equals having added its windows here when both edges are
        multiples of `LEAF_WINDOWS` and the shard is a union of whole subtrees."""
        if self._leaf is not None or following.start != self.next_window:
            raise ValueError(f"the next shard must start at window {self.next_window}, got {following.start}")
        for node in following.tree.nodes:
            self.tree.push(node)
        self._leaf = None if following._leaf is None else following._leaf.clone()
        self.next_window = following.next_window
        self.rows += following.rows

    def total(self) -> Tensor:
        """The sum over all windows added, float64; the right-most subtrees are added first."""
        return self.tree.total(self._leaf)


def second_moment(x: Tensor) -> Tensor:
    """X^T X in float64: x [..., tokens, n] -> [..., n, n]."""
    x = x.to(torch.float64)
    return x.mT @ x


def eigenbasis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ascending and eigenvectors in columns of a symmetric float64 [..., n, n]; every vector's largest
    entry is positive, so that the basis does not depend on the solver's choice of sign."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    pivot = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return values, vectors * torch.where(pivot < 0, -1.0, 1.0)
