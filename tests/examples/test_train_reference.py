"""The script that trains a larger model: what it writes can be quantized; too little text is refused."""

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

import resq
from resq.models.source import Source
from resq.models.text import load_tokenizer

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 32,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose models are small."""
    example("train_tiny")
    module = example("train_reference")
    full = module.setup_of

    def small(family: str) -> object:
        setup = full(family)
        sizes = setup.sizes | SMALL | ({"head_dim": 16} if "head_dim" in setup.sizes else {})
        return replace(setup, sizes=sizes, batch=4)

    monkeypatch.setattr(module, "setup_of", small)
    return module


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two files with sixty documents together."""
    lines = [f"document {n}: " + " ".join(f"{n * k % 97} sheep" for k in range(60)) for n in range(60)]
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    files[0].write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:-1]), encoding="utf-8")
    files[1].write_text(lines[-1], encoding="utf-8")
    return files


def trained(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    given = ["train_reference.py", *map(str, arguments), "--tokens", "768", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", given)
    script.main()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_it_writes_can_be_quantized(
    family: str, script: ModuleType, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(script, monkeypatch, tmp_path / "model", *texts, "--family", family)
    source = Source.open(tmp_path / "model")
    assert (source.config["model_type"], source.shape.hidden, source.shape.head_dim) == (family, 64, 16)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    facts = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))
    assert (facts["script"], facts["tokens"]) == ("examples/train_reference.py", 768)
    assert 4 < facts["held_out_nats"] < 6  # six steps: near ln 300 = 5.7
    assert load_tokenizer(tmp_path / "model")("7 sheep")["input_ids"][0] == 0
    packed = resq.quantize(tmp_path / "model", tmp_path / "packed", recipe="resq", calibration=texts, windows=4)
    assert isinstance(resq.load(packed.directory, backend="reference").generate("1", max_new_tokens=2), str)


def test_no_document_is_trained_on_and_held_out(script: ModuleType) -> None:
    texts, held_out = script.split([str(n) for n in range(120)])
    assert held_out == ["49", "99"]
    assert sorted(texts + held_out, key=int) == [str(n) for n in range(120)]
    assert script.first(["ab", "c", "def"], 3) == ["ab", "c"]


def test_the_models_have_25_to_30_million_parameters() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    example("train_tiny")
    module = example("train_reference")
    for family in module.FAMILIES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **module.setup_of(family).sizes))
        assert 25e6 < sum(parameter.numel() for parameter in model.parameters()) < 30e6


def test_too_little_text_and_an_existing_directory_are_refused(
    script: ModuleType,
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for arguments, words in (
        ((tmp_path / "model", texts[1]), "1 documents are too few"),
        ((tmp_path, *texts), "exists already"),
    ):
        with pytest.raises(SystemExit) as refused:
            trained(script, monkeypatch, *arguments)
        assert refused.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
