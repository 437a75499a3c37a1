"""A reader written from docs/checkpoint.md and docs/math.md alone: it must find the numbers that resq finds.

Everything above the line `What resq says` uses numpy, json and hashlib, and nothing of this project.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PLAIN_DTYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}
Tensors = dict[str, np.ndarray]
Entry = dict[str, Any]
Rounded = tuple[np.ndarray, np.ndarray, np.ndarray]  # q, scale, zero, each [tokens, n]


def read_safetensors(file: Path) -> Tensors:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = content[8 + length + begin : 8 + length + end]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, PLAIN_DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [rows, bytes] -> signed int64 [rows, count]."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    assert not stream[:, count * bits :].any()
    assert stream.shape[1] - count * bits < 8
    values = stream[:, : count * bits].reshape(len(packed), count, bits) @ (1 << np.arange(bits))
    if bits == 1:
        return 2 * values - 1
    return np.where(values >= 1 << (bits - 1), values - (1 << bits), values)


def integers_of(linear: Entry, tensors: Tensors) -> np.ndarray:
    parts = [
        unpack(tensors[f"{linear['name']}.qweight.{index}"], bits, size)
        for index, (bits, size) in enumerate(linear["bands"])
    ]
    return np.concatenate(parts, axis=1)


def weights_of(linear: Entry, tensors: Tensors) -> np.ndarray:
    """float32 [out, in]."""
    if linear["bands"] is None:
        return tensors[f"{linear['name']}.weight"].astype(np.float32)
    scale = tensors[f"{linear['name']}.scale"].repeat([size for _, size in linear["bands"]], axis=1)
    return integers_of(linear, tensors).astype(np.float32) * scale


def round_range(x: np.ndarray, bits: int, scale_dtype: str, clip: float = 1.0) -> Rounded:
    """x float32 [rows, n], one range a row."""
    one, top = np.float32(1), np.float32(2**bits - 1)
    low = np.minimum(np.float32(0), x.min(axis=1, keepdims=True)) * np.float32(clip)
    high = np.maximum(np.float32(0), x.max(axis=1, keepdims=True)) * np.float32(clip)
    scale = (high - low) * np.float32(1.0 / top)
    if scale_dtype == "float16":
        scale = np.minimum(scale, np.float32(65504)).astype(np.float16).astype(np.float32)
    scale = np.where(scale >= np.float32(2.0**-126), scale, one)
    inverse = one / scale
    zero = np.clip(np.rint(-low * inverse), 0, top)
    q = np.clip(np.rint(x * inverse) + zero, 0, top)
    return q, np.broadcast_to(scale, q.shape), np.broadcast_to(zero, q.shape)


def round_bands(x: np.ndarray, form: Entry) -> Rounded:
    parts, start = [], 0
    clips = form["clip"] or [1.0] * len(form["bands"])
    for (bits, size), clip in zip(form["bands"], clips, strict=True):
        for cut in np.split(x[:, start : start + size], form["groups"], axis=1):
            parts.append(round_range(cut, bits, form["scale_dtype"], clip))
        start += size
    q, scale, zero = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return q, scale, zero


def value_of(rounded: Rounded) -> np.ndarray:
    q, scale, zero = rounded
    return scale.astype(np.float64) * (q.astype(np.float64) - zero)


def difference(a: int, b: int, p: int, degree: int) -> int:
    return sum((a // p**i - b // p**i) % p * p**i for i in range(degree))


def product(f: tuple[int, ...], g: tuple[int, ...], p: int) -> tuple[int, ...]:
    out = [0] * (len(f) + len(g) - 1)
    for (i, a), (j, b) in itertools.product(enumerate(f), enumerate(g)):
        out[i + j] = (out[i + j] + a * b) % p
    return tuple(out)


def character_matrix(q: int) -> np.ndarray:
    """Q[a, b] = chi(a - b) over GF(q)."""
    p = next(n for n in range(2, q + 1) if q % n == 0)
    degree = round(math.log(q, p))
    monic = {k: [(*tail, 1) for tail in itertools.product(range(p), repeat=k)] for k in range(1, degree + 1)}
    composite = {
        product(f, g, p) for k in range(1, degree // 2 + 1) for f, g in itertools.product(monic[k], monic[degree - k])
    }
    modulus = next(f for f in monic[degree] if f not in composite)
    chi = np.full(q, -1.0)
    for digits in itertools.product(range(p), repeat=degree):
        square = list(product(digits, digits, p))
        while len(square) > degree:
            lead = square.pop()
            for i in range(degree):
                square[len(square) - degree + i] -= lead * modulus[i]
        chi[sum(digit % p * p**i for i, digit in enumerate(square))] = 1.0
    chi[0] = 0.0
    return np.array([[chi[difference(a, b, p, degree)] for b in range(q)] for a in range(q)])


def bordered(q: int, column: float) -> np.ndarray:
    out = np.ones((q + 1, q + 1))
    out[0, 0], out[1:, 0], out[1:, 1:] = 0.0, column, character_matrix(q)
    return out


def williamson_codes() -> dict[int, list[int]]:
    rows = re.findall(r"^\| (\d+) \| \d+ \| ([0-9A-F, ]+) \|$", (DOCS / "math.md").read_text("utf-8"), re.MULTILINE)
    return {int(n): [int(code, 16) for code in codes.split(",")] for n, codes in rows}


def williamson(m: int) -> np.ndarray:
    n = m // 4
    row, column = np.indices((n, n))
    blocks = []
    for code in williamson_codes()[n]:
        a = np.ones(n)
        for i in range(1, (n - 1) // 2 + 1):
            a[i] = a[n - i] = -1.0 if code >> (i - 1) & 1 else 1.0
        blocks.append(a[(row - column) % n])
    a, b, c, d = blocks
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def random_orthogonal(m: int) -> np.ndarray:
    seed = hashlib.sha256(f"resq.numerics.hadamard:random-orthogonal:{m}".encode("ascii")).digest()
    words = np.frombuffer(hashlib.shake_256(seed).digest(16 * m * m), "<u8")
    u = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    g = np.sqrt(-2 * np.log(u[: m * m])) * np.cos(2 * np.pi * u[m * m :])
    factor, r = np.linalg.qr(g.reshape(m, m))
    return factor * np.sign(np.diag(r)) * math.sqrt(m)


def small_factor(construction: str, m: int) -> np.ndarray:
    """S = sqrt(m) F."""
    match construction:
        case "sylvester":
            return np.ones((1, 1))
        case "paley1":
            return np.eye(m) + bordered(m - 1, -1.0)
        case "paley2":
            a, b = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
            return np.kron(bordered(m // 2 - 1, 1.0), a) + np.kron(np.eye(m // 2), b)
        case "williamson":
            return williamson(m)
        case _:
            return random_orthogonal(m)


def hadamard(power: int, order: int, construction: str) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < power:
        h = np.block([[h, h], [h, -h]])
    return np.kron(h, small_factor(construction, order)) / math.sqrt(power * order)


class Reader:
    """State: an opened checkpoint directory, and the maps it has rebuilt."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = json.loads((directory / "resq.json").read_text("utf-8"))
        self.config = json.loads((directory / "config.json").read_text("utf-8"))
        assert self.manifest["format_version"] == 1
        assert self.config["quantization_config"]["manifest"] == "resq.json"
        self.transforms: dict[tuple[int, int, str], np.ndarray] = {}

    def tensors(self, file: str) -> Tensors:
        content, entry = (self.directory / file).read_bytes(), self.manifest["files"][file]
        assert len(content) == entry["bytes"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        return read_safetensors(self.directory / file)

    def mapped(self, x: np.ndarray, form: Entry, tensors: Tensors) -> np.ndarray:
        """A Format's map in float64, cast to float32; x [rows, n]."""
        if form["map_input_bits"] is not None:
            x = value_of(round_range(x.astype(np.float32), form["map_input_bits"], "float32"))
        x, entry = x.astype(np.float64), form["map"]
        if entry is not None and entry["kind"] == "dense":
            x = x @ tensors[entry["tensor"]].astype(np.float64)
        elif entry is not None and entry["kind"] == "permutation":
            x = x[:, tensors[entry["tensor"]]]
        elif entry is not None:
            assert entry["kind"] == "hadamard"
            key = (entry["power"], entry["order"], entry["construction"])
            self.transforms.setdefault(key, hadamard(*key))
            assert entry["size"] == len(self.transforms[key]) * entry["inner"] == x.shape[1]
            x = x @ np.kron(self.transforms[key], np.eye(entry["inner"]))
        return x.astype(np.float32)

    def linear(self, x: np.ndarray, form: Entry, entry: Entry, tensors: Tensors) -> np.ndarray:
        """y = x W^T + b for x that went through its map."""
        rounded = (x, np.ones_like(x), np.zeros_like(x)) if form["bands"] is None else round_bands(x, form)
        if entry["bands"] is None:
            y = value_of(rounded) @ tensors[f"{entry['name']}.weight"].astype(np.float64).T
        else:
            y = self.packed_product(rounded, form["groups"], entry, tensors)
        if entry["bias"]:
            y = y + tensors[f"{entry['name']}.bias"].astype(np.float64)
        return y.astype(np.float32)

    def packed_product(self, x: Rounded, groups: int, entry: Entry, tensors: Tensors) -> np.ndarray:
        """Exact integer sums per band and group, then the two scales, in float64."""
        weights, scale = integers_of(entry, tensors), tensors[f"{entry['name']}.scale"].astype(np.float64)
        q, x_scale, zero = (part.astype(np.float64) for part in x)
        y, start = np.zeros((len(q), len(weights))), 0
        for index, (_, size) in enumerate(entry["bands"]):
            for _ in range(groups):
                cut = slice(start, start + size // groups)
                y += x_scale[:, start : start + 1] * scale[:, index] * ((q - zero)[:, cut] @ weights[:, cut].T)
                start = cut.stop
        return y

    def replayed(self, form: Entry, entry: Entry, tensors: Tensors, golden: Tensors) -> np.ndarray:
        """The exact sums of a linear's golden input, int64 [rows, segments, out]."""
        name = f"input.{'+'.join(f'{bits}x{size}' for bits, size in form['bands'])}.{form['groups']}"
        q, zero = (golden[f"{name}.{part}"].astype(np.int64) for part in ("q", "zero"))
        sizes = [size // form["groups"] for _, size in form["bands"] for _ in range(form["groups"])]
        x, weights = q - zero.reshape(len(q), -1).repeat(sizes, axis=1), integers_of(entry, tensors)
        sums, start = [], 0
        for _, size in entry["bands"]:
            for _ in range(form["groups"]):
                cut = slice(start, start + size // form["groups"])
                sums.append(x[:, cut] @ weights[:, cut].T)
                start = cut.stop
        return np.stack(sums, axis=1)

    def norm(self, x: np.ndarray, entry: Entry, tensors: Tensors) -> np.ndarray:
        wide = x.astype(np.float64)
        y = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + entry["eps"])
        return (y if entry["gain"] is None else y * tensors[entry["gain"]]).astype(np.float32)

    def rope(self, x: np.ndarray) -> np.ndarray:
        """x float32 [tokens, heads, h], half-split."""
        half = x.shape[-1] // 2
        theta = self.config["rope_parameters"]["rope_theta"]
        angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
        cos, sin = (f(np.concatenate([angles, angles], axis=1)).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return (x.astype(np.float64) * cos + turned.astype(np.float64) * sin).astype(np.float32)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [tokens, vocab] of one sequence."""
        ends = self.manifest["ends"]
        tensors = self.tensors(ends["file"])
        hidden = tensors[ends["embed"]].astype(np.float32)[tokens]
        for entry in self.manifest["layers"]:
            hidden = self.layer(hidden, entry, self.tensors(entry["file"]))
        x = self.mapped(self.norm(hidden, ends["norm"], tensors), ends["head_input"], tensors)
        return self.linear(x, ends["head_input"], ends["head"], tensors)

    def layer(self, hidden: np.ndarray, entry: Entry, tensors: Tensors) -> np.ndarray:
        inputs, linears, norms = entry["inputs"], entry["linears"], entry["norms"]
        heads, kv_heads, h = (self.config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))

        def run(x: np.ndarray, point: str, *roles: str) -> list[np.ndarray]:
            x = self.mapped(x, inputs[point], tensors)
            return [self.linear(x, inputs[point], linears[role], tensors) for role in roles]

        def turned(x: np.ndarray, form: Entry) -> np.ndarray:
            return self.mapped(x.reshape(-1, h), form, tensors)

        def cached(x: np.ndarray, form: Entry) -> np.ndarray:
            flat = turned(x, form)
            if form["bands"] is None:
                wide = np.clip(flat, -65504, 65504).astype(np.float16).astype(np.float64)
            else:
                wide = value_of(round_bands(flat, form))
            return wide.reshape(len(x), -1, h)

        q, k, v = run(self.norm(hidden, norms["attn_in"], tensors), "attn_in", "q", "k", "v")
        q = turned(self.rope(q.reshape(-1, heads, h)), entry["query"]).astype(np.float64).reshape(-1, heads, h)
        k = cached(self.rope(k.reshape(-1, kv_heads, h)), entry["key"])
        v = cached(v, entry["value"])
        out = []
        for j in range(heads):
            kv = j // (heads // kv_heads)
            scores = q[:, j] @ k[:, kv].T / math.sqrt(h)
            scores[np.triu_indices(len(scores), 1)] = -np.inf
            soft = np.exp(scores - scores.max(axis=1, keepdims=True))
            out.append(soft / soft.sum(axis=1, keepdims=True) @ v[:, kv])
        hidden = hidden + run(np.concatenate(out, axis=1).astype(np.float32), "o_in", "o")[0]
        gate, up = run(self.norm(hidden, norms["mlp_in"], tensors), "mlp_in", "gate", "up")
        wide = gate.astype(np.float64)
        return hidden + run(wide / (1 + np.exp(-wide)) * up, "down_in", "down")[0]


# ------------------------------------------------ What resq says ------------------------------------------------

MADE: dict[str, dict[str, Any]] = {
    "resq-4": {"recipe": "resq", "bits": 4},
    "resq-3": {"recipe": "resq", "bits": 3},
    "resq-2-untied": {"recipe": "resq", "bits": 2, "untie": True},
    "resq-4-head-8": {"recipe": "resq", "bits": 4, "head_bits": 8},
    "resq-paper-4": {"recipe": "resq-paper", "bits": 4},
    "rtn-4": {"recipe": "rtn", "bits": 4},
    "rtn-6": {"recipe": "rtn", "bits": 6},
    "quarot-4": {"recipe": "quarot"},
    "quarot-4-without-an-order": {"recipe": "quarot", "heads": 14},
    "resq-w4a8kv4": {"recipe": "resq-w4a8kv4"},
    "resq-weight-only": {"recipe": "resq-weight-only"},
    "resq-kv": {"recipe": "resq-kv"},
    "resq-246": {"recipe": "resq-246"},
    "resq-246-at-3": {"recipe": "resq-246", "bits": 3},
    "resq-4-clipped": {"recipe": "resq", "bits": 4, "clip": [0.7, 0.93]},
}


def clip_everything(directory: Path, clip: list[float]) -> None:
    """Every range of a checkpoint is multiplied by its band's `clip`."""
    manifest = json.loads((directory / "resq.json").read_text("utf-8"))
    for layer in manifest["layers"]:
        for form in (*layer["inputs"].values(), layer["key"], layer["value"]):
            form["clip"] = clip[: len(form["bands"])]
    (directory / "resq.json").write_text(json.dumps(manifest), "utf-8")


@pytest.fixture(scope="module", params=MADE)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with biases (Qwen2), one for each of `MADE`; tests only read it."""
    from tests.conftest import make_checkpoint

    import resq

    place = tmp_path_factory.mktemp("made")
    options = dict(MADE[request.param])
    heads, clip = options.pop("heads", 8), options.pop("clip", None)
    sizes = {"num_attention_heads": heads, "hidden_size": 8 * heads}
    dtype = "float16" if "3" in request.param else "bfloat16"
    source = make_checkpoint(place / "source", "qwen2", dtype=dtype, **sizes)
    (place / "text").write_text("the quick brown fox jumps over a lazy dog. " * 20, encoding="utf-8")
    out = place / "packed"
    resq.quantize(source, out, calibration=[place / "text"], windows=8, window_length=32, **options)
    if clip is not None:
        clip_everything(out, clip)
    return out


def test_every_weight_is_what_the_document_says(directory: Path) -> None:
    from resq.checkpoint.files import CheckpointReader
    from resq.numerics.linear import DenseLinear, PackedLinear

    theirs, ours = CheckpointReader(directory), Reader(directory)
    for index, entry in enumerate(ours.manifest["layers"]):
        parts, tensors = theirs.layer(index), ours.tensors(entry["file"])
        assert set(entry["linears"]) == set(parts.linears) == {"q", "k", "v", "o", "gate", "up", "down"}
        for role, linear in parts.linears.items():
            if isinstance(linear, PackedLinear):
                assert np.array_equal(integers_of(entry["linears"][role], tensors), linear.integers().numpy())
            weight = linear.dequantize() if isinstance(linear, PackedLinear) else linear.weight.float()
            assert np.array_equal(weights_of(entry["linears"][role], tensors), weight.numpy())
            assert (linear.bias is not None) == entry["linears"][role]["bias"] == (role in "qkv")
            if linear.bias is not None:
                assert np.array_equal(tensors[f"{entry['linears'][role]['name']}.bias"], linear.bias.numpy())
    ends, tensors = theirs.ends(), ours.tensors(ours.manifest["ends"]["file"])
    assert np.array_equal(tensors[ours.manifest["ends"]["embed"]].astype(np.float32), ends.embed.float().numpy())
    head = ends.head if isinstance(ends.head, DenseLinear) else ends.head.dense()
    assert np.array_equal(weights_of(ours.manifest["ends"]["head"], tensors), head.weight.float().numpy())


def test_the_document_is_enough_to_run_the_model(directory: Path) -> None:
    import torch

    import resq

    tokens = np.random.default_rng(0).integers(3, 259, 24)
    theirs = resq.load(directory, backend="reference")(torch.from_numpy(tokens)[None])[0].numpy()
    # Both round the same float64 results to float32, so an integer flips once in some 1e8 and would be seen at once;
    # float32 logits may differ in their last bits.
    assert np.abs(Reader(directory).logits(tokens) - theirs).max() <= 1e-6 * np.abs(theirs).max()


def test_every_tensor_is_named_by_the_manifest_or_the_sentinel(directory: Path) -> None:
    manifest = (directory / "resq.json").read_text("utf-8")
    index = json.loads((directory / "model.safetensors.index.json").read_text("utf-8"))
    ours = Reader(directory)
    assert sorted(ours.manifest["files"]) == sorted(set(index["weight_map"].values()))
    for file in ours.manifest["files"]:
        for name, tensor in ours.tensors(file).items():
            assert index["weight_map"][name] == file
            stem = re.sub(r"\.(qweight\.\d+|scale|bias|weight)$", "", name)
            assert f'"{name}"' in manifest or f'"{stem}"' in manifest or (name, tensor.size) == ("model.norm.weight", 0)


def test_golden_vectors_are_what_the_document_says(directory: Path) -> None:
    ours = Reader(directory)
    points = {"attn_in": "qkv", "o_in": ["o"], "mlp_in": ["gate", "up"], "down_in": ["down"]}
    ends = ours.manifest["ends"]
    linears = [(ends["file"], ends["head_input"], ends["head"])]
    for layer in ours.manifest["layers"]:
        for point, roles in points.items():
            linears += [(layer["file"], layer["inputs"][point], layer["linears"][role]) for role in roles]
    linears = [(file, form, linear) for file, form, linear in linears if form["bands"] and linear["bands"]]
    assert (ours.manifest["golden"] is None) == (not linears)
    named = {linear["name"] for _, _, linear in linears}
    golden = read_safetensors(directory / "golden.safetensors") if linears else {}
    assert {name.rpartition(".")[0] for name in golden if not name.startswith("input.")} == named
    for file, form, linear in linears:
        sums = ours.replayed(form, linear, ours.tensors(file), golden)
        channels, number = golden[f"{linear['name']}.channels"], np.arange(1, linear["shape"][0] + 1)
        assert {0, linear["shape"][0] - 1} <= {*channels.tolist()}
        assert len(channels) <= 8
        assert np.array_equal(golden[f"{linear['name']}.sums"], sums[:, :, channels])
        assert np.array_equal(golden[f"{linear['name']}.totals"], np.stack([sums.sum(-1), sums @ number], axis=-1))


def test_the_list_of_hashes_is_what_the_document_says(directory: Path) -> None:
    lines = (directory / "SHA256SUMS.txt").read_text("utf-8")
    files = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    files.remove("SHA256SUMS.txt")
    assert [line[66:] for line in lines.splitlines()] == files
    for file, line in zip(files, lines.splitlines(keepends=True), strict=True):
        if file != "resq.json":  # a fixture changes that one
            assert line == f"{hashlib.sha256((directory / file).read_bytes()).hexdigest()}  {file}\n"


def test_the_examples_of_the_document_are_right() -> None:
    document = (DOCS / "checkpoint.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d) \| ([-\d, ]+) \| ((?:[0-9A-F]{2} ?)+) \|$", document, re.MULTILINE)
    assert [int(bits) for bits, _, _ in rows] == [1, 2, 3, 4, 5, 6, 8]
    for bits, values, packed in rows:
        want = [int(value) for value in values.split(",")]
        row = np.frombuffer(bytes.fromhex(packed), np.uint8)[None]
        assert unpack(row, int(bits), len(want))[0].tolist() == want
    q, scale, zero = round_range(np.array([[-1, 0, 0.5, 2]], np.float32), 4, "float32")
    assert (q.tolist(), zero[0, 0]) == ([[0, 5, 7, 15]], 5)
    assert scale[0, 0] == pytest.approx(0.2)
    q, scale, zero = round_range(np.array([[-1, 0, 0.5, 2]], np.float32), 4, "float32", 0.5)
    assert (q.tolist(), zero[0, 0]) == ([[0, 5, 10, 15]], 5)
    assert scale[0, 0] == pytest.approx(0.1)


def test_every_manifest_key_is_documented() -> None:
    from resq.checkpoint import manifest as code

    document = (DOCS / "checkpoint.md").read_text("utf-8")
    for name, model in vars(code).items():
        if not isinstance(model, type) or not issubclass(model, code._Strict) or model is code._Strict:
            continue
        title = name.removesuffix("Entry")
        found = re.search(rf"^(?:\* )?\*\*{title}\*\*(.*?)(?=^(?:\* )?\*\*|^## )", document, re.MULTILINE | re.DOTALL)
        assert found is not None, f"docs/checkpoint.md does not describe {title}"
        written = set(re.findall(r"`(\w+)`", found[1]))
        assert set(model.model_fields) <= written, f"{title} lacks {set(model.model_fields) - written}"


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("clip", [1.0, 0.93, 0.8, 1e-3])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_activations_round_as_the_document_says(bits: int, clip: float, scale_dtype: str) -> None:
    import torch

    from resq.numerics.affine import asymmetric

    random = np.random.default_rng(bits)
    x = random.standard_normal((400, 33)) * 10.0 ** random.integers(-44, 38, (400, 1))
    x[:40], x[40:80], x[80] = np.abs(x[:40]), -np.abs(x[40:80]), 0
    x = x.astype(np.float32)
    q, scale, zero = round_range(x, bits, scale_dtype, clip)
    theirs = asymmetric(torch.from_numpy(x), bits, getattr(torch, scale_dtype), clip)
    assert np.array_equal(q, theirs[0].numpy())
    assert np.array_equal(scale[:, 0], theirs[1].numpy())
    assert np.array_equal(zero[:, 0], theirs[2].numpy())


@pytest.mark.parametrize(
    ("power", "order", "construction"),
    [
        (32, 1, "sylvester"),
        (4, 28, "paley1"),
        (1, 84, "paley1"),
        (2, 20, "paley2"),
        (2, 76, "paley2"),
        (1, 100, "paley2"),
    ]
    + [(2, order, "williamson") for order in (92, 116, 156, 172)]
    + [(2, 107, "random-orthogonal")],
)
def test_transforms_can_be_rebuilt_from_the_document(power: int, order: int, construction: str) -> None:
    from resq.numerics.hadamard import HadamardPlan, matrix

    theirs = matrix(HadamardPlan(power * order, power, order, construction)).numpy()
    ours = hadamard(power, order, construction)
    assert np.abs(ours @ ours.T - np.eye(power * order)).max() < 1e-12
    # ±1 entries differ by one division; two QRs of a well-conditioned m = 107 by their float64 rounding.
    assert np.abs(ours - theirs).max() < (1e-12 if construction == "random-orthogonal" else 1e-15)
