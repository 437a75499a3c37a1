"""PCA bases: U = P · blkdiag(R_band), eigenvectors ascending, a random rotation inside each band (paper §2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import Shape, Site
from resq.numerics import hadamard as transforms
from resq.numerics.bands import Bands
from resq.numerics.maps import Dense, LinearMap, PerHead, random_orthogonal
from resq.numerics.moments import eigenbasis
from resq.ptq.basis.fixed import RANDOM
from resq.ptq.recipe import At, Moments, Setting, Statistic, check_sites

_STATISTICS = {Site.RESIDUAL: Statistic.RESIDUAL, Site.VALUE: Statistic.VALUE, Site.QUERY_KEY: Statistic.KEY}


# Orders the coordinates of a site: moment [n, n] -> orthogonal [n, n], the most important direction in the last column.
Pick = Callable[[Tensor, torch.Generator], Tensor]
# Fills a band's rotation: its size -> orthogonal [n, n], on the CPU like its generator.
Rotation = Callable[[int, torch.Generator], Tensor]


def by_variance(moment: Tensor, generator: torch.Generator) -> Tensor:
    """Eigenvectors, ascending: the subspace of most energy (paper theorem 2.2, as docs/math.md corrects it)."""
    return eigenbasis(moment)[1]


def by_magnitude(moment: Tensor, generator: torch.Generator) -> Tensor:
    """The coordinates themselves, by their power."""
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return eye[:, torch.diagonal(moment).argsort(stable=True)]


def at_random(moment: Tensor, generator: torch.Generator) -> Tensor:
    """A random orthogonal basis: a subspace of average energy."""
    return random_orthogonal(len(moment), generator).to(moment.device)


def haar(size: int, generator: torch.Generator) -> Tensor:
    """A random rotation, uniform over all."""
    return random_orthogonal(size, generator)


def randomised_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """diag(±1) T with random signs and the normalised transform T of this size."""
    signs = torch.randint(2, (size, 1), generator=generator) * 2 - 1
    return signs * transforms.matrix(transforms.plan(size))


def none(size: int, generator: torch.Generator) -> Tensor:
    """No rotation."""
    return torch.eye(size, dtype=torch.float64)


def rotated(vectors: Tensor, bands: Bands, generator: torch.Generator, rotation: Rotation = haar) -> Tensor:
    """P · blkdiag(R_1, …, R_B), float64 [n, n]; R_b a rotation of the band's size."""
    turns = [rotation(band.size, generator).to(vectors.device) for band in bands]
    return torch.cat([vectors[:, cut] @ turn for cut, turn in zip(bands.slices(), turns, strict=True)], dim=1)


@dataclass(frozen=True)
class Pca:
    """Eigenvectors of the uncentred second moment at each site, rotated inside the bands; ablations `pick` others and
    use another `rotation`.

    residual: one U_A for the model; value: U_B per layer and kv head; query_key: U_C per layer, shared by its heads.
    balance_heads: every kv head's values are scaled band by band so that all heads have the same power in each band.
    o's input then has one range per token and band and no head is drowned by a louder one; the
    factors fold into v and o, and the cache, ranged per head, does not see them.
    """

    on: tuple[Site, ...]
    balance_heads: bool = False
    pick: Pick = by_variance
    rotation: Rotation = haar

    def __post_init__(self) -> None:
        check_sites("pca", self.on, _STATISTICS)

    def turn(self, moment: Tensor, at: At, setting: Setting, head: int | None = None) -> Tensor:
        """The orthogonal map [n, n] of one site, or of one head there."""
        generator = setting.generator(at, head)
        return rotated(self.pick(moment, generator), setting.bands(at), generator, self.rotation)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites given."""
        return frozenset(self.on)

    orders = sites

    @property
    def needs(self) -> frozenset[Statistic]:
        """The moment of each site."""
        return frozenset(_STATISTICS[site] for site in self.on)

    def check(self, shape: Shape, tokens: int) -> None:
        """Raises InputError with fewer calibration tokens than twice the hidden size: too few for a moment's rank."""
        if Site.RESIDUAL in self.on and tokens < 2 * shape.hidden:
            raise InputError(
                f"{tokens} calibration tokens are too few for a basis of {shape.hidden} coordinates; at least "
                f"{2 * shape.hidden} are needed: use more or longer windows"
            )

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        """Raises InputError as `check` does."""
        self.check(setting.shape, moments.tokens)
        maps: dict[At, LinearMap] = {}
        if Site.RESIDUAL in self.on:
            at = At(Site.RESIDUAL)
            assert moments.residual is not None
            maps[at] = Dense(self.turn(moments.residual, at, setting))
        if Site.VALUE in self.on:
            assert moments.value is not None
            for layer, moment in enumerate(moments.value):
                at = At(Site.VALUE, layer)
                turns = torch.stack([self.turn(one, at, setting, head) for head, one in enumerate(moment)])
                scales = None
                if self.balance_heads:
                    scales = balancing_scales(moment, turns, setting.bands(At(Site.ATTN_OUT, layer)))
                maps[at] = PerHead(turns, scales)
        if Site.QUERY_KEY in self.on:
            assert moments.key is not None
            for layer, moment in enumerate(moments.key):
                at = At(Site.QUERY_KEY, layer)
                maps[at] = Dense(self.turn(moment, at, setting))
        return maps

    def notes(self, setting: Setting) -> list[str]:
        """Bands that have no Hadamard matrix where the rotation is one, and what stands in."""
        if self.rotation is not randomised_hadamard:
            return []
        layers = range(setting.shape.layers)
        cuts = [setting.bands(At(site, layer)) for site in self.on for layer in layers]
        plans = {band.size: transforms.plan(band.size) for bands in cuts for band in bands}
        return [
            f"a band of {size} coordinates has no Hadamard matrix: random orthogonal factor of {plan.order}"
            for size, plan in sorted(plans.items(), reverse=True)
            if plan.construction == RANDOM
        ]

    def __str__(self) -> str:
        words = [*self.on, *(["balanced heads"] if self.balance_heads else [])]
        changed = (self.pick, self.rotation) != (by_variance, haar)
        words += [f"picked {self.pick.__name__}", f"rotation {self.rotation.__name__}"] if changed else []
        return f"pca({', '.join(words)})"


def balancing_scales(moment: Tensor, turns: Tensor, bands: Bands) -> Tensor:
    """Factors [G, h], equal within a band: (geometric mean over heads of the band's power / the head's)^(1/2).

    moment [G, h, h]: of each kv head's values; turns [G, h, h]: its orthogonal map. A silent head gets 1.
    """
    power = torch.einsum("gij,gik,gkj->gj", turns, moment, turns)
    scales = torch.ones_like(power)
    for cut in bands.slices():
        band = power[:, cut].mean(dim=1, keepdim=True)
        heard = band > 0
        if heard.any():
            scales[:, cut] = torch.where(heard, (band[heard].log().mean().exp() / band).sqrt(), 1.0)
    return scales


def pca(*sites: Site, balance_heads: bool = False, pick: Pick = by_variance, rotation: Rotation = haar) -> Pca:
    """`pca(Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY)`."""
    return Pca(sites, balance_heads, pick, rotation)
