"""Learned rotations stay rotations inside their bands, no step changes nothing, and steps lower the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from tests.conftest import Kept
from torch import Tensor

from resq.backends.reference import dense
from resq.checkpoint.writer import CheckpointWriter
from resq.embedded import TEXT
from resq.errors import InputError
from resq.models.architecture import Site
from resq.models.source import Source
from resq.models.text import load_tokenizer, sampled_windows
from resq.numerics.linear import PackedLinear
from resq.numerics.maps import Dense, PerHead, random_orthogonal
from resq.progress import silent
from resq.ptq.learning import LearnRotations, cayley_step, learn_rotations, polar
from resq.ptq.pipeline import Job, fit_maps, quantize
from resq.ptq.recipe import At, Fitted, Recipe, Setting, Tuned
from resq.ptq.recipes import QUAROT, QUIK, RESQ, RTN, SPINQUANT
from resq.ptq.statistics import collect

EVERY = (Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY)


def tokens(windows: int = 6) -> Tensor:
    return torch.randint(3, 259, (windows, 32), generator=torch.Generator().manual_seed(9))


def fitted(source: Source, recipe: Recipe, seen: Tensor, bits: int = 4) -> Fitted:
    recipe = replace(recipe, precision=recipe.precision.with_low(bits))
    moments = collect(source, dense(torch.float32), seen, recipe.needs, silent)
    setting = Setting(source.shape, recipe.precision, 0)
    return Fitted(source, recipe, fit_maps(recipe, moments, source.shape, 0), moments, seen, setting)


def matrices(found: Tuned | Fitted, at: At) -> Tensor:
    """[heads or 1, n, n]."""
    map = found.maps[at]
    assert isinstance(map, Dense | PerHead)
    return map.matrices if isinstance(map, PerHead) else map.matrix[None]


def skewed(rotation: Tensor, direction: Tensor) -> Tensor:
    """The skew matrix of a step."""
    half = direction @ rotation.mT - 0.5 * rotation @ (rotation.mT @ direction @ rotation.mT)
    return half - half.mT


@pytest.mark.parametrize("rate", [1e-3, 0.05, 1e6])
def test_a_step_is_the_cayley_transform_to_the_iterations_bound(rate: float) -> None:
    """Five fixed-point iterations from a start with error 2 h² leave 2 h^7, h = α/2 ||A|| ≤ 1/2."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.stack([random_orthogonal(12, generator) for _ in range(3)])
    direction = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    skew = skewed(rotation, direction)
    norm = torch.linalg.matrix_norm(skew)
    alpha = (1 / norm).clamp(max=rate)[:, None, None]
    eye = torch.eye(12, dtype=torch.float64)
    exact = torch.linalg.solve(eye + alpha / 2 * skew, (eye - alpha / 2 * skew) @ rotation)
    torch.testing.assert_close(exact.mT @ exact, eye.expand(3, 12, 12), rtol=0, atol=1e-13)
    moved = cayley_step(rotation, direction, rate)
    half = alpha.flatten() / 2 * norm
    assert bool((torch.linalg.matrix_norm(moved - exact, ord=2) <= 2 * half**7 + 1e-13).all())
    assert not torch.equal(moved, rotation)


def test_steps_against_the_gradient_lower_a_quadratic_to_its_minimum_on_the_manifold() -> None:
    goal = random_orthogonal(8, torch.Generator().manual_seed(0))
    goal[0] *= torch.det(goal).sign()  # a rotation, as the identity is
    rotation, losses = torch.eye(8, dtype=torch.float64), []
    for _ in range(200):
        losses.append(float((rotation - goal).square().sum() / 2))
        rotation = cayley_step(rotation, rotation - goal, 0.1)
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 1e-6 * losses[0]


def test_the_polar_factor_is_the_nearest_orthogonal_matrix() -> None:
    near = random_orthogonal(10, torch.Generator().manual_seed(0))
    noise = 1e-3 * torch.randn(10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = polar(near + noise)
    torch.testing.assert_close(found.T @ found, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-13)
    assert float((found - near - noise).norm()) < float(noise.norm())


@pytest.mark.parametrize("whole", [False, True])
def test_learned_maps_are_orthogonal_and_hold_the_subspaces_unless_told_otherwise(
    whole: bool, checkpoint: Callable[..., Path]
) -> None:
    before = fitted(Source.open(checkpoint()), RESQ, tokens())
    kept = {at: map for at, map in before.maps.items() if at.site not in EVERY}
    tuned = LearnRotations(EVERY, steps=3, batch=2, whole=whole)(before, silent)
    assert len(tuned.losses) == 3
    assert all(
        tuned.maps[at] is not None and tuned.maps[at] == map for at, map in kept.items() if at.site != Site.ATTN_OUT
    )
    for at in before.maps:
        if at.site not in EVERY:
            continue
        old, new = matrices(before, at), matrices(tuned, at)
        eye = torch.eye(old.shape[-1], dtype=torch.float64)
        assert float((new.mT @ new - eye).abs().max()) <= 1e-12
        turn = old.mT @ new
        assert float((turn - eye).abs().max()) > 1e-4
        # One turn for all heads of a layer.
        assert float((turn - turn[:1]).abs().max()) <= 1e-12
        low, high = before.setting.bands(at).slices()
        across = float(turn[:, low, high].abs().max())
        assert across > 1e-6 if whole else across <= 1e-12
    value, values = before.maps[At(Site.VALUE, 0)], tuned.maps[At(Site.VALUE, 0)]
    assert isinstance(value, PerHead)
    assert isinstance(values, PerHead)
    assert value.scales is not None
    assert values.scales is not None
    assert torch.equal(value.scales, values.scales)


def test_no_step_gives_back_the_very_maps(checkpoint: Callable[..., Path]) -> None:
    before = fitted(Source.open(checkpoint()), RESQ, tokens())
    tuned = learn_rotations(*EVERY, steps=0)(before, silent)
    assert all(tuned.maps[at] is map for at, map in before.maps.items())
    assert (tuned.notes, tuned.losses) == ((), ())


def packed(source: Source, recipe: Recipe) -> list[Tensor]:
    kept = Kept([])
    quantize(source, Job(recipe, tokens(), 3, 0, keep_tied=True), cast(CheckpointWriter, kept), silent)
    linears = [linear for parts in kept.layers for linear in parts.linears.values()]
    assert kept.ends is not None
    found = [kept.ends.embed]
    for linear in linears:
        assert isinstance(linear, PackedLinear)
        found += [*linear.qweight, linear.scale]
    return found


def test_spinquant_without_a_step_has_the_bytes_of_its_start_and_with_one_others(
    checkpoint: Callable[..., Path],
) -> None:
    source = Source.open(checkpoint())

    def steps(count: int) -> Recipe:
        return replace(SPINQUANT, tuning=(learn_rotations(Site.RESIDUAL, Site.VALUE, steps=count),))

    start, none, one = (packed(source, each) for each in (replace(SPINQUANT, tuning=()), steps(0), steps(1)))
    assert all(torch.equal(a, b) for a, b in zip(start, none, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start, one, strict=True))


def test_steps_take_the_windows_in_turn_and_the_note_tells_the_losses(checkpoint: Callable[..., Path]) -> None:
    before = fitted(Source.open(checkpoint()), RESQ, tokens())
    seen: list[tuple[str, int, int]] = []
    tuned = LearnRotations((Site.VALUE,), steps=2, batch=4)(before, lambda *step: seen.append(step))
    assert seen == [("learning rotations", 1, 2), ("learning rotations", 2, 2)]
    first, last = tuned.losses
    assert tuned.notes == (
        f"rotations learned in 2 steps of 4 × 32 tokens: loss {first:.4f} → {last:.4f} nats (means of 1)",
    )
    # The second step went round: windows 4, 5, 0 and 1.
    for order, loss in (([0, 1, 2, 3], first), ([4, 5, 0, 1], last)):
        rolled = replace(before, tokens=tokens()[[0, 1, 2, 3, *order]])
        again = LearnRotations((Site.VALUE,), steps=2, batch=4)(rolled, silent)
        assert again.losses[0] == first
        assert (again.losses[1] == loss) == (order[0] == 4)


def learning(source: Source, seen: Tensor, windows: Tensor, *, steps: int, rate: float) -> tuple[float, ...]:
    before = replace(fitted(source, RESQ, seen, bits=2), tokens=windows)
    return LearnRotations((Site.RESIDUAL, Site.VALUE), steps, rate, batch=len(windows))(before, silent).losses


def test_the_loss_of_a_trained_model_falls_on_the_windows_learned_from() -> None:
    source = Source.open("tiny")
    windows = sampled_windows([TEXT], load_tokenizer(source.path), count=40, length=64, seed=0).tokens
    losses = learning(source, windows, windows[:4], steps=8, rate=1.5)
    # A step flips integers of 2 bits: single losses scatter by 0.04 with the last digits of the moments, the mean of
    # three by 0.02, around 0.35 below the first.
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2


@pytest.mark.slow
def test_the_loss_of_llama_5m_falls_on_the_windows_learned_from(shared: Path) -> None:
    source = Source.open(shared / "models" / "llama-5m")
    text = shared / "data" / "wikitext-2" / "wiki.train.first1MB.raw"
    windows = sampled_windows([text], load_tokenizer(source.path), count=32, length=128, seed=0).tokens
    losses = learning(source, windows, windows[:4], steps=30, rate=0.3)
    assert sum(losses[-5:]) / 5 < sum(losses[:3]) / 3


@pytest.mark.parametrize(
    ("recipe", "site", "message"),
    [
        (RTN, Site.RESIDUAL, "recipe rtn has no map at residual whose rotation could be learned"),
        (QUAROT, Site.QUERY_KEY, "a hadamard map at query_key cannot be learned; use a dense one there"),
        (QUIK, Site.QUERY_KEY, "a permutation map at query_key cannot be learned; use a dense one there"),
    ],
)
def test_what_has_no_rotation_to_learn_is_refused(
    recipe: Recipe, site: Site, message: str, checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(InputError, match=rf"\A{message}\Z"):
        learn_rotations(site)(fitted(Source.open(checkpoint()), recipe, tokens()), silent)


def test_impossible_settings_are_refused_where_they_are_made() -> None:
    with pytest.raises(InputError, match="rotations are learned at residual, value, query_key, not at mlp_hidden"):
        learn_rotations(Site.MLP_HIDDEN)
    for changes in ({"steps": -1}, {"batch": 0}, {"rate": 0.0}):
        with pytest.raises(
            InputError, match="learning takes steps of at least 0, a batch of at least 1 and a positive"
        ):
            replace(learn_rotations(Site.VALUE), **changes)
