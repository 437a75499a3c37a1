"""Writing a checkpoint directory in one piece, and reading its layers back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resq.checkpoint.golden import GOLDEN_FILE, Golden, to_tensors
from resq.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    EndsEntry,
    FileEntry,
    FormatEntry,
    LayerEntry,
    LinearEntry,
    Manifest,
    MapEntry,
    NormEntry,
    read_manifest,
)
from resq.errors import CheckpointError, InputError
from resq.numerics import maps
from resq.numerics.bands import PACKABLE_BITS, Bands
from resq.numerics.formats import ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, Linear, PackedLinear

ENDS_FILE = "model-ends.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What `sha256sum -c` reads: every other file, also those that the manifest cannot name, itself and the index.
SUMS_FILE = "SHA256SUMS.txt"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def layer_file(index: int, layers: int) -> str:
    """Name of a layer's file, zero-padded so that names sort."""
    return f"model-layer-{index:0{len(str(layers - 1))}d}.safetensors"


@dataclass(frozen=True)
class Parts:
    """A decoder layer as the checkpoint knows it: keys are the values of `Role` and `Point`."""

    linears: Mapping[str, Linear]
    norms: Mapping[str, Norm]
    inputs: Mapping[str, ActivationFormat]
    heads: HeadFormats
    window: int | None = None


@dataclass(frozen=True)
class EndParts:
    """Embedding, final norm and head; `tied` when the head's weight is the embedding table."""

    embed: Tensor
    norm: Norm
    head_input: ActivationFormat
    head: Linear
    tied: bool


class _Tensors:
    """State: the tensors of one file under their names; one tensor stored under two names keeps the first."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def put(self, name: str, tensor: Tensor) -> str:
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        self._names[id(tensor)] = name
        self.named[name] = tensor
        return name

    def linear(self, name: str, linear: Linear) -> LinearEntry:
        bands = None
        if isinstance(linear, PackedLinear):
            bands = [list(pair) for pair in linear.bands.pairs]
            for index, part in enumerate(linear.qweight):
                self.put(f"{name}.qweight.{index}", part)
            self.put(f"{name}.scale", linear.scale)
        else:
            self.put(f"{name}.weight", linear.weight)
        if linear.bias is not None:
            self.put(f"{name}.bias", linear.bias)
        return LinearEntry(name=name, shape=list(linear.shape), bands=bands, bias=linear.bias is not None)

    def norm(self, name: str, norm: Norm) -> NormEntry:
        gain = None if norm.gain is None else self.put(f"{name}.gain", norm.gain)
        return NormEntry(eps=norm.eps, gain=gain)

    def head_norm(self, name: str, norm: Norm | None) -> NormEntry | None:
        return None if norm is None else self.norm(name, norm)

    def format(self, name: str, format: ActivationFormat) -> FormatEntry:
        entry = None
        if format.map is not None:
            parameters, tensors = maps.describe(format.map)
            entry = MapEntry(**parameters)
            # The map's own tensor is what is recognised when two formats share it.
            for key, tensor in tensors.items():
                entry = entry.model_copy(update={"tensor": self.put(f"{name}.{key}", tensor)})
        return FormatEntry(
            map=entry,
            bands=None if format.bands is None else [list(pair) for pair in format.bands.pairs],
            groups=format.groups,
            scale_dtype="float16" if format.scale_dtype == torch.float16 else "float32",
            map_input_bits=format.map_input_bits,
            clip=None if format.clip is None else list(format.clip),
        )


def check_free(out: Path) -> None:
    """Raises InputError when there is something at `out`, or no way to look."""
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    raise InputError(f"{out} exists already; choose another --out or remove it first")


class CheckpointWriter:
    """State: a checkpoint being written to a hidden directory beside its place; `close` renames it there.

    `with CheckpointWriter(out) as writer: …`. Leaving the block with an exception, or without `close`, removes
    everything. Raises InputError when `out` exists or the disk is full.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        check_free(out)
        # A random name: a process id comes back after a crash, in a container with every run.
        self._work = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._work.mkdir()
        except OSError as error:
            raise InputError(f"cannot write to {out.parent}: {error.strerror}; choose another --out") from error
        self._weight_map: dict[str, str] = {}
        self._copied: dict[str, FileEntry] = {}
        self._tensor_bytes = 0
        self._files: dict[str, FileEntry] = {}
        self._layers: dict[int, LayerEntry] = {}
        self._ends: EndsEntry | None = None
        self._golden: dict[str, Golden] = {}
        self._closed = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:
            shutil.rmtree(self._work, ignore_errors=True)

    def _save(self, file: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        path = self._work / file
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read; these are as readable as their directory.
            path.chmod(self._work.stat().st_mode & 0o666)
            digest = _sync_and_hash(path)
        except (OSError, SafetensorError) as error:
            raise _write_error(self.out, error) from error
        return FileEntry(bytes=path.stat().st_size, sha256=digest)

    def _save_weights(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        self._files[file] = self._save(file, tensors)
        self._weight_map.update(dict.fromkeys(tensors, file))
        self._tensor_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def add_layer(self, index: int, layers: int, prefix: str, names: Mapping[str, str], parts: Parts) -> None:
        """Write decoder layer `index`: `prefix` is `model.layers.3`, `names` the module name of every role and norm."""
        tensors = _Tensors()
        file = layer_file(index, layers)
        self._layers[index] = LayerEntry(
            file=file,
            linears={role: tensors.linear(f"{prefix}.{names[role]}", linear) for role, linear in parts.linears.items()},
            norms={point: tensors.norm(f"{prefix}.{names[point]}", norm) for point, norm in parts.norms.items()},
            inputs={point: tensors.format(f"{prefix}.{point}", format) for point, format in parts.inputs.items()},
            key=tensors.format(f"{prefix}.key", parts.heads.key),
            query=tensors.format(f"{prefix}.query", parts.heads.query),
            value=tensors.format(f"{prefix}.value", parts.heads.value),
            query_norm=tensors.head_norm(f"{prefix}.query_norm", parts.heads.query_norm),
            key_norm=tensors.head_norm(f"{prefix}.key_norm", parts.heads.key_norm),
            window=parts.window,
        )
        self._save_weights(file, tensors.named)

    def add_ends(self, names: Mapping[str, str], parts: EndParts) -> None:
        """Write embedding, final norm and head; `names` has `embed`, `norm` and `head`."""
        tensors = _Tensors()
        embed = tensors.put(f"{names['embed']}.weight", parts.embed)
        norm = tensors.norm(names["norm"], parts.norm)
        head_input = tensors.format("head_input", parts.head_input)
        if parts.tied:
            head = LinearEntry(name=names["embed"], shape=list(parts.head.shape), bands=None, bias=False)
        else:
            head = tensors.linear(names["head"], parts.head)
        self._ends = EndsEntry(
            file=ENDS_FILE, embed=embed, norm=norm, head_input=head_input, head=head, tied=parts.tied
        )
        # transformers without `import resq` only warns about an unknown method and would run random weights; a final
        # norm of the wrong shape makes it stop.
        self._save_weights(ENDS_FILE, {**tensors.named, f"{names['norm']}.weight": torch.zeros(0)})

    def add_golden(self, vectors: Mapping[str, Golden]) -> None:
        """Keep the golden vectors of linears, by the linears' names, for the one file that `close` writes."""
        self._golden |= vectors

    def add_text(self, name: str, text: str) -> None:
        """Write a small UTF-8 file."""
        self._add_small(name, text.encode())

    def add_copy(self, source: Path, name: str) -> None:
        """Copy a small file as it is, to `name` (tokenizer, generation config, chat template)."""
        try:
            content = source.read_bytes()
        except OSError as error:
            raise InputError(f"{source} cannot be read: {error.strerror}; check its permissions") from error
        self._add_small(name, content)

    def _add_small(self, name: str, content: bytes) -> None:
        try:
            (self._work / name).parent.mkdir(exist_ok=True)
            (self._work / name).write_bytes(content)
        except OSError as error:
            raise _write_error(self.out, error) from error
        self._copied[name] = FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def close(self, **header: Any) -> Manifest:
        """Write index and manifest, flush everything to disk and move the directory to its place; `header` holds the
        manifest's remaining fields."""
        assert self._ends is not None
        assert sorted(self._layers) == list(range(len(self._layers)))
        golden = self._save(GOLDEN_FILE, to_tensors(self._golden)) if self._golden else None
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            **header,
            ends=self._ends,
            layers=[self._layers[index] for index in sorted(self._layers)],
            files=dict(sorted(self._files.items())),
            copied=dict(sorted(self._copied.items())),
            golden=golden,
        )
        index = {"metadata": {"total_size": self._tensor_bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        self.add_text(INDEX_FILE, json.dumps(index, indent=1) + "\n")
        self.add_text(MANIFEST_FILE, manifest.to_json())
        entries = self._files | self._copied | ({} if golden is None else {GOLDEN_FILE: golden})
        self.add_text(SUMS_FILE, "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(entries.items())))
        try:
            for path in self._work.rglob("*"):
                if path.name not in (*self._files, GOLDEN_FILE):
                    _sync(path)
            _sync(self._work)
            check_free(self.out)
            os.rename(self._work, self.out)
            _sync(self.out.parent)
        except OSError as error:
            raise _write_error(self.out, error) from error
        self._closed = True
        return manifest


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_and_hash(path: Path) -> str:
    _sync(path)
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    """Of a whole file, lower-case hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_error(out: Path, error: Exception) -> InputError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error)
    reason = "the disk is full; free some space" if full else f"{error}; choose another --out"
    return InputError(f"writing {out} failed: {reason}, nothing was kept")


def read_sums(directory: Path) -> dict[str, str] | None:
    """SHA256SUMS.txt as {file name: hash}, None where there is none (checkpoints of before it). Raises CheckpointError
    when it is no such list."""
    file = directory / SUMS_FILE
    if not file.is_file():
        return None
    try:
        *lines, last = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is no list of hashes ({error}); copy the checkpoint again") from error
    found = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if last or len(sums) != len(lines):
        raise CheckpointError(f"{file} is no list of hashes and names; copy the checkpoint again")
    return sums


class CheckpointReader:
    """State: an opened checkpoint directory. Every file is checked against its recorded size and hash before it is
    read for the first time.

    Raises CheckpointError naming the file or tensor that is missing, truncated or altered.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        golden = {} if self.manifest.golden is None else {GOLDEN_FILE: self.manifest.golden}
        self.recorded: Mapping[str, FileEntry] = self.manifest.files | golden | self.manifest.copied
        self._checked: set[str] = set()

    def check(self, file: str) -> None:
        """Raises CheckpointError when a file that the manifest names is missing or not as it was written."""
        if file in self._checked:
            return
        path, want = self.directory / file, self.recorded.get(file)
        if want is None or not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the checkpoint again")
        size = path.stat().st_size
        if size != want.bytes:
            raise CheckpointError(f"{path} has {size} bytes, {want.bytes} were written; copy the checkpoint again")
        try:
            digest = sha256_of(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
        if digest != want.sha256:
            raise CheckpointError(
                f"{path} was altered after it was written (sha256 differs); copy the checkpoint again"
            )
        self._checked.add(file)

    def _read(self, file: str) -> dict[str, Tensor]:
        self.check(file)
        path = self.directory / file
        try:
            # Tensors lie in the mapped file: memory holds what is touched, and gives it back under pressure.
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error

    def layer(self, index: int) -> Parts:
        """Decoder layer `index`."""
        entry = self.manifest.layers[index]
        read = _Entries(entry.file, self._read(entry.file))
        return Parts(
            linears={role: read.linear(linear) for role, linear in entry.linears.items()},
            norms={point: read.norm(norm) for point, norm in entry.norms.items()},
            inputs={point: read.format(f"inputs.{point}", format) for point, format in entry.inputs.items()},
            heads=HeadFormats(
                query=read.format("query", entry.query),
                key=read.format("key", entry.key),
                value=read.format("value", entry.value),
                query_norm=None if entry.query_norm is None else read.norm(entry.query_norm),
                key_norm=None if entry.key_norm is None else read.norm(entry.key_norm),
            ),
            window=entry.window,
        )

    def ends(self) -> EndParts:
        """Embedding, final norm and head."""
        entry = self.manifest.ends
        read = _Entries(entry.file, self._read(entry.file))
        embed = read.tensor(entry.embed)
        if entry.tied and (entry.embed != f"{entry.head.name}.weight" or entry.head.bands or entry.head.bias):
            raise CheckpointError(
                f"{entry.file}: the head is tied, but {entry.head.name} is not the table {entry.embed} alone"
            )
        head = read.linear(entry.head)
        return EndParts(embed, read.norm(entry.norm), read.format("head_input", entry.head_input), head, entry.tied)

    def golden(self) -> dict[str, Tensor]:
        """The tensors of the golden vectors, for `golden.from_tensors`; none where none were recorded."""
        return {} if self.manifest.golden is None else self._read(GOLDEN_FILE)


class _Entries:
    """State: the tensors of one file, turned back into numerics by their manifest entries."""

    def __init__(self, file: str, tensors: dict[str, Tensor]) -> None:
        self._file, self._tensors = file, tensors

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self._file} has no tensor {name}, which its manifest names; copy the checkpoint again"
            )
        return self._tensors[name]

    def linear(self, entry: LinearEntry) -> Linear:
        bias = self._shaped(f"{entry.name}.bias", entry.shape[:1]) if entry.bias else None
        if entry.bands is None:
            linear: Linear = DenseLinear(self._shaped(f"{entry.name}.weight", entry.shape), bias)
        else:
            bands = self._bands(entry.name, entry.bands)
            parts = tuple(self.tensor(f"{entry.name}.qweight.{index}") for index in range(len(bands)))
            try:
                linear = PackedLinear(bands, parts, self.tensor(f"{entry.name}.scale"), bias)
            except InputError as error:
                raise CheckpointError(f"{self._file}: {entry.name}: {error}") from error
        if list(linear.shape) != entry.shape:
            raise CheckpointError(
                f"{self._file}: {entry.name} has shape {list(linear.shape)}, its manifest says {entry.shape}"
            )
        return linear

    def _shaped(self, name: str, shape: list[int]) -> Tensor:
        tensor = self.tensor(name)
        if list(tensor.shape) != shape:
            raise CheckpointError(f"{self._file}: {name} has shape {list(tensor.shape)}, its manifest says {shape}")
        return tensor

    def _bands(self, name: str, pairs: list[list[int]]) -> Bands:
        try:
            return Bands.of(*((bits, size) for bits, size in pairs))
        except ValueError as error:
            raise CheckpointError(
                f"{self._file}: {name}: the manifest holds impossible bands {pairs}: {error}"
            ) from error

    def norm(self, entry: NormEntry) -> Norm:
        return Norm(entry.eps, None if entry.gain is None else self.tensor(entry.gain))

    def format(self, name: str, entry: FormatEntry) -> ActivationFormat:
        map = None
        if entry.map is not None:
            parameters = entry.map.model_dump(exclude={"tensor"}, exclude_none=True)
            key = "index" if entry.map.kind == maps.Permutation.kind else "matrix"
            tensors = {} if entry.map.tensor is None else {key: self.tensor(entry.map.tensor)}
            try:
                map = maps.restore(parameters, tensors)
            except KeyError as error:
                raise CheckpointError(f"{self._file}: {name}: a {entry.map.kind} map without {error}") from error
            except InputError as error:
                what = f"{entry.map.kind} map {entry.map.tensor or ''}".strip()
                raise CheckpointError(f"{self._file}: {name}: the {what} is impossible: {error}") from error
        bands = None if entry.bands is None else self._bands(name, entry.bands)
        if entry.map_input_bits not in (None, *PACKABLE_BITS):
            raise CheckpointError(f"{self._file}: {name}: map_input_bits is {entry.map_input_bits}, no width of a band")
        if map is not None and bands is not None and bands.size != map.size:
            raise CheckpointError(f"{self._file}: {name}: bands of {bands.size} coordinates follow a map of {map.size}")
        clip = None if entry.clip is None else tuple(entry.clip)
        try:
            return ActivationFormat(map, bands, entry.groups, _DTYPES[entry.scale_dtype], entry.map_input_bits, clip)
        except InputError as error:
            raise CheckpointError(f"{self._file}: {name}: {error}") from error
