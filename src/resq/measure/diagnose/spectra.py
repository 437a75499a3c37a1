"""Spectra of the second moments: how much of each site's energy few directions hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.models.architecture import Shape, Site
from resq.numerics.moments import eigenbasis
from resq.ptq.recipe import Moments

# The part of a dimension that ResQ keeps in 8 bit.
TOP = 1 / 8


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one moment, descending, as shares of their sum; the mean over a layer's kv heads for values.

    top: share held by the first 1/8 of them. layer: None for the residual stream, which has one moment for all.
    """

    site: str
    layer: int | None
    shares: tuple[float, ...]
    top: float


def shares(moment: Tensor) -> Tensor:
    """λ_i / Σ λ descending, float64 [..., n], of a symmetric moment [..., n, n]; a moment of zeros has equal shares."""
    values = eigenbasis(moment)[0].clamp(min=0).flip(-1)
    total = values.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, values / total.clamp(min=torch.finfo(values.dtype).tiny), 1 / values.shape[-1])


def top_share(descending: Tensor) -> float:
    """Σ of the first n/8 (at least one) of shares [n]."""
    return float(descending[: max(1, round(TOP * len(descending)))].sum())


def spectra(moments: Moments, shape: Shape) -> list[Spectrum]:
    """Of the residual stream, then of each layer's values (mean over kv heads) and keys; those that were collected."""
    found = []
    if moments.residual is not None:
        found.append((Site.RESIDUAL, None, shares(moments.residual)))
    for layer in range(shape.layers):
        if moments.value is not None:
            found.append((Site.VALUE, layer, shares(moments.value[layer]).mean(dim=0)))
        if moments.key is not None:
            found.append((Site.QUERY_KEY, layer, shares(moments.key[layer])))
    return [Spectrum(str(site), layer, tuple(each.tolist()), top_share(each)) for site, layer, each in found]
