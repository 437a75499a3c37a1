"""Rotary position embeddings: frequencies from a configuration, tables for positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from resq.errors import InputError, nearest


@dataclass(frozen=True)
class Rope:
    """How a head of h coordinates turns: the pair (i, i + h/2) by position · frequencies[i].

    frequencies: float64 [h / 2] as a tuple, radians per position; 0 for a pair that does not turn (partial rotation).
    factor: multiplies cos and sin of the pairs that turn; 1 except for yarn and longrope.
    limit: the number of positions up to which these are the model's frequencies (dynamic, longrope); None: any number.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    limit: int | None = None

    @property
    def order(self) -> tuple[int, ...] | None:
        """The source coordinate at each of our h coordinates of a q or k head; None when the whole head turns.

        A source has [first halves, second halves, passing], we [first halves, passing, second halves, passing]: one
        rotation of the whole head then serves both. q·k is the same under a permutation of both.
        """
        half = len(self.frequencies)
        turning = sum(f != 0 for f in self.frequencies)
        if turning == half:
            return None
        split = turning + half  # the middle of the passing coordinates [2 turning, 2 half)
        return (*range(turning), *range(2 * turning, split), *range(turning, 2 * turning), *range(split, 2 * half))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [b, t, h], half-split, from angles taken in float64; positions int64 [b, t]."""
        frequencies, factor = _on(self, positions.device)
        angles = positions.to(torch.float64)[..., None] * frequencies
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return torch.cat([cos, cos], dim=-1).to(torch.float32), torch.cat([sin, sin], dim=-1).to(torch.float32)


@lru_cache(maxsize=64)
def _on(rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies and factors float64 [h / 2] on `device`, copied there once: a CUDA graph can hold no copy."""
    with torch.inference_mode(False):
        frequencies = torch.tensor(rope.frequencies, dtype=torch.float64)
        return frequencies.to(device), torch.where(frequencies == 0, 1.0, rope.factor).to(device)


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None, above: float = 0) -> float:
    """parameters[key], or `default` where it is missing or null; InputError unless it is a finite number > `above`."""
    value = default if parameters.get(key) is None else parameters[key]
    if isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf:
        return value
    given = "no" if value is None else f"{value!r} as"
    raise InputError(f"RoPE {parameters['rope_type']!r} has {given} {key}; it must be a number above {above}")


def _stretch(parameters: Mapping[str, Any]) -> float:
    """s: `factor`, or by how much the context was extended where it is missing or null."""
    if parameters.get("factor") is not None:
        return _number(parameters, "factor")
    return _number(parameters, "max_position_embeddings") / _number(parameters, "original_max_position_embeddings")


def _linear(plain: list[float], parameters: Mapping[str, Any]) -> Rope:
    factor = _number(parameters, "factor")
    return Rope(tuple(f / factor for f in plain))


def _dynamic(plain: list[float], parameters: Mapping[str, Any]) -> Rope:
    """NTK: theta grows with the length of the sequence, from max_position_embeddings (not the original) on."""
    _number(parameters, "factor")
    return Rope(tuple(plain), limit=int(_number(parameters, "max_position_embeddings")))


def _llama3(plain: list[float], parameters: Mapping[str, Any]) -> Rope:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    factor, low = _number(parameters, "factor"), _number(parameters, "low_freq_factor")
    high = _number(parameters, "high_freq_factor", above=low)
    trained = _number(parameters, "original_max_position_embeddings")
    scaled = []
    for f in plain:
        turns = trained * f / (2 * math.pi)  # rotations within the trained context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        scaled.append((1 - smooth) * f / factor + smooth * f)
    return Rope(tuple(scaled))


def _yarn(plain: list[float], parameters: Mapping[str, Any]) -> Rope:
    """f' = (1 - γ) f / s + γ f, and (0.1 ln s + 1) on cos and sin (YaRN, arXiv 2309.00071).

    γ falls from 1 at the pair that turns `beta_fast` times within the trained context to 0 at the one that turns
    `beta_slow` times; linearly along the pairs, as published code has it, not along turns, as the paper.
    """
    if "factor" not in parameters:
        raise InputError("RoPE 'yarn' has no factor; it must be a number above 0, or null for the context's extension")
    s, trained = _stretch(parameters), _number(parameters, "original_max_position_embeddings")

    def pair(turns: float) -> float:
        return len(plain) * math.log(trained / (turns * 2 * math.pi)) / math.log(parameters["rope_theta"])

    low, high = pair(_number(parameters, "beta_fast", 32)), pair(_number(parameters, "beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # transformers clips by the count of coordinates, not of pairs, and keeps a ramp of no width finite by 0.001.
    low, high = max(low, 0), min(high, 2 * len(plain) - 1)
    width = high - low or 0.001
    keep = [1 - min(1.0, max(0.0, (i - low) / width)) for i in range(len(plain))]

    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(s) + 1 if s > 1 else 1.0

    both = parameters.get("mscale") and parameters.get("mscale_all_dim")
    m, over = (_number(parameters, "mscale"), _number(parameters, "mscale_all_dim")) if both else (1.0, 0.0)
    factor = _number(parameters, "attention_factor", magnitude(m) / magnitude(over))
    return Rope(tuple((1 - g) * f / s + g * f for f, g in zip(plain, keep, strict=True)), factor)


def _longrope(plain: list[float], parameters: Mapping[str, Any]) -> Rope:
    """f'_i = f_i / λ_i, λ = short_factor up to the trained context L and long_factor for sequences beyond it (LongRoPE,
    arXiv 2402.13753); sqrt(1 + ln s / ln L) on cos and sin of both."""
    for key in ("short_factor", "long_factor"):
        given = parameters.get(key)
        if not isinstance(given, list) or len(given) != len(plain):
            what = f"{len(given)} values" if isinstance(given, list) else given
            raise InputError(f"RoPE 'longrope' has {what} as {key}; it must be a list of {len(plain)} numbers")
        for value in given:
            _number({**parameters, key: value}, key)
    short, s = parameters["short_factor"], _stretch(parameters)
    trained = _number(parameters, "original_max_position_embeddings", above=1)
    magnitude = math.sqrt(1 + math.log(s) / math.log(trained)) if s > 1 else 1.0
    limit = None if short == parameters["long_factor"] else int(trained)
    scaled = tuple(f / value for f, value in zip(plain, short, strict=True))
    return Rope(scaled, _number(parameters, "attention_factor", magnitude), limit)


_KINDS: dict[str, Callable[[list[float], Mapping[str, Any]], Rope]] = {
    "default": lambda plain, parameters: Rope(tuple(plain)),
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
    "longrope": _longrope,
}


def rope_from_config(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4); head_dim h.

    Raises InputError by name of an unsupported scaling, or of a parameter that is missing or out of its range.
    """
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if nested := [key for key, value in parameters.items() if isinstance(value, Mapping)]:
        raise InputError(f"RoPE parameters by kind of layer ({', '.join(nested)}) are not supported; give one set")
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    # Names that Phi-3 checkpoints have for longrope.
    if kind == "su" or (kind == "yarn" and "short_factor" in parameters):
        kind = "longrope"
    if kind not in _KINDS:
        raise InputError(
            f"RoPE scaling {kind!r} is not supported; supported are {', '.join(_KINDS)}{nearest(kind, _KINDS)}"
        )
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        values = (parameters.get(key), config.get(key), default)
        parameters[key] = next(value for value in values if value is not None)
    # As in transformers, the trained context beside the parameters is before the one in them.
    trained = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    longest = config.get("max_position_embeddings")
    parameters |= {"original_max_position_embeddings": trained or longest, "max_position_embeddings": longest}
    parameters["rope_type"] = kind
    theta = _number(parameters, "rope_theta", above=1)
    part = _number(parameters, "partial_rotary_factor")
    turning = int(head_dim * part)
    if head_dim % 2 or turning % 2 or not 0 < turning <= head_dim:
        raise InputError(
            f"RoPE turns {turning} of {head_dim} coordinates of a head (partial_rotary_factor {part:g}); "
            f"both must be even, and the first in 2 … {head_dim}"
        )
    rope = _KINDS[kind]([theta ** (-2 * i / turning) for i in range(turning // 2)], parameters)
    return replace(rope, frequencies=rope.frequencies + (0.0,) * ((head_dim - turning) // 2))
