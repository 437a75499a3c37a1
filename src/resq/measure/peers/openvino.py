"""OpenVINO as a peer: a decoder written as a graph, with INT4 weights."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resq.measure.peers.peer import DEVIATION, check_full_attention, check_groups, seconds_of, signed
from resq.models.architecture import Architecture, Config, Role, Shape, architecture_for
from resq.progress import Progress, silent

INT4_GROUP = 128


class _Graph:
    """State: the constants of a decoder under construction, which OpenVINO does not keep alive by itself.

    Written the way its compressor and its exporter write it, as the plugin fuses by pattern: weights as integers,
    converted, times their scale; RoPE, RMSNorm and attention over a cache with a beam index.
    """

    def __init__(
        self, architecture: Architecture, shape: Shape, head_bits: int, progress: Callable[[int], None]
    ) -> None:
        self._ov: Any = importlib.import_module("openvino")
        self._op: Any = importlib.import_module("openvino.opset13")
        self.shape, self.bytes = shape, 0
        self.arrays: list[np.ndarray] = []
        self._random = np.random.Generator(np.random.SFC64(0))
        self._updates: list[Any] = []
        self.model = self._build(architecture, head_bits, progress)

    def _constant(self, value: Any, dtype: type = np.float32) -> Any:
        return self._op.constant(np.array(value, dtype))

    def _integers(self, value: Any) -> Any:
        return self._constant(value, np.int64)

    def _weight(self, bits: int, out: int, inner: int) -> Any:
        """float32 [out, inner] from INT4 in groups of 128 or from INT8 by row; float16 scales."""
        op, group = self._op, INT4_GROUP if bits == 4 else inner
        packed = np.frombuffer(self._random.bytes(out * inner * bits // 8), np.uint8)
        scales = signed(DEVIATION * 12**0.5 / 2**bits, (out, inner // group, 1), self._random)
        self.arrays.append(packed)
        self.bytes += packed.nbytes + scales.nbytes
        kind = self._ov.Type.i4 if bits == 4 else self._ov.Type.i8
        sizes = [out, inner // group, group] if bits == 4 else [out, inner]
        # Distinct memory for every weight: the plugin packs constants at one address only once.
        integers = op.constant(self._ov.Tensor(packed, self._ov.Shape(sizes), kind), shared_memory=True)
        weight = op.multiply(op.convert(integers, "f16"), op.constant(scales if bits == 4 else scales[:, 0]))
        if bits == 4:
            weight = op.reshape(weight, np.array([out, inner]), False)
        return op.convert(weight, "f32")

    def _linear(self, x: Any, out: int, inner: int, *, bias: bool = False) -> Any:
        y = self._op.matmul(x, self._weight(4, out, inner), False, True)
        return self._op.add(y, self._constant(np.zeros((1, 1, out)))) if bias else y

    def _norm(self, x: Any, size: int) -> Any:
        """x / sqrt(mean x² + ε) · γ over the last axis."""
        op = self._op
        squares = op.reduce_mean(op.power(x, self._constant(2.0)), self._integers([-1]), True)
        inverse = op.divide(self._constant(1.0), op.sqrt(op.add(squares, self._constant(self.shape.eps))))
        return op.multiply(self._constant(np.ones(size)), op.multiply(x, inverse))

    def _heads(self, x: Any, count: int, *, norm: bool) -> Any:
        """[b, t, count · h] to [b, count, t, h]."""
        x = self._op.reshape(x, np.array([0, 0, count, self.shape.head_dim]), True)
        x = self._norm(x, self.shape.head_dim) if norm else x
        return self._op.transpose(x, np.array([0, 2, 1, 3]))

    def _rope(self, x: Any, cos: Any, sin: Any) -> Any:
        op, half = self._op, self.shape.head_dim // 2
        first, second = op.slice(x, [0], [half], [1], [3]), op.slice(x, [half], [2**62], [1], [3])
        return op.add(op.multiply(x, cos), op.multiply(op.concat([op.negative(second), first], -1), sin))

    def _cached(self, name: str, x: Any, batch: Any, beam: Any) -> Any:
        """Everything cached and x behind it, repeated for the query heads: [b, heads, s, h]."""
        op, shape = self._op, self.shape
        none = op.broadcast(
            self._constant(0.0), op.concat([batch, self._integers([shape.kv_heads, 0, shape.head_dim])], 0)
        )
        sizes = self._ov.PartialShape([-1, shape.kv_heads, -1, shape.head_dim])
        past = op.gather(op.read_value(none, name, self._ov.Type.f32, sizes), beam, self._integers(0))
        x = op.concat([past, x], -2)
        self._updates.append(op.assign(x, name))
        if shape.heads == shape.kv_heads:
            return x
        length = op.gather(op.shape_of(x), self._integers([2]), self._integers(0))
        counts = self._integers([shape.kv_heads, shape.heads // shape.kv_heads])
        sizes = op.concat([batch, counts, length, self._integers([shape.head_dim])], 0)
        x = op.broadcast(op.unsqueeze(x, self._integers(2)), sizes, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(x, np.array([0, shape.heads, -1, shape.head_dim]), True)

    def _build(self, architecture: Architecture, head_bits: int, progress: Callable[[int], None]) -> Any:
        op, shape = self._op, self.shape
        inputs = [
            op.parameter(sizes, kind, name=name)
            for name, sizes, kind in (
                ("tokens", [-1, -1], self._ov.Type.i64),
                ("positions", [-1, -1], self._ov.Type.i64),
                ("beam", [-1], self._ov.Type.i32),
            )
        ]
        for node in inputs:
            node.output(0).set_names({node.get_friendly_name()})
        tokens, positions, beam = inputs
        batch = op.gather(op.shape_of(tokens), self._integers([0]), self._integers(0))
        embedding = self._weight(head_bits, shape.vocab, shape.hidden)
        x = op.gather(embedding, op.convert(tokens, "i32"), self._constant(0, np.int32))
        frequencies = self._constant([[shape.rope.frequencies]])
        angles = op.multiply(op.unsqueeze(op.convert(positions, "f32"), self._integers(-1)), frequencies)
        angles = op.unsqueeze(op.concat([angles, angles], -1), self._integers(1))
        cos, sin = op.cos(angles), op.sin(angles)

        sizes = shape.sizes()
        counts = {Role.Q: shape.heads, Role.K: shape.kv_heads, Role.V: shape.kv_heads}
        for layer in range(shape.layers):
            progress(layer)
            inner = self._norm(x, shape.hidden)
            heads = {
                role: self._heads(
                    self._linear(inner, *sizes[role], bias=role in architecture.biased),
                    count,
                    norm=role in architecture.head_norms,
                )
                for role, count in counts.items()
            }
            query = self._rope(heads[Role.Q], cos, sin)
            key = self._cached(f"key {layer}", self._rope(heads[Role.K], cos, sin), batch, beam)
            value = self._cached(f"value {layer}", heads[Role.V], batch, beam)
            attended = op.transpose(
                op.scaled_dot_product_attention(query, key, value, causal=True), np.array([0, 2, 1, 3])
            )
            attended = op.reshape(attended, np.array([0, 0, shape.heads * shape.head_dim]), True)
            x = op.add(x, self._linear(attended, *sizes[Role.O]))
            inner = self._norm(x, shape.hidden)
            gate, up = op.swish(self._linear(inner, *sizes[Role.GATE])), self._linear(inner, *sizes[Role.UP])
            x = op.add(x, self._linear(op.multiply(gate, up), *sizes[Role.DOWN]))
        progress(shape.layers)
        # Only the last token goes through the head: a prefill needs no other logits.
        x = self._norm(op.slice(x, [-1], [2**62], [1], [1]), shape.hidden)
        head = embedding if shape.tied else self._weight(head_bits, shape.vocab, shape.hidden)
        return self._ov.Model([op.result(op.matmul(x, head, False, True))], self._updates, inputs)


class OpenVino:
    """State: a compiled decoder with INT4 weights, its request, and the cache inside it."""

    def __init__(
        self,
        config: Config,
        threads: int,
        head_bits: int,
        progress: Progress = silent,
        *,
        name: str,
        properties: Mapping[str, Any],
    ) -> None:
        architecture = architecture_for(config["model_type"])
        shape = architecture.shape(dict(config))
        check_full_attention(name, shape)
        check_groups(name, shape, INT4_GROUP)
        openvino: Any = importlib.import_module("openvino")
        self.version = str(openvino.__version__).split("-")[0]
        graph = _Graph(architecture, shape, head_bits, lambda done: progress(f"building {name}", done, shape.layers))
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **properties}
        compiled = openvino.Core().compile_model(graph.model, "CPU", options)
        self.weight_bytes, self.vocab = graph.bytes, shape.vocab
        precision, cached = (
            compiled.get_property(key).to_string() for key in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        )
        self.about = (
            f"INT4 g{INT4_GROUP} weights, INT{head_bits} head, {precision}, dynamic quantization "
            f"{compiled.get_property('DYNAMIC_QUANTIZATION_GROUP_SIZE')}, {cached} KV cache"
        )
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        # The plugin may go on reading the constants (the embedding is gathered from them).
        self._weights = graph.arrays

    def empty(self, rows: int, tokens: int) -> None:
        """See Engine."""
        self._request.reset_state()

    def forward(self, tokens: np.ndarray, start: int) -> float:
        """See Engine."""
        rows, length = tokens.shape
        inputs = {
            "tokens": tokens,
            "positions": np.tile(np.arange(start, start + length, dtype=np.int64), (rows, 1)),
            "beam": np.arange(rows, dtype=np.int32),
        }
        return seconds_of(lambda: self._request.infer(inputs, share_inputs=True, share_outputs=True))

    def logits(self) -> Tensor:
        """See Engine."""
        return torch.from_numpy(self._request.get_output_tensor().data[:, -1].copy())

    def close(self) -> None:
        """See Engine."""
        if self._compiled is not None:
            # The hidden states' memory; not all of it goes with the objects (2026.4).
            self._compiled.release_memory()
        self._request = self._compiled = None
        self._weights = []
        gc.collect()
