"""Bases that need no data: the Hadamard transform before down_proj, the gather of the heads' bands before o_proj."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resq.models.architecture import Shape, Site
from resq.numerics import hadamard as transforms
from resq.numerics.maps import Hadamard, LinearMap, Permutation
from resq.ptq.recipe import At, Moments, Setting, Statistic


@dataclass(frozen=True)
class HadamardBasis:
    """U_D: the deterministic normalised Hadamard transform on the FFN channels, the same in every layer."""

    needs = frozenset[Statistic]()
    orders = frozenset[Site]()
    sites = frozenset({Site.MLP_HIDDEN})

    def check(self, shape: Shape, tokens: int) -> None:
        """Always possible."""

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        """One shared map."""
        map = Hadamard(transforms.plan(setting.shape.ffn))
        return {At(Site.MLP_HIDDEN, layer): map for layer in range(setting.shape.layers)}

    def __str__(self) -> str:
        return "hadamard(mlp_hidden)"


@dataclass(frozen=True)
class GatherHeads:
    """A permutation of the concatenated heads that puts equal bands of all heads next to each other."""

    needs = frozenset[Statistic]()
    orders = frozenset({Site.ATTN_OUT})
    sites = frozenset({Site.ATTN_OUT})

    def check(self, shape: Shape, tokens: int) -> None:
        """Always possible."""

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        """One shared permutation; inside a band heads keep their order and coordinates theirs."""
        shape = setting.shape
        coordinates = torch.arange(shape.heads * shape.head_dim).view(shape.heads, shape.head_dim)
        bands = setting.bands(Site.ATTN_OUT)
        index = torch.cat([coordinates[:, cut].flatten() for cut in bands.slices()])
        map = Permutation(index)
        return {At(Site.ATTN_OUT, layer): map for layer in range(shape.layers)}

    def __str__(self) -> str:
        return "gather_heads(attn_out)"
