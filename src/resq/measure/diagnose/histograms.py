"""How activations are distributed before and after a recipe's maps (paper Figs. 1a and 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.backends.reference import dense
from resq.measure.diagnose.places import Place, activations, format_at, visits
from resq.models.architecture import Site
from resq.models.decoder import Layer
from resq.models.source import Source
from resq.progress import Progress, silent
from resq.ptq.placement import Placement, fold_norms, in_float64
from resq.ptq.statistics import in_dtype

BINS = 81


@dataclass(frozen=True)
class Histogram:
    """Counts of one band's coordinates in equal bins over -limit … limit; bits: of the band, None where nothing was
    mapped or rounded. kurtosis: E x⁴ / (E x²)², 3 for a Gaussian. peak: max |x| over the root mean square."""

    bits: int | None
    size: int
    counts: tuple[int, ...]
    kurtosis: float
    peak: float


@dataclass(frozen=True)
class Distribution:
    """One place of one layer before the maps (one histogram) and after them (one for each band). limit: the largest
    |x| of both. before_channels, after_channels: max |x| of every coordinate over all tokens, in order."""

    place: str
    layer: int
    limit: float
    before: Histogram
    after: tuple[Histogram, ...]
    before_channels: tuple[float, ...]
    after_channels: tuple[float, ...]


def histogram(x: Tensor, limit: float, bits: int | None = None) -> Histogram:
    """Of x [rows, n] over -limit … limit."""
    wide = x.to(torch.float64)
    square = wide.square()
    power = float(square.mean())
    counts = torch.histc(wide, BINS, -limit, limit).to(torch.int64) if limit > 0 else torch.zeros(BINS)
    kurtosis = float(square.square().mean()) / power**2 if power > 0 else 0.0
    peak = float(wide.abs().max()) / power**0.5 if power > 0 else 0.0
    return Histogram(bits, x.shape[-1], tuple(int(count) for count in counts), kurtosis, peak)


@torch.inference_mode()
def distributions(
    source: Source, placement: Placement, windows: Tensor, layer: int, progress: Progress = silent
) -> list[Distribution]:
    """Every place of decoder layer `layer` on windows int64 [windows, length], in the source's coordinates (norm gains
    folded as the placement has them) and in the placement's."""
    ops, shape, residual = dense(torch.float32), source.shape, placement.map_at(Site.RESIDUAL)
    for visit in visits(source, windows, "measuring distributions", progress):
        if visit.index != layer:
            continue
        plain = (fold_norms if placement.folds else in_float64)(visit.layer)
        placed = placement.layer(visit.layer, layer)
        old: dict[Place, list[Tensor]] = {place: [] for place in Place}
        new: dict[Place, list[Tensor]] = {place: [] for place in Place}
        for hidden in visit.hidden:
            turned = hidden if residual is None else residual.apply(hidden.to(torch.float64)).to(ops.dtype)
            for found, which, states in ((old, plain, hidden), (new, placed, turned)):
                for place, x in activations(ops, shape, in_dtype(which, ops.dtype), states, visit.at).items():
                    found[place].append(x.flatten(0, -2))
        return [_distribution(place, layer, placed, torch.cat(old[place]), torch.cat(new[place])) for place in Place]
    raise AssertionError(f"layer {layer} of {shape.layers}")


def _distribution(place: Place, index: int, placed: Layer, before: Tensor, after: Tensor) -> Distribution:
    bands = format_at(placed, place).bands
    limit = float(torch.maximum(before.abs().max(), after.abs().max()))
    cuts = [(None, slice(None))] if bands is None else list(zip([b.bits for b in bands], bands.slices(), strict=True))
    return Distribution(
        str(place),
        index,
        limit,
        histogram(before, limit),
        tuple(histogram(after[:, cut], limit, bits) for bits, cut in cuts),
        tuple(before.abs().amax(dim=0).tolist()),
        tuple(after.abs().amax(dim=0).tolist()),
    )
