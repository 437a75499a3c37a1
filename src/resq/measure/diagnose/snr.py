"""Signal-to-noise ratio of rounded activations, layer by layer and place by place (paper Fig. 1b)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resq.backends.reference import dense
from resq.errors import InputError
from resq.measure.diagnose.places import Place, Visit, activations, format_at, visits
from resq.models.architecture import Point, Shape, Site
from resq.models.source import Source
from resq.numerics.maps import LinearMap, PerHead
from resq.progress import Progress, silent
from resq.ptq.basis.pca import Pca, Pick, by_magnitude, by_variance
from resq.ptq.pipeline import fit_maps
from resq.ptq.placement import INPUT_SITES, Placement
from resq.ptq.recipe import Basis, Moments, Recipe
from resq.ptq.statistics import in_dtype

# What decides which 1/8 of the coordinates is precise; AS_THEY_COME: the last channels, whatever they hold.
PICKS = {"principal components": by_variance, "loudest channels": by_magnitude}
AS_THEY_COME = "last channels"


@dataclass(frozen=True)
class Snr:
    """10 log10(||X||² / ||X - X̂||²) of one layer's activations at one place, in dB; None where nothing is lost."""

    method: str
    layer: int
    place: str
    db: float | None


def maps_before(placement: Placement, place: Place, layer: int) -> list[LinearMap]:
    """The maps that a place's activations went through, in order."""
    shape = placement.shape
    value = placement.map_at(Site.VALUE, layer)
    match place:
        case Place.KEY:
            found = []  # orthogonal; a rounded rotation's own error is no rounding of keys
        case Place.VALUE:
            found = [value]
        case Place.O_IN:
            repeated = value.repeated(shape.heads // shape.kv_heads) if isinstance(value, PerHead) else None
            found = [repeated, placement.map_at(INPUT_SITES[Point.O_IN], layer)]
        case Place.DOWN_IN:
            found = [placement.map_at(INPUT_SITES[Point.DOWN_IN], layer)]
        case _:
            found = [placement.map_at(Site.RESIDUAL), placement.map_at(INPUT_SITES[Point(place)], layer)]
    return [map for map in found if map is not None]


def inverse(maps: list[LinearMap], size: int) -> Tensor | None:
    """The matrix that takes the maps' outputs back, float64 [size, size]; None where all are orthogonal and change no
    norm."""
    if all(map.orthogonal for map in maps):
        return None
    # dual(w) = w M^-T, so M^-1 is the transpose of the identity's dual.
    back = torch.eye(size, dtype=torch.float64)
    for map in reversed(maps):
        back = back @ map.dual(torch.eye(size, dtype=torch.float64)).T
    return back


class _Energy:
    """State: Σ x² of a signal and of its rounding's noise, float64."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, x: Tensor, rounded: Tensor) -> None:
        self.signal += float(x.to(torch.float64).square().sum())
        self.noise += float((x.to(torch.float64) - rounded).square().sum())

    def db(self) -> float | None:
        if self.noise == 0 or self.signal == 0:
            return None
        return float(10 * torch.log10(torch.tensor(self.signal / self.noise, dtype=torch.float64)))


def layer_snr(placement: Placement, visit: Visit) -> dict[Place, float | None]:
    """The SNR of every place that the placement's precision rounds, for one layer of the source.

    The hidden states are the 16-bit model's, in the placement's basis, and nothing before a place is rounded: each
    place's own rounding is all that is seen. Maps that are not orthogonal (balanced heads, SmoothQuant's factors) are
    undone first, so that all methods are measured by the same norm; norm gains stay where the recipe has them.
    """
    ops, shape = dense(torch.float32), placement.shape
    layer = placement.layer(visit.layer, visit.index)
    run, residual = in_dtype(layer, ops.dtype), placement.map_at(Site.RESIDUAL)
    sums = {place: _Energy() for place in Place if format_at(layer, place).bands is not None}
    back: dict[Place, Tensor | None] = {}
    for hidden in visit.hidden:
        turned = hidden if residual is None else residual.apply(hidden.to(torch.float64)).to(ops.dtype)
        seen = activations(ops, shape, run, turned, visit.at)
        for place, energy in sums.items():
            x = seen[place]
            rounded = format_at(layer, place).quantize(x).dequantize(torch.float64)
            if place is Place.VALUE:
                x, rounded = x.flatten(-2), rounded.flatten(-2)
            if place not in back:
                back[place] = inverse(maps_before(placement, place, visit.index), x.shape[-1])
            undo = back[place]
            if undo is not None:
                x, rounded = x.to(torch.float64) @ undo, rounded @ undo
            energy.add(x, rounded)
    return {place: energy.db() for place, energy in sums.items()}


@torch.inference_mode()
def snr(source: Source, placements: Mapping[str, Placement], windows: Tensor, progress: Progress = silent) -> list[Snr]:
    """Of every method (a name and its placement), layer and rounded place, on windows int64 [windows, length].

    Ranges are not clipped: a recipe that searches clips does so while it rounds, after its placement.
    """
    rows = []
    for visit in visits(source, windows, "measuring SNR", progress):
        for method, placement in placements.items():
            found = layer_snr(placement, visit)
            rows += [Snr(method, visit.index, str(place), db) for place, db in found.items()]
    return rows


def mean_db(rows: list[Snr], method: str, place: str) -> float | None:
    """Mean over layers in dB of one method at one place; None where it rounds nothing there."""
    found = [row.db for row in rows if (row.method, row.place) == (method, place) and row.db is not None]
    return sum(found) / len(found) if found else None


def other_bases(recipe: Recipe, moments: Moments, shape: Shape, seed: int) -> dict[str, Placement]:
    """A PCA recipe with each of `PICKS` in place of its own choice, and without any map where PCA gives one: the same
    cut and bits in other coordinates. Raises InputError for a recipe without PCA."""
    sites = frozenset(site for basis in recipe.basis if isinstance(basis, Pca) for site in basis.on)
    if not sites:
        raise InputError(f"recipe {recipe.name} has no PCA basis to exchange; take one of resq's")

    def placed(picked: Recipe) -> Placement:
        return Placement(shape, fit_maps(picked, moments, shape, seed), recipe.precision, recipe.folds_norms)

    placements = {
        name: placed(replace(recipe, basis=tuple(_picking(basis, pick) for basis in recipe.basis)))
        for name, pick in PICKS.items()
    }
    own = placed(recipe)
    others = {at: map for at, map in own.maps.items() if at.site not in sites}
    return {**placements, AS_THEY_COME: replace(own, maps=others)}


def _picking(basis: Basis, pick: Pick) -> Basis:
    return replace(basis, pick=pick) if isinstance(basis, Pca) else basis
