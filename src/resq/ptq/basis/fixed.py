"""Bases that need no data: Hadamard transforms, and the gather of the heads' bands before o_proj."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.models.architecture import Shape, Site
from resq.numerics import hadamard as transforms
from resq.numerics.hadamard import HadamardPlan
from resq.numerics.maps import Dense, Hadamard, LinearMap, PerHead, Permutation
from resq.ptq.recipe import At, Moments, Setting, Statistic, check_sites

RANDOM = "random-orthogonal"
SITES = (Site.RESIDUAL, Site.VALUE, Site.ATTN_OUT, Site.QUERY_KEY, Site.MLP_HIDDEN)


@dataclass(frozen=True)
class HadamardBasis:
    """Normalised Hadamard transforms, the same in every layer: outliers spread over all coordinates of a site.

    signed: sites with random signs first, diag(±1) T. query_key: every head's T_h. mlp_hidden: T_F.
    value and attn_out together are one transform of o's input, T_H ⊗ T_h: I ⊗ T_h in v, T_H ⊗ I online. Where H has no
    Hadamard order, one over all H·h coordinates is applied online and v keeps its basis (method.md §3, QuaRot).
    Elsewhere a size without an order takes its transform with a random orthogonal factor.
    """

    on: tuple[Site, ...]
    signed: tuple[Site, ...] = (Site.RESIDUAL,)
    needs = frozenset[Statistic]()
    orders = frozenset[Site]()

    def __post_init__(self) -> None:
        check_sites("hadamard", self.on, SITES)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites given."""
        return frozenset(self.on)

    def check(self, shape: Shape, tokens: int) -> None:
        """Always possible."""

    def matrix(self, plan: HadamardPlan, at: At, setting: Setting) -> Tensor:
        """The transform at one site, float64 [n, n]."""
        matrix = transforms.matrix(plan)
        if at.site not in self.signed:
            return matrix
        return (torch.randint(2, (plan.size, 1), generator=setting.generator(at)) * 2 - 1) * matrix

    def plans(self, shape: Shape) -> dict[Site, HadamardPlan]:
        """The transform at each site; over H coordinates at attn_out where `value` turns each head."""
        sizes = {
            Site.RESIDUAL: shape.hidden,
            Site.VALUE: shape.head_dim,
            Site.ATTN_OUT: shape.heads * shape.head_dim,
            Site.QUERY_KEY: shape.head_dim,
            Site.MLP_HIDDEN: shape.ffn,
        }
        plans = {site: transforms.plan(sizes[site]) for site in self.on}
        if {Site.VALUE, Site.ATTN_OUT} <= self.sites:
            across = transforms.plan(shape.heads)
            if across.construction == RANDOM:
                del plans[Site.VALUE]
            else:
                plans[Site.ATTN_OUT] = across
        return plans

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        """Maps of every site; those of all layers are alike but for signs."""
        shape, maps = setting.shape, dict[At, LinearMap]()
        for site, plan in self.plans(shape).items():
            if site is Site.RESIDUAL:
                maps[At(site)] = Dense(self.matrix(plan, At(site), setting))
                continue
            if site is Site.VALUE:
                for layer in range(shape.layers):
                    at = At(site, layer)
                    maps[at] = PerHead(self.matrix(plan, at, setting).repeat(shape.kv_heads, 1, 1))
                continue
            if site is Site.ATTN_OUT:
                map: LinearMap = Hadamard(plan, inner=shape.heads * shape.head_dim // plan.size)
            else:
                map = Hadamard(plan)
            maps |= {At(site, layer): map for layer in range(shape.layers)}
        return maps

    def notes(self, setting: Setting) -> list[str]:
        """What has no Hadamard matrix, and what stands in."""
        shape = setting.shape
        plans, remarks = self.plans(shape), []
        if Site.VALUE in self.sites - plans.keys():
            size = shape.heads * shape.head_dim
            remarks.append(
                f"{shape.heads} heads have no Hadamard matrix: one of {size} coordinates at attn_out, none at value"
            )
        remarks += [
            f"{plan.size} coordinates at {site} have no Hadamard matrix: random orthogonal factor of {plan.order}"
            for site, plan in plans.items()
            if plan.construction == RANDOM
        ]
        return remarks

    def __str__(self) -> str:
        words = (f"{site} with random signs" if site in self.signed else site for site in self.on)
        return f"hadamard({', '.join(words)})"


def hadamard(*sites: Site, signed: tuple[Site, ...] = (Site.RESIDUAL,)) -> HadamardBasis:
    """`hadamard(Site.MLP_HIDDEN)`."""
    return HadamardBasis(sites, signed)


@dataclass(frozen=True)
class GatherHeads:
    """A permutation of the concatenated heads that puts equal bands of all heads next to each other."""

    needs = frozenset[Statistic]()
    orders = frozenset({Site.ATTN_OUT})
    sites = frozenset({Site.ATTN_OUT})

    def check(self, shape: Shape, tokens: int) -> None:
        """Always possible."""

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        """One permutation a layer; inside a band heads keep their order and coordinates theirs."""
        shape, maps = setting.shape, dict[At, LinearMap]()
        coordinates = torch.arange(shape.heads * shape.head_dim).view(shape.heads, shape.head_dim)
        for layer in range(shape.layers):
            at = At(Site.ATTN_OUT, layer)
            maps[at] = Permutation(torch.cat([coordinates[:, cut].flatten() for cut in setting.bands(at).slices()]))
        return maps

    def notes(self, setting: Setting) -> list[str]:
        """Nothing to remark."""
        return []

    def __str__(self) -> str:
        return "gather_heads(attn_out)"
