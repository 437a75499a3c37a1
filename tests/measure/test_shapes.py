"""The named shapes are the published models': this package and transformers read the same sizes from them."""

from __future__ import annotations

import pytest
import torch

from resq.errors import InputError
from resq.measure.shapes import SHAPES, shape_named
from resq.models.architecture import architecture_for

# Parameters as the model cards' safetensors headers count them, tied heads once.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-2-7b": 6_738_415_616,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b-v0.3": 7_248_023_552,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape_named(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_as_transformers_fills_it_in(name: str) -> None:
    from transformers import AutoConfig

    config = shape_named(name)
    architecture = architecture_for(config["model_type"])
    assert architecture.shape(config) == architecture.shape(AutoConfig.for_model(**config).to_dict())


def test_every_published_shape_is_counted() -> None:
    assert SHAPES.keys() - {"tiny"} == PUBLISHED.keys()


def test_a_shape_is_a_copy() -> None:
    shape_named("llama-3.2-1b")["rope_parameters"]["factor"] = 1.0
    assert shape_named("llama-3.2-1b")["rope_parameters"]["factor"] == 32.0


def test_an_unknown_shape_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"'llama-3\.2-1B-x'.*qwen3-8b.*did you mean llama-3\.2-1b\?") as refused:
        shape_named("llama-3.2-1B-x")
    assert "\n" not in str(refused.value)
