"""Sizes of published models as Hugging Face configurations, so that speed can be measured without their weights."""

from __future__ import annotations

import copy
from typing import Any

from resq.errors import InputError, nearest


def _llama3(factor: float) -> dict[str, Any]:
    """RoPE of Llama 3.1 and 3.2: trained on 8192 tokens, stretched by `factor`."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _config(
    model_type: str,
    *,
    hidden: int,
    ffn: int,
    layers: int,
    heads: tuple[int, int],
    head_dim: int,
    vocab: int,
    context: int,
    tied: bool,
    eps: float = 1e-5,
    rope: dict[str, Any] | None = None,
    theta: float = 10000.0,
) -> dict[str, Any]:
    """A configuration with what transformers fills in; heads: of queries, of keys and values."""
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": theta},
    }
    if model_type in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * layers}
    if model_type == "mistral":
        config |= {"sliding_window": None}
    return config


def _qwen(model_type: str, **sizes: Any) -> dict[str, Any]:
    return _config(model_type, eps=1e-6, theta=1000000.0, **sizes)


# From the config.json of meta-llama/Llama-*, Qwen/Qwen*, mistralai/Mistral-7B-v0.3; `tiny` is nobody's, for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _config(
        "llama", hidden=256, ffn=512, layers=2, heads=(4, 2), head_dim=64, vocab=512, context=2048, tied=True
    ),
    "llama-3.2-1b": _config(
        "llama",
        hidden=2048,
        ffn=8192,
        layers=16,
        heads=(32, 8),
        head_dim=64,
        vocab=128256,
        context=131072,
        tied=True,
        rope=_llama3(32.0),
    ),
    "llama-3.2-3b": _config(
        "llama",
        hidden=3072,
        ffn=8192,
        layers=28,
        heads=(24, 8),
        head_dim=128,
        vocab=128256,
        context=131072,
        tied=True,
        rope=_llama3(32.0),
    ),
    "llama-3.1-8b": _config(
        "llama",
        hidden=4096,
        ffn=14336,
        layers=32,
        heads=(32, 8),
        head_dim=128,
        vocab=128256,
        context=131072,
        tied=False,
        rope=_llama3(8.0),
    ),
    "llama-3.1-70b": _config(
        "llama",
        hidden=8192,
        ffn=28672,
        layers=80,
        heads=(64, 8),
        head_dim=128,
        vocab=128256,
        context=131072,
        tied=False,
        rope=_llama3(8.0),
    ),
    "llama-2-7b": _config(
        "llama", hidden=4096, ffn=11008, layers=32, heads=(32, 32), head_dim=128, vocab=32000, context=4096, tied=False
    ),
    "qwen2.5-0.5b": _qwen(
        "qwen2", hidden=896, ffn=4864, layers=24, heads=(14, 2), head_dim=64, vocab=151936, context=32768, tied=True
    ),
    "qwen2.5-1.5b": _qwen(
        "qwen2", hidden=1536, ffn=8960, layers=28, heads=(12, 2), head_dim=128, vocab=151936, context=131072, tied=True
    ),
    "qwen2.5-7b": _qwen(
        "qwen2",
        hidden=3584,
        ffn=18944,
        layers=28,
        heads=(28, 4),
        head_dim=128,
        vocab=152064,
        context=131072,
        tied=False,
    ),
    "qwen3-0.6b": _qwen(
        "qwen3", hidden=1024, ffn=3072, layers=28, heads=(16, 8), head_dim=128, vocab=151936, context=40960, tied=True
    ),
    "qwen3-1.7b": _qwen(
        "qwen3", hidden=2048, ffn=6144, layers=28, heads=(16, 8), head_dim=128, vocab=151936, context=40960, tied=True
    ),
    "qwen3-8b": _qwen(
        "qwen3", hidden=4096, ffn=12288, layers=36, heads=(32, 8), head_dim=128, vocab=151936, context=40960, tied=False
    ),
    "mistral-7b-v0.3": _config(
        "mistral",
        hidden=4096,
        ffn=14336,
        layers=32,
        heads=(32, 8),
        head_dim=128,
        vocab=32768,
        context=32768,
        tied=False,
        theta=1000000.0,
    ),
}


def shape_named(name: str) -> dict[str, Any]:
    """A copy of the configuration of that name. Raises InputError naming those that exist. `shape_named("tiny")`."""
    if name not in SHAPES:
        raise InputError(f"no shape is named {name!r}; there are {', '.join(SHAPES)}{nearest(name, SHAPES)}")
    return copy.deepcopy(SHAPES[name])
