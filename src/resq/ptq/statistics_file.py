"""Pass 1 as a file: sums over a run of calibration windows, what they were made of, and merging runs to the whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from resq.checkpoint.manifest import FileEntry
from resq.durable import check_free, write_tensors, writing
from resq.errors import InputError, nearest_path
from resq.models.architecture import READERS, Point, Shape
from resq.models.source import Source
from resq.numerics.device import CPU
from resq.numerics.moments import Leaves, Node, Tree, subtrees
from resq.progress import Progress, silent
from resq.ptq.recipe import Moments, Peaks, Statistic
from resq.ptq.statistics import Sums, larger

# Counts up when the arithmetic of `gather` or the layout of the file changes: sums of two versions are not added.
STATISTICS_VERSION = 1
METADATA_KEY = "resq_statistics"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Sizes(_Strict):
    """The sizes of the model that shapes follow from."""

    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    ffn: int = Field(ge=1)

    @classmethod
    def of(cls, shape: Shape) -> Sizes:
        """Of a model."""
        return cls(**{name: getattr(shape, name) for name in cls.model_fields})


class Calibration(_Strict):
    """All calibration windows, of every shard: `tokens_sha256` is their hash as the manifest has it, `seed` chose them,
    `origin` names the text and is not compared."""

    origin: str
    tokens_sha256: str = Field(min_length=64, max_length=64)
    windows: int = Field(ge=1)
    window_length: int = Field(ge=2)
    seed: int = Field(ge=0)


class Header(_Strict):
    """What sums were made of. source: bytes and hash of config.json and of every weight file. dtype, device: of the
    forward. leaves: (first, after the last) leaf of the summation tree that the file holds."""

    version: int
    source: dict[str, FileEntry]
    sizes: Sizes
    calibration: Calibration
    dtype: Literal["float32"]
    device: Literal["cpu", "cuda"]
    statistics: list[Statistic]
    leaves: list[int] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _check_leaves(self) -> Header:
        first, stop = self.leaves
        if not 0 <= first < stop <= self.tree.count:
            raise ValueError(f"leaves {first} … {stop} are none of {self.tree.count}")
        return self

    @property
    def tree(self) -> Leaves:
        """How windows lie under leaves."""
        return Leaves(self.calibration.windows)

    @property
    def span(self) -> tuple[int, int]:
        """(first window, window after the last) that the sums are over."""
        return self.tree.span(*self.leaves)

    @property
    def whole(self) -> bool:
        """Whether no window is missing."""
        return self.leaves == [0, self.tree.count]

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The runs of windows (first, after the last) before and after these, empty when whole."""
        (start, stop), windows = self.span, self.calibration.windows
        return [run for run in ((0, start), (stop, windows)) if run[0] < run[1]]

    def sum_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every summed statistic, layers in order."""
        sizes, shapes = self.sizes, dict[str, tuple[int, ...]]()
        h = sizes.head_dim
        for index in range(sizes.layers):
            if Statistic.VALUE in self.statistics:
                shapes[f"{Statistic.VALUE}.{index}"] = (sizes.kv_heads, h, h)
            if Statistic.KEY in self.statistics:
                shapes[f"{Statistic.KEY}.{index}"] = (h, h)
        if Statistic.RESIDUAL in self.statistics:
            shapes[Statistic.RESIDUAL] = (sizes.hidden, sizes.hidden)
        return shapes

    def peak_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored peak of every layer; none when there are no peaks."""
        sizes, shapes = self.sizes, dict[str, tuple[int, ...]]()
        inputs = dict.fromkeys((Point.ATTN_IN, Point.MLP_IN), sizes.hidden)
        inputs |= {Point.O_IN: sizes.heads * sizes.head_dim, Point.DOWN_IN: sizes.ffn}
        for index in range(sizes.layers if Statistic.PEAKS in self.statistics else 0):
            for kind in ("inputs", "weights"):
                shapes |= {f"peaks.{index}.{kind}.{point}": (inputs[point],) for point in READERS}
            shapes[f"peaks.{index}.key"] = (sizes.head_dim,)
            shapes[f"peaks.{index}.value"] = (sizes.kv_heads, sizes.head_dim)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the file: each sum once per subtree."""
        runs = subtrees(*self.leaves)
        sums = {node_name(name, *run): shape for name, shape in self.sum_shapes().items() for run in runs}
        return sums | self.peak_shapes()


def node_name(name: str, first: int, stop: int) -> str:
    """The tensor of a sum over the leaves first … stop - 1: `key.3.leaves.0-8`."""
    return f"{name}.leaves.{first}-{stop}"


def windows_in_words(span: tuple[int, int]) -> str:
    """A run of windows for people, who count from 1: `windows 9 … 16`."""
    return f"windows {span[0] + 1} … {span[1]}"


@dataclass(frozen=True)
class Statistics:
    """Sums over a run of calibration windows, and what they were made of."""

    header: Header
    sums: Sums

    def moments(self, needs: frozenset[Statistic]) -> Moments:
        """What bases that need these statistics are fitted on; the same bits as `collect` gives over all windows."""
        kept = {name: tree for name, tree in self.sums.trees.items() if name.split(".")[0] in needs}
        calibration = self.header.calibration
        tokens = calibration.windows * calibration.window_length
        return Sums(kept, self.sums.peaks if Statistic.PEAKS in needs else None).moments(tokens)

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds, by name."""
        found = {
            node_name(name, node.first, node.stop): node.total
            for name, tree in self.sums.trees.items()
            for node in tree.nodes
        }
        for index, peaks in enumerate(self.sums.peaks or []):
            for kind, each in (("inputs", peaks.inputs), ("weights", peaks.weights)):
                found |= {f"peaks.{index}.{kind}.{point}": peak for point, peak in each.items()}
            found |= {f"peaks.{index}.key": peaks.key, f"peaks.{index}.value": peaks.value}
        return found


def source_files(source: Source, progress: Progress = silent) -> dict[str, FileEntry]:
    """Bytes and sha256 of the files that the forward depends on: config.json and the weights."""
    total = source.nbytes
    hashes = source.sha256(lambda done: progress("hashing the source", done, total))
    config = (source.path / "config.json").read_bytes()
    entries = {"config.json": FileEntry(bytes=len(config), sha256=hashlib.sha256(config).hexdigest())}
    for file, digest in hashes.items():
        entries[file] = FileEntry(bytes=(source.path / file).stat().st_size, sha256=digest)
    return entries


def differing_file(here: Mapping[str, FileEntry], there: Mapping[str, FileEntry]) -> str | None:
    """The first file that two models do not share."""
    return next((file for file in sorted({*here, *there}) if here.get(file) != there.get(file)), None)


def difference(one: Header, other: Header) -> str | None:
    """In what two files cannot belong to one calibration, in words; None when they can."""
    if file := differing_file(one.source, other.source):
        return f"the source model ({file})"
    a, b = one.calibration, other.calibration
    pairs: dict[str, tuple[Any, Any]] = {
        "the number of windows": (a.windows, b.windows),
        "the window length": (a.window_length, b.window_length),
        "the seed of the windows": (a.seed, b.seed),
        "the statistics": (", ".join(one.statistics), ", ".join(other.statistics)),
        "the forward's device": (one.device, other.device),
    }
    for what, (here, there) in pairs.items():
        if here != there:
            return f"{what} ({here} and {there})"
    return "the calibration tokens" if a.tokens_sha256 != b.tokens_sha256 else None


def write(statistics: Statistics, out: Path) -> None:
    """Write a new file in one piece: a hidden file beside its place, flushed to disk, then renamed. Raises InputError
    when `out` exists or the disk is full."""
    check_free(out)
    tensors = {name: tensor.to(CPU).contiguous() for name, tensor in statistics.tensors().items()}
    header = statistics.header.model_dump_json()
    # One key: safetensors writes several in no fixed order.
    metadata = {METADATA_KEY: json.dumps({"sha256": checksum(header, tensors), "header": header})}
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(out, tensors, metadata, replace=False)


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the header and of every tensor's name and bytes, by name."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name}\n".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _opened(path: Path) -> tuple[Any, str, str]:
    """A file's handle, its header as text and its checksum."""
    if not path.is_file():
        raise InputError(
            f"no statistics file at {path}; `resq calibrate` makes one, `resq merge` the whole of shards"
            f"{nearest_path(path)}"
        )
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a whole statistics file ({error}); copy it again, or make it with `resq calibrate`"
        ) from error
    try:
        record = json.loads((handle.metadata() or {})[METADATA_KEY])
        header, digest = record["header"], record["sha256"]
        version = json.loads(header)["version"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} holds no statistics of resq; `resq calibrate` makes them") from error
    if version != STATISTICS_VERSION:
        raise InputError(
            f"{path} holds statistics of version {version!r}, this resq reads and makes {STATISTICS_VERSION}; make it "
            "again with `resq calibrate`"
        )
    return handle, header, digest


def read_header(path: Path) -> Header:
    """What a file's sums were made of. Raises InputError naming the file when it is none, or damaged."""
    _, text, _ = _opened(path)
    return _parsed(path, text)


def _parsed(path: Path, text: str) -> Header:
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its header"
        raise InputError(f"{path} was altered after it was written: {where}: {first['msg']}; copy it again") from error


def read(path: Path) -> Statistics:
    """A file's sums, checked: names, shapes, checksum, finiteness. Raises InputError naming the file."""
    handle, text, digest = _opened(path)
    tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  no dict
    odd = [name for name, tensor in tensors.items() if tensor.dtype != torch.float64]
    if odd or checksum(text, tensors) != digest:
        raise InputError(f"{path} was altered after it was written (sha256 differs); copy it again")
    header = _parsed(path, text)
    shapes, there = header.tensor_shapes(), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if there != shapes:
        name = min(name for name in {*there, *shapes} if there.get(name) != shapes.get(name))
        raise InputError(
            f"{path}: {name} has shape {there.get(name, 'none')}, its header says {shapes.get(name, 'nothing')}; make "
            "it again with `resq calibrate`"
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds NaN or Inf; make it again with `resq calibrate`")
    trees = {name: Tree() for name in header.sum_shapes()}
    for name, tree in trees.items():
        for first, stop in subtrees(*header.leaves):
            tree.push(Node((stop - first).bit_length() - 1, first, tensors[node_name(name, first, stop)]))
    return Statistics(header, Sums(trees, _peaks(header, tensors)))


def _peaks(header: Header, tensors: Mapping[str, Tensor]) -> list[Peaks] | None:
    if Statistic.PEAKS not in header.statistics:
        return None
    found = []
    for index in range(header.sizes.layers):
        inputs, weights = (
            {point: tensors[f"peaks.{index}.{kind}.{point}"] for point in READERS} for kind in ("inputs", "weights")
        )
        found.append(Peaks(inputs, weights, tensors[f"peaks.{index}.key"], tensors[f"peaks.{index}.value"]))
    return found


def merge(paths: Sequence[Path], progress: Progress = silent) -> Statistics:
    """The sums of a run of shards, given in any order: the bits of a single run over their windows.

    Raises InputError naming the files when one is given twice, when they differ in model, calibration or arithmetic,
    and when windows between them are missing; windows before and after them may be (`Header.missing`).
    """
    if not paths:
        raise InputError("no statistics file was given; name the shards that `resq calibrate --shard` wrote")
    headers = {path: read_header(path) for path in dict.fromkeys(paths)}
    if len(headers) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise InputError(f"{twice} was given twice; give each shard once")
    ordered = sorted(headers, key=lambda path: (headers[path].leaves, str(path)))
    for one, other in pairwise(ordered):
        if what := difference(headers[one], headers[other]):
            raise InputError(
                f"{other} cannot be merged with {one}: they differ in {what}; merge shards of one model and one "
                "calibration"
            )
    for one, other in pairwise(ordered):
        (_, stop), (start, end) = headers[one].span, headers[other].span
        if start < stop:
            both = windows_in_words((start, min(stop, end)))
            raise InputError(f"{one} and {other} both hold {both}; give each shard once")
        if start > stop:
            raise InputError(
                f"{windows_in_words((stop, start))} are missing between {one} and {other}; give their shards too"
            )
    trees: dict[str, Tree] = {}
    peaks: list[Peaks] | None = None
    for number, path in enumerate(ordered):
        progress("merging", number, len(ordered))
        sums = read(path).sums
        for name, tree in sums.trees.items():
            merged = trees.setdefault(name, Tree())
            for node in tree.nodes:
                merged.push(node)
        peaks = sums.peaks if peaks is None or sums.peaks is None else larger(peaks, sums.peaks)
    progress("merging", len(ordered), len(ordered))
    leaves = [headers[ordered[0]].leaves[0], headers[ordered[-1]].leaves[1]]
    return Statistics(headers[ordered[0]].model_copy(update={"leaves": leaves}), Sums(trees, peaks))


def check_fit(path: str, header: Header, source: Mapping[str, FileEntry], needs: frozenset[Statistic]) -> None:
    """Raises InputError when a file's sums are not of this model, not of all windows, or lack what bases need."""
    if file := differing_file(source, header.source):
        raise InputError(f"{path} holds statistics of another model: {file} differs; make them with `resq calibrate`")
    if not header.whole:
        missing = " and ".join(windows_in_words(run) for run in header.missing)
        raise InputError(f"{path} lacks {missing} of {header.calibration.windows}; merge it with their shards first")
    if lacking := sorted(needs - set(header.statistics)):
        raise InputError(
            f"{path} has {', '.join(header.statistics)} but not {', '.join(lacking)}, which the recipe's bases need; "
            "make it with `resq calibrate` and this --recipe"
        )
