"""A Hugging Face checkpoint as a stream: one decoder layer at a time, straight from safetensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from resq import embedded
from resq.errors import InputError, nearest_path
from resq.models.architecture import Architecture, Role, Shape, architecture_for
from resq.models.decoder import Ends, Layer
from resq.models.refused import structural_reason
from resq.numerics.formats import PLAIN, HeadFormats, Norm
from resq.numerics.linear import DenseLinear

# Weight files mapped at once: a layer may begin in one and end in the next. torch maps them as private memory, which a
# limit on a process's data counts.
MAPPED = 2
HEADER_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# What a hub download needs: weights, configuration, tokenizer, chat template.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
# The same weights once more, in the formats of Mistral's and Meta's own code.
HUB_IGNORED = ["consolidated*", "original/*"]
# Rows of a tensor that are looked through for NaN and Inf at once.
CHECKED = 4096


def locate(source: str | Path, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    """The local directory of a source: the embedded model for `tiny` (a directory of that name is `./tiny`), the path
    itself, or the snapshot of a hub id (`organisation/name`), of which the files of these patterns are fetched if
    needed. Raises InputError when there is none of them."""
    path, text = Path(source), str(source)
    if text == embedded.MODEL:
        return embedded.model_directory()
    if path.is_dir():
        return path
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(
            f"no checkpoint directory at {text}; give a directory with config.json, a hub id like org/name, or "
            f"{embedded.MODEL} for the model that comes with resq{nearest_path(path, embedded.MODEL)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=list(patterns), ignore_patterns=HUB_IGNORED))
    except GatedRepoError as error:
        raise InputError(f"{text} is gated: accept its licence on the hub, then log in with `hf auth login`") from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{text} is neither a local directory nor a hub model that can be fetched: {reason}"
        ) from error


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError when the file is something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no JSON object; fetch it again")
    return value


def read_generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json, empty when there is none. Raises InputError for end tokens that are no integers."""
    file = path / "generation_config.json"
    config = read_object(file) if file.is_file() else {}
    ends = config.get("eos_token_id")
    if ends is not None and not all(isinstance(token, int) for token in (ends if isinstance(ends, list) else [ends])):
        raise InputError(f"{file} has eos_token_id {ends!r}; it must be an integer or a list of them")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """config.json with transformers' defaults filled in. Raises InputError when it is missing or of an unknown type."""
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path} has no config.json; give a Hugging Face checkpoint directory")
    raw = read_object(file)
    if not isinstance(raw.get("model_type"), str):
        raise InputError(f"{file} names no model_type; give a Hugging Face checkpoint directory")
    if why := structural_reason(raw):
        raise InputError(f"this {raw['model_type']} model cannot be quantized: {why}")
    architecture_for(raw["model_type"])
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    # What transformers fills in is its business; fields it does not know stay as given.
    given = {key: value for key, value in raw.items() if key != "quantization_config"}
    scaling = given.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "su":  # longrope in the first Phi-3 checkpoints
        given["rope_scaling"] = {**scaling, "type": "longrope"}
    try:
        known = AutoConfig.for_model(**given).to_dict()
    except (StrictDataclassError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"transformers cannot read {file}: {reason}") from error
    return {**raw, **known}


def original_config(path: Path, name: str) -> dict[str, Any]:
    """`read_config` of an original. Raises InputError for a checkpoint that is quantized already."""
    config = read_config(path)
    if quantized := read_object(path / "config.json").get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(f"{name} is already quantized ({method}); give the 16- or 32-bit original")
    return config


class Source:
    """State: an opened checkpoint; tensors are read from the mapped files when asked for.

    `Source.open("path/or/hub-id")`. Attributes: path, name, config, architecture, shape.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.config = original_config(path, name)
        self.architecture: Architecture = architecture_for(self.config["model_type"])
        self.shape: Shape = self.architecture.shape(self.config)
        self._files: dict[str, Any] = {}
        read_generation_config(path)
        self._check_headers()
        self._stamps = self._written()

    def _check_headers(self) -> None:
        """Every tensor that is read must be there with its shape and a known dtype, and none may be left over: a weight
        that this architecture does not read would silently become another model."""
        shapes: dict[str, tuple[int, ...]] = {}
        optional: dict[str, tuple[int, ...]] = {}
        architecture, sizes = self.architecture, self.shape.sizes()
        for index in range(self.shape.layers):
            prefix = self.layer_prefix(index)
            for name, roles in self._modules().items():
                out = sum(sizes[role][0] for role in roles)
                shapes[f"{prefix}.{name}.weight"] = (out, sizes[roles[0]][1])
                optional[f"{prefix}.{name}.bias"] = (out,)
            for name in architecture.norms.values():
                shapes[f"{prefix}.{name}.weight"] = (self.shape.hidden,)
            for name in architecture.head_norms.values():
                shapes[f"{prefix}.{name}.weight"] = (self.shape.head_dim,)
        table = (self.shape.vocab, self.shape.hidden)
        shapes[f"{architecture.embed}.weight"] = table
        shapes[f"{architecture.final_norm}.weight"] = (self.shape.hidden,)
        (optional if self.shape.tied else shapes)[f"{architecture.head}.weight"] = table
        for name in sorted(shapes.keys() - self.index.keys()):
            raise InputError(
                f"{self.name} has no tensor {name}; its config.json and its weights do not belong together"
            )
        for role in Role:
            self._check_biases(role)
        known = shapes | optional
        for name in sorted(self.index):
            if name in known:
                self._check_header(name, known[name])
            elif not name.endswith("rotary_emb.inv_freq"):
                raise InputError(
                    f"{self.name} has a tensor {name}, which a {self.config['model_type']} model of its config.json "
                    "does not have; it would be lost"
                )

    def _check_biases(self, role: Role) -> None:
        """A role has a bias in every layer or in none; a family that always has one must."""
        module = next(name for name, roles in self._modules().items() if role in roles)
        names = [f"{self.layer_prefix(index)}.{module}.bias" for index in range(self.shape.layers)]
        missing = [name for name in names if name not in self.index]
        if missing and (len(missing) < len(names) or role in self.architecture.biased):
            raise InputError(f"{self.name} has no tensor {missing[0]}, which belongs to its weights; fetch it again")

    def _check_header(self, name: str, shape: tuple[int, ...]) -> None:
        try:
            header = self._open(self.index[name]).get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{self.name} has no tensor {name} in {self.index[name]}; fetch it again") from error
        if tuple(header.get_shape()) != shape:
            raise InputError(f"tensor {name} has shape {tuple(header.get_shape())}, its config.json says {shape}")
        if header.get_dtype() not in HEADER_DTYPES:
            accepted = ", ".join(HEADER_DTYPES.values())
            raise InputError(f"tensor {name} has dtype {header.get_dtype()}; accepted are {accepted}")

    @classmethod
    def open(cls, source: str | Path) -> Source:
        """Open a local directory or a hub id."""
        return cls(locate(source), str(source))

    @cached_property
    def index(self) -> dict[str, str]:
        """File of every tensor. Raises InputError when there are no safetensors or a shard is missing."""
        index_file = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if index_file.is_file():
            try:
                index = dict(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"])
                missing = sorted({file for file in index.values() if not (self.path / file).is_file()})
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise InputError(f"{index_file} is not an index of safetensors ({error!r}); fetch it again") from error
            if missing:
                raise InputError(
                    f"{self.name} lacks {missing[0]}, named in model.safetensors.index.json; fetch it again"
                )
            return index
        if single.is_file():
            return dict.fromkeys(self._open(single.name).keys(), single.name)
        raise InputError(
            f"{self.name} has no model.safetensors or model.safetensors.index.json; convert it to safetensors"
        )

    def _open(self, file: str) -> Any:
        """A weight file; the last `MAPPED` that were asked for stay open."""
        handle = self._files.pop(file, None)
        if handle is None:
            try:
                handle = safe_open(self.path / file, framework="pt")
            except SafetensorError as error:
                raise InputError(
                    f"{self.path / file} is not a whole safetensors file ({error}); fetch it again"
                ) from error
        self._files[file] = handle
        while len(self._files) > MAPPED:
            del self._files[next(iter(self._files))]
        return handle

    @property
    def shards(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted(set(self.index.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum((self.path / file).stat().st_size for file in self.shards)

    def sha256(self, progress: Callable[[int], None] = lambda done: None) -> dict[str, str]:
        """Hash of every weight file; `progress` is told the bytes read so far."""
        hashes, done = {}, 0
        for file in self.shards:
            digest = hashlib.sha256()
            with open(self.path / file, "rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
                    done += len(block)
                    progress(done)
            hashes[file] = digest.hexdigest()
        return hashes

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or a range of its rows, in its stored dtype. Raises InputError when it is not finite."""
        file = self._open(self.index[name])
        value = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        # Without a copy of the tensor: its extremes are NaN where one of its values is.
        if value.numel() and not all(map(math.isfinite, map(float, torch.aminmax(value)))):
            raise InputError(f"tensor {name} holds NaN or Inf; the checkpoint is damaged, fetch it again")
        return value

    def check_unchanged(self) -> None:
        """Raises InputError when a weight file was written since this was opened."""
        if self._written() != self._stamps:
            raise InputError(f"files of {self.name} changed while they were read; put back what was there")

    def _written(self) -> list[tuple[int, int]]:
        """Bytes and time of writing of the weight files."""
        stats = [(self.path / file).stat() for file in self.shards]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def layer_prefix(self, index: int) -> str:
        """Name before every tensor of layer `index`."""
        return f"{self.architecture.layers}.{index}"

    def _modules(self) -> dict[str, tuple[Role, ...]]:
        """Every stored linear of a layer with the roles whose rows it holds, in order."""
        fused = self.architecture.fused
        taken = {role for roles in fused.values() for role in roles}
        alone = {name: (role,) for role, name in self.architecture.linears.items() if role not in taken}
        return {**alone, **fused}

    def layer(self, index: int) -> Layer:
        """Decoder layer `index` as it is stored, nothing rounded; heads whose coordinates turn only in part are put
        into the order of `Rope`."""
        shape, prefix, linears = self.shape, self.layer_prefix(index), {}
        for name, roles in self._modules().items():
            start = 0
            for role in roles:
                stop = start + shape.sizes()[role][0]
                rows = None if len(roles) == 1 else slice(start, stop)
                weight = self.tensor(f"{prefix}.{name}.weight", rows)
                bias = self.tensor(f"{prefix}.{name}.bias", rows) if f"{prefix}.{name}.bias" in self.index else None
                if role in (Role.Q, Role.K):
                    weight, bias = self._head_order(weight), None if bias is None else self._head_order(bias)
                linears[role] = DenseLinear(weight, bias)
                start = stop
        norms = {
            point: Norm(shape.eps, self.tensor(f"{prefix}.{name}.weight"))
            for point, name in self.architecture.norms.items()
        }
        heads = {
            role: Norm(shape.eps, self._head_order(self.tensor(f"{prefix}.{name}.weight")))
            for role, name in self.architecture.head_norms.items()
        }
        formats = HeadFormats(query_norm=heads.get(Role.Q), key_norm=heads.get(Role.K))
        return Layer(linears, norms, formats, window=shape.window(index))

    def _head_order(self, rows: Tensor) -> Tensor:
        """Rows of q or k (weights, biases, norm gains) with each head's coordinates in the order of `Rope`."""
        order = self.shape.rope.order
        if order is None:
            return rows
        return rows.unflatten(0, (-1, self.shape.head_dim))[:, list(order)].flatten(0, 1)

    def ends(self) -> Ends:
        """Embedding, final norm and head; a tied head is the embedding table itself (the same tensor)."""
        embed = self.embedding()
        norm = Norm(self.shape.eps, self.tensor(f"{self.architecture.final_norm}.weight"))
        head = embed if self.shape.tied else self.tensor(f"{self.architecture.head}.weight")
        return Ends(embed, norm, PLAIN, DenseLinear(head))

    def embedding(self) -> Tensor:
        """The embedding table [vocab, hidden]."""
        return self.tensor(f"{self.architecture.embed}.weight")

    @cached_property
    def dtype(self) -> str:
        """Name of the embedding's dtype, which stands for the checkpoint's."""
        name = f"{self.architecture.embed}.weight"
        return HEADER_DTYPES[self._open(self.index[name]).get_slice(name).get_dtype()]

    def parameters(self) -> int:
        """Weights of the model, a tied table counted once."""
        count = 0
        for file in self.shards:
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  a safetensors handle is no dict
                size = 1
                for extent in handle.get_slice(name).get_shape():
                    size *= extent
                count += size
        return count
