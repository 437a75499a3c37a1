"""A small checkpoint with every kind of map, band and linear, written without the quantization pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from resq.checkpoint.files import EndParts, Parts
from resq.checkpoint.golden import Golden
from resq.checkpoint.manifest import CalibrationEntry, Manifest, RecipeEntry, SourceEntry
from resq.checkpoint.work import WorkDirectory
from resq.checkpoint.writer import CheckpointWriter
from resq.numerics import hadamard
from resq.numerics.bands import Bands
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, PackedLinear
from resq.numerics.maps import Dense, Hadamard, PerHead, Permutation, random_orthogonal

NAMES = {role: f"part.{role}_proj" for role in ("q", "k", "v", "o", "gate", "up", "down")}
NAMES |= {"attn_in": "norm_1", "mlp_in": "norm_2"}
END_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
HIDDEN, FFN, VOCAB, HEAD = 24, 56, 10, 8
LAYERS = 2


def packed(generator: torch.Generator, out: int, *bands: tuple[int, int], bias: bool = False) -> PackedLinear:
    integers = [torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (out, n), generator=generator) for b, n in bands]
    integers = [part * 2 + 1 if b == 1 else part for part, (b, _) in zip(integers, bands, strict=True)]
    scale = torch.rand(out, len(bands), generator=generator)
    return PackedLinear.from_integers(
        torch.cat(integers, dim=1), scale, Bands.of(*bands), torch.randn(out, generator=generator) if bias else None
    )


def layer_parts(seed: int) -> Parts:
    """One decoder layer: the query map is the key map, the same tensor."""
    g = torch.Generator().manual_seed(seed)
    turn = Dense(random_orthogonal(HEAD, g).to(torch.float32))
    heads = torch.stack([random_orthogonal(HEAD, g).to(torch.float32) for _ in range(3)])
    kv = Bands.of((4, 7), (8, 1))
    mixed = Hadamard(hadamard.plan(FFN // 7), inner=7) if seed else Hadamard(hadamard.plan(FFN))
    return Parts(
        linears={
            "q": packed(g, HIDDEN, (3, 13), (4, 8), (8, 3), bias=True),
            "k": packed(g, HEAD, (2, HIDDEN)),
            "v": DenseLinear(torch.randn(HEAD, HIDDEN, generator=g).to(torch.float16)),
            "o": packed(g, HIDDEN, (4, 18), (8, 6)),
            "gate": packed(g, FFN, (1, 5), (5, HIDDEN - 5)) if seed else packed(g, FFN, (6, HIDDEN)),
            "up": packed(g, FFN, (8, HIDDEN)),
            "down": packed(g, HIDDEN, (3, FFN)),
        },
        norms={"attn_in": Norm(1e-5, torch.randn(HIDDEN, generator=g)), "mlp_in": Norm(1e-6)},
        inputs={
            "attn_in": ActivationFormat(bands=Bands.of((3, 13), (4, 8), (8, 3))),
            "o_in": ActivationFormat(Permutation(torch.randperm(HIDDEN, generator=g)), Bands.of((4, 18), (8, 6)), 3),
            "mlp_in": ActivationFormat(PerHead(heads), map_input_bits=8),
            "down_in": ActivationFormat(mixed, Bands.of((4, FFN)), clip=(0.93,)),
        },
        heads=HeadFormats(
            query=ActivationFormat(turn),
            key=ActivationFormat(turn, kv, scale_dtype=torch.float16, clip=(0.8, 1.0)),
            value=ActivationFormat(None, kv, scale_dtype=torch.float16),
        ),
        window=7 if seed else None,
    )


def end_parts(*, tied: bool) -> EndParts:
    g = torch.Generator().manual_seed(99)
    embed = torch.randn(VOCAB, HIDDEN, generator=g).to(torch.bfloat16)
    if tied:
        mixed = Dense(torch.randn(HIDDEN, HIDDEN, generator=g), orthogonal=False)
        return EndParts(embed, Norm(1e-5), ActivationFormat(mixed), DenseLinear(embed), tied=True)
    head = packed(g, VOCAB, (8, HIDDEN))
    return EndParts(embed, Norm(1e-5, torch.randn(HIDDEN, generator=g)), PLAIN, head, tied=False)


def header() -> dict[str, Any]:
    return {
        "made_by": {"resq": "test"},
        "recipe": RecipeEntry(name="none", basis=["a"], precision={"weights": "4 bit"}, rounding="none", seed=0),
        "source": SourceEntry(
            name="x", model_type="llama", dtype="bfloat16", bytes=1, parameters=2, tied=True, sha256={"f": "0"}
        ),
        "calibration": CalibrationEntry(
            origin="text", windows=2, rounding_windows=1, window_length=8, tokens_sha256="0", forward="float32, cpu"
        ),
        "notes": ["a remark"],
    }


def fill(writer: CheckpointWriter, *, tied: bool = True, golden: Golden | None = None) -> None:
    """Everything but `close`."""
    writer.add_ends(END_NAMES, end_parts(tied=tied))
    for index in range(LAYERS):
        prefix = f"model.layers.{index}"
        vectors = {} if golden is None else {f"{prefix}.{NAMES['q']}": golden}
        writer.add_layer(index, LAYERS, prefix, NAMES, layer_parts(index), vectors)


def stopped(out: Path, inputs: Mapping[str, Any] | None = None, golden: Golden | None = None) -> WorkDirectory:
    """Work on a checkpoint that was interrupted when all layers were written."""
    with suppress(KeyboardInterrupt), WorkDirectory(out, inputs or {}) as work:
        fill(CheckpointWriter(work), golden=golden)
        raise KeyboardInterrupt
    return work


def write(out: Path, before_close: Callable[[Path], None] = lambda work: None, *, tied: bool = True) -> Manifest:
    """A whole checkpoint; `before_close` is told the hidden directory once everything else is written."""
    with WorkDirectory(out, {}) as work:
        writer = CheckpointWriter(work)
        fill(writer, tied=tied)
        before_close(work.path)
        return writer.close(**header())


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint directory to read or to damage."""
    out = tmp_path / "packed"
    write(out)
    return out


@pytest.fixture
def edit(written: Path) -> Callable[..., Path]:
    """`edit("layers/0/window", 3)` sets a value of the manifest (a new key too) and returns the directory."""

    def change(path: str, value: Any) -> Path:
        file = written / "resq.json"
        manifest = json.loads(file.read_text("utf-8"))
        node = manifest
        *steps, last = (int(step) if step.isdigit() else step for step in path.split("/"))
        for step in steps:
            node = node[step]
        node[last] = value
        file.write_text(json.dumps(manifest), encoding="utf-8")
        return written

    return change


@pytest.fixture
def retensor(written: Path, edit: Callable[..., Path]) -> Callable[..., Path]:
    """`retensor(file, name, change)` replaces a tensor, or removes it for None; size and hash then fit."""

    def change(file: str, name: str, new: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
        tensors = load_file(written / file)
        value = new(tensors.pop(name))
        save_file(tensors if value is None else {**tensors, name: value}, written / file)
        content = (written / file).read_bytes()
        return edit(f"files/{file}", {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})

    return change
