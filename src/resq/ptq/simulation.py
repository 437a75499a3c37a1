"""The rounded model in floating point: what a choice of maps costs, differentiable in the maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resq.backends.reference import straight_through
from resq.models import decoder
from resq.models.architecture import Role, Shape
from resq.models.decoder import Layer, Positions
from resq.models.source import Source
from resq.numerics.affine import round_symmetric, symmetric_limits
from resq.numerics.bands import Bands
from resq.numerics.device import CPU, moved
from resq.numerics.linear import DenseLinear
from resq.numerics.maps import LinearMap
from resq.ptq.placement import Placement
from resq.ptq.precision import Precision
from resq.ptq.recipe import At, Recipe
from resq.ptq.statistics import in_dtype


@dataclass(frozen=True)
class Simulation:
    """A source with maps placed, activations and cache rounded straight through, in float32.

    round_weights: weights are rounded to nearest too, without clip search; they are 16 bit otherwise. Holds one layer
    of weights and the hidden states before every layer at a time, on `device`; layers are run again for the gradient.
    """

    source: Source
    recipe: Recipe
    round_weights: bool = False
    device: torch.device = CPU

    def loss(self, maps: Mapping[At, LinearMap], tokens: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats of tokens int64 [windows, length]: a float64 scalar, differentiable in
        the maps' tensors."""
        ops, shape, precision = straight_through(self.device), self.source.shape, self.recipe.precision
        tokens = tokens.to(self.device)
        placement = Placement(shape, maps, precision, self.recipe.folds_norms)
        ends = placement.ends(moved(self.source.ends(), self.device), keep_tied=False)
        ends = replace(ends, embed=ends.embed.to(ops.dtype), head=DenseLinear(ends.head.weight.to(ops.dtype)))
        at = Positions.following(shape, 0, len(tokens), tokens.shape[1], device=self.device)

        def run(index: int, hidden: Tensor) -> Tensor:
            layer = placement.layer(moved(self.source.layer(index), self.device), index)
            if self.round_weights:
                layer = rounded(layer, index, precision, shape)
            return decoder.forward_layer(ops, shape, in_dtype(layer, ops.dtype), hidden, at)

        hidden = decoder.embed(ops, ends, tokens)
        for index in range(shape.layers):
            if torch.is_grad_enabled():
                hidden = checkpoint(run, index, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = run(index, hidden)
        logits = decoder.logits(ops, ends, hidden[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, tokens[:, 1:].flatten()).to(torch.float64)


def rounded(layer: Layer, index: int, precision: Precision, shape: Shape) -> Layer:
    """Weights rounded to nearest, straight through."""
    linears = dict(layer.linears)
    for role in Role:
        bands = precision.weight_bands(index, role, shape)
        if bands is not None:
            weight = linears[role].weight
            linears[role] = DenseLinear(
                weight + (nearest(weight.detach(), bands) - weight).detach(), linears[role].bias
            )
    return replace(layer, linears=linears)


def nearest(weight: Tensor, bands: Bands) -> Tensor:
    """s · clamp(round(w / s)) with s = max |w| over the largest integer for every row and band, [out, in]."""
    parts = []
    for band, cut in zip(bands, bands.slices(), strict=True):
        part = weight[:, cut]
        scale = part.abs().amax(dim=1, keepdim=True) / symmetric_limits(band.bits)[1]
        parts.append(round_symmetric(part, scale.clamp(min=1e-30), band.bits) * scale)
    return torch.cat(parts, dim=1)
