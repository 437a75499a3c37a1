"""The one decoder: a pure function of weights as data and a record of operators.

In float64 it is the invariance test, in float32 the calibration forward, with the reference operators the definition of
the quantized model, with fast operators the fast one. A layer is written as the four steps at which a linear's input
is formed, so that calibration can stop at each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resq.models.architecture import READERS, Point, Role, Shape
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm

if TYPE_CHECKING:  # the operators arrive as an argument: models and backends do not import each other
    from resq.backends.backend import Backend, LayerCache


@dataclass
class Layer:
    """One decoder layer as data: linears by role, norms and input formats by point, formats of the heads."""

    linears: dict[Role, Any]
    norms: dict[Point, Norm]
    heads: HeadFormats
    inputs: dict[Point, ActivationFormat] = field(default_factory=lambda: dict.fromkeys(Point, PLAIN))
    window: int | None = None

    def prepacked(self, ops: Backend) -> Layer:
        """The same layer with every linear in the backend's own layout."""
        points = {role: point for point, roles in READERS.items() for role in roles}
        linears = {role: ops.prepack(linear, self.inputs[points[role]]) for role, linear in self.linears.items()}
        if ops.together is not None:
            for roles in READERS.values():
                ops.together([linears[role] for role in roles])
        return replace(self, linears=linears)


@dataclass
class Ends:
    """What surrounds the layers: embedding table [vocab, hidden], final norm, the head's input format and weight."""

    embed: Tensor
    norm: Norm
    head_input: ActivationFormat
    head: Any

    def prepacked(self, ops: Backend) -> Ends:
        """The same with the head in the backend's own layout, and the table on its device."""
        return replace(self, embed=self.embed.to(ops.device), head=ops.prepack(self.head, self.head_input))


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one call stand: RoPE tables [b, t, h] and each row's first valid cache slot (or None)."""

    cos: Tensor
    sin: Tensor
    starts: Tensor | None = None

    @classmethod
    def following(
        cls,
        shape: Shape,
        past: int,
        batch: int,
        tokens: int,
        starts: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Positions:
        """The `tokens` slots after `past`, on `device`."""
        starts = None if starts is None else starts.to(device)
        return cls.at(shape, torch.arange(past, past + tokens, device=device)[None].expand(batch, -1), starts)

    @classmethod
    def at(cls, shape: Shape, slots: Tensor, starts: Tensor | None) -> Positions:
        """Slots int64 [b, t]; a row's position 0 is its first valid slot."""
        positions = slots if starts is None else (slots - starts[:, None]).clamp(min=0)
        return cls(*shape.rope.tables(positions), starts)


def attention_input(ops: Backend, layer: Layer, hidden: Tensor) -> Any:
    """Input of q, k, v: hidden [b, t, d] -> activations [b, t, d]."""
    return ops.norm_quantize(hidden, layer.norms[Point.ATTN_IN], layer.inputs[Point.ATTN_IN])


def attention(ops: Backend, shape: Shape, layer: Layer, x: Any, at: Positions, cache: LayerCache) -> Any:
    """Input of o: activations [b, t, H·h]; appends the tokens' keys and values to the cache."""
    q, k, v = ops.linears(x, [layer.linears[role] for role in READERS[Point.ATTN_IN]])
    q = q.unflatten(-1, (shape.heads, shape.head_dim))
    k, v = (each.unflatten(-1, (shape.kv_heads, shape.head_dim)) for each in (k, v))
    q = ops.rope_project_append(q, k, v, at.cos, at.sin, layer.heads, cache)
    out = ops.attend(q, cache, shape.head_dim**-0.5, at.starts, layer.window)
    return ops.gather_quantize(out, layer.inputs[Point.O_IN])


def mlp_input(ops: Backend, layer: Layer, hidden: Tensor) -> Any:
    """Input of gate and up: hidden [b, t, d] -> activations [b, t, d]."""
    return ops.norm_quantize(hidden, layer.norms[Point.MLP_IN], layer.inputs[Point.MLP_IN])


def mlp_hidden(ops: Backend, layer: Layer, x: Any) -> Any:
    """Input of down: activations [b, t, F]."""
    gate, up = ops.linears(x, [layer.linears[role] for role in READERS[Point.MLP_IN]])
    return ops.act_hadamard_quantize(gate, up, layer.inputs[Point.DOWN_IN])


def forward_layer(
    ops: Backend, shape: Shape, layer: Layer, hidden: Tensor, at: Positions, cache: LayerCache | None = None
) -> Tensor:
    """hidden [b, t, d] -> [b, t, d]. Without a cache the layer fills one of its own: the same rounded K and V."""
    cache = ops.cache(layer.heads) if cache is None else cache
    x = attention_input(ops, layer, hidden)
    hidden = ops.linear(attention(ops, shape, layer, x, at, cache), layer.linears[Role.O], hidden)
    m = mlp_hidden(ops, layer, mlp_input(ops, layer, hidden))
    return ops.linear(m, layer.linears[Role.DOWN], hidden)


def embed(ops: Backend, ends: Ends, tokens: Tensor) -> Tensor:
    """Rows of the embedding table: tokens int64 [b, t] -> [b, t, d], where the table lies."""
    return F.embedding(tokens.to(ends.embed.device), ends.embed).to(ops.dtype)


def logits(ops: Backend, ends: Ends, hidden: Tensor) -> Tensor:
    """Final norm and head: hidden [b, t, d] -> [b, t, vocab]."""
    return ops.linear(ops.norm_quantize(hidden, ends.norm, ends.head_input), ends.head)


def forward(
    ops: Backend,
    shape: Shape,
    ends: Ends,
    layers: Iterable[Layer],
    tokens: Tensor,
    caches: Sequence[LayerCache] | None = None,
    starts: Tensor | None = None,
    *,
    last: bool = False,
) -> Tensor:
    """tokens int64 [b, t] -> logits [b, t, vocab] (only the last token's, [b, 1, vocab], with `last`).

    caches: one per layer, appended to; starts int64 [b]: first valid slot of each left-padded row.
    """
    past = caches[0].length if caches else 0
    at = Positions.following(shape, past, tokens.shape[0], tokens.shape[1], starts, ops.device)
    return forward_at(ops, shape, ends, layers, tokens, at, caches, last=last)


def forward_at(
    ops: Backend,
    shape: Shape,
    ends: Ends,
    layers: Iterable[Layer],
    tokens: Tensor,
    at: Positions,
    caches: Sequence[LayerCache] | None,
    *,
    last: bool = False,
) -> Tensor:
    """`forward` of tokens whose positions are known."""
    hidden = embed(ops, ends, tokens)
    for index, layer in enumerate(layers):
        hidden = forward_layer(ops, shape, layer, hidden, at, caches[index] if caches else None)
    return logits(ops, ends, hidden[:, -1:] if last else hidden)
