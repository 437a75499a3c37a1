"""Other engines on random weights of a model's shape, to be timed in the same process as this package's own model."""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from resq.errors import InputError, nearest
from resq.models.architecture import Architecture, Config, Role, Shape, architecture_for
from resq.progress import Progress, silent

# Tokens in one forward while a cache is filled: bounds the hidden states of a batch of long rows.
FILL_TOKENS = 2048
# Standard deviation of random weights, as at the start of training: activations stay in the range of a trained model.
DEVIATION = 0.02
HEAD_BITS = (4, 8)
INT4_GROUP = 128


class Peer(Protocol):
    """State: one engine with a model of random weights and the cache of one batch.

    name, version: of the engine. weight_bytes: as the engine was given them, what several parts share counted once.
    about: how it is configured, in words.
    """

    name: str
    version: str
    weight_bytes: int
    about: str

    def prefill(self, tokens: int) -> float:
        """Seconds of one prefill of `tokens` tokens of a fresh context, up to the last token's logits.

        Empties the cache: decoding needs another `start_decode`.
        """
        ...

    def start_decode(self, batch: int, context: int) -> None:
        """Fill the cache with `context` tokens for each of `batch` rows."""
        ...

    def decode(self) -> float:
        """Seconds of one decode step of the batch, up to the logits of every row; the next token is given, not chosen.

        Every row is one token longer afterwards.
        """
        ...

    def close(self) -> None:
        """Free the weights and the cache."""
        ...


class Build(Protocol):
    """Makes a peer for a configuration: its head in `head_bits` bits where the engine quantizes the head."""

    def __call__(self, config: Config, threads: int, head_bits: int, progress: Progress = silent) -> Peer:
        """The peer, ready to be timed."""
        ...


def tokens_of(vocab: int, batch: int, start: int, stop: int) -> np.ndarray:
    """Tokens int64 [batch, stop - start] at positions start … stop - 1 of an endless text for each row.

    The strides are primes, so that neither a row's tokens nor the rows at one position repeat soon.
    """
    positions = np.arange(start, stop, dtype=np.int64)
    rows = np.arange(batch, dtype=np.int64)
    return (positions * 7919 + rows[:, None] * 104729 + 1) % vocab


def signed(scale: float, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """±scale float16 of a shape: integers in -8 … 7 have a mean, times scales of either sign they have none."""
    return np.where(random.integers(0, 2, shape, np.uint8), scale, -scale).astype(np.float16)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _started(batch: int) -> None:
    if not batch:
        raise ValueError("decode() has no context to continue; call start_decode(batch, context) first")


# PyTorch


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """torch's thread count is one for the process: set it for a call, then put it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchPeer:
    """State: a transformers model in bfloat16 with a dynamic cache."""

    name = "torch-bf16"
    about = "bf16 weights, head and KV cache, SDPA"

    def __init__(self, config: Config, threads: int, head_bits: int, progress: Progress = silent) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self._threads, self._vocab = threads, config["vocab_size"]
        known = AutoConfig.for_model(**config)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(known, dtype=torch.bfloat16, attn_implementation="sdpa")
        model.eval()
        model.tie_weights()
        parameters = list(model.parameters())
        # Drawing every weight takes minutes, and the time of a forward does not depend on equal values in other places.
        noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul(DEVIATION).to(torch.bfloat16)
        for done, parameter in enumerate(parameters):
            progress(f"building {self.name}", done, len(parameters))
            if parameter.dim() == 1:
                parameter.data.fill_(1.0)
                continue
            for part in parameter.data.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
        progress(f"building {self.name}", len(parameters), len(parameters))
        self._model: Any = model
        self.weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self._empty()

    def prefill(self, tokens: int) -> float:
        """See Peer."""
        self._empty()
        try:
            return self._forward(1, 0, tokens)
        finally:
            self._cache = None

    def start_decode(self, batch: int, context: int) -> None:
        """See Peer."""
        self._empty()
        step = max(1, FILL_TOKENS // batch)
        for at in range(0, context, step):
            self._forward(batch, at, min(context, at + step))
        self._batch, self._context = batch, context

    def decode(self) -> float:
        """See Peer."""
        _started(self._batch)
        seconds = self._forward(self._batch, self._context, self._context + 1)
        self._context += 1
        return seconds

    def logits(self) -> Tensor:
        """float32 [batch, vocab] of the last prefill or decode step."""
        return self._logits[:, -1].float()

    def close(self) -> None:
        """See Peer."""
        self._model = self._cache = self._logits = None
        gc.collect()

    def _empty(self) -> None:
        from transformers import DynamicCache

        self._cache: Any = DynamicCache()
        self._logits: Any = None
        self._batch = self._context = 0

    def _forward(self, batch: int, start: int, stop: int) -> float:
        tokens = torch.from_numpy(tokens_of(self._vocab, batch, start, stop))

        def run() -> None:
            output = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._logits = output.logits

        with torch.inference_mode(), _torch_threads(self._threads):
            return _seconds(run)


# OpenVINO


def _full_attention(name: str, shape: Shape) -> None:
    if any(window is not None for window in shape.windows):
        raise InputError(f"{name} is built with full attention only, this model has sliding windows; leave {name} out")


def _divisible(name: str, shape: Shape, group: int) -> None:
    for size in (shape.hidden, shape.heads * shape.head_dim, shape.ffn):
        if size % group:
            raise InputError(f"{name} rounds groups of {group} weights, which {size} inputs are not; leave {name} out")


class _OpenVinoGraph:
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


class OpenVinoPeer:
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
        _full_attention(name, shape)
        _divisible(name, shape, INT4_GROUP)
        openvino: Any = importlib.import_module("openvino")
        self.name, self.version = name, str(openvino.__version__).split("-")[0]
        graph = _OpenVinoGraph(
            architecture, shape, head_bits, lambda done: progress(f"building {name}", done, shape.layers)
        )
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **properties}
        compiled = openvino.Core().compile_model(graph.model, "CPU", options)
        self.weight_bytes, self._vocab = graph.bytes, shape.vocab
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
        self._empty()

    def prefill(self, tokens: int) -> float:
        """See Peer."""
        self._empty()
        return self._forward(1, 0, tokens)

    def start_decode(self, batch: int, context: int) -> None:
        """See Peer."""
        self._empty()
        step = max(1, FILL_TOKENS // batch)
        for at in range(0, context, step):
            self._forward(batch, at, min(context, at + step))
        self._batch, self._context = batch, context

    def decode(self) -> float:
        """See Peer."""
        _started(self._batch)
        seconds = self._forward(self._batch, self._context, self._context + 1)
        self._context += 1
        return seconds

    def logits(self) -> Tensor:
        """float32 [batch, vocab] of the last prefill or decode step."""
        return torch.from_numpy(self._request.get_output_tensor().data[:, -1].copy())

    def close(self) -> None:
        """See Peer."""
        if self._compiled is not None:
            # The hidden states' memory; not all of it goes with the objects (2026.4).
            self._compiled.release_memory()
        self._request = self._compiled = None
        self._weights = []
        gc.collect()

    def _empty(self) -> None:
        self._request.reset_state()
        self._batch = self._context = 0

    def _forward(self, batch: int, start: int, stop: int) -> float:
        inputs = {
            "tokens": tokens_of(self._vocab, batch, start, stop),
            "positions": np.tile(np.arange(start, stop, dtype=np.int64), (batch, 1)),
            "beam": np.arange(batch, dtype=np.int32),
        }
        return _seconds(lambda: self._request.infer(inputs, share_inputs=True, share_outputs=True))


# llama.cpp


@dataclass(frozen=True)
class Blocks:
    """A GGUF type with `count` weights in a block of `bytes` bytes, random but for the scales.

    A float16 scale is at byte `scale`; the `multipliers` bytes before it multiply it (K-quants), all are `multiplier`.
    deviation: of a weight of random bytes, in units of scale · multiplier.
    """

    count: int
    bytes: int
    scale: int
    deviation: float
    multipliers: int = 0
    multiplier: int = 1

    def random(self, out: int, inner: int, random: np.random.Generator) -> np.ndarray:
        """Random weights [out, inner] as uint8 [out, bytes of a row]."""
        blocks = np.frombuffer(random.bytes(out * inner // self.count * self.bytes), np.uint8).reshape(-1, self.bytes)
        blocks = blocks.copy()
        scales = signed(DEVIATION / self.deviation / self.multiplier, (len(blocks), 1), random)
        blocks[:, self.scale : self.scale + 2] = scales.view(np.uint8)
        blocks[:, self.scale - self.multipliers : self.scale] = self.multiplier
        return blocks.reshape(out, -1)


# ggml-common.h: block_q4_0 {d, qs}, block_q8_0 {d, qs}, block_q6_K {ql, qh, scales, d}.
BLOCKS = {
    "Q4_0": Blocks(32, 18, 0, 16 / 12**0.5),
    "Q8_0": Blocks(32, 34, 0, 256 / 12**0.5),
    "Q6_K": Blocks(256, 210, 208, 64 / 12**0.5, 16, 8),
}
# What llama-quantize gives the head for these weights when it is not told otherwise, and its INT4.
HEADS = {"Q4_0": {8: "Q6_K", 4: "Q4_0"}, "Q8_0": {8: "Q8_0", 4: "Q4_0"}}
# llama.cpp's names for what it computes like a model type.
GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
GGUF_LINEARS = {
    Role.Q: "attn_q",
    Role.K: "attn_k",
    Role.V: "attn_v",
    Role.O: "attn_output",
    Role.GATE: "ffn_gate",
    Role.UP: "ffn_up",
    Role.DOWN: "ffn_down",
}


def write_gguf(
    file: Path, config: Config, weights: str, head: str, progress: Callable[[int], None] = lambda done: None
) -> None:
    """A GGUF file of random weights without vocabulary; `weights` and `head` name a type in BLOCKS."""
    gguf: Any = importlib.import_module("gguf")
    architecture = architecture_for(config["model_type"])
    shape = architecture.shape(dict(config))
    random = np.random.Generator(np.random.SFC64(0))
    writer = gguf.GGUFWriter(file, GGUF_ARCHITECTURES[config["model_type"]])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(shape.eps)

    def add(name: str, kind: str, data: np.ndarray) -> None:
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    add("token_embd.weight", head, BLOCKS[head].random(shape.vocab, shape.hidden, random))
    if not shape.tied:
        add("output.weight", head, BLOCKS[head].random(shape.vocab, shape.hidden, random))
    ones("output_norm", shape.hidden)
    # The engine reads each layer into memory of its own, so that equal layers cost what different ones do.
    linears = {role: BLOCKS[weights].random(*size, random) for role, size in shape.sizes().items()}
    for layer in range(shape.layers):
        progress(layer)
        block = f"blk.{layer}"
        ones(f"{block}.attn_norm", shape.hidden)
        ones(f"{block}.ffn_norm", shape.hidden)
        for role in architecture.head_norms:
            ones(f"{block}.{GGUF_LINEARS[role]}_norm", shape.head_dim)
        for role, data in linears.items():
            add(f"{block}.{GGUF_LINEARS[role]}.weight", weights, data)
            if role in architecture.biased:
                writer.add_tensor(f"{block}.{GGUF_LINEARS[role]}.bias", np.zeros(data.shape[0], np.float32))
    progress(shape.layers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@cache
def _llama() -> Any:
    """The engine, initialized once; of what it logs only errors (ggml level 4) are shown."""
    llama: Any = importlib.import_module("llama_cpp")

    def log(level: int, text: bytes, data: object) -> None:
        if level == 4:
            sys.stderr.write(text.decode(errors="replace"))

    # The engine keeps the pointer for good; so does the module.
    llama.resq_log = llama.llama_log_callback(log)
    llama.llama_log_set(llama.resq_log, ctypes.c_void_p(0))
    llama.llama_backend_init()
    return llama


def _with(options: Any, **values: int) -> Any:
    """A ctypes structure with these fields set; it would take a name it does not have without a word."""
    known = {field[0] for field in options._fields_}
    for key, value in values.items():
        if key not in known:
            version = _llama().__version__
            raise InputError(
                f"llama-cpp-python {version} has no option {key}; run pip install --upgrade 'llama-cpp-python>=0.3.36'"
            )
        setattr(options, key, value)
    return options


class LlamaPeer:
    """State: a GGUF model in memory and a context for one number of rows, made anew for another."""

    # Decode steps a context has room for; then a longer one is made and filled again, outside any timing.
    ROOM = 256

    def __init__(
        self,
        config: Config,
        threads: int,
        head_bits: int,
        progress: Progress = silent,
        *,
        name: str,
        weights: str,
    ) -> None:
        kind = config["model_type"]
        if kind not in GGUF_ARCHITECTURES:
            accepted = ", ".join(GGUF_ARCHITECTURES)
            raise InputError(f"{name} is given {accepted} models only, this one is {kind}; leave {name} out")
        shape = architecture_for(kind).shape(dict(config))
        _full_attention(name, shape)
        _divisible(name, shape, BLOCKS[weights].count)
        head = HEADS[weights][head_bits]
        head = head if shape.hidden % BLOCKS[head].count == 0 else "Q8_0"
        llama = _llama()
        self.name, self.version = name, f"llama-cpp-python {llama.__version__}"
        self._threads, self._vocab = threads, shape.vocab
        # Read into memory (LLAMA_LOAD_MODE_NONE): mapped, the weights would be pages of a file that is about to go.
        options = _with(llama.llama_model_default_params(), load_mode=0, n_gpu_layers=0)
        with TemporaryDirectory(prefix="resq-peer-") as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(file, config, weights, head, lambda done: progress(f"building {name}", done, shape.layers))
            self._model: Any = llama.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise RuntimeError(f"{self.version} cannot read the GGUF file written for it; its message is above")
        self.weight_bytes = int(llama.llama_model_size(self._model))
        flags = (flag.strip() for flag in llama.llama_print_system_info().decode().replace(":", "|").split("|"))
        used = [flag.removesuffix("= 1").strip() for flag in flags if flag.endswith("= 1")]
        wide = " ".join(word for word in used if word.startswith(("AVX", "AMX", "NEON", "SVE")))
        self.about = f"{weights} weights, {head} head, f16 KV cache, built for {wide or 'no vector extension'}"
        self._handle: Any = None
        self._rows = self._capacity = self._batch = self._context = 0

    def prefill(self, tokens: int) -> float:
        """See Peer."""
        self._empty(1, tokens)
        return self._forward(tokens_of(self._vocab, 1, 0, tokens), 0)

    def start_decode(self, batch: int, context: int) -> None:
        """See Peer."""
        self._empty(batch, context + self.ROOM)
        tokens = tokens_of(self._vocab, batch, 0, context)
        for row in range(batch):
            self._forward(tokens[row : row + 1], 0, first_row=row)
        self._batch, self._context = batch, context

    def decode(self) -> float:
        """See Peer."""
        _started(self._batch)
        if self._context == self._capacity:
            self.start_decode(self._batch, self._context)
        seconds = self._forward(tokens_of(self._vocab, self._batch, self._context, self._context + 1), self._context)
        self._context += 1
        return seconds

    def logits(self) -> Tensor:
        """float32 [batch, vocab] of the last prefill or decode step."""
        rows = self._batch or 1
        values = np.ctypeslib.as_array(_llama().llama_get_logits(self._handle), (rows, self._vocab))
        return torch.from_numpy(values.copy())

    def close(self) -> None:
        """See Peer."""
        self._free()
        if self._model:
            _llama().llama_model_free(self._model)
        self._model = None

    def _free(self) -> None:
        if self._handle:
            _llama().llama_free(self._handle)
        self._handle = None

    def _empty(self, rows: int, positions: int) -> None:
        """An empty context for `rows` rows of up to `positions` tokens each."""
        llama = _llama()
        self._batch = self._context = 0
        if self._handle and rows == self._rows and positions <= self._capacity:
            llama.llama_memory_clear(llama.llama_get_memory(self._handle), True)
            return
        self._free()
        options = _with(
            llama.llama_context_default_params(),
            n_ctx=rows * positions,
            n_seq_max=rows,
            n_batch=max(rows, positions),
            n_threads=self._threads,
            n_threads_batch=self._threads,
        )
        self._handle = llama.llama_init_from_model(self._model, options)
        if not self._handle:
            raise RuntimeError(f"{self.version} gives no context of {rows} rows of {positions} tokens; see its message")
        self._rows, self._capacity = rows, positions

    def _forward(self, tokens: np.ndarray, start: int, *, first_row: int = 0) -> float:
        """One call on tokens [rows, t] at positions start …; logits of the last token of every row."""
        llama = _llama()
        rows, length = tokens.shape
        batch = llama.llama_batch_init(tokens.size, 0, 1)
        batch.n_tokens = tokens.size
        for index, token in enumerate(tokens.reshape(-1).tolist()):
            row, at = divmod(index, length)
            batch.token[index], batch.pos[index] = token, start + at
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, first_row + row
            batch.logits[index] = at == length - 1

        def run() -> None:
            if code := llama.llama_decode(self._handle, batch):
                raise RuntimeError(f"llama_decode returned {code} for {rows} rows of {length} tokens at {start}")
            llama.llama_synchronize(self._handle)

        try:
            return _seconds(run)
        finally:
            llama.llama_batch_free(batch)


PEERS: dict[str, Build] = {
    "torch-bf16": TorchPeer,
    "openvino": partial(OpenVinoPeer, name="openvino", properties={}),
    "openvino-f32dq": partial(
        OpenVinoPeer,
        name="openvino-f32dq",
        properties={"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128},
    ),
    "llama.cpp": partial(LlamaPeer, name="llama.cpp", weights="Q4_0"),
    "llama.cpp-q8_0": partial(LlamaPeer, name="llama.cpp-q8_0", weights="Q8_0"),
}
# Distributions by the module they install, for each engine.
PACKAGES: dict[str, dict[str, str]] = {
    "torch-bf16": {},
    "openvino": {"openvino": "openvino"},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
}


def check_peer(name: str) -> None:
    """Raises InputError when no peer has that name, or its packages cannot be imported. `check_peer("openvino")`."""
    if name not in PEERS:
        raise InputError(f"no peer is named {name!r}; there are {', '.join(PEERS)}{nearest(name, PEERS)}")
    engine = next(engine for engine in PACKAGES if name.startswith(engine))
    missing = []
    for module, distribution in PACKAGES[engine].items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            missing.append(distribution)
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"peer {name} needs {distribution}, which is installed but cannot be loaded: {reason}; "
                f"run pip install --force-reinstall {distribution}"
            ) from error
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(
            f"peer {name} needs {' and '.join(missing)}, which {verb} not installed; "
            "run pip install 'resq-llm[bench]' or leave it out"
        )


def peer_named(name: str, config: Config, *, threads: int, head_bits: int = 8, progress: Progress = silent) -> Peer:
    """Build a peer for a Hugging Face configuration; head_bits 4 or 8. Raises InputError when it cannot be.

    `peer_named("openvino", shape_named("llama-3.2-1b"), threads=2)`
    """
    if head_bits not in HEAD_BITS:
        raise InputError(f"a peer's head has 4 or 8 bits, not {head_bits}")
    if threads < 1:
        raise InputError(f"{threads} threads compute nothing; give at least 1")
    check_peer(name)
    return PEERS[name](config, threads, head_bits, progress)
