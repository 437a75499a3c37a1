"""Streaming second moments with a fixed summation tree, and the eigenbasis of one."""

from __future__ import annotations

import torch
from torch import Tensor

# Windows summed one after the other before the tree begins: fewer partial sums to hold, and the smallest shard.
LEAF_WINDOWS = 8


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
        self._leaf: Tensor | None = None
        self._nodes: list[tuple[int, int, Tensor]] = []  # (level, first leaf, sum), levels strictly descending

    def add(self, x: Tensor) -> None:
        """Add one window: x [..., tokens, n] or, for several heads, any leading axes kept by `second_moment`."""
        self.add_moment(second_moment(x), x.shape[-2])

    def add_moment(self, moment: Tensor, rows: int) -> None:
        """Add the next window's moment (float64, summed over `rows` rows)."""
        self._leaf = moment.clone() if self._leaf is None else self._leaf.add_(moment)
        self.rows += rows
        self.next_window += 1
        if self.next_window % LEAF_WINDOWS == 0:
            self._push(0, self.next_window // LEAF_WINDOWS - 1, self._leaf)
            self._leaf = None

    def _push(self, level: int, first_leaf: int, node: Tensor) -> None:
        # Two neighbours merge when the left one is an even subtree of the same height.
        while self._nodes and self._nodes[-1][0] == level and self._nodes[-1][1] % (2 << level) == 0:
            _, first_leaf, left = self._nodes.pop()
            node = left.add_(node)
            level += 1
        self._nodes.append((level, first_leaf, node))

    def extend(self, following: MomentSum) -> None:
        """Append the shard that starts where this one ends; equals having added its windows here when both edges are
        multiples of `LEAF_WINDOWS` and the shard is a union of whole subtrees."""
        if self._leaf is not None or following.start != self.next_window:
            raise ValueError(f"the next shard must start at window {self.next_window}, got {following.start}")
        for level, first_leaf, node in following._nodes:
            self._push(level, first_leaf, node.clone())
        self._leaf = None if following._leaf is None else following._leaf.clone()
        self.next_window = following.next_window
        self.rows += following.rows

    def total(self) -> Tensor:
        """The sum over all windows added, float64; the right-most subtrees are added first."""
        parts = [node for _, _, node in self._nodes] + ([] if self._leaf is None else [self._leaf])
        if not parts:
            raise ValueError("no window was added")
        result = parts[-1].clone()
        for part in reversed(parts[:-1]):
            result = part + result
        return result


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
