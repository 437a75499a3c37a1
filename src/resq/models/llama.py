"""Llama 2, 3 and 3.x: MHA or GQA, tied or untied embeddings, scaled RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resq.models.architecture import Architecture, Point, Role


def refuse(config: Mapping[str, Any]) -> str | None:
    """Only SiLU-gated feed-forward blocks are run."""
    if config.get("hidden_act") != "silu":
        return f"its activation is {config.get('hidden_act')!r}; supported is 'silu'"
    return None


ARCHITECTURE = Architecture(
    model_types=("llama",),
    layers="model.layers",
    embed="model.embed_tokens",
    head="lm_head",
    final_norm="model.norm",
    linears={
        Role.Q: "self_attn.q_proj",
        Role.K: "self_attn.k_proj",
        Role.V: "self_attn.v_proj",
        Role.O: "self_attn.o_proj",
        Role.GATE: "mlp.gate_proj",
        Role.UP: "mlp.up_proj",
        Role.DOWN: "mlp.down_proj",
    },
    norms={Point.ATTN_IN: "input_layernorm", Point.MLP_IN: "post_attention_layernorm"},
    refuse=refuse,
)
