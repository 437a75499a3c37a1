"""What a transformer is made of: roles of linears, points where activations are rounded, sites of a basis change."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

from resq.errors import InputError
from resq.models.rope import Rope, rope_from_config


class Role(StrEnum):
    """Which linear of a decoder layer."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741  the field's own name
    GATE = "gate"
    UP = "up"
    DOWN = "down"


class Point(StrEnum):
    """Where a linear's input is formed: after a norm, after attention, after SiLU·mul."""

    ATTN_IN = "attn_in"
    O_IN = "o_in"
    MLP_IN = "mlp_in"
    DOWN_IN = "down_in"


# The order in which a layer runs and is rounded.
READERS: dict[Point, tuple[Role, ...]] = {
    Point.ATTN_IN: (Role.Q, Role.K, Role.V),
    Point.O_IN: (Role.O,),
    Point.MLP_IN: (Role.GATE, Role.UP),
    Point.DOWN_IN: (Role.DOWN,),
}


class Site(StrEnum):
    """Where a basis may change, and what absorbs the map.

    residual: whole model; embed, o, down write it, q, k, v, gate, up, head read it; orthogonal, norms folded first.
    norm_out: input of q,k,v or gate,up, per layer; online.
    value: each kv head of v (writes) and o's input (reads).
    attn_out: concatenated heads before o; online, o reads.
    query_key: each head of q and k after RoPE; online on both, orthogonal, cancels in q·k.
    mlp_hidden: input of down; online, down reads.
    """

    RESIDUAL = "residual"
    NORM_OUT = "norm_out"
    VALUE = "value"
    ATTN_OUT = "attn_out"
    QUERY_KEY = "query_key"
    MLP_HIDDEN = "mlp_hidden"


@dataclass(frozen=True)
class Shape:
    """The sizes and constants of one model; H query heads, G kv heads of h coordinates each, FFN size F."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float
    rope: Rope
    tied: bool
    max_positions: int
    window: int | None = None

    def sizes(self) -> dict[Role, tuple[int, int]]:
        """(out, in) of every linear of a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            Role.Q: (q, self.hidden),
            Role.K: (kv, self.hidden),
            Role.V: (kv, self.hidden),
            Role.O: (self.hidden, q),
            Role.GATE: (self.ffn, self.hidden),
            Role.UP: (self.ffn, self.hidden),
            Role.DOWN: (self.hidden, self.ffn),
        }


@dataclass(frozen=True)
class Architecture:
    """Names of one family's tensors in a Hugging Face checkpoint, and what of it cannot be run.

    `refuse(config)` returns the reason why a configuration is not supported, or None.
    """

    model_types: tuple[str, ...]
    layers: str
    embed: str
    head: str
    final_norm: str
    linears: Mapping[Role, str]
    norms: Mapping[Point, str]
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda config: None

    def shape(self, config: Mapping[str, Any]) -> Shape:
        """Read the sizes from a transformers configuration given as a dict (defaults already filled in)."""
        reason = self.refuse(config)
        if reason:
            raise InputError(f"this {config['model_type']} model cannot be quantized: {reason}")
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
            if config[key] < 1:
                raise InputError(f"config.json has {key} {config[key]}; it must be at least 1")
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise InputError(
                f"{heads} query heads cannot share {kv_heads} key/value heads; the second must divide the first"
            )
        return Shape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            eps=config["rms_norm_eps"],
            rope=rope_from_config(config, head_dim),
            tied=bool(config.get("tie_word_embeddings")),
            max_positions=config["max_position_embeddings"],
        )


def _described() -> dict[str, Architecture]:
    """Every architecture described by a module of this package, by model type."""
    import resq.models as package

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        described = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "ARCHITECTURE", None)
        if described is not None:
            found.update(dict.fromkeys(described.model_types, described))
    return found


def architecture_for(model_type: str) -> Architecture:
    """The description of a `model_type`. Raises InputError naming those that exist."""
    described = _described()
    if model_type not in described:
        near = get_close_matches(model_type, described, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"model type {model_type!r} is not supported; supported are {', '.join(sorted(described))}{hint} "
            "(ARCHITECTURE.md says how to describe another)"
        )
    return described[model_type]
