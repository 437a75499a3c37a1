"""Pass 1: one streamed forward over the calibration windows, collecting the moments that the bases need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resq.backends.backend import Backend
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import READERS, Point, Role
from resq.models.decoder import Layer, Positions
from resq.models.source import Source
from resq.numerics.device import CPU, moved
from resq.numerics.linear import DenseLinear
from resq.numerics.moments import LeafSums, Leaves, Node, Tree
from resq.progress import Progress
from resq.ptq.activations import Activations, Buffers
from resq.ptq.placement import fold_norms
from resq.ptq.recipe import Moments, Peaks, Statistic
from resq.ptq.resume import Position

# The name of pass 1 in a job's files, and what of peaks is kept by point.
PHASE, _BY_POINT = "moments", ("inputs", "weights")


def in_dtype(layer: Layer, dtype: torch.dtype) -> Layer:
    """The same layer with weights and biases of dense linears cast once, for a forward in `dtype`."""

    def cast(linear: DenseLinear) -> DenseLinear:
        return DenseLinear(linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))

    return replace(layer, linears={role: cast(linear) for role, linear in layer.linears.items()})


def check_finite(hidden: Activations | Sequence[Tensor], layer: int) -> None:
    """Raises InputError naming the layer whose output overflowed in some window."""
    if not all(torch.isfinite(hidden[number]).all() for number in range(len(hidden))):
        raise InputError(f"layer {layer} gives NaN or Inf on the calibration text; check the source model")


@dataclass(frozen=True)
class Sums:
    """What pass 1 leaves of a run of windows: a tree of float64 sums by name (`residual`, `value.3`, `key.3` of layer
    3), and the peaks of every layer."""

    trees: dict[str, Tree]
    peaks: list[Peaks] | None = None

    def moments(self, tokens: int) -> Moments:
        """What the bases are fitted on, of so many tokens."""
        totals = {name: tree.total() for name, tree in self.trees.items()}

        def layers(kind: Statistic) -> list[Tensor] | None:
            return [total for name, total in totals.items() if name.startswith(f"{kind}.")] or None

        return Moments(
            tokens, totals.get(Statistic.RESIDUAL), layers(Statistic.VALUE), layers(Statistic.KEY), self.peaks
        )


def collect(
    source: Source,
    ops: Backend,
    tokens: Tensor,
    needs: frozenset[Statistic],
    progress: Progress,
    buffers: Buffers | None = None,
    position: Position | None = None,
) -> Moments:
    """Moments over windows tokens int64 [windows, length], one layer of the source in memory at a time.

    Computed, and left, on the device of `ops`. Windows are run one by one, so that no sum depends on a batch size; of
    several ranks each takes its leaves, and the first gets the whole, the others nothing of use.
    """
    leaves, position = Leaves(len(tokens)), Position() if position is None else position
    ranks = position.ranks
    first, stop = ranks.span(leaves)
    mine = tokens[slice(*leaves.span(first, stop))]
    sums = gather(source, ops, mine, needs, leaves, first, progress, buffers, position)
    if ranks.size > 1:
        trees = {name: ranks.summed(tree, leaves) for name, tree in sums.trees.items()}
        peaks = [each for each in ranks.gathered(moved(sums.peaks, CPU)) if each]
        sums = Sums(trees, moved(reduce(larger, peaks), ops.device) if peaks else None)
    return sums.moments(tokens.numel()) if ranks.first else Moments(tokens.numel())


def gather(
    source: Source,
    ops: Backend,
    tokens: Tensor,
    needs: frozenset[Statistic],
    leaves: Leaves,
    first_leaf: int,
    progress: Progress,
    buffers: Buffers | None = None,
    position: Position | None = None,
) -> Sums:
    """The sums over one run of whole leaves, whose windows tokens int64 [windows, length] are; `leaves` are those of
    all windows. With a position the pass goes on where an earlier process was."""
    shape, count = source.shape, len(tokens)
    if not needs:
        return Sums({})
    position = Position() if position is None else position
    buffers = Buffers(device=ops.device) if buffers is None else buffers
    begin, before = position.layer(PHASE, leaves, ("hidden",)), None
    if begin:
        before = position.sums(PHASE, begin)
        begin = begin if position.ranks.agree(before is not None) else 0
    residual_sum = LeafSums(leaves.size)
    trees: dict[str, Tree] = {}
    peaks: list[Peaks] = []
    if begin and before is not None:
        states = position.states(PHASE, begin, "hidden", leaves)
        residual_sum, trees, peaks = _restored(before, leaves.size, ops.device)
    else:
        table = source.embedding()
        states = (F.embedding(window[None], table).to(ops.device, ops.dtype) for window in tokens)
    hidden = buffers.keep(states, count)
    del before
    at = Positions.following(shape, 0, 1, tokens.shape[1], device=ops.device)
    for index in range(begin, shape.layers):
        plain = moved(source.layer(index), ops.device)
        layer = fold_norms(plain, ops.dtype)
        largest = Largest() if Statistic.PEAKS in needs and count else None
        value_sum, key_sum = LeafSums(leaves.size), LeafSums(leaves.size)
        for number in range(count):
            before_layer = hidden[number]
            x = decoder.attention_input(ops, layer, before_layer)
            cache = ops.cache(layer.heads)
            out = decoder.attention(ops, shape, layer, x, at, cache)
            middle = before_layer + ops.linear(out, layer.linears[Role.O])
            m = decoder.mlp_input(ops, layer, middle)
            keys_seen, values_seen = cache.read()
            if Statistic.RESIDUAL in needs:
                residual_sum.add(number, x[0])
                residual_sum.add(number, m[0])
            if Statistic.VALUE in needs:
                value_sum.add(number, values_seen[0])
            if Statistic.KEY in needs:
                key_sum.add(number, keys_seen[0].flatten(0, 1))
            inner = decoder.mlp_hidden(ops, layer, m)
            if largest is not None:
                largest.add({Point.ATTN_IN: x, Point.O_IN: out, Point.MLP_IN: m, Point.DOWN_IN: inner})
                largest.add(
                    {"key": keys_seen[0].transpose(0, 1).flatten(0, 1), "value": values_seen[0].transpose(0, 1)}
                )
            hidden[number] = middle + ops.linear(inner, layer.linears[Role.DOWN])
            progress("collecting moments", index * count + number + 1, shape.layers * count)
        check_finite(hidden, index)
        source.check_unchanged()
        if Statistic.VALUE in needs:
            trees[f"{Statistic.VALUE}.{index}"] = value_sum.tree(first_leaf)
        if Statistic.KEY in needs:
            trees[f"{Statistic.KEY}.{index}"] = key_sum.tree(first_leaf)
        if largest is not None:
            peaks.append(largest.of(plain))
        del plain, layer
        position.save(PHASE, index + 1, {"hidden": hidden}, leaves, lambda: _kept(residual_sum, trees, peaks))
    if Statistic.RESIDUAL in needs:
        trees[Statistic.RESIDUAL] = residual_sum.tree(first_leaf)
    return Sums(trees, peaks if Statistic.PEAKS in needs else None)


def _kept(residual: LeafSums, trees: Mapping[str, Tree], peaks: Sequence[Peaks]) -> dict[str, Any]:
    """The sums so far in plain containers."""
    nodes = {name: [(node.level, node.first, node.total) for node in tree.nodes] for name, tree in trees.items()}
    each = [
        {"key": peak.key, "value": peak.value}
        | {kind: [(point.value, largest) for point, largest in getattr(peak, kind).items()] for kind in _BY_POINT}
        for peak in peaks
    ]
    return {"residual": residual.sums, "trees": nodes, "peaks": each}


def _restored(kept: dict[str, Any], size: int, device: torch.device) -> tuple[LeafSums, dict[str, Tree], list[Peaks]]:
    """The inverse of `_kept`, on a device."""
    kept = moved(kept, device)
    trees = {name: Tree() for name in kept["trees"]}
    for name, nodes in kept["trees"].items():
        for node in nodes:
            trees[name].push(Node(*node))
    peaks = [
        Peaks(**{**each, **{kind: {Point(point): peak for point, peak in each[kind]} for kind in _BY_POINT}})
        for each in kept["peaks"]
    ]
    return LeafSums(size, kept["residual"]), trees, peaks


class Largest:
    """State: max |x| of every channel over the windows added so far, by name."""

    def __init__(self) -> None:
        self._largest: dict[Any, Tensor] = {}

    def add(self, seen: Mapping[Any, Tensor]) -> None:
        """A window's tensors; values are kept apart by head, everything else over all axes but the last."""
        for name, x in seen.items():
            heads = 2 if name == "value" else 1
            peak = x.abs().flatten(0, -1 - heads).amax(dim=0)
            self._largest[name] = torch.maximum(self._largest[name], peak) if name in self._largest else peak

    def of(self, layer: Layer) -> Peaks:
        """The peaks of `layer`, whose norms' gains the tensors added did not have."""
        inputs = {point: self._largest[point].to(torch.float64) for point in Point}
        for point, norm in layer.norms.items():
            if norm.gain is not None:
                inputs[point] *= norm.gain.to(torch.float64).abs()
        weights = {
            point: torch.stack([layer.linears[role].weight.abs().amax(dim=0) for role in roles]).amax(dim=0)
            for point, roles in READERS.items()
        }
        wide = {point: peak.to(torch.float64) for point, peak in weights.items()}
        return Peaks(inputs, wide, *(self._largest[name].to(torch.float64) for name in ("key", "value")))


def larger(one: Sequence[Peaks], other: Sequence[Peaks]) -> list[Peaks]:
    """Layer by layer, the larger of two runs' peaks."""

    def each(a: Mapping[Point, Tensor], b: Mapping[Point, Tensor]) -> dict[Point, Tensor]:
        return {point: torch.maximum(a[point], b[point]) for point in a}

    return [
        Peaks(
            each(a.inputs, b.inputs),
            each(a.weights, b.weights),
            torch.maximum(a.key, b.key),
            torch.maximum(a.value, b.value),
        )
        for a, b in zip(one, other, strict=True)
    ]
