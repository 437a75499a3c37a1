"""Every family with every recipe: quantize, save, load, prefill against token by token, transformers as a host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import brief
from torch import Tensor

import resq
from resq.errors import CheckpointError, InputError
from resq.models.architecture import architecture_for
from resq.ptq.recipes import RECIPES
from resq.runtime.generate import Sampling, continue_tokens

# Windows shorter than the prompt, so that some token leaves them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False},
    "qwen3-sliding": {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "phi3-partly-turning": {
        "model_type": "phi3",
        "head_dim": 16,
        "num_attention_heads": 4,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "tie_word_embeddings": False},
}
PROMPT = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(2))


def packed(family: str, recipe: str, checkpoint: Callable[..., Path], text: Path) -> Path:
    source = checkpoint(**FAMILIES[family])
    out = source.parent / "packed"
    return resq.quantize(source, out, recipe=brief(recipe), calibration=[text], windows=6, window_length=32).directory


def decoded(model: resq.Model, tokens: Tensor) -> Tensor:
    cache = model.cache()
    return torch.cat([model(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])], dim=1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decoding_agree(family: str, recipe: str, checkpoint: Callable[..., Path], text: Path) -> None:
    model = resq.load(packed(family, recipe, checkpoint, text))
    assert [layer.window for layer in model.layers] == [model.shape.window(i) for i in range(model.shape.layers)]
    got, want = decoded(model, PROMPT), model(PROMPT)
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    starts = torch.tensor([0, 5])
    padded = PROMPT.clone()
    padded[1, :5] = 0
    alone = model(PROMPT[1:, 5:])
    assert float((model(padded, None, starts)[1:, 5:] - alone).abs().max()) <= 1e-5 * float(alone.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_logits_text_and_padding(
    family: str, checkpoint: Callable[..., Path], text: Path
) -> None:
    from transformers import AutoModelForCausalLM

    directory = packed(family, "resq", checkpoint, text)
    own, hosted = resq.load(directory), AutoModelForCausalLM.from_pretrained(directory)
    row = PROMPT[:1]
    with torch.inference_mode():
        assert torch.equal(hosted(PROMPT).logits, own(PROMPT))
    made = hosted.generate(row, max_new_tokens=10, do_sample=False)[0, row.shape[1] :].tolist()
    assert made == list(continue_tokens(own, row, 10, Sampling(), own.end_tokens))
    padded = PROMPT.clone()
    padded[1, :5] = 0
    mask = torch.ones_like(padded)
    mask[1, :5] = 0
    both = hosted.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)
    alone = hosted.generate(PROMPT[1:, 5:], max_new_tokens=10, do_sample=False)[0, 7:].tolist()
    assert both[1, 12 : 12 + len(alone)].tolist() == alone


def test_every_described_family_is_here() -> None:
    from resq.models.architecture import _described

    named = {family["model_type"] for family in FAMILIES.values()}
    assert named == set(_described())
    assert all(architecture_for(name).model_types for name in named)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_where_rope_changes_with_the_prompt_both_runtimes_stop(
    rope: str, checkpoint: Callable[..., Path], text: Path
) -> None:
    from transformers import AutoModelForCausalLM

    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    sizes: dict[str, Any] = {"max_position_embeddings": 32, "model_type": "llama"}
    if rope == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
        parameters = {**parameters, **factors}
        sizes = {"max_position_embeddings": 256, "original_max_position_embeddings": 32, "model_type": "phi3"}
        sizes |= {"head_dim": 8}
    source = checkpoint(**sizes, rope_parameters=parameters)
    out = source.parent / "packed"
    resq.quantize(source, out, recipe="resq-kv", calibration=[text], windows=6, window_length=32)
    own, hosted = resq.load(out), AutoModelForCausalLM.from_pretrained(out)
    whole = torch.randint(3, 259, (1, 33), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert torch.equal(hosted(whole[:, :32]).logits, own(whole[:, :32]))
        with pytest.raises(InputError, match="beyond the 32 tokens"):
            hosted(whole)
    with pytest.raises(InputError, match="context of 32"):
        own(whole)


def change(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "edit", "match"),
    [
        ("resq.json", lambda m: m["layers"][1].update(query_norm=None), "norm of q heads"),
        ("resq.json", lambda m: m["layers"][0].update(window=None), "window None, config.json 5"),
        ("config.json", lambda c: c.update(sliding_window=9), "window 5, config.json 9"),
    ],
    ids=["norm", "window", "config"],
)
def test_a_manifest_and_a_configuration_that_disagree_are_refused(
    file: str, edit: Callable[[dict[str, Any]], None], match: str, checkpoint: Callable[..., Path], text: Path
) -> None:
    directory = packed("qwen3-sliding", "resq-kv", checkpoint, text)
    change(directory / file, edit)
    with pytest.raises(CheckpointError, match=match):
        resq.load(directory)


def test_code_that_is_not_copied_is_not_named(checkpoint: Callable[..., Path], text: Path) -> None:
    source = checkpoint()
    change(source / "config.json", lambda config: config.update(auto_map={"AutoConfig": "configuration_phi3.Phi3"}))
    out = source.parent / "packed"
    resq.quantize(source, out, recipe="rtn")
    assert "auto_map" not in json.loads((out / "config.json").read_text(encoding="utf-8"))
