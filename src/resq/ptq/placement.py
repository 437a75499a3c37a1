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
        folded = fold_norms(source) if self.folds else in_float64(source)
        linears = dict(folded.linears)
        if residual := self.map_at(Site.RESIDUAL):
            for role in (Role.Q, Role.K, Role.V, Role.GATE, Role.UP):
                linears[role] = DenseLinear(as_reader(residual, linears[role].weight), linears[role].bias)
            for role in (Role.O, Role.DOWN):
                linears[role] = DenseLinear(*as_writer(residual, linears[role].weight, linears[role].bias))
        value = self.map_at(Site.VALUE, index)
        if isinstance(value, PerHead):
            v, o = linears[Role.V], linears[Role.O]
            linears[Role.V] = DenseLinear(*as_writer(value, v.weight, v.bias))
            queries = value.repeated(self.shape.heads // self.shape.kv_heads)
            linears[Role.O] = DenseLinear(as_reader(queries, o.weight), o.bias)
        norms = dict(folded.norms)
        for point, site in INPUT_SITES.items():
            map = self.map_at(site, index)
            if isinstance(map, Diagonal):
                if point is Point.DOWN_IN:
                    linears[Role.UP] = DenseLinear(*as_writer(map, linears[Role.UP].weight, linears[Role.UP].bias))
                else:
                    norms[point] = scaled_norm(norms[point], map)
            if map is not None:
                for role in READERS[point]:
                    linears[role] = DenseLinear(as_reader(map, linears[role].weight), linears[role].bias)
        heads = self.heads(index, source.heads, linears[Role.Q].weight.device)
        return replace(folded, linears=linears, norms=norms, heads=heads, inputs=self.inputs(index))

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

    def ends(self, source: Ends, *, keep_tied: bool) -> Ends:
        """Embedding table, final norm and head in the new basis, float64.

        keep_tied (only for a tied source): the head goes on reading the table, its input taken through
        M = U^T diag(gain) U online. Otherwise the head is a matrix of its own with gain and U folded in.
        """
        residual = self.map_at(Site.RESIDUAL)
        embed = source.embed.to(torch.float64)
        table = embed if residual is None else residual.apply(embed)
        norm = Norm(source.norm.eps, None if source.norm.gain is None else source.norm.gain.to(torch.float64))
        if keep_tied:
            if residual is None or norm.gain is None:
                return Ends(table, norm, PLAIN, DenseLinear(table))
            identity = torch.eye(self.shape.hidden, dtype=torch.float64, device=embed.device)
            turn = residual.apply(identity)
            mixed = Dense(turn.T @ (norm.gain[:, None] * turn), orthogonal=False)
            return Ends(table, Norm(norm.eps), ActivationFormat(mixed), DenseLinear(table))
        head = source.head.weight.to(torch.float64)
        if self.folds and norm.gain is not None:
            head, norm = head * norm.gain, Norm(norm.eps)
        if residual is not None:
            head = as_reader(residual, head)
        return Ends(table, norm, PLAIN, DenseLinear(head))


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


def fold_norms(layer: Layer) -> Layer:
    """Move norm gains into the linears that read them: W' = W diag(g), in float64. Norms of heads stay: the query and
    key maps come after them."""
    wide = in_float64(layer)
    linears = dict(wide.linears)
    for point, norm in wide.norms.items():
        if norm.gain is not None:
            for role in READERS[point]:
                linears[role] = DenseLinear(linears[role].weight * norm.gain, linears[role].bias)
    return replace(wide, linears=linears, norms={point: Norm(norm.eps) for point, norm in wide.norms.items()})


def scaled_norm(norm: Norm, map: Diagonal) -> Norm:
    """The norm whose output is already multiplied by the diagonal: gain' = gain · scales, float64."""
    scales = map.scales.to(torch.float64)
    return Norm(norm.eps, scales if norm.gain is None else norm.gain.to(torch.float64) * scales)


def rounded_matrix(matrix: Tensor, bits: int) -> Tensor:
    """A matrix rounded symmetrically with one scale per tensor, float32."""
    scale = symmetric_scale(matrix.reshape(1, -1), bits, clip_search=False)
    return round_symmetric(matrix, scale, bits) * scale
