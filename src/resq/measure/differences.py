"""In what two packed checkpoints differ: files by their hashes, tensors value by value, and their manifests."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from resq.checkpoint.files import INDEX_FILE, CheckpointReader
from resq.checkpoint.golden import GOLDEN_FILE
from resq.checkpoint.manifest import LinearEntry, Manifest
from resq.errors import CheckpointError
from resq.numerics.packing import unpack_signed
from resq.progress import Progress, silent

# It is written from the manifest, and its title is the directory's name.
CARD_FILE = "README.md"
# Values that are compared at once: some 100 MB with their float64 differences.
AT_ONCE = 1 << 22
# Of the size of a value, to compare bits: NaN equals itself, and 0 is not -0.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is another one in the second checkpoint.

    differing: how many of its `values` are not the same bits. packed: these are the integers of packed weights.
    largest: the largest |difference|, None where one is not finite. problem: why there is nothing to count, else None.
    """

    file: str
    tensor: str
    differing: int
    values: int
    largest: float | None
    packed: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Differences:
    """What `differences` found.

    files: whether every file has the same bytes in both. tensors: those that differ; same: how many tensors of files
    that differ do not. fields: of the manifest, by their path (`layers.3.window`), in the first and in the second.
    """

    files: dict[str, bool]
    tensors: list[TensorDifference]
    same: int
    fields: dict[str, tuple[Any, Any]]

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return all(self.files.values()) and not self.fields


def differences(
    first: CheckpointReader, second: CheckpointReader, *, apart_from: Collection[str] = (), progress: Progress = silent
) -> Differences:
    """Compare two checkpoints whose files are as they were written (`CheckpointReader.check`).

    apart_from: fields of the manifest that may differ, with all below them. Files are compared by their hashes, without
    the README; tensors only in files that differ. `progress` is told ("comparing", files, of all).
    """
    files, tensors, same = {}, [], 0
    # Golden vectors last: they follow from the weights.
    names = sorted({*first.recorded, *second.recorded} - {CARD_FILE}, key=lambda name: (name == GOLDEN_FILE, name))
    for number, name in enumerate(names):
        progress("comparing", number, len(names))
        files[name] = first.recorded.get(name) == second.recorded.get(name)
        if not files[name] and name.endswith(".safetensors"):
            found, equal = _file_differences(first, second, name)
            tensors, same = [*tensors, *found], same + equal
    progress("comparing", len(names), len(names))
    index = [(reader.directory / INDEX_FILE).read_bytes() for reader in (first, second)]
    files[INDEX_FILE] = index[0] == index[1]
    manifests = first.manifest.model_dump(), second.manifest.model_dump()
    ignored = {"files", "copied", "golden", *apart_from}
    return Differences(dict(sorted(files.items())), tensors, same, dict(_fields(*manifests, "", ignored)))


def _fields(first: Any, second: Any, at: str, ignored: Collection[str]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The paths at which two values of JSON differ, as deep as they have the same keys or lengths."""
    if at in ignored:
        return
    pairs: Mapping[Any, tuple[Any, Any]] | None = None
    if isinstance(first, dict) and isinstance(second, dict):
        pairs = {key: (first.get(key), second.get(key)) for key in first | second}
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = dict(enumerate(zip(first, second, strict=True)))
    if pairs is None:
        if first != second:
            yield at, (first, second)
        return
    for key, (one, other) in pairs.items():
        yield from _fields(one, other, f"{at}.{key}" if at else str(key), ignored)


def _linears(manifest: Manifest) -> Iterator[LinearEntry]:
    for layer in manifest.layers:
        yield from layer.linears.values()
    yield manifest.ends.head


def _packed(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """(bits, values in a row) of every tensor of packed integers."""
    return {
        f"{linear.name}.qweight.{index}": (bits, size)
        for linear in _linears(manifest)
        for index, (bits, size) in enumerate(linear.bands or [])
    }


def _file_differences(
    first: CheckpointReader, second: CheckpointReader, file: str
) -> tuple[list[TensorDifference], int]:
    """The tensors of a file that differ, and how many do not."""
    found, same = [], 0
    packed = _packed(first.manifest), _packed(second.manifest)
    there = [_opened(reader, file) for reader in (first, second)]
    for name in sorted({name for handle in there for name in handle}):
        if any(name not in handle for handle in there):
            which = "first" if name in there[0] else "second"
            found.append(TensorDifference(file, name, 0, 0, None, problem=f"it is in the {which} alone"))
            continue
        a, b = (handle[name].get_tensor(name) for handle in there)
        bands = [each.get(name) for each in packed]
        kinds = [(a.dtype, list(a.shape), bands[0]), (b.dtype, list(b.shape), bands[1])]
        if kinds[0] != kinds[1]:
            words = (_kind(*kind) for kind in kinds)
            found.append(TensorDifference(file, name, 0, 0, None, problem=" and ".join(words)))
        elif (difference := _values(file, name, a, b, bands[0])).differing:
            found.append(difference)
        else:
            same += 1
    return found, same


def _opened(reader: CheckpointReader, file: str) -> dict[str, Any]:
    """The handle of a file under each of its tensors' names; nothing for a file that is not there."""
    if file not in reader.recorded:
        return {}
    try:
        handle = safe_open(reader.directory / file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{reader.directory / file} is not a safetensors file: {error}") from error
    return dict.fromkeys(handle.keys(), handle)


def _kind(dtype: torch.dtype, shape: list[int], band: tuple[int, int] | None) -> str:
    width = "" if band is None else f", {band[1]} values of {band[0]} bits a row"
    return f"{str(dtype).removeprefix('torch.')} {shape}{width}"


def _values(file: str, name: str, a: Tensor, b: Tensor, band: tuple[int, int] | None) -> TensorDifference:
    """Compare two tensors of one shape, of packed integers where there is a band."""
    if band is None:
        a, b = a.flatten(), b.flatten()
        rows = AT_ONCE
    else:
        rows = max(1, AT_ONCE // band[1])
    differing, values, largest = 0, 0, 0.0
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        if band is not None:
            x, y = (unpack_signed(part, *band) for part in (x, y))
        word = _WORDS[x.element_size()]
        unequal = x.view(word) != y.view(word)
        differing, values = differing + int(unequal.sum()), values + x.numel()
        if unequal.any():
            gap = (x[unequal].to(torch.float64) - y[unequal].to(torch.float64)).abs()
            largest = max(largest, float(gap.max().nan_to_num(nan=math.inf)))
    shown = largest if math.isfinite(largest) else None
    return TensorDifference(file, name, differing, values, shown, packed=band is not None)
