"""Placing maps into weights: logits stay as they are, rounding later is the only lossy step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import READERS, Point, Role, Shape, Site
from resq.models.decoder import Ends, Layer
from resq.numerics.affine import round_symmetric, symmetric_scale
from resq.numerics.bands import Bands
from resq.numerics.device import CPU
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear
from resq.numerics.maps import Dense, Diagonal, LinearMap, OnlineMap, PerHead, as_reader, as_writer
from resq.ptq.precision import Precision
from resq.ptq.recipe import At

# RMSNorm and q·k commute with rotations only.
_ORTHOGONAL = frozenset({Site.RESIDUAL, Site.QUERY_KEY})
# Where a diagonal is folded into the norm or the linear before.
_SCALED = frozenset({Site.ATTN_NORM_OUT, Site.MLP_NORM_OUT, Site.MLP_HIDDEN})
# The site of each linear's input, per layer.
INPUT_SITES = {
    Point.ATTN_IN: Site.ATTN_NORM_OUT,
    Point.O_IN: Site.ATTN_OUT,
    Point.MLP_IN: Site.MLP_NORM_OUT,
    Point.DOWN_IN: Site.MLP_HIDDEN,
}


POINTS = {role: point for point, roles in READERS.items() for role in roles}


@dataclass(frozen=True)
class Placement:
    """The maps of a model and how its activations are rounded. `folds`: norm gains move into the next linears. What is
    placed stays where it lies; maps are quickest on the same device."""

    shape: Shape
    maps: Mapping[At, LinearMap]
    precision: Precision
    folds: bool

    def __post_init__(self) -> None:
        for at, map in self.maps.items():
            diagonal = isinstance(map, Diagonal) and at.site not in _SCALED
            if diagonal or (at.site is Site.VALUE and not isinstance(map, PerHead)):
                raise InputError(f"a {map.kind} map at {at.site} cannot be placed; leave it out of the recipe's basis")
            if at.site in _ORTHOGONAL and not map.orthogonal:
                raise InputError(f"{at.site} needs an orthogonal map, got a {map.kind} one that is not")

    def map_at(self, site: Site, layer: int | None = None) -> LinearMap | None:
        """The map of a site, or None."""
        return self.maps.get(At(site, layer))

    def layer(self, source: Layer, index: int) -> Layer:
        """Decoder layer `index` in the new bases, float64, with the formats of its inputs, queries, keys and values."""
        norms = {point: self.norm(source.norms[point], point, index) for point in source.norms}
        linears = {role: self.linear(source, role, index) for role in Role}
        heads = self.heads(index, source.heads, linears[Role.Q].weight.device)
        return replace(source, linears=linears, norms=norms, heads=heads, inputs=self.inputs(index))

    def norm(self, source: Norm, point: Point, index: int) -> Norm:
        """The norm before `point` of layer `index`, float64; without its gain where that was folded."""
        wide = Norm(source.eps, None if self.folds or source.gain is None else source.gain.to(torch.float64))
        map = self.map_at(INPUT_SITES[point], index)
        return scaled_norm(wide, map) if isinstance(map, Diagonal) else wide

    def linear(self, source: Layer, role: Role, index: int) -> DenseLinear:
        """One linear of layer `index` in the new bases, float64; memory holds no other."""
        plain, point = source.linears[role], POINTS[role]
        weight = plain.weight.to(torch.float64)
        bias = None if plain.bias is None else plain.bias.to(torch.float64)
        if self.folds and point in source.norms and (gain := source.norms[point].gain) is not None:
            weight = weight * gain.to(torch.float64)
        if residual := self.map_at(Site.RESIDUAL):
            if role in (Role.O, Role.DOWN):
                weight, bias = as_writer(residual, weight, bias)
            else:
                weight = as_reader(residual, weight)
        value = self.map_at(Site.VALUE, index)
        if isinstance(value, PerHead) and role is Role.V:
            weight, bias = as_writer(value, weight, bias)
        if isinstance(value, PerHead) and role is Role.O:
            weight = as_reader(value.repeated(self.shape.heads // self.shape.kv_heads), weight)
        if (map := self.map_at(INPUT_SITES[point], index)) is not None:
            weight = as_reader(map, weight)
        hidden = self.map_at(Site.MLP_HIDDEN, index)
        if isinstance(hidden, Diagonal) and role is Role.UP:
            weight, bias = as_writer(hidden, weight, bias)
        return DenseLinear(weight, bias)

    def inputs(self, index: int) -> dict[Point, ActivationFormat]:
        """Online maps and bands of the inputs of layer `index`'s linears."""
        formats = {}
        for point, site in INPUT_SITES.items():
            map = self.map_at(site, index)
            online = None if isinstance(map, Diagonal) else map
            formats[point] = ActivationFormat(online, self.precision.input_bands(index, point, self.shape))
        if self.precision.output_per_head:
            formats[Point.O_IN] = replace(formats[Point.O_IN], groups=self.shape.heads)
        return formats

    def heads(self, index: int, source: HeadFormats, device: torch.device = CPU) -> HeadFormats:
        """Online maps and bands of layer `index`'s queries, keys and values; `source` has their norms. A matrix that
        is rounded is made on `device`."""
        turn = self.map_at(Site.QUERY_KEY, index)
        assert not isinstance(turn, Diagonal)
        bits = None if turn is None else self.precision.rotation_bits
        if turn is not None and bits is not None:
            matrix = turn.apply(torch.eye(turn.size, dtype=torch.float64, device=device))
            turn = Dense(rounded_matrix(matrix.to(torch.float32), bits), orthogonal=False)

        def stored(bands: Bands | None, map: OnlineMap | None = None, bits: int | None = None) -> ActivationFormat:
            return ActivationFormat(map, bands, scale_dtype=torch.float16, map_input_bits=bits)

        return replace(
            source,
            query=ActivationFormat(turn, map_input_bits=bits),
            key=stored(self.precision.key_bands(index, self.shape), turn, bits),
            value=stored(self.precision.value_bands(index, self.shape)),
        )

    def table(self, rows: Tensor) -> Tensor:
        """Rows of the embedding table [n, hidden] in the new basis, float64."""
        residual = self.map_at(Site.RESIDUAL)
        wide = rows.to(torch.float64)
        return wide if residual is None else residual.apply(wide)

    def head(self, rows: Tensor, norm: Norm) -> Tensor:
        """Rows of a head that is a matrix of its own, gain and U folded in, float64; norm: the final one."""
        residual = self.map_at(Site.RESIDUAL)
        wide = rows.to(torch.float64)
        if self.folds and norm.gain is not None:
            wide = wide * norm.gain.to(torch.float64)
        return wide if residual is None else as_reader(residual, wide)

    def head_input(self, norm: Norm, *, keep_tied: bool) -> tuple[Norm, ActivationFormat]:
        """The final norm, float64, and the format of the head's input.

        keep_tied (only for a tied source): the head goes on reading the table, its input taken through
        M = U^T diag(gain) U online. Otherwise the head is a matrix of its own (`head`).
        """
        residual = self.map_at(Site.RESIDUAL)
        wide = Norm(norm.eps, None if norm.gain is None else norm.gain.to(torch.float64))
        if not keep_tied:
            return (Norm(norm.eps) if self.folds else wide), PLAIN
        if residual is None or wide.gain is None:
            return wide, PLAIN
        identity = torch.eye(self.shape.hidden, dtype=torch.float64, device=wide.gain.device)
        turn = residual.apply(identity)
        mixed = Dense(turn.T @ (wide.gain[:, None] * turn), orthogonal=False)
        return Norm(norm.eps), ActivationFormat(mixed)

    def ends(self, source: Ends, *, keep_tied: bool) -> Ends:
        """Embedding table, final norm and head in the new basis, float64, all rows at once."""
        table = self.table(source.embed)
        norm, format = self.head_input(source.norm, keep_tied=keep_tied)
        head = table if keep_tied else self.head(source.head.weight, source.norm)
        return Ends(table, norm, format, DenseLinear(head))


def in_float64(layer: Layer) -> Layer:
    """The same layer with float64 weights, biases and gains."""

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.float64)

    linears = {
        role: DenseLinear(linear.weight.to(torch.float64), wide(linear.bias)) for role, linear in layer.linears.items()
    }
    return replace(
        layer, linears=linears, norms={point: Norm(norm.eps, wide(norm.gain)) for point, norm in layer.norms.items()}
    )


def fold_norms(layer: Layer, dtype: torch.dtype = torch.float64) -> Layer:
    """Move norm gains into the linears that read them: W' = W diag(g), in float64, then cast. Norms of heads stay: the
    query and key map comes after them."""
    linears = {}
    for role, linear in layer.linears.items():
        gain = layer.norms[POINTS[role]].gain if POINTS[role] in layer.norms else None
        weight = linear.weight.to(torch.float64)
        weight = weight if gain is None else weight * gain.to(torch.float64)
        linears[role] = DenseLinear(weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))
    return replace(layer, linears=linears, norms={point: Norm(norm.eps) for point, norm in layer.norms.items()})


def scaled_norm(norm: Norm, map: Diagonal) -> Norm:
    """The norm whose output is already multiplied by the diagonal: gain' = gain · scales, float64."""
    scales = map.scales.to(torch.float64)
    return Norm(norm.eps, scales if norm.gain is None else norm.gain.to(torch.float64) * scales)


def rounded_matrix(matrix: Tensor, bits: int) -> Tensor:
    """A matrix rounded symmetrically with one scale per tensor, float32."""
    scale = symmetric_scale(matrix.reshape(1, -1), bits, clip_search=False)
    return round_symmetric(matrix, scale, bits) * scale
