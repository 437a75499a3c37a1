"""The pipeline rounds each linear on the inputs it will get, and gives the same integers for the same job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from tests.conftest import Kept, brief
from torch import Tensor

from resq.backends.backend import Backend
from resq.backends.reference import dense, straight_through
from resq.checkpoint.writer import CheckpointWriter
from resq.models import decoder
from resq.models.architecture import READERS, Role, Site
from resq.models.decoder import Layer
from resq.models.source import Source
from resq.numerics.bands import INT8, Bands
from resq.numerics.formats import ActivationFormat
from resq.numerics.linear import DenseLinear, PackedLinear
from resq.numerics.maps import Dense, Hadamard, describe
from resq.numerics.moments import second_moment
from resq.ptq.ablations import ABLATIONS
from resq.ptq.ends import in_sixteen_bit
from resq.ptq.layers import LinearReport, nearest_16_bit, output_error
from resq.ptq.pipeline import Job, fit_maps, quantize
from resq.ptq.placement import Placement
from resq.ptq.recipe import At, InputMoments, Recipe, Rounded, Statistic
from resq.ptq.recipes import GPTQ, QUAROT, QUIK, RECIPES, RESQ, RESQ_KV, RESQ_PAPER, RESQ_WEIGHT_ONLY, RTN
from resq.ptq.rounding.nearest import Nearest
from resq.ptq.statistics import collect
from resq.runtime.load import ends_from, layer_from


@dataclass(frozen=True)
class Watched:
    """Nearest rounding that notes the moments it was offered."""

    seen: list[Tensor]
    cross: list[Tensor]
    sees_rounded: bool = False
    corrects: bool = False
    needs_moment: ClassVar[bool] = True

    def __call__(self, weight: Tensor, moments: InputMoments | None, bands: Bands, bias: Tensor | None) -> Rounded:
        assert moments is not None
        self.seen.append(moments.seen)
        self.cross.extend([] if moments.cross is None else [moments.cross])
        return Nearest()(weight, moments, bands, bias)


def calibration() -> Tensor:
    return torch.randint(3, 259, (6, 32), generator=torch.Generator().manual_seed(9))


def run(source: Source, recipe: Recipe, **changes: Any) -> tuple[Kept, list[LinearReport]]:
    job = Job(recipe, calibration(), **{"rounding_windows": 3, "seed": 0, "keep_tied": True, **changes})
    kept = Kept([])
    return kept, quantize(source, job, cast(CheckpointWriter, kept), lambda what, done, steps: None).linears


def tensors(kept: Kept) -> list[Tensor]:
    """Everything stored."""
    assert kept.ends is not None
    found = [kept.ends.embed]
    for parts in kept.layers:
        for linear in parts.linears.values():
            found += [linear.weight] if isinstance(linear, DenseLinear) else [*linear.qweight, linear.scale]
            found += [] if linear.bias is None else [linear.bias]
        found += [format.map.matrix for format in (parts.heads.query, parts.heads.key) if isinstance(format.map, Dense)]
    return found


@pytest.mark.parametrize("recipe", [RESQ, RTN], ids=["resq", "rtn"])
def test_each_linear_is_rounded_on_the_inputs_the_rounded_layers_before_it_give(
    recipe: Recipe, checkpoint: Callable[..., Path]
) -> None:
    """A linear's input depends on the linears before it alone: run the finished model and compare every moment."""
    source, watched = Source.open(checkpoint("qwen2")), Watched([], [])
    kept, _ = run(source, replace(recipe, rounding=watched))
    inputs: list[Tensor] = []
    ops = dense(torch.float32)

    def linears(x: Any, weights: Any, onto: Tensor | None = None) -> list[Tensor]:
        inputs.extend(x for _ in weights)
        return ops.linears(x, weights, onto)

    layers = [layer_from(parts, source.shape, "kept").prepacked(ops) for parts in kept.layers]
    moments = collect(source, ops, calibration(), recipe.needs, lambda what, done, steps: None)
    residual = fit_maps(recipe, moments, source.shape, 0).get(At(Site.RESIDUAL))
    ends = source.ends()  # its table in the new basis, as it is stored; the head does not matter here
    embed = ends.embed.double() if residual is None else residual.apply(ends.embed.double())
    ends = replace(ends, embed=embed.to(torch.bfloat16))
    decoder.forward(replace(ops, linears=linears), source.shape, ends, layers, calibration()[:3])
    inputs.pop()  # of the head
    assert len(inputs) == len(watched.seen) == 2 * 7
    for x, moment in zip(inputs, watched.seen, strict=True):
        want = second_moment(x.flatten(0, 1))
        # Two float32 forwards with other summation orders, as in the decoder's tests; a product doubles it.
        torch.testing.assert_close(moment, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def inputs_of(source: Source, ops: Backend, layers: Sequence[Layer], embed: Tensor) -> list[list[Tensor]]:
    """Per linear in the order of rounding what it reads, window by window as the pipeline runs them."""
    read: list[list[Tensor]] = []
    for tokens in calibration()[:3]:
        seen: list[Tensor] = []

        def linears(x: Any, weights: Any, onto: Tensor | None = None, *, into: list[Tensor] = seen) -> list[Tensor]:
            into.extend(x[0] for _ in weights)
            return ops.linears(x, weights, onto)

        ends = replace(source.ends(), embed=embed)
        decoder.forward(replace(ops, linears=linears), source.shape, ends, layers, tokens[None])
        read.append(seen[:-1])  # but the head
    return [list(each) for each in zip(*read, strict=True)]


@pytest.mark.parametrize("recipe", [RESQ, QUIK], ids=lambda recipe: recipe.name)
def test_a_rounding_may_see_rounded_inputs_and_those_of_the_unrounded_model(
    recipe: Recipe, checkpoint: Callable[..., Path]
) -> None:
    source, watched = Source.open(checkpoint("qwen2")), Watched([], [], sees_rounded=True, corrects=True)
    kept, _ = run(source, replace(recipe, rounding=watched))
    assert kept.ends is not None
    ops = straight_through()
    finished = [layer_from(parts, source.shape, "kept").prepacked(ops) for parts in kept.layers]
    rounded = inputs_of(source, ops, finished, kept.ends.embed)
    moments = collect(source, dense(torch.float32), calibration(), recipe.needs, lambda what, done, steps: None)
    maps = fit_maps(recipe, moments, source.shape, 0)
    placement = Placement(source.shape, maps, recipe.precision, recipe.folds_norms)
    exact = [placement.layer(source.layer(index), index) for index in range(source.shape.layers)]
    embed = placement.ends(source.ends(), keep_tied=True).embed
    unrounded = inputs_of(source, dense(torch.float64), exact, embed)
    assert len(rounded) == len(unrounded) == len(watched.seen) == len(watched.cross) == 2 * 7
    for x, y, seen, cross in zip(rounded, unrounded, watched.seen, watched.cross, strict=True):
        pairs = list(zip(x, y, strict=True))
        want = sum(a.double().T @ a.double() for a, _ in pairs), sum(a.double().T @ b for a, b in pairs)
        for got, each in zip((seen, cross), want, strict=True):
            # Sums of float32 in another order move a rounding here and there.
            assert float((got - each).norm()) <= 1e-2 * float(each.norm())
        # What tells rounded inputs from unrounded ones, and both from their products.
        plain = sum(b.T @ b for _, b in pairs)
        assert float((seen - plain).norm()) >= 2e-2 * float(seen.norm())
        assert float((cross - seen).norm()) >= 1e-2 * float(seen.norm())


def test_a_rounding_that_asks_for_nothing_else_gets_no_cross_moment(checkpoint: Callable[..., Path]) -> None:
    watched = Watched([], [])
    run(Source.open(checkpoint()), replace(RESQ, rounding=watched))
    assert watched.cross == []
    assert len(watched.seen) == 14


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_runs_and_changes_something(name: str, checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    found, base = tensors(run(source, ABLATIONS[name])[0]), tensors(run(source, GPTQ if "gptq" in name else RESQ)[0])
    same = len(found) == len(base) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, base, strict=True)
    )
    assert not same


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_job_gives_the_same_bits_and_another_seed_others(name: str, checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    first, again, other = (tensors(run(source, brief(name), seed=seed)[0]) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = {
        basis.sites & {Site.RESIDUAL, Site.QUERY_KEY}
        for basis in RECIPES[name].basis
        if Statistic.PEAKS not in basis.needs
    }
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)) == (not any(drawn))


@pytest.mark.parametrize("recipe", [RESQ, RESQ_PAPER], ids=["resq", "resq-paper"])
def test_the_query_key_map_is_stored_once_in_float32(recipe: Recipe, checkpoint: Callable[..., Path]) -> None:
    kept, _ = run(Source.open(checkpoint()), recipe)
    for parts in kept.layers:
        turn = parts.heads.query.map
        assert isinstance(turn, Dense)
        assert isinstance(parts.heads.key.map, Dense)
        assert turn.matrix.dtype == torch.float32
        assert parts.heads.key.map.matrix is turn.matrix


def test_a_report_has_every_linear_in_the_order_it_runs(checkpoint: Callable[..., Path]) -> None:
    _, reports = run(Source.open(checkpoint()), RESQ)
    order = [role for roles in READERS.values() for role in roles]
    assert [(report.layer, report.role) for report in reports] == [
        (layer, role) for layer in range(2) for role in order
    ]
    assert {report.damping for report in reports} == {0.01}
    assert all(0 < report.error < 0.1 for report in reports)


def test_a_reported_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, e = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (50, 5, 5))
    rounded = w + 0.1 * e
    outputs = float((x @ (w - rounded).T).square().sum() / (x @ w.T).square().sum())
    lost, energy = output_error(w, rounded, InputMoments(x.T @ x))
    assert lost / energy == pytest.approx(outputs)
    weights = float((w - rounded).square().sum() / w.square().sum())
    lost, energy = output_error(w, rounded, None)
    assert lost / energy == pytest.approx(weights)


def test_a_recipe_without_moments_needs_no_calibration(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    job = Job(RTN, torch.empty(0, 32, dtype=torch.int64), 0, 0, keep_tied=True)
    kept = Kept([])
    reports = quantize(source, job, cast(CheckpointWriter, kept), lambda what, done, steps: None).linears
    want, _ = run(source, RTN)
    assert all(torch.equal(a, b) for a, b in zip(tensors(kept), tensors(want), strict=True))
    assert {report.damping for report in reports} == {None}


def test_progress_ends_at_its_number_of_steps(checkpoint: Callable[..., Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    job = Job(RESQ, torch.randint(3, 259, (6, 32)), 2, 0, keep_tied=True)
    quantize(Source.open(checkpoint()), job, cast(CheckpointWriter, Kept([])), lambda *report: seen.append(report))
    assert [report for report in seen if report[0] == "rounding"] == [("rounding", step, 14) for step in range(15)]
    assert seen.index(("collecting moments", 12, 12)) < seen.index(("rounding", 0, 14))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tables_are_stored_in_16_bit_of_the_sources_kind(dtype: str, checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint(dtype=dtype, tie_word_embeddings=False))
    kept, _ = run(source, RTN, keep_tied=False)
    assert kept.ends is not None
    assert isinstance(kept.ends.head, DenseLinear)
    want = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    assert kept.ends.embed.dtype == kept.ends.head.weight.dtype == want
    assert torch.equal(kept.ends.embed, source.ends().embed.to(want))
    assert in_sixteen_bit(torch.tensor([[1e5]]), dtype, lambda rows: rows).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_weight_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = nearest_16_bit(weight.double())
    assert stored.dtype == dtype
    assert torch.equal(stored, weight)


def test_another_weight_is_stored_in_the_nearer_16_bit_type() -> None:
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert nearest_16_bit(weight).dtype == torch.float16  # three more digits
    assert nearest_16_bit(weight * 1e5).dtype == torch.bfloat16  # out of range
    assert nearest_16_bit(weight * 1e-7).dtype == torch.bfloat16  # below float16's normal numbers
    assert torch.equal(nearest_16_bit(torch.zeros(2, 2, dtype=torch.float64)).double(), torch.zeros(2, 2))


def test_a_tied_model_stores_one_table_and_an_untied_one_two(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    tied, untied = (run(source, RESQ, keep_tied=kept)[0].ends for kept in (True, False))
    assert tied is not None
    assert untied is not None
    assert (tied.tied, untied.tied) == (True, False)
    assert isinstance(tied.head, DenseLinear)
    assert isinstance(untied.head, DenseLinear)
    assert tied.head.weight is tied.embed
    assert isinstance(tied.head_input.map, Dense)
    assert tied.head_input.map.matrix.dtype == torch.float32
    assert untied.head.weight.shape == untied.embed.shape
    assert not torch.equal(untied.head.weight, untied.embed)


def test_a_head_in_8_bit_is_packed_and_its_input_rounded(checkpoint: Callable[..., Path]) -> None:
    recipe = replace(RESQ, precision=replace(RESQ.precision, head=INT8))
    ends = run(Source.open(checkpoint()), recipe, keep_tied=False)[0].ends
    assert ends is not None
    assert isinstance(ends.head, PackedLinear)
    assert ends.head_input.bands is not None
    assert ends.head.bands.pairs == ends.head_input.bands.pairs == [(8, 64)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_recipe_for_the_cache_keeps_every_linear_that_meets_no_map(
    dtype: str, checkpoint: Callable[..., Path]
) -> None:
    source = Source.open(checkpoint("qwen2", dtype=dtype))
    kept, reports = run(source, RESQ_KV)
    for index, parts in enumerate(kept.layers):
        layer = source.layer(index)
        for role, linear in parts.linears.items():
            assert isinstance(linear, DenseLinear)
            before = layer.linears[Role(role)]
            mapped = role in (Role.V, Role.O)
            assert torch.equal(linear.weight.double(), before.weight.double()) != mapped
            assert mapped or linear.weight.dtype == before.weight.dtype
            assert (linear.bias is None) == (before.bias is None)
            if linear.bias is not None:
                assert torch.equal(linear.bias, before.bias.float()) != mapped
        for point, norm in layer.norms.items():
            assert torch.equal(parts.norms[point].gain.double(), norm.gain.double())
        assert all(format == ActivationFormat() for format in parts.inputs.values())
    assert kept.ends is not None
    assert torch.equal(kept.ends.embed, source.ends().embed)
    # float16's half ulp, squared, is what an untouched linear does not pay.
    assert all((0 < report.error <= 2.0**-22) == (report.role in (Role.V, Role.O)) for report in reports)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_recipe_that_rounds_nothing_gives_the_model_back(model_type: str, checkpoint: Callable[..., Path]) -> None:
    source, ops, tokens = Source.open(checkpoint(model_type)), dense(torch.float64), calibration()[:2]
    kept, _ = run(source, replace(RESQ_KV, basis=(), precision=replace(RESQ_KV.precision, key=None, value=None)))
    assert kept.ends is not None
    layers = [layer_from(parts, source.shape, "kept") for parts in kept.layers]
    got = decoder.forward(ops, source.shape, ends_from(kept.ends, source.shape), layers, tokens)
    plain = [source.layer(index) for index in range(source.shape.layers)]
    assert torch.equal(got, decoder.forward(ops, source.shape, source.ends(), plain, tokens))


def test_weights_alone_need_no_map_of_queries_and_keys(checkpoint: Callable[..., Path]) -> None:
    kept, _ = run(Source.open(checkpoint()), RESQ_WEIGHT_ONLY)
    for parts in kept.layers:
        assert parts.heads.query.map is parts.heads.key.map is None
        formats = [*parts.inputs.values(), parts.heads.key, parts.heads.value]
        assert all(format.bands is None for format in formats)
        bands = {role: linear.bands.pairs for role, linear in parts.linears.items() if isinstance(linear, PackedLinear)}
        wide = {role: [(4, 56), (8, 8)] for role in (Role.Q, Role.K, Role.V, Role.GATE, Role.UP)}
        assert bands == {**wide, Role.O: [(4, 112), (8, 16)], Role.DOWN: [(4, 172)]}


def test_hadamard_maps_are_stored_without_a_tensor(checkpoint: Callable[..., Path]) -> None:
    kept, _ = run(Source.open(checkpoint()), QUAROT)
    for parts in kept.layers:
        for map in (parts.inputs["o_in"].map, parts.inputs["down_in"].map, parts.heads.query.map):
            assert isinstance(map, Hadamard)
            assert describe(map)[1] == {}
        assert parts.inputs["o_in"].map.inner == 16
        assert parts.heads.key.map is parts.heads.query.map


def test_a_linear_in_16_bit_keeps_its_weights(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    recipe = replace(RTN, precision=replace(RTN.precision, down_weights=None, down_inputs=None))
    kept, reports = run(source, recipe)
    down = kept.layers[0].linears[Role.DOWN]
    assert isinstance(down, DenseLinear)
    assert torch.equal(down.weight, source.layer(0).linears[Role.DOWN].weight)
    assert all(report.error == 0 for report in reports if report.role == Role.DOWN)
