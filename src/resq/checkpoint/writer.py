"""Writing a checkpoint, part by part, into a work directory that survives what stops the process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from resq.checkpoint.files import ENDS_FILE, INDEX_FILE, SUMS_FILE, EndParts, Parts, layer_file
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
)
from resq.checkpoint.work import WorkDirectory
from resq.durable import sha256_of, sync, write_tensors, writing
from resq.errors import InputError
from resq.numerics import maps
from resq.numerics.formats import ActivationFormat, Norm
from resq.numerics.linear import Linear, PackedLinear


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


@dataclass(frozen=True)
class _Part:
    """Embedding and head, or a layer, as it was written: its file's name in the checkpoint and its manifest entry; size
    and hash of the files by their place in the work directory; bytes of every tensor; the file of its golden vectors;
    what was told of it."""

    file: str
    entry: dict[str, Any]
    files: dict[str, dict[str, Any]]
    tensors: dict[str, int]
    golden: str | None
    told: dict[str, Any]


class CheckpointWriter:
    """State: a checkpoint being written part by part into a work directory; `close` gives it its place.

    Every part is durable when its `add_…` returns. Of a job that goes on, the parts that are whole count as added.
    Raises InputError when the disk is full.
    """

    def __init__(self, work: WorkDirectory) -> None:
        self.work, self._place = work, work.checkpoint
        self._copied: dict[str, FileEntry] = {}
        self._ends = self._recorded("ends")
        self._layers: list[_Part] = []
        while (part := self._recorded(f"layer-{len(self._layers)}")) is not None:
            self._layers.append(part)

    @property
    def has_ends(self) -> bool:
        """Whether embedding, norm and head are written."""
        return self._ends is not None

    @property
    def finished(self) -> int:
        """Layers that are written, from the first."""
        return len(self._layers)

    def told(self, name: str) -> dict[str, Any]:
        """What was told of `ends` or `layer-3` when it was added."""
        part = self._ends if name == "ends" else self._layers[int(name.removeprefix("layer-"))]
        assert part is not None
        return part.told

    def restart(self, layer: int) -> None:
        """Forget the layers from `layer` on."""
        del self._layers[layer:]

    def begin_anew(self) -> None:
        """Forget every part, so that none of them meets parts of other maps, not even after another stop."""
        self.work.forget("ends.json", *(f"layer-{index}.json" for index in range(len(self._layers))))
        self._ends, self._layers = None, []

    def _recorded(self, name: str) -> _Part | None:
        """A part of an earlier process; None when it is not there, or not as it was written."""
        record = self.work.record(name)
        if record is None:
            return None
        try:
            part = _Part(**record)
            whole = all(
                file.stat().st_size == want["bytes"] and sha256_of(file) == want["sha256"]
                for file, want in ((self.work.path / name, want) for name, want in part.files.items())
            )
        except (OSError, TypeError, KeyError, AttributeError):
            return None
        return part if whole else None

    def _add(
        self,
        name: str,
        file: str,
        tensors: Mapping[str, Tensor],
        entry: LayerEntry | EndsEntry,
        golden: Mapping[str, Golden],
        said: Mapping[str, Any],
    ) -> _Part:
        vectors, files = f"golden-{name}.safetensors", {}
        with writing(self.work.out, None):
            for path, content in (
                (self._place / file, tensors),
                *([(self.work.file(vectors), to_tensors(golden))] if golden else []),
            ):
                write_tensors(path, content, {"format": "pt"})
                size = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
                files[str(path.relative_to(self.work.path))] = size.model_dump()
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        part = _Part(file, entry.model_dump(), files, sizes, vectors if golden else None, dict(said))
        self.work.save(name, asdict(part))
        return part

    def add_layer(
        self,
        index: int,
        layers: int,
        prefix: str,
        names: Mapping[str, str],
        parts: Parts,
        golden: Mapping[str, Golden] | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """Write decoder layer `index`, the next: `prefix` is `model.layers.3`, `names` the module name of every role
        and norm; golden: vectors by the linears' names; told: plain JSON for who goes on."""
        assert index == len(self._layers)
        tensors = _Tensors()
        file = layer_file(index, layers)
        entry = LayerEntry(
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
        self._layers.append(self._add(f"layer-{index}", file, tensors.named, entry, golden or {}, told or {}))

    def add_ends(
        self,
        names: Mapping[str, str],
        parts: EndParts,
        golden: Mapping[str, Golden] | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """Write embedding, final norm and head; `names` has `embed`, `norm` and `head`; the rest as for a layer."""
        tensors = _Tensors()
        embed = tensors.put(f"{names['embed']}.weight", parts.embed)
        norm = tensors.norm(names["norm"], parts.norm)
        head_input = tensors.format("head_input", parts.head_input)
        if parts.tied:
            head = LinearEntry(name=names["embed"], shape=list(parts.head.shape), bands=None, bias=False)
        else:
            head = tensors.linear(names["head"], parts.head)
        entry = EndsEntry(file=ENDS_FILE, embed=embed, norm=norm, head_input=head_input, head=head, tied=parts.tied)
        # transformers without `import resq` only warns about an unknown method and would run random weights; a final
        # norm of the wrong shape makes it stop.
        stored = {**tensors.named, f"{names['norm']}.weight": torch.zeros(0)}
        self._ends = self._add("ends", ENDS_FILE, stored, entry, golden or {}, told or {})

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
        with writing(self.work.out, None):
            (self._place / name).parent.mkdir(exist_ok=True)
            (self._place / name).write_bytes(content)
        self._copied[name] = FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def close(self, **header: Any) -> Manifest:
        """Write index and manifest, flush everything to disk and move the directory to its place; `header` holds the
        manifest's remaining fields."""
        assert self._ends is not None
        parts = [self._ends, *self._layers]
        golden = self._golden(parts)
        files = {part.file: FileEntry(**part.files[f"{self._place.name}/{part.file}"]) for part in parts}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            **header,
            ends=EndsEntry(**self._ends.entry),
            layers=[LayerEntry(**part.entry) for part in self._layers],
            files=dict(sorted(files.items())),
            copied=dict(sorted(self._copied.items())),
            golden=golden,
        )
        weight_map = {name: part.file for part in parts for name in part.tensors}
        total = sum(size for part in parts for size in part.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.add_text(INDEX_FILE, json.dumps(index, indent=1) + "\n")
        self.add_text(MANIFEST_FILE, manifest.to_json())
        entries = files | self._copied | ({} if golden is None else {GOLDEN_FILE: golden})
        self.add_text(SUMS_FILE, "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(entries.items())))
        with writing(self.work.out, None):
            flushed = {*files, GOLDEN_FILE}
            for path in self._place.rglob("*"):
                if path.name not in flushed:
                    sync(path)
        self.work.finish()
        return manifest

    def _golden(self, parts: Sequence[_Part]) -> FileEntry | None:
        """The golden vectors of all parts as one file."""
        files = [self.work.file(part.golden) for part in parts if part.golden is not None]
        if not files:
            return None
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= load_file(file)
        path = self._place / GOLDEN_FILE
        with writing(self.work.out, None):
            write_tensors(path, tensors, {"format": "pt"})
        return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
