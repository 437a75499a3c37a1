"""resq.json: what a packed checkpoint holds, strict and versioned. docs/checkpoint.md is its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from resq.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST_FILE = "resq.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MapEntry(_Strict):
    """An online linear map; `tensor` names its stored matrix or index, absent for a Hadamard transform."""

    kind: Literal["dense", "per_head", "permutation", "hadamard"]
    size: int = Field(ge=1)
    tensor: str | None = None
    orthogonal: bool | None = None
    heads: int | None = Field(default=None, ge=1)
    power: int | None = None
    order: int | None = None
    construction: str | None = None
    inner: int = Field(default=1, ge=1)


class FormatEntry(_Strict):
    """An `ActivationFormat`: bands as [[bits, size], …] or null for an unrounded activation."""

    map: MapEntry | None = None
    bands: list[list[int]] | None = None
    groups: int = Field(default=1, ge=1)
    scale_dtype: Literal["float32", "float16"] = "float32"
    map_input_bits: int | None = None
    clip: list[float] | None = None


class LinearEntry(_Strict):
    """A linear: `name` is the prefix of its tensors; bands null means plain weights `<name>.weight`."""

    name: str
    shape: list[int] = Field(min_length=2, max_length=2)
    bands: list[list[int]] | None
    bias: bool


class NormEntry(_Strict):
    """An RMSNorm; gain null means that it was folded into the linears after it."""

    eps: float
    gain: str | None


def complete(*keys: str) -> AfterValidator:
    """A dict must have exactly these keys."""

    def check(entries: dict[str, Any]) -> dict[str, Any]:
        if set(entries) != set(keys):
            raise ValueError(f"it has {', '.join(entries) or 'nothing'}; it must have {', '.join(keys)}")
        return entries

    return AfterValidator(check)


class LayerEntry(_Strict):
    """One decoder layer and the file that holds it."""

    file: str
    linears: Annotated[dict[str, LinearEntry], complete("q", "k", "v", "o", "gate", "up", "down")]
    norms: Annotated[dict[str, NormEntry], complete("attn_in", "mlp_in")]
    inputs: Annotated[dict[str, FormatEntry], complete("attn_in", "o_in", "mlp_in", "down_in")]
    query: FormatEntry
    key: FormatEntry
    value: FormatEntry
    query_norm: NormEntry | None = None
    key_norm: NormEntry | None = None
    window: int | None = Field(default=None, ge=1)


class EndsEntry(_Strict):
    """Embedding, final norm and head. `tied`: the head reads the embedding table, after `head_input`'s map."""

    file: str
    embed: str
    norm: NormEntry
    head_input: FormatEntry
    head: LinearEntry
    tied: bool


class FileEntry(_Strict):
    """Size and hash of one weight file."""

    bytes: int
    sha256: str


class RecipeEntry(_Strict):
    """How the integers were made, in words and numbers. definition: the recipe as a file of `--recipe` has it; empty
    where it has parts that no file can name."""

    name: str
    basis: list[str]
    precision: dict[str, str]
    rounding: str
    seed: int
    definition: dict[str, Any] = Field(default_factory=dict)


class SourceEntry(_Strict):
    """The 16- or 32-bit original. sha256: of its weight files and config.json."""

    name: str
    model_type: str
    dtype: str
    bytes: int
    parameters: int
    tied: bool
    sha256: dict[str, str]


class TextEntry(_Strict):
    """A calibration text: its name as it was given, and the hash of the file (of `stdlib`, of its documents)."""

    name: str
    sha256: str


class StatisticsEntry(_Strict):
    """A statistics file that the bases were fitted on: its hash, and what kind of device its forward ran on."""

    sha256: str
    device: str


class CalibrationEntry(_Strict):
    """The windows that bases and rounding were computed from; null in a recipe that needs none.

    seed: what chose them, null in checkpoints of before it. texts: in the order they were given; none where there were
    statistics alone. statistics: null where this run collected them.
    """

    origin: str
    windows: int
    rounding_windows: int
    window_length: int
    tokens_sha256: str
    forward: str
    seed: int | None = None
    texts: list[TextEntry] = Field(default_factory=list)
    statistics: StatisticsEntry | None = None


class Manifest(_Strict):
    """The whole of resq.json."""

    format_version: int
    made_by: dict[str, str]
    recipe: RecipeEntry
    source: SourceEntry
    calibration: CalibrationEntry | None
    ends: EndsEntry
    layers: list[LayerEntry] = Field(min_length=1)
    files: dict[str, FileEntry]
    copied: dict[str, FileEntry]
    notes: list[str] = Field(default_factory=list)
    golden: FileEntry | None = None

    def to_json(self) -> str:
        """Indented, keys in the order of the fields."""
        return self.model_dump_json(indent=1, exclude_none=False) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Parse resq.json. Raises CheckpointError for a missing file, an unknown key or an unknown version."""
    file = directory / MANIFEST_FILE
    if not file.is_file():
        source = (directory / "config.json").is_file()
        hint = "run resq quantize on it first" if source else "it is not a checkpoint written by resq quantize"
        raise CheckpointError(f"{directory} has no {MANIFEST_FILE}; {hint}")
    try:
        raw: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; check its permissions") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); copy the checkpoint again") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version!r}; this resq reads {FORMAT_VERSION}: upgrade resq-llm"
        )
    try:
        return Manifest.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        # A key may hold anything, a line break too.
        where = ".".join(str(part).encode("unicode_escape").decode() for part in first["loc"])
        raise CheckpointError(
            f"{file}: {where}: {first['msg'].lower()}; the manifest was altered or is of a newer resq"
        ) from error
