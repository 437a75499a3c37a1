"""Qwen2 and Qwen2.5 with full attention: Llama's names with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from resq.models import llama


def refuse(config: Mapping[str, Any]) -> str | None:
    """Sliding-window layers are refused rather than run as full attention."""
    if config.get("use_sliding_window") and "sliding_attention" in (config.get("layer_types") or ["sliding_attention"]):
        return "it uses sliding-window attention, which is not supported yet"
    return llama.refuse(config)


ARCHITECTURE = replace(llama.ARCHITECTURE, model_types=("qwen2",), refuse=refuse)
