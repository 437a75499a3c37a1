"""The 16-bit model's hidden states layer by layer, and the activations that a layer rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from resq.backends.backend import Backend
from resq.backends.reference import dense
from resq.measure.windows import check_windows
from resq.models import decoder
from resq.models.architecture import Point, Role, Shape
from resq.models.decoder import Layer, Positions
from resq.models.source import Source
from resq.numerics.formats import ActivationFormat
from resq.progress import Progress
from resq.ptq.statistics import check_finite, in_dtype


class Place(StrEnum):
    """Where a layer rounds activations: the inputs of its linears, its keys and its values."""

    ATTN_IN = "attn_in"
    O_IN = "o_in"
    MLP_IN = "mlp_in"
    DOWN_IN = "down_in"
    KEY = "key"
    VALUE = "value"


@dataclass(frozen=True)
class Visit:
    """One decoder layer of the source, as it is stored, and its inputs: hidden float32 [1, t, d] of every window."""

    index: int
    layer: Layer
    hidden: tuple[Tensor, ...]
    at: Positions


def embedded_windows(source: Source, windows: Tensor) -> list[Tensor]:
    """The embedding of each window, float32 [1, t, d]."""
    check_windows(source, windows)
    table = source.embedding()
    return [F.embedding(window[None], table).to(torch.float32) for window in windows]


def visits(source: Source, windows: Tensor, phase: str, progress: Progress) -> Iterator[Visit]:
    """Every decoder layer in order with the 16-bit model's hidden states before it, computed in float32; one layer in
    memory. `progress` is told of `phase` after each layer. Raises InputError for hidden states that are not finite."""
    ops, shape = dense(torch.float32), source.shape
    hidden = embedded_windows(source, windows)
    at = Positions.following(shape, 0, 1, windows.shape[1])
    progress(phase, 0, shape.layers)
    for index in range(shape.layers):
        layer = source.layer(index)
        yield Visit(index, layer, tuple(hidden), at)
        run = in_dtype(layer, torch.float32)
        hidden = [decoder.forward_layer(ops, shape, run, window, at) for window in hidden]
        check_finite(hidden, index)
        progress(phase, index + 1, shape.layers)


def activations(ops: Backend, shape: Shape, layer: Layer, hidden: Tensor, at: Positions) -> dict[Place, Tensor]:
    """What `layer` rounds, before rounding, for hidden [1, t, d]: inputs [1, t, n] after their online maps, keys and
    values [1, t, G, h]. `ops` round nothing."""
    x = decoder.attention_input(ops, layer, hidden)
    cache = ops.cache(layer.heads)
    out = decoder.attention(ops, shape, layer, x, at, cache)
    m = decoder.mlp_input(ops, layer, ops.linear(out, layer.linears[Role.O], hidden))
    keys, values = cache.read()
    return {
        Place.ATTN_IN: x,
        Place.O_IN: out,
        Place.MLP_IN: m,
        Place.DOWN_IN: decoder.mlp_hidden(ops, layer, m),
        Place.KEY: keys.transpose(1, 2),
        Place.VALUE: values.transpose(1, 2),
    }


def format_at(layer: Layer, place: Place) -> ActivationFormat:
    """How `layer` rounds there."""
    match place:
        case Place.KEY:
            return layer.heads.key
        case Place.VALUE:
            return layer.heads.value
        case _:
            return layer.inputs[Point(place)]
