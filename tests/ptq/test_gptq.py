"""GPTQ in blocks is GPTQ, it lowers the output error on correlated inputs, and it says what it could not factorize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.affine import symmetric_limits, symmetric_scale
from resq.numerics.bands import Bands
from resq.ptq.recipe import KEPT, InputMoments
from resq.ptq.rounding.gptq import PANEL, Factor, Gptq, corrected, inverse_factor
from resq.ptq.rounding.nearest import Nearest, scales

CUTS = {
    "one-band": Bands.of((4, 96)),
    "two-bands": Bands.of((4, 84), (8, 12)),
    "three-bands": Bands.of((2, 12), (4, 72), (6, 12)),
    "odd-edges": Bands.of((3, 41), (8, 55)),
    "iso-3-bit": Bands.of((1, 12), (3, 72), (5, 12)),
}


def problem(seed: int, size: int = 96, out: int = 24, rows: int = 400) -> tuple[Tensor, Tensor]:
    """Weights float64 [out, size] and the moment of inputs whose coordinates are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(rows, size // 4) @ normal(size // 4, size) + 0.3 * normal(rows, size)
    return normal(out, size), inputs.T @ inputs


def plain_gptq(weight: Tensor, moment: Tensor, bands: Bands, scale: Tensor, damping: float) -> Tensor:
    """Integers by the update of arXiv 2210.17323 eq. 2 and 3: one column at a time, the inverse Hessian of the columns
    still to come by Gaussian elimination."""
    size = weight.shape[1]
    inverse = torch.linalg.inv(moment + damping * torch.diagonal(moment).mean() * torch.eye(size, dtype=torch.float64))
    weight, integers = weight.clone(), torch.zeros_like(weight)
    column_of = [(index, band.bits) for index, band in enumerate(bands) for _ in range(band.size)]
    for i, (band, bits) in enumerate(column_of):
        low, high = symmetric_limits(bits)
        s = scale[:, band].double()
        whole = torch.where(weight[:, i] < 0, low, high) if bits == 1 else (weight[:, i] / s).round().clamp(low, high)
        integers[:, i] = whole
        error = (weight[:, i] - integers[:, i] * s) / inverse[i, i]
        weight[:, i + 1 :] -= error[:, None] * inverse[i, i + 1 :]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return integers


def upper_factor(moment: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """U upper-triangular with U^T U = (H + λ I)^-1, and the damping."""
    made = inverse_factor(InputMoments(moment), damping, order)
    return (made.below.tril(-1) + made.pivots.diag()).T, made.damping


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """||X W^T - X Ŵ^T||²."""
    difference = weight - rounded
    return float(((difference @ moment) * difference).sum())


@pytest.mark.parametrize("block", [1, 7, 32, 96, 128])
@pytest.mark.parametrize("name", CUTS)
def test_blocked_gptq_has_the_integers_of_the_plain_one(name: str, block: int) -> None:
    bands = CUTS[name]
    for seed in range(2):
        weight, moment = problem(seed)
        scale = scales(weight, bands, clip_search=False)
        rounded = Gptq(block=block, clip_search=False)(weight, InputMoments(moment), bands, None)
        assert torch.equal(rounded.linear.scale, scale)
        want = plain_gptq(weight, moment, bands, scale, 0.01)
        assert torch.equal(rounded.linear.integers().double(), want)
        assert rounded.damping == 0.01


@pytest.mark.parametrize("size", [1, 96, PANEL, 2 * PANEL + 3])
def test_the_energy_of_outputs_is_that_of_the_inputs_passed_through(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    inputs, weight = (torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (50, 7))
    outputs = inputs @ weight.T
    assert InputMoments(inputs.T @ inputs).energy(weight) == pytest.approx(float(outputs.square().sum()), rel=1e-11)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("seed", range(4))
def test_gptq_has_a_smaller_output_error_than_nearest_on_correlated_inputs(seed: int, name: str) -> None:
    weight, moment = problem(seed)
    gptq, nearest = (
        rounding(weight, InputMoments(moment), CUTS[name], None).linear for rounding in (Gptq(), Nearest())
    )
    assert torch.equal(gptq.scale, nearest.scale)
    errors = [output_error(weight, linear.dequantize(torch.float64), moment) for linear in (gptq, nearest)]
    assert errors[0] < errors[1]


def test_gptq_is_nearest_where_inputs_are_uncorrelated() -> None:
    weight, _ = problem(0)
    moment = torch.diag(torch.linspace(0.5, 2.0, 96, dtype=torch.float64))
    for bands in CUTS.values():
        gptq, nearest = (rounding(weight, InputMoments(moment), bands, None).linear for rounding in (Gptq(), Nearest()))
        assert torch.equal(gptq.integers(), nearest.integers())


def test_rounding_leaves_its_arguments_as_they_were() -> None:
    weight, moment = problem(0)
    moment[:, 5] = moment[5] = 0.0
    bias = torch.arange(24, dtype=torch.float64)
    before = [x.clone() for x in (weight, moment, bias)]
    for rounding in (Gptq(), Nearest()):
        rounding(weight, InputMoments(moment), CUTS["two-bands"], bias)
    assert all(torch.equal(x, kept) for x, kept in zip((weight, moment, bias), before, strict=True))


def test_any_layout_of_the_weight_gives_the_same_integers() -> None:
    weight, moment = problem(1)
    strided = torch.empty(96, 24, dtype=torch.float64).T.copy_(weight)
    first, second = (Gptq()(w, InputMoments(moment), CUTS["two-bands"], None).linear for w in (weight, strided))
    assert not strided.is_contiguous()
    assert torch.equal(first.integers(), second.integers())


def test_scaling_all_inputs_changes_no_integer() -> None:
    weight, moment = problem(2)
    for factor in (2.0**-20, 2.0**20):
        first, second = (
            Gptq()(weight, InputMoments(m), CUTS["two-bands"], None).linear for m in (moment, moment * factor)
        )
        assert torch.equal(first.integers(), second.integers())


@pytest.mark.parametrize(("least", "used"), [(0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_is_raised_until_the_moment_factorizes_and_is_reported(least: float, used: float) -> None:
    """A moment with one eigenvalue that rounding pushed below zero; the mean of its diagonal is one."""
    size = 32
    turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.full((size,), (size - least) / (size - 1), dtype=torch.float64)
    values[0] = least
    moment = turn @ torch.diag(values) @ turn.T
    upper, damping = upper_factor(moment, 0.01)
    assert damping == pytest.approx(used)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ (moment + damping * identity), identity, rtol=0, atol=1e-10)
    weight = problem(0, size)[0]
    assert Gptq()(weight, InputMoments(moment), Bands.of((4, size)), None).damping == damping


@pytest.mark.parametrize("size", [1, 96, 300, PANEL + 3, 2 * PANEL])
def test_the_factor_of_a_nearly_singular_moment_is_as_good_as_its_condition_allows(size: int) -> None:
    """Inputs of a tenth of the rank and a damping of 1e-8: condition numbers up to 1e10."""
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(max(1, size // 10), size, generator=generator, dtype=torch.float64)
    moment = inputs.T @ inputs
    damped = moment.clone()
    damped.diagonal().add_(1e-8 * moment.diagonal().mean())
    upper, damping = upper_factor(moment, 1e-8)
    assert damping == 1e-8
    explicit = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    # A relative error of size · eps in L, backward, is one of size · eps · condition in its inverse's square.
    bound = size * torch.finfo(torch.float64).eps * float(torch.linalg.cond(damped))
    for found in (upper, explicit):
        assert (found.T @ (found @ damped) - torch.eye(size)).norm() <= bound


def test_a_factor_in_another_order_is_that_of_the_permuted_moment() -> None:
    moment = problem(0)[1]
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(upper_factor(moment, 0.01, order)[0], upper_factor(moment[order][:, order], 0.01)[0])


@pytest.mark.parametrize("size", [1, 96, PANEL + 3, 3 * PANEL])
def test_sums_that_are_given_up_hold_their_first_factor_below_the_diagonal(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    inputs, weight = (torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (2 * size, 4))
    moment = inputs.T @ inputs
    order = torch.randperm(size, generator=generator)
    for named in (None, order):
        given = moment.clone()
        moments = InputMoments(given, gives_up=True)
        made, apart = inverse_factor(moments, 0.01, named), inverse_factor(InputMoments(moment), 0.01, named)
        assert made.below is given
        assert torch.equal(given.triu(), moment.triu())
        assert torch.equal(made.below.tril(-1), apart.below.tril(-1))
        assert torch.equal(made.pivots, apart.pivots)
        # What is asked of the sums after that is as before; the next factor finds room elsewhere.
        assert moments.energy(weight) == InputMoments(moment).energy(weight)
        assert torch.equal(moments.entries(order, order[:7]), moment[order][:, order[:7]])
        second = inverse_factor(moments, 0.1, named)
        assert second.below is not given
        assert torch.equal(made.below.tril(-1), apart.below.tril(-1))


def test_sums_that_are_given_up_factorize_with_more_damping_as_well() -> None:
    moment = problem(0)[1]
    moment -= 1.5 * torch.linalg.eigvalsh(moment)[0] * torch.eye(len(moment), dtype=torch.float64)
    least = torch.linalg.eigvalsh(moment)[0] / moment.diagonal().mean()
    start = float(-least) / 2
    made = inverse_factor(InputMoments(moment.clone(), gives_up=True), start)
    assert made.damping == pytest.approx(10 * start)
    assert torch.equal(made.below.tril(-1), inverse_factor(InputMoments(moment), 10 * start).below.tril(-1))


def test_dead_inputs_do_not_change_the_damping_of_the_others() -> None:
    moment = problem(0)[1] * 1e-6
    alone = upper_factor(moment, 0.01)[0]
    wide = torch.zeros(100, 100, dtype=torch.float64)
    wide[4:, 4:] = moment
    upper = upper_factor(wide, 0.01)[0]
    torch.testing.assert_close(upper[4:, 4:], alone, rtol=1e-12, atol=0)
    assert not upper[:4, 4:].any()


def test_what_depends_on_the_moments_alone_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*arguments: Any) -> Factor:
        made.append(arguments[1])
        return inverse_factor(*arguments)

    monkeypatch.setattr("resq.ptq.rounding.gptq.inverse_factor", counted)
    weight, exact, seen = streams(0)
    moments = both_moments(exact, seen)
    rounding = Gptq(correction=0.5)
    shared = [rounding(rows, moments, Bands.of((4, 48)), None) for rows in (weight, 2 * weight, weight[:3])]
    assert made == [0.5, 0.01]
    assert torch.equal(shared[0].target, corrected(weight, both_moments(exact, seen), 0.5))
    # In another order, or with another damping, it is another factor; the oldest is forgotten.
    for other in (replace(rounding, act_order=True), Gptq(damping=0.1)):
        kept, fresh = (
            other(weight, m, Bands.of((4, 48)), None).linear.integers() for m in (moments, both_moments(exact, seen))
        )
        assert torch.equal(kept, fresh)
    assert len(moments._kept) == KEPT


def test_fewer_rows_than_columns_round_with_the_usual_damping() -> None:
    weight, moment = problem(0, rows=3)
    assert torch.linalg.matrix_rank(moment) == 3
    rounded = Gptq()(weight, InputMoments(moment), CUTS["two-bands"], None)
    nearest = Nearest()(weight, InputMoments(moment), CUTS["two-bands"], None)
    errors = [output_error(weight, r.linear.dequantize(torch.float64), moment) for r in (rounded, nearest)]
    assert rounded.damping == 0.01
    assert errors[0] < errors[1]


def test_a_moment_that_no_damping_helps_is_refused() -> None:
    moment = torch.diag(torch.tensor([1.0] * 7 + [-1e3], dtype=torch.float64))
    with pytest.raises(InputError, match="cannot be factorized even with damping 10;"):
        inverse_factor(InputMoments(moment), 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(value: float) -> None:
    weight, moment = problem(0)
    moment[3, 4] = moment[4, 3] = value
    with pytest.raises(InputError, match="NaN or Inf"):
        Gptq()(weight, InputMoments(moment), CUTS["one-band"], None)


def test_a_dead_input_rounds_to_zero_and_leaves_the_others_alone() -> None:
    weight, moment = problem(0)
    bands, dead = CUTS["one-band"], torch.tensor([0, 40, 95])
    alive = torch.ones(96, dtype=torch.bool)
    alive[dead] = False
    moment[dead] = moment[:, dead] = 0.0
    rounded = Gptq(clip_search=False)(weight, InputMoments(moment), bands, None)
    integers = rounded.linear.integers().double()
    assert torch.equal(integers[:, dead], torch.zeros(24, 3, dtype=torch.float64))
    live = moment[alive][:, alive]
    want = plain_gptq(weight[:, alive], live, Bands.of((4, 93)), rounded.linear.scale, 0.01)
    assert torch.equal(integers[:, alive], want)


def test_an_input_that_never_spoke_rounds_to_zeros() -> None:
    weight, moment = problem(0)
    rounded = Gptq()(weight, InputMoments(torch.zeros_like(moment)), CUTS["two-bands"], None)
    assert not rounded.linear.integers().any()


@pytest.mark.parametrize("rounding", [Gptq(), Gptq(clip_search=False), Nearest(), Nearest(clip_search=False)], ids=str)
@pytest.mark.parametrize("bits", [(2, 3, 4), (4, 6, 8), (8, 2, 3), (1, 3, 5)])
def test_each_band_uses_its_own_range_of_integers(bits: tuple[int, int, int], rounding: Gptq | Nearest) -> None:
    weight, moment = problem(3)
    bands = Bands.of(*zip(bits, (32, 40, 24), strict=True))
    integers = rounding(weight * 100, InputMoments(moment), bands, None).linear.integers()
    for band, cut in zip(bands, bands.slices(), strict=True):
        low, high = symmetric_limits(band.bits)
        part = integers[:, cut]
        assert low <= int(part.min()) < 0 < int(part.max()) <= high
        assert int(part.max()) == high


def test_scales_are_those_of_the_original_weights_per_row_and_band() -> None:
    weight, moment = problem(0)
    bands = CUTS["two-bands"]
    for search in (True, False):
        want = [
            symmetric_scale(weight[:, cut], band.bits, clip_search=search)
            for band, cut in zip(bands, bands.slices(), strict=True)
        ]
        got = Gptq(clip_search=search)(weight, InputMoments(moment), bands, None).linear.scale
        assert torch.equal(got, torch.stack(want, dim=1))
    assert not torch.equal(scales(weight, bands, clip_search=True), scales(weight, bands, clip_search=False))


@pytest.mark.parametrize("rounding", [Gptq(), Nearest()], ids=["gptq", "nearest"])
def test_a_rows_integers_depend_on_that_row_alone(rounding: Gptq | Nearest) -> None:
    weight, moment = problem(0)
    bands = CUTS["two-bands"]
    every = rounding(weight, InputMoments(moment), bands, None).linear.integers()
    some = rounding(weight[5:9], InputMoments(moment), bands, None).linear.integers()
    assert torch.equal(every[5:9], some)


@pytest.mark.parametrize("rounding", [Gptq(), Nearest()], ids=["gptq", "nearest"])
def test_a_zero_row_stays_zero_and_the_bias_is_kept(rounding: Gptq | Nearest) -> None:
    weight, moment = problem(0)
    weight[4] = 0.0
    bias = torch.linspace(-1, 1, 24, dtype=torch.float64)
    linear = rounding(weight, InputMoments(moment), CUTS["two-bands"], bias).linear
    assert not linear.integers()[4].any()
    assert torch.isfinite(linear.scale).all()
    assert linear.bias is not None
    assert torch.equal(linear.bias, bias.float())


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("name", CUTS)
def test_act_order_is_gptq_on_columns_permuted_inside_bands(name: str, block: int) -> None:
    bands = CUTS[name]
    weight, moment = problem(4)
    # Column energies that fall and rise across the bands' edges: a global order would mix them.
    factors = torch.rand(96, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    moment = moment * factors * factors[:, None]
    rounding = Gptq(block=block, clip_search=False, act_order=True)
    order = rounding.order(moment, bands)
    assert order is not None
    for cut in bands.slices():
        part = order[cut]
        assert part.sort().values.tolist() == list(range(cut.start, cut.stop))
        assert bool((torch.diagonal(moment)[part].diff() <= 0).all())
    scale = scales(weight, bands, clip_search=False)
    rounded = rounding(weight, InputMoments(moment), bands, None)
    want = plain_gptq(weight[:, order], moment[order][:, order], bands, scale, 0.01)
    assert torch.equal(rounded.linear.integers()[:, order].double(), want)
    assert torch.equal(rounded.linear.scale, scale)
    natural = Gptq(block=block, clip_search=False)(weight, InputMoments(moment), bands, None)
    assert not torch.equal(natural.linear.integers(), rounded.linear.integers())


def test_equal_inputs_keep_their_order() -> None:
    order = Gptq(act_order=True).order(torch.eye(96, dtype=torch.float64), CUTS["two-bands"])
    assert order is not None
    assert torch.equal(order, torch.arange(96))
    assert Gptq().order(torch.eye(96), CUTS["two-bands"]) is None


def streams(seed: int, size: int = 48, rows: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """W [16, size], inputs X [rows, size] of the unrounded model and X̂ of the rounded one, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    exact = normal(rows, size // 4) @ normal(size // 4, size) + 0.3 * normal(rows, size)
    # Errors that depend on the inputs, as those of layers before do.
    return normal(16, size), exact, exact @ (torch.eye(size) + 0.05 * normal(size, size)) + 0.2 * normal(rows, size)


def both_moments(exact: Tensor, seen: Tensor) -> InputMoments:
    return InputMoments(seen.T @ seen, seen.T @ exact)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_a_corrected_weight_is_the_damped_least_squares_solution(damping: float) -> None:
    weight, exact, seen = streams(0)
    found = corrected(weight, both_moments(exact, seen), damping)
    root = (damping * (seen.T @ seen).diagonal().mean()).sqrt()
    left = torch.cat([seen, root * torch.eye(48, dtype=torch.float64)])
    right = torch.cat([exact @ weight.T, root * weight.T])
    want = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9 * float(want.abs().max()))

    def objective(w: Tensor) -> float:
        return float((left @ w.T - right).square().sum())

    generator = torch.Generator().manual_seed(1)
    least = objective(found)
    assert least < objective(weight)
    for _ in range(5):
        nudge = 1e-3 * torch.randn(found.shape, generator=generator, dtype=torch.float64)
        assert objective(found + nudge) > least


def test_rounding_a_corrected_weight_brings_outputs_nearer_to_the_unrounded_models() -> None:
    for seed in range(3):
        weight, exact, seen = streams(seed)
        errors = []
        for rounding in (Gptq(correction=0.01), Gptq()):
            linear = rounding(weight, both_moments(exact, seen), Bands.of((4, 48)), None).linear
            errors.append(float((seen @ linear.dequantize(torch.float64).T - exact @ weight.T).norm()))
        assert errors[0] < errors[1]


def test_a_correction_with_equal_inputs_changes_nothing() -> None:
    weight, moment = problem(0)
    bands = CUTS["two-bands"]
    plain = Gptq()(weight, InputMoments(moment), bands, None)
    fixed = Gptq(correction=0.01)(weight, InputMoments(moment, moment.clone()), bands, None)
    assert torch.equal(fixed.target, weight)
    assert torch.equal(fixed.linear.integers(), plain.linear.integers())
    assert torch.equal(fixed.linear.scale, plain.linear.scale)


def test_the_target_of_a_correction_is_the_corrected_weight() -> None:
    weight, exact, seen = streams(0)
    moments = both_moments(exact, seen)
    rounded = Gptq(correction=0.05)(weight, moments, Bands.of((4, 48)), None)
    assert torch.equal(rounded.target, corrected(weight, moments, 0.05))
    assert (Gptq(correction=0.05).corrects, Gptq().corrects, Gptq(sees_rounded=True).sees_rounded) == (
        True,
        False,
        True,
    )


@pytest.mark.parametrize("changes", [{"damping": 0.0}, {"damping": -1.0}, {"block": 0}, {"correction": 0.0}])
def test_impossible_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(InputError, match="GPTQ takes a block of at least 1 and positive dampings, got "):
        replace(Gptq(), **changes)


def test_the_name_says_every_setting() -> None:
    assert str(Gptq(damping=0.05, block=64)) == "gptq, damping 0.05, block 64, clip search on"
    changed = Gptq(clip_search=False, act_order=True, sees_rounded=True, correction=0.1)
    assert str(changed) == (
        "gptq, damping 0.01, block 128, clip search off, act-order inside bands, Hessians of rounded inputs, "
        "weights corrected with damping 0.1"
    )
    assert str(Nearest(clip_search=False)) == "nearest, clip search off"
