"""Golden vectors of what was rounded: the exact sums of every linear with integer weights and integer inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from resq.backends.reference import reference
from resq.checkpoint.golden import Golden, golden_input
from resq.models.architecture import READERS
from resq.models.decoder import Layer
from resq.numerics.device import CPU, moved
from resq.numerics.formats import ActivationFormat
from resq.numerics.linear import Linear, PackedLinear

# Output channels unpacked at once: what this takes is small beside a layer.
BLOCK = 1024


def golden_of(linear: Linear, format: ActivationFormat) -> Golden | None:
    """The golden vectors of one linear, computed where it lies; None without integers on both sides."""
    if not isinstance(linear, PackedLinear) or format.bands is None:
        return None
    ops = reference(linear.scale.device)
    assert ops.accumulate is not None
    x = golden_input(format.bands, format.groups)
    here, parts = moved(x, ops.device), []
    for start in range(0, linear.shape[0], BLOCK):
        some = linear.rows(slice(start, start + BLOCK))
        parts.append(ops.accumulate(here, ops.prepack(some, format)))
    return moved(Golden.of(here, torch.cat(parts, dim=-1)), CPU)


def golden_of_layer(layer: Layer, prefix: str, names: Mapping[str, str]) -> dict[str, Golden]:
    """By the linears' names in the checkpoint, `prefix` being `model.layers.3` and `names` those of the roles."""
    vectors = {
        f"{prefix}.{names[role]}": golden_of(layer.linears[role], layer.inputs[point])
        for point, roles in READERS.items()
        for role in roles
    }
    return {name: golden for name, golden in vectors.items() if golden is not None}
