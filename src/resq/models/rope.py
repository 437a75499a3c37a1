"""Rotary position embeddings: frequencies from a configuration, tables for positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resq.errors import InputError


@dataclass(frozen=True)
class Rope:
    """Frequencies float64 [h / 2] as a tuple, and the factor on cos and sin (1 except for yarn)."""

    frequencies: tuple[float, ...]
    factor: float = 1.0

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [b, t, h], half-split, from angles taken in float64; positions int64 [b, t]."""
        angles = positions.to(torch.float64)[..., None] * torch.tensor(self.frequencies, dtype=torch.float64)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.factor).to(torch.float32), (angles.sin() * self.factor).to(torch.float32)


def _plain(theta: float, dim: int) -> list[float]:
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def _linear(frequencies: list[float], parameters: Mapping[str, Any]) -> list[float]:
    return [f / parameters["factor"] for f in frequencies]


def _llama3(frequencies: list[float], parameters: Mapping[str, Any]) -> list[float]:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    trained = parameters["original_max_position_embeddings"]
    scaled = []
    for f in frequencies:
        turns = trained * f / (2 * math.pi)  # rotations within the trained context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        scaled.append((1 - smooth) * f / factor + smooth * f)
    return scaled


_SCALED = {"default": lambda frequencies, parameters: frequencies, "linear": _linear, "llama3": _llama3}


def rope_from_config(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4). Raises InputError by name of an
    unsupported scaling: one that changes with the length of the prompt has no single cache."""
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _SCALED:
        raise InputError(f"RoPE scaling {kind!r} is not supported; supported are {', '.join(_SCALED)}")
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    if (parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InputError("partial rotary embeddings are not supported; the whole head must rotate")
    return Rope(tuple(_SCALED[kind](_plain(theta, head_dim), parameters)))
