"""Bases from the largest magnitudes of channels: QUIK's permutations and SmoothQuant's diagonals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import Point, Shape, Site
from resq.numerics.maps import Diagonal, LinearMap, PerHead, Permutation
from resq.progress import Progress
from resq.ptq.recipe import At, Fitted, Moments, Peaks, Setting, Statistic, Tuned, check_sites
from resq.ptq.simulation import Simulation

# Inputs that a permutation orders.
POINTS = {Site.ATTN_NORM_OUT: Point.ATTN_IN, Site.MLP_NORM_OUT: Point.MLP_IN, Site.ATTN_OUT: Point.O_IN}
# Inputs that a diagonal scales.
SMOOTHED = {Site.ATTN_NORM_OUT: Point.ATTN_IN, Site.MLP_NORM_OUT: Point.MLP_IN, Site.MLP_HIDDEN: Point.DOWN_IN}


@dataclass(frozen=True)
class OutliersLast:
    """Permutations by ascending max |x| over the calibration text, so that the channels of largest outliers are the
    last, precise ones (QUIK, arXiv 2310.09259).

    attn_norm_out, mlp_norm_out, attn_out: gathered online, per layer; value: per kv head, in v and o; query_key: per
    layer, shared by its heads, online.
    """

    on: tuple[Site, ...]
    needs = frozenset({Statistic.PEAKS})

    def __post_init__(self) -> None:
        check_sites("outliers_last", self.on, (*POINTS, Site.VALUE, Site.QUERY_KEY))

    @property
    def sites(self) -> frozenset[Site]:
        """The sites given."""
        return frozenset(self.on)

    orders = sites

    def check(self, shape: Shape, tokens: int) -> None:
        """Always possible."""

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        """Maps of every layer."""
        assert moments.peaks is not None
        return {At(site, layer): self.map(site, peaks) for layer, peaks in enumerate(moments.peaks) for site in self.on}

    def map(self, site: Site, peaks: Peaks) -> LinearMap:
        """The map of one site of one layer."""
        if site is Site.VALUE:
            eye = torch.eye(peaks.value.shape[-1], dtype=torch.float64, device=peaks.value.device)
            return PerHead(torch.stack([eye[:, ascending(head)] for head in peaks.value]))
        if site is Site.QUERY_KEY:
            return Permutation(ascending(peaks.key))
        largest = peaks.inputs[POINTS[site]]
        if site is Site.ATTN_OUT and Site.VALUE in self.on:
            # By then every head's coordinates are in the order of its values.
            groups, size = peaks.value.shape
            heads = largest.view(-1, size)
            order = torch.stack([ascending(head) for head in peaks.value]).repeat_interleave(
                len(heads) // groups, dim=0
            )
            largest = heads.gather(1, order).flatten()
        return Permutation(ascending(largest))

    def notes(self, setting: Setting) -> list[str]:
        """Nothing to remark."""
        return []

    def __str__(self) -> str:
        return f"outliers_last({', '.join(self.on)})"


def ascending(peaks: Tensor) -> Tensor:
    """Indices int64 by rising magnitude; equal ones keep their order."""
    return peaks.argsort(stable=True)


def outliers_last(*sites: Site) -> OutliersLast:
    """`outliers_last(Site.ATTN_NORM_OUT, Site.VALUE)`."""
    return OutliersLast(sites)


@dataclass(frozen=True)
class Smooth:
    """Diagonals x' = x / s with s_j = max |X_j|^α / max |W_j|^(1-α): outliers move from activations into weights
    (SmoothQuant, arXiv 2211.10438).

    attn_norm_out, mlp_norm_out: into the norm's gain; value: into v, per kv head, over the query heads that share it;
    mlp_hidden: into up.
    """

    on: tuple[Site, ...]
    strength: float = 0.5
    needs = frozenset({Statistic.PEAKS})
    orders = frozenset[Site]()

    def __post_init__(self) -> None:
        check_sites("smooth", self.on, (*SMOOTHED, Site.VALUE))
        if not 0 <= self.strength <= 1:
            raise InputError(f"smoothing has a strength in 0 … 1, got {self.strength}")

    @property
    def sites(self) -> frozenset[Site]:
        """The sites given."""
        return frozenset(self.on)

    def check(self, shape: Shape, tokens: int) -> None:
        """Always possible."""

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        """Maps of every layer."""
        assert moments.peaks is not None
        maps: dict[At, LinearMap] = {}
        for layer, peaks in enumerate(moments.peaks):
            for site in self.on:
                if site is Site.VALUE:
                    groups, size = peaks.value.shape
                    shared = [
                        peak[Point.O_IN].view(groups, -1, size).amax(dim=1) for peak in (peaks.inputs, peaks.weights)
                    ]
                    eye = torch.eye(size, dtype=torch.float64, device=peaks.value.device).repeat(groups, 1, 1)
                    maps[At(site, layer)] = PerHead(eye, self.scales(*shared))
                else:
                    point = SMOOTHED[site]
                    maps[At(site, layer)] = Diagonal(self.scales(peaks.inputs[point], peaks.weights[point]))
        return maps

    def scales(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """1 / s; 1 for channels that are silent in inputs or weights."""
        s = inputs**self.strength / weights ** (1 - self.strength)
        return torch.where((inputs > 0) & (weights > 0), 1 / s, torch.ones_like(s))

    def notes(self, setting: Setting) -> list[str]:
        """Nothing to remark."""
        return []

    def __str__(self) -> str:
        return f"smooth({', '.join(self.on)})"


def smooth(*sites: Site) -> Smooth:
    """`smooth(Site.ATTN_NORM_OUT, Site.VALUE)`."""
    return Smooth(sites)


@dataclass(frozen=True)
class SearchStrength:
    """The α of every `Smooth` basis with the least loss of the rounded model on calibration text (SmoothQuant+,
    arXiv 2312.03788: one α for the model, on the whole model's loss).

    Weights are rounded to nearest without clip search meanwhile. windows: how many of the calibration windows.
    """

    strengths: tuple[float, ...] = tuple(step / 10 for step in range(1, 10))
    windows: int = 8
    needs = Smooth.needs

    def __post_init__(self) -> None:
        if not self.strengths or not all(0 <= strength <= 1 for strength in self.strengths) or self.windows < 1:
            raise InputError(
                f"a search takes strengths in 0 … 1 and at least 1 window, got {self.strengths} and {self.windows}"
            )

    def __call__(self, fitted: Fitted, progress: Progress) -> Tuned:
        """Maps of the best strength, with the loss at each."""
        bases = [basis for basis in fitted.recipe.basis if isinstance(basis, Smooth)]
        if not bases:
            raise InputError(f"recipe {fitted.recipe.name} has no smoothing whose strength could be searched")
        simulation = Simulation(fitted.source, fitted.recipe, round_weights=True, device=fitted.setting.device)
        tokens, losses = fitted.tokens[: self.windows], list[float](fitted.bookmark.load() or [])

        def smoothed(strength: float) -> dict[At, LinearMap]:
            maps = dict(fitted.maps)
            for basis in bases:
                maps |= replace(basis, strength=strength).fit(fitted.moments, fitted.setting)
            return maps

        for number in range(len(losses), len(self.strengths)):
            with torch.no_grad():
                losses.append(float(simulation.loss(smoothed(self.strengths[number]), tokens)))
            fitted.bookmark.save(lambda: losses)
            progress("searching the strength of smoothing", number + 1, len(self.strengths))
        _, strength = min(zip(losses, self.strengths, strict=True))
        return Tuned(smoothed(strength), (f"smoothing strength {strength:g}",), tuple(losses))

    def __str__(self) -> str:
        return f"strength searched in {self.strengths[0]:g} … {self.strengths[-1]:g}"
