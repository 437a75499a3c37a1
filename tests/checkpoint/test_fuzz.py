"""Damaged checkpoints: loading refuses in one line, or gives the tensors as they were written; verifying tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import make_checkpoint

import resq
from resq.checkpoint.golden import GOLDEN_FILE
from resq.errors import InputError
from resq.measure.verify import verify

TRIALS = 400


@pytest.mark.slow
def test_random_damage_is_refused_or_harmless(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden_size=32, intermediate_size=48, head_dim=8)
    packed = resq.quantize(source, tmp_path / "packed", calibration=[text], windows=8, window_length=32).directory
    manifest = json.loads((packed / "resq.json").read_text("utf-8"))
    for layer in manifest["layers"]:
        layer["key"]["clip"] = [0.9] * len(layer["key"]["bands"])
    (packed / "resq.json").write_text(json.dumps(manifest), "utf-8")
    tokens = torch.arange(3, 35)[None]
    before = resq.load(packed)(tokens)
    generator = torch.Generator().manual_seed(0)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    # config.json's numbers are not hashed at load: `copied` in the manifest records them for a full verification.
    files = sorted(file for file in packed.iterdir() if file.suffix == ".safetensors" or file.name == "resq.json")
    messages: list[str] = []
    for trial in range(TRIALS):
        damaged = tmp_path / "damaged"
        shutil.copytree(packed, damaged)
        file = damaged / files[draw(len(files))].name
        content = bytearray(file.read_bytes())
        at = draw(len(content))
        kind = trial % 4
        if kind == 0:
            content[at] ^= 1 << draw(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + 1 + draw(64)]
        else:
            content[at:at] = bytes(draw(256) for _ in range(1 + draw(64)))
        file.write_bytes(content)
        try:
            after = resq.load(damaged)(tokens)
        except InputError as error:
            messages.append(str(error))
        else:
            # Tensors are hashed. The manifest is not: its words for people, or a digit of an eps, may change. What
            # only a verification reads is hashed then.
            assert file.name in ("resq.json", GOLDEN_FILE), (trial, kind, at)
            assert after.shape == before.shape
            if file.name == GOLDEN_FILE:
                assert any(GOLDEN_FILE in problem for problem in verify(damaged, backend="reference").problems)
        shutil.rmtree(damaged)
    assert len(messages) > TRIALS // 2
    assert not [message for message in messages if "\n" in message]
