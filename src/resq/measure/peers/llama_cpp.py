"""llama.cpp as a peer: a GGUF file of random weights, read into memory."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resq.errors import InputError
from resq.measure.peers.peer import DEVIATION, check_full_attention, check_groups, seconds_of, signed
from resq.models.architecture import Config, Role, architecture_for
from resq.progress import Progress, silent


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


class LlamaCpp:
    """State: a GGUF model in memory and a context for one number of rows, made anew for another."""

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
        check_full_attention(name, shape)
        check_groups(name, shape, BLOCKS[weights].count)
        head = HEADS[weights][head_bits]
        head = head if shape.hidden % BLOCKS[head].count == 0 else "Q8_0"
        llama = _llama()
        self.version, self.vocab = f"llama-cpp-python {llama.__version__}", shape.vocab
        self._threads = threads
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
        self._rows = self._tokens = 0

    def empty(self, rows: int, tokens: int) -> None:
        """See Engine. A context for as many rows that has the room is kept."""
        llama = _llama()
        if self._handle and rows == self._rows and tokens <= self._tokens:
            llama.llama_memory_clear(llama.llama_get_memory(self._handle), True)
            return
        self._free()
        options = _with(
            llama.llama_context_default_params(),
            n_ctx=rows * tokens,
            n_seq_max=rows,
            n_batch=rows * tokens,
            n_threads=self._threads,
            n_threads_batch=self._threads,
        )
        self._handle = llama.llama_init_from_model(self._model, options)
        if not self._handle:
            raise RuntimeError(f"{self.version} gives no context of {rows} rows of {tokens} tokens; see its message")
        self._rows, self._tokens = rows, tokens

    def forward(self, tokens: np.ndarray, start: int) -> float:
        """See Engine."""
        llama = _llama()
        rows, length = tokens.shape
        batch = llama.llama_batch_init(tokens.size, 0, 1)
        batch.n_tokens = tokens.size
        for index, token in enumerate(tokens.reshape(-1).tolist()):
            row, at = divmod(index, length)
            batch.token[index], batch.pos[index] = token, start + at
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = at == length - 1

        def run() -> None:
            if code := llama.llama_decode(self._handle, batch):
                raise RuntimeError(f"llama_decode returned {code} for {rows} rows of {length} tokens at {start}")
            llama.llama_synchronize(self._handle)

        try:
            return seconds_of(run)
        finally:
            llama.llama_batch_free(batch)

    def logits(self) -> Tensor:
        """See Engine."""
        values = np.ctypeslib.as_array(_llama().llama_get_logits(self._handle), (self._rows, self.vocab))
        return torch.from_numpy(values.copy())

    def close(self) -> None:
        """See Engine."""
        self._free()
        if self._model:
            _llama().llama_model_free(self._model)
        self._model = None

    def _free(self) -> None:
        if self._handle:
            _llama().llama_free(self._handle)
        self._handle = None
