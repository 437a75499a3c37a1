"""What is timed: copies of one decoder block, of ours or in torch, made ready for a point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from resq.backends.backend import Backend
from resq.measure.gpu.timer import Timer
from resq.measure.gpu.torch_block import Attend, Weights, bf16_product, block, fastest_attention, fused, int8_product
from resq.measure.speed import Point, held_bytes
from resq.models.architecture import Architecture, Role, Shape
from resq.models.architecture import Point as Input
from resq.models.decoder import Layer, Positions, forward_layer
from resq.numerics.linear import DenseLinear

# Copies together are this many times as large as the last-level cache, so that nothing of one is left when it is used
# again.
ROTATED = 4


@dataclass(frozen=True)
class Ready:
    """Work set up for a point: `run` is one pass of every copy of the block over inputs of its own, blocks how many
    there are. cache_bytes: what the keys and values of one block take; about: what was chosen, for people."""

    run: Callable[[], list[Tensor]]
    blocks: int
    cache_bytes: int
    about: str = ""


class BlockContender(Protocol):
    """name; about: one line for people; weight_bytes: of one block's linears as they lie on the device."""

    name: str
    about: str
    weight_bytes: int

    def ready(self, point: Point) -> Ready:
        """Everything allocated and filled for a prefill of a fresh context, or for a step of decoding."""
        ...


def copies_for(timer: Timer, weight_bytes: int) -> int:
    """How many copies of weights to go round."""
    return max(1, -(-ROTATED * timer.cache_bytes // weight_bytes))


def _hidden(point: Point, number: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    rows = (1, point.tokens) if point.mode == "prefill" else (point.batch, 1)
    generator = torch.Generator(device).manual_seed(number)
    return torch.randn(*rows, size, generator=generator, device=device).to(dtype)


class OurBlock:
    """State: copies of a block in a backend's layout."""

    def __init__(self, name: str, shape: Shape, layer: Layer, backend: Backend, timer: Timer) -> None:
        self.name, self.about = name, f"backend {backend.name}"
        self._shape, self._backend, self._timer = shape, backend, timer
        self._layers = [layer.prepacked(backend)]
        self.weight_bytes = sum(held_bytes(weight) for weight in self._layers[0].linears.values())
        self._layers += [layer.prepacked(backend) for _ in range(copies_for(timer, self.weight_bytes) - 1)]

    def ready(self, point: Point) -> Ready:
        """See BlockContender. Decoding starts from the same tokens in every row, and each step forgets its own."""
        ops, shape, past = self._backend, self._shape, point.context
        rows, tokens = (1, point.tokens) if point.mode == "prefill" else (point.batch, 1)
        caches = [ops.cache(layer.heads) for layer in self._layers]
        inputs = [_hidden(point, n, shape.hidden, ops.device, ops.dtype) for n in range(len(caches))]
        if point.mode == "decode":
            for number, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
                self._fill(layer, cache, number, point)
        at = Positions.following(shape, past, rows, tokens, device=ops.device)

        def run() -> list[Tensor]:
            found = []
            for layer, cache, hidden in zip(self._layers, caches, inputs, strict=True):
                cache.crop(past)
                found.append(forward_layer(ops, shape, layer, hidden, at, cache))
            return found

        with torch.inference_mode():
            run()
        return Ready(_inference(run), len(caches), caches[0].nbytes())

    def _fill(self, layer: Layer, cache: Any, number: int, point: Point) -> None:
        """Fill a cache as the runner of decoding has it: room for one more token, its position on the device."""
        ops, shape = self._backend, self._shape
        with torch.inference_mode():
            at = Positions.following(shape, 0, 1, point.context, device=ops.device)
            prompt = _hidden(Point("prefill", point.context), number, shape.hidden, ops.device, ops.dtype)
            forward_layer(ops, shape, layer, prompt, at, cache)
            cache.select(torch.zeros(point.batch, dtype=torch.int64, device=ops.device))
            if hasattr(cache, "clock"):
                cache.reserve(point.batch, shape.kv_heads, shape.head_dim, point.context + 1)
                cache.clock = torch.full((1,), point.context, dtype=torch.int32, device=ops.device)


class TorchBlock:
    """State: copies of a block in torch. product: how a linear is computed; compiled: by torch.compile."""

    def __init__(
        self,
        name: str,
        shape: Shape,
        weights: Sequence[Weights],
        timer: Timer,
        *,
        compiled: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.about = f"torch {torch.__version__}{', compiled' if compiled else ''}"
        self.weight_bytes = weights[0].bytes
        self._shape, self._weights, self._timer, self._compiled = shape, weights, timer, compiled

    def ready(self, point: Point) -> Ready:
        """See BlockContender."""
        shape, device, past = self._shape, self._timer.device, point.context
        rows, tokens = (1, point.tokens) if point.mode == "prefill" else (point.batch, 1)
        room = rows, shape.kv_heads, past + tokens, shape.head_dim
        caches = [
            [torch.randn(room, device=device).to(torch.bfloat16) for _ in range(2)] for _ in range(len(self._weights))
        ]
        inputs = [_hidden(point, n, shape.hidden, device, torch.bfloat16) for n in range(len(caches))]
        at = Positions.following(shape, past, rows, tokens, device=device)
        cos, sin = at.cos.to(torch.bfloat16), at.sin.to(torch.bfloat16)
        query = torch.randn(rows, shape.heads, tokens, shape.head_dim, device=device).to(torch.bfloat16)
        chosen, attend = fastest_attention(self._timer, query, *caches[0], causal=point.mode == "prefill")
        step = self._step()

        def run() -> list[Tensor]:
            return [
                step(shape, weights, hidden, cos, sin, keys, values, past, attend)
                for weights, hidden, (keys, values) in zip(self._weights, inputs, caches, strict=True)
            ]

        return Ready(_inference(run), len(caches), sum(part.nbytes for part in caches[0]), f"SDPA: {chosen}")

    def _step(self) -> Callable[[Shape, Weights, Tensor, Tensor, Tensor, Tensor, Tensor, int, Attend], Tensor]:
        if self._compiled is None:
            return block
        # After some shapes Dynamo gives up and runs uncompiled.
        torch.compiler.reset()
        return self._compiled(block, dynamic=False)


def _inference(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    def inside() -> list[Tensor]:
        with torch.inference_mode():
            return run()

    return inside


def random_weights(
    architecture: Architecture, shape: Shape, timer: Timer, *, integers: bool, seed: int = 0
) -> list[Weights]:
    """Copies of random weights for torch's block."""
    device = timer.device
    generator = torch.Generator(device).manual_seed(seed)
    gains = {point: torch.ones(shape.hidden, device=device) for point in (Input.ATTN_IN, Input.MLP_IN)}
    heads = {role: torch.ones(shape.head_dim, device=device) for role in architecture.head_norms}

    def linear(role: Role) -> DenseLinear:
        out, inner = shape.sizes()[role]
        weight = torch.randn(out, inner, generator=generator, device=device) * inner**-0.5
        bias = torch.randn(out, generator=generator, device=device) * 0.01 if role in architecture.biased else None
        return DenseLinear(weight.to(torch.bfloat16), bias)

    def one() -> Weights:
        return fused({role: linear(role) for role in Role}, gains, heads, int8_product if integers else bf16_product)

    found = [one()]
    return found + [one() for _ in range(copies_for(timer, found[0].bytes) - 1)]
