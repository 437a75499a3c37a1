"""The script that trained the embedded model: whole, repeatable, and refused where it would overwrite."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import example

from resq import embedded
from resq.embedded import corpus
from resq.models.source import Source
from resq.models.text import load_tokenizer


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, reading a small part of the standard library and training for three small steps."""
    module = example("train_tiny")
    monkeypatch.setattr(module, "TINY", replace(module.TINY, batch=2))
    texts = {side: [text[:4000] for text in corpus.documents(evaluation=side)[:12]] for side in (False, True)}
    monkeypatch.setattr(module, "documents", lambda *, evaluation: texts[evaluation])
    return module


def trained(script: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, torch.Tensor]:
    tokens = str(3 * script.TINY.batch * script.TINY.length)
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", str(out), "--tokens", tokens, *more])
    script.main()
    return load_file(out / "model.safetensors")


def test_the_same_seed_trains_the_same_model_and_another_another(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(script, tmp_path / "first", monkeypatch)
    again = trained(script, tmp_path / "again", monkeypatch)
    other = trained(script, tmp_path / "other", monkeypatch, "--seed", "1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    facts = json.loads((tmp_path / "first" / "training.json").read_text(encoding="utf-8"))
    assert facts["tokens"] == 3 * script.TINY.batch * script.TINY.length
    assert 4 < facts["held_out_nats"] < 8  # three steps: a little below ln 2048 = 7.6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_it_writes_has_the_shape_of_the_embedded_model(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    trained(script, out, monkeypatch)
    assert Source.open(out).shape == Source.open(embedded.MODEL).shape
    tokenizer = load_tokenizer(out)
    ids = tokenizer("def f():")["input_ids"]
    assert tokenizer.decode(ids) == f"{script.END}def f():"
    with pytest.raises(SystemExit) as refused:
        trained(script, out, monkeypatch)
    assert refused.value.code == 2
