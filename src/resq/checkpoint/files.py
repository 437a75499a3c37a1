"""The files of a checkpoint, and reading its layers back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from resq.checkpoint.golden import GOLDEN_FILE
from resq.checkpoint.manifest import FileEntry, FormatEntry, LinearEntry, Manifest, NormEntry, read_manifest
from resq.durable import sha256_of
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
