"""What a transformer is made of: roles of linears, points where activations are rounded, sites of a basis change."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from resq.errors import InputError, nearest
from resq.models.refused import reason
from resq.models.rope import Rope, rope_from_config

Config = Mapping[str, Any]


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
    attn_norm_out, mlp_norm_out: input of q,k,v and of gate,up, per layer; a diagonal goes into the norm's gain, others
        are online.
    value: each kv head of v (writes) and o's input (reads).
    attn_out: concatenated heads before o; online, o reads.
    query_key: each head of q and k after RoPE; online on both, orthogonal, cancels in q·k.
    mlp_hidden: input of down; a diagonal goes into up, others are online; down reads.
    """

    RESIDUAL = "residual"
    ATTN_NORM_OUT = "attn_norm_out"
    MLP_NORM_OUT = "mlp_norm_out"
    VALUE = "value"
    ATTN_OUT = "attn_out"
    QUERY_KEY = "query_key"
    MLP_HIDDEN = "mlp_hidden"


@dataclass(frozen=True)
class Shape:
    """The sizes and constants of one model; H query heads, G kv heads of h coordinates each, FFN size F.

    windows: sliding window of every layer in tokens, None where a layer attends to everything; empty for no window.
    """

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
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        """Tokens that a query of decoder layer `layer` sees, itself included; None for all before it."""
        return self.windows[layer] if self.windows else None

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


def no_windows(config: Config) -> tuple[int | None, ...]:
    """Full attention in every layer."""
    return ()


def one_window(config: Config) -> tuple[int | None, ...]:
    """`sliding_window` holds for every layer, null for none (Mistral, Phi-3)."""
    window = config.get("sliding_window")
    return () if window is None else (window,) * config["num_hidden_layers"]


def windows_by_layer(config: Config) -> tuple[int | None, ...]:
    """`layer_types` says which layers slide, as transformers derives it from use_sliding_window and max_window_layers
    (Qwen2, Qwen3). Raises InputError for a kind of attention that is neither full nor sliding."""
    kinds = config["layer_types"]
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(f"a layer has {kind!r}; supported are full_attention and sliding_attention")
    if len(kinds) != config["num_hidden_layers"]:
        raise InputError(f"layer_types names {len(kinds)} layers, num_hidden_layers is {config['num_hidden_layers']}")
    window = config.get("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds) if window is not None else ()


@dataclass(frozen=True)
class Architecture:
    """Names of one family's tensors in a Hugging Face checkpoint, and what of it cannot be run.

    layers, embed, head, final_norm: module names; the next three are relative to a layer. linears: of every role.
    norms: RMSNorms by the point whose input they form. head_norms: RMSNorms of each query and key head before RoPE.
    fused: modules whose rows are those of several roles, in this order; `linears` then only names what is written.
    biased: roles that always have a bias; others may have one, in all layers or in none.
    windows: sliding windows from a configuration. refuse: the reason why a configuration cannot be run, or None.
    """

    model_types: tuple[str, ...]
    layers: str
    embed: str
    head: str
    final_norm: str
    linears: Mapping[Role, str]
    norms: Mapping[Point, str]
    head_norms: Mapping[Role, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[Role, ...]] = field(default_factory=dict)
    biased: frozenset[Role] = frozenset()
    windows: Callable[[Config], tuple[int | None, ...]] = no_windows
    refuse: Callable[[Config], str | None] = lambda config: None

    def shape(self, config: Config) -> Shape:
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
        rope = rope_from_config(config, head_dim)
        context = config["max_position_embeddings"]
        windows = self.windows(config)
        if any(window is not None and window < 1 for window in windows):
            raise InputError(f"config.json has sliding_window {config['sliding_window']}; it must be at least 1")
        return Shape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            eps=config["rms_norm_eps"],
            rope=rope,
            tied=bool(config.get("tie_word_embeddings")),
            max_positions=context if rope.limit is None else min(context, rope.limit),
            windows=windows,
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
    """The description of a `model_type`. Raises InputError naming those that exist, and why a known one cannot be."""
    described = _described()
    if model_type in described:
        return described[model_type]
    if why := reason(model_type):
        raise InputError(
            f"{model_type} models cannot be quantized: {why}; supported are {', '.join(sorted(described))}"
        )
    raise InputError(
        f"model type {model_type!r} is not supported; supported are {', '.join(sorted(described))}"
        f"{nearest(model_type, described)} "
        "(docs/add-a-model.md says how to describe another)"
    )
