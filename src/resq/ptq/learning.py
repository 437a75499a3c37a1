"""Rotations learned by gradient on the loss of the rounded model, on the Stiefel manifold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import Site
from resq.numerics.bands import Bands
from resq.numerics.device import changed
from resq.numerics.maps import Dense, LinearMap, PerHead
from resq.progress import Progress
from resq.ptq.recipe import At, Fitted, Setting, Statistic, Tuned
from resq.ptq.simulation import Simulation

# Fixed-point iterations of a Cayley step, and the share of the radius of convergence that a step may take (Li et al.,
# arXiv 2002.01113, algorithm 1: s = 5 there with a bound of 0.5).
CAYLEY_ITERATIONS, CAYLEY_REACH = 5, 0.5


def cayley_step(rotation: Tensor, direction: Tensor, rate: float) -> Tensor:
    """A step from an orthogonal X [..., n, n] against `direction` M [..., n, n], along the Cayley curve
    Y = X - α/2 A (X + Y) with the skew A = Â - Â^T, Â = M X^T - ½ X (X^T M X^T) (arXiv 2002.01113, eq. 8).

    α is the rate, at most 2 · reach / ||A||.
    """
    half = direction @ rotation.mT - 0.5 * rotation @ (rotation.mT @ direction @ rotation.mT)
    skew = half - half.mT
    reach = 2 * CAYLEY_REACH / (torch.linalg.matrix_norm(skew, keepdim=True) + 1e-12)
    step = reach.clamp(max=rate)
    moved = rotation - step * skew @ rotation
    for _ in range(CAYLEY_ITERATIONS):
        moved = rotation - step / 2 * skew @ (rotation + moved)
    return moved


def polar(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix to [..., n, n]: U V^T of its singular value decomposition, in float64."""
    left, _, right = torch.linalg.svd(matrix.to(torch.float64))
    return left @ right


@dataclass
class Learned:
    """State: one rotation float64 [n, n] that turns a band of one or several maps, and its gradient."""

    value: Tensor

    def __post_init__(self) -> None:
        self.value.requires_grad_()

    def step(self, rate: float) -> None:
        """One Cayley step against the gradient; momentum would keep the loss from falling at this rate."""
        assert self.value.grad is not None
        with torch.no_grad():
            self.value.copy_(cayley_step(self.value, self.value.grad, rate))
        self.value.grad = None


@dataclass(frozen=True)
class LearnRotations:
    """Cayley SGD on rotations of the bases' maps at some sites, the rest of the recipe held fixed (SpinQuant,
    arXiv 2405.16406): U' = U · blkdiag(R_band), every R from the identity, so that no step leaves U as it is.

    Activations and cache are rounded straight through, weights stay 16 bit unless `round_weights`. Every step takes the
    next `batch` calibration windows; the rate falls linearly to 0. whole: one R over all bands, which learns the
    subspace too. residual: one map; value: one R per layer, shared by its kv heads; query_key: per
    layer.
    """

    on: tuple[Site, ...]
    steps: int = 100
    rate: float = 1.5
    batch: int = 8
    whole: bool = False
    round_weights: bool = False
    needs = frozenset[Statistic]()

    def __post_init__(self) -> None:
        allowed = (Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY)
        if wrong := set(self.on) - set(allowed):
            raise InputError(f"rotations are learned at {', '.join(allowed)}, not at {min(wrong)}")
        if self.steps < 0 or self.batch < 1 or self.rate <= 0:
            raise InputError(
                f"learning takes steps of at least 0, a batch of at least 1 and a positive rate, got {self.steps}, "
                f"{self.batch} and {self.rate}"
            )

    def __call__(self, fitted: Fitted, progress: Progress) -> Tuned:
        """Maps after learning, orthogonal to 1e-12, with the loss before every step and after the last."""
        with torch.inference_mode(False), torch.enable_grad():
            return self._learn(fitted, progress)

    def _learn(self, fitted: Fitted, progress: Progress) -> Tuned:
        maps = {at: changed(map, Tensor.clone) for at, map in fitted.maps.items()}  # gradients may pass copies
        tokens = fitted.tokens.clone()
        simulation = Simulation(fitted.source, fitted.recipe, self.round_weights, fitted.setting.device)
        rotations = {at: self.start(at, map, fitted.setting) for at, map in maps.items() if at.site in self.on}
        if without := set(self.on) - {at.site for at in rotations}:
            raise InputError(
                f"recipe {fitted.recipe.name} has no map at {min(without)} whose rotation could be learned"
            )
        losses = list[float]()
        if (kept := fitted.bookmark.load()) is not None:
            losses = kept["losses"]
            resume(rotations, kept["rotations"])
        for step in range(len(losses), self.steps):
            first = step * self.batch
            chosen = torch.arange(first, first + self.batch) % len(tokens)
            loss = simulation.loss({**maps, **turned(maps, rotations)}, tokens[chosen])
            loss.backward()
            losses.append(float(loss.detach()))
            for blocks in rotations.values():
                for block in blocks:
                    block.step(self.rate * (1 - step / self.steps))
            fitted.bookmark.save(lambda: {"losses": losses, "rotations": values(rotations)})
            progress("learning rotations", step + 1, self.steps)
        with torch.no_grad():
            for blocks in rotations.values():
                for block in blocks:
                    block.value.copy_(polar(block.value))
            learned = {at: projected(map) for at, map in turned(maps, rotations).items()}
        if not losses:
            return Tuned(fitted.maps)
        tenth = max(1, len(losses) // 10)
        began, ended = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        seen = f"{self.batch} × {tokens.shape[1]} tokens"
        note = (
            f"rotations learned in {self.steps} steps of {seen}: loss {began:.4f} → {ended:.4f} nats (means of {tenth})"
        )
        return Tuned({**maps, **learned}, (note,), tuple(losses))

    def start(self, at: At, map: LinearMap, setting: Setting) -> list[Learned]:
        """Identities: one for each band, or one for all."""
        if not isinstance(map, (Dense, PerHead)):
            raise InputError(f"a {map.kind} map at {at.site} cannot be learned; use a dense one there")
        size = map.matrices.shape[-1] if isinstance(map, PerHead) else map.size
        bands = Bands.of((8, size)) if self.whole else setting.bands(at)
        return [Learned(torch.eye(band.size, dtype=torch.float64, device=setting.device)) for band in bands]

    def __str__(self) -> str:
        what = ", ".join(
            [*self.on, *(["whole"] if self.whole else []), *(["rounded weights"] if self.round_weights else [])]
        )
        return f"learned({what}: {self.steps} steps of {self.batch} windows, rate {self.rate:g})"


def learn_rotations(
    *sites: Site, steps: int = 100, rate: float = 1.5, batch: int = 8, whole: bool = False
) -> LearnRotations:
    """`learn_rotations(Site.RESIDUAL, Site.VALUE)`."""
    return LearnRotations(sites, steps, rate, batch, whole)


def values(rotations: Mapping[At, list[Learned]]) -> list[list[Tensor]]:
    """The rotations alone, in their order."""
    return [[block.value.detach() for block in blocks] for blocks in rotations.values()]


def resume(rotations: Mapping[At, list[Learned]], kept: list[list[Tensor]]) -> None:
    """Set rotations to what `values` gave."""
    with torch.no_grad():
        for blocks, found in zip(rotations.values(), kept, strict=True):
            for block, value in zip(blocks, found, strict=True):
                block.value.copy_(value)


def turned(maps: Mapping[At, LinearMap], rotations: Mapping[At, list[Learned]]) -> dict[At, LinearMap]:
    """U · blkdiag(R) for the maps that have rotations."""
    found: dict[At, LinearMap] = {}
    for at, blocks in rotations.items():
        map, turn = maps[at], torch.block_diag(*(block.value for block in blocks))
        if isinstance(map, PerHead):
            found[at] = replace(map, matrices=map.matrices @ turn)
        elif isinstance(map, Dense):
            found[at] = replace(map, matrix=map.matrix @ turn)
    return found


def projected(map: LinearMap) -> LinearMap:
    """The map with its rotations orthogonal in float64."""
    if isinstance(map, PerHead):
        return replace(map, matrices=polar(map.matrices))
    assert isinstance(map, Dense)
    return replace(map, matrix=polar(map.matrix))
