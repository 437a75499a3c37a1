"""Every recipe, on a tied model and on an untied one with biases and 14 heads: stored, counted, run and hosted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import brief, make_checkpoint
from torch import Tensor

import resq
from resq.backends.reference import dense
from resq.measure.ledger import Ledger, ledger
from resq.models import decoder
from resq.models.source import Source
from resq.numerics.hadamard import HadamardPlan
from resq.numerics.maps import Hadamard
from resq.ptq.recipes import RECIPES

SOURCES: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama"},
    "untied-14-heads": {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "num_attention_heads": 14,
        "hidden_size": 112,
    },
}
TOKENS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(6))


@dataclass(frozen=True)
class Made:
    recipe: str
    source: Path
    directory: Path

    @property
    def model(self) -> resq.Model:
        return resq.load(self.directory)

    @property
    def book(self) -> Ledger:
        model = self.model
        return ledger(model.manifest, model.shape.head_dim)


@pytest.fixture(scope="module", params=SOURCES)
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """One source with every recipe; tests only read."""
    place = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(place / "source", seed=2, **SOURCES[request.param])
    text = place / "text"
    text.write_text("the quick brown fox jumps over a lazy dog while it rains. " * 20, encoding="utf-8")
    made = {}
    for name in RECIPES:
        out = place / name
        resq.quantize(source, out, recipe=brief(name), calibration=[text], windows=8, window_length=32)
        made[name] = Made(name, source, out)
    return made


@pytest.fixture(params=RECIPES)
def made(request: pytest.FixtureRequest, every: dict[str, Made]) -> Made:
    return every[request.param]


def test_the_ledger_counts_the_bytes_of_the_stored_weights(made: Made) -> None:
    model, stored, weights = made.model, 0, 0
    for entry in model.manifest.layers:
        tensors = load_file(made.directory / entry.file)
        names = [linear.name for linear in entry.linears.values()]
        stored += sum(
            tensor.nbytes
            for name, tensor in tensors.items()
            if name.startswith(tuple(f"{prefix}." for prefix in names)) and not name.endswith(".bias")
        )
        weights += sum(linear.shape[0] * linear.shape[1] for linear in entry.linears.values())
    assert made.book.weight_bits == pytest.approx(8 * stored / weights, rel=1e-12)


def test_the_ledger_counts_the_bytes_of_a_filled_cache(made: Made) -> None:
    model, book = made.model, made.book
    caches = model.cache()
    model(TOKENS, caches)
    held = sum(cache.nbytes() for cache in caches)
    assert book.kv_bytes_per_token == held / TOKENS.numel()
    shape = model.shape
    values = shape.layers * shape.kv_heads * shape.head_dim
    assert (book.key_bits + book.value_bits) * values == 8 * book.kv_bytes_per_token


# Bits of one token's inputs in the tied model: 64, 128, 64 and 172 coordinates, 40 bits of scale and zero a range.
INPUT_BITS = {
    **dict.fromkeys(("rtn", "gptq", "smoothquant+", "quarot", "spinquant"), 4 * 428 + 4 * 40),
    **dict.fromkeys(
        ("quik", "resq", "resq+", "resq-learned"), 2 * (56 * 4 + 8 * 8) + 112 * 4 + 16 * 8 + 172 * 4 + 7 * 40
    ),
    "resq-246": 4 * 428 + 10 * 40,
    "resq-paper": 2 * (56 * 4 + 8 * 8) + 112 * 4 + 16 * 8 + 172 * 4 + (5 + 2 * 8) * 40,
    "resq-w4a8kv4": 8 * 428 + 4 * 40,
    **dict.fromkeys(("resq-weight-only", "resq-kv"), 16 * 428),
}


@pytest.mark.parametrize("every", ["tied"], indirect=True)
def test_the_ledger_counts_every_range_of_an_input(made: Made) -> None:
    assert made.book.activation_bits == pytest.approx(INPUT_BITS[made.recipe] / 428, rel=1e-12)


def test_what_a_recipe_leaves_alone_has_16_bits_and_the_rest_as_many_as_resq(every: dict[str, Made]) -> None:
    resq_, a8, weights, cache = (every[name].book for name in ("resq", "resq-w4a8kv4", "resq-weight-only", "resq-kv"))
    assert weights.weight_bits == a8.weight_bits == resq_.weight_bits < 7
    assert (weights.activation_bits, weights.key_bits, weights.value_bits) == (16, 16, 16)
    assert (cache.weight_bits, cache.activation_bits) == (16, 16)
    # 14 · 4 + 2 · 8 bits, and two scales with zero points of 24 bits together.
    assert cache.key_bits == cache.value_bits == a8.key_bits == a8.value_bits == (14 * 4 + 2 * 8 + 2 * 24) / 16


def test_a_manifest_says_in_words_what_was_done(made: Made) -> None:
    manifest = made.model.manifest
    assert manifest.recipe.basis == brief(made.recipe).describe()["basis"]
    assert (manifest.recipe.rounding == "none, every decoder weight stays 16 bit") == (made.recipe == "resq-kv")
    assert (manifest.calibration is None) == (made.recipe == "rtn")
    if manifest.calibration is not None:
        assert manifest.calibration.rounding_windows == (0 if made.recipe == "resq-kv" else 8)
    notes = [note for note in manifest.notes if "Hadamard" in note]
    fallback = made.recipe == "quarot" and made.model.shape.heads == 14
    assert notes == ["14 heads have no Hadamard matrix: one of 224 coordinates at attn_out, none at value"] * fallback
    card = (made.directory / "README.md").read_text("utf-8")
    rounded = {"resq-weight-only": "weights", "resq-kv": "keys, values"}
    assert f"with {rounded.get(made.recipe, 'weights, activations, keys, values')} in packed integers" in card


def test_the_online_transform_of_the_heads_is_recorded(every: dict[str, Made]) -> None:
    model = every["quarot"].model
    heads, size = model.shape.heads, model.shape.head_dim
    want = (
        Hadamard(HadamardPlan(224, 8, 28, "paley1"))
        if heads == 14
        else Hadamard(HadamardPlan(8, 8, 1, "sylvester"), 16)
    )
    for layer, entry in zip(model.layers, model.manifest.layers, strict=True):
        assert layer.inputs["o_in"].map == want
        assert entry.inputs["o_in"].map is not None
        assert entry.inputs["o_in"].map.size == heads * size


def test_prefill_and_decoding_agree(made: Made) -> None:
    model, want = made.model, made.model(TOKENS)
    cache = model.cache()
    got = torch.cat([model(part, cache) for part in TOKENS.split([1, 9, 1, 1, 12], dim=1)], dim=1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_transformers_runs_every_recipe(made: Made) -> None:
    from transformers import AutoModelForCausalLM

    hosted = AutoModelForCausalLM.from_pretrained(made.directory)
    with torch.inference_mode():
        assert torch.equal(hosted(TOKENS).logits, made.model(TOKENS))


def source_logits(directory: Path) -> Tensor:
    source, ops = Source.open(directory), dense(torch.float64)
    layers = [source.layer(index) for index in range(source.shape.layers)]
    return decoder.forward(ops, source.shape, source.ends(), layers, TOKENS)


def test_the_less_is_rounded_the_closer_the_logits(every: dict[str, Made]) -> None:
    want = source_logits(every["resq"].source)
    error = {name: float((each.model(TOKENS) - want).norm() / want.norm()) for name, each in every.items()}
    some, all_of_it = ("resq-w4a8kv4", "resq-weight-only"), ("resq", "resq-paper", "gptq", "quarot", "rtn")
    assert error["resq-kv"] < min(error[name] for name in some), error
    assert max(error[name] for name in some) < min(error[name] for name in all_of_it), error
