"""Frequencies and tables of rotary embeddings are those of transformers, and what is not known is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resq.errors import InputError
from resq.models.rope import rope_from_config

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default-long": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    # The published values of Llama 3.1 8B and Llama 3.2 1B.
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3-32": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def rotary_of_transformers(parameters: dict[str, Any], head_dim: int) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=parameters)
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_tables_are_those_of_transformers(name: str, head_dim: int) -> None:
    rope = rope_from_config({"rope_parameters": SCALINGS[name]}, head_dim)
    rotary = rotary_of_transformers(SCALINGS[name], head_dim)
    assert rope.factor == rotary.attention_scaling
    got = torch.tensor(rope.frequencies, dtype=torch.float64)
    torch.testing.assert_close(got, rotary.inv_freq.double(), rtol=1e-6, atol=0)

    positions = torch.tensor([[0, 1, 2, 3], [5, 7, 11, 13]])
    cos, sin = rope.tables(positions)
    want_cos, want_sin = rotary(torch.zeros(1), positions)
    assert (cos.dtype, cos.shape) == (torch.float32, (2, 4, head_dim))
    # An angle below 13 in float32 is off by half a unit in its last place, from the frequency and from the product.
    atol = 13 * 2 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(cos, want_cos, rtol=0, atol=atol)
    torch.testing.assert_close(sin, want_sin, rtol=0, atol=atol)


def test_tables_of_far_positions_are_as_exact_as_those_of_near_ones() -> None:
    rope = rope_from_config({"rope_theta": 10000.0}, 8)
    far = 1_000_003
    cos, sin = rope.tables(torch.tensor([[far]]))
    angles = far * torch.tensor(rope.frequencies * 2, dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0].double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[0, 0].double(), angles.sin(), rtol=0, atol=1e-7)


def test_rope_theta_and_rope_scaling_of_transformers_4_mean_the_same() -> None:
    new = rope_from_config({"rope_parameters": SCALINGS["linear"]}, 64)
    old = rope_from_config({"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}, 64)
    assert new == old


def test_theta_is_ten_thousand_where_nothing_names_it() -> None:
    assert rope_from_config({}, 64) == rope_from_config({"rope_parameters": SCALINGS["default"]}, 64)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "proportional", "mrope"])
def test_another_scaling_is_refused_by_name(kind: str) -> None:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(InputError, match=rf"\A.*{kind}.*default, linear, llama3.*\Z"):
        rope_from_config({"rope_parameters": parameters}, 64)


@pytest.mark.parametrize(
    "config", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}]
)
def test_partial_rotation_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="partial rotary"):
        rope_from_config(config, 64)
