"""`resq bench --device cuda` without a card: what is refused, the roofline, the baselines' sums, and a whole run on the
CPU by the host's clock."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import run
from torch import Tensor

from resq import show
from resq.backends.cpu import CPU
from resq.backends.reference import REFERENCE, dense
from resq.errors import BackendUnavailable, InputError
from resq.measure.gpu import bench
from resq.measure.gpu.bench import UNIFORM, BlockPlan, bench_block, save_block, uniform
from resq.measure.gpu.ceilings import Sizes, measure_ceilings
from resq.measure.gpu.contenders import OurBlock, TorchBlock, copies_for, random_weights
from resq.measure.gpu.roofline import Ceilings, cache_bytes, least_seconds, steps, weight_bytes
from resq.measure.gpu.timer import HostTimer, Run
from resq.measure.gpu.torch_block import bf16_product, block, fastest_attention, fused, int8_product
from resq.measure.rows import provenance, read_rows
from resq.measure.shapes import shape_named
from resq.measure.speed import Point, held_bytes
from resq.measure.synthetic import one_layer
from resq.models.architecture import Point as Input
from resq.models.architecture import Role, Shape, architecture_for
from resq.models.decoder import Layer, Positions, forward_layer
from resq.numerics.formats import HeadFormats, Norm
from resq.numerics.linear import DenseLinear
from resq.ptq.precision import Precision
from resq.ptq.recipes import recipe_named

HOST = HostTimer(torch.device("cpu"))
SMALL = BlockPlan("tiny", prefill=(12,), batches=(1, 3), contexts=(9,), rounds=3)
# Rates of an H200 as design/gpu-kernels.md A7 takes them.
H200 = Ceilings(bf16=790e12, int8=1580e12, attention=600e12, copy=4.3e12)
FAST = Ceilings(bf16=1e12, int8=2e12, attention=1e12, copy=1e11)


def shape_of(name: str) -> Shape:
    config = shape_named(name)
    return architecture_for(config["model_type"]).shape(config)


@pytest.mark.parametrize(
    ("point", "bf16", "resq"),
    [
        (Point("prefill", 512), 307, 165),
        (Point("prefill", 2048), 1272, 702),
        (Point("prefill", 8192), 5775, 3496),
        (Point("decode", batch=1, context=1024), 102, 28),
        (Point("decode", batch=16, context=1024), 118, 34),
        (Point("decode", batch=16, context=4096), 165, 48),
        (Point("decode", batch=64, context=1024), 169, 52),
        (Point("decode", batch=64, context=4096), 356, 110),
    ],
    ids=str,
)
def test_the_roofline_of_llama_3_8b_is_the_one_that_goals_were_set_by(point: Point, bf16: float, resq: float) -> None:
    """The design's figures are whole microseconds and take a token's head for 80 bytes, where it has 78."""
    shape = shape_of("llama-3.1-8b")
    assert least_seconds(steps(shape, point, None), H200) * 1e6 == pytest.approx(bf16, abs=0.51)
    assert least_seconds(steps(shape, point, Precision()), H200) * 1e6 == pytest.approx(resq, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "llama-3.1-8b", "qwen2.5-7b"])
def test_bytes_that_a_block_must_hold_are_those_that_it_is_made_of(name: str) -> None:
    recipe = recipe_named("resq")
    shape, layer = one_layer(shape_named(name) | {"intermediate_size": 512, "hidden_size": 256}, recipe)
    for role, linear in layer.linears.items():
        held = sum(part.nbytes for part in linear.qweight) + linear.scale.nbytes
        assert weight_bytes(shape, recipe.precision)[role] == held
    cache = CPU.cache(layer.heads)
    parts = (torch.randn(2, 5, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    at = Positions.following(shape, 0, 2, 5)
    CPU.rope_project_append(*parts, at.cos, at.sin, layer.heads, cache)
    assert cache.nbytes() == 2 * 5 * cache_bytes(shape, recipe.precision)


def test_weights_and_cache_are_as_small_as_was_asked() -> None:
    for name, most in (("llama-3.1-8b", 0.32), ("llama-3.2-1b", 0.38)):
        shape = shape_of(name)
        weights = [sum(weight_bytes(shape, precision).values()) for precision in (Precision(), None)]
        assert weights[0] / weights[1] <= 0.30
        assert cache_bytes(shape, Precision()) / cache_bytes(shape, None) <= most


def dense_layer(name: str, seed: int = 0) -> tuple[Shape, Layer]:
    """A block of the shape `tiny` in the manner of a family, with float32 weights, biases and gains at random."""
    config = shape_named("tiny") | {"model_type": name, "layer_types": ["full_attention"] * 2}
    architecture = architecture_for(name)
    shape = replace(architecture.shape(config), layers=1)
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    def gain(size: int) -> Norm:
        return Norm(shape.eps, 1 + 0.1 * random(size))

    linears = {
        role: DenseLinear(random(*size) * size[1] ** -0.5, random(size[0]) if role in architecture.biased else None)
        for role, size in shape.sizes().items()
    }
    heads = (gain(shape.head_dim) if role in architecture.head_norms else None for role in (Role.Q, Role.K))
    query, key = heads
    return shape, Layer(
        linears,
        {point: gain(shape.hidden) for point in (Input.ATTN_IN, Input.MLP_IN)},
        HeadFormats(query_norm=query, key_norm=key),
    )


@pytest.mark.parametrize(("product", "error"), [(bf16_product, 0.02), (int8_product, 0.04)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_torchs_block_computes_what_the_decoder_does(family: str, product: Any, error: float) -> None:
    """In bfloat16 each of some ten operators adds about 2^-9 of its result; int8 as much again for each product."""
    shape, layer = dense_layer(family)
    ops = dense(torch.float64)
    cache, hidden = ops.cache(layer.heads), torch.randn(2, 9, shape.hidden, generator=torch.Generator().manual_seed(1))
    at = Positions.following(shape, 0, 2, 9)
    want = forward_layer(ops, shape, layer, hidden.double(), at, cache)
    gains = {point: norm.gain for point, norm in layer.norms.items() if norm.gain is not None}
    norms = {Role.Q: layer.heads.query_norm, Role.K: layer.heads.key_norm}
    heads = {role: norm.gain for role, norm in norms.items() if norm is not None and norm.gain is not None}
    weights = fused(layer.linears, gains, heads, product)
    keys, values = (torch.full((2, shape.kv_heads, 9, shape.head_dim), torch.nan).bfloat16() for _ in range(2))
    parts = []
    for start, stop in ((0, 8), (8, 9)):  # a prompt, then a step
        q = torch.randn(2, shape.heads, stop - start, shape.head_dim).bfloat16()
        k = torch.randn(2, shape.kv_heads, stop, shape.head_dim).bfloat16()
        _, attend = fastest_attention(HOST, q, k, k, causal=start == 0)
        x, cos, sin = (each[:, start:stop].bfloat16() for each in (hidden, at.cos, at.sin))
        parts.append(block(shape, weights, x, cos, sin, keys, values, start, attend))
    got = torch.cat(parts, dim=1).double()
    assert float((got - want).norm() / want.norm()) <= error


def test_a_step_of_grouped_heads_has_one_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever form of attention is fastest: each is made the fastest once."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, t, 16, generator=generator) for heads, t in ((8, 1), (2, 7), (2, 7)))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    found = {}
    for fastest in range(4):

        @dataclass(frozen=True)
        class Chosen(HostTimer):
            calls: list[int] = field(default_factory=list)

            def captured(self, run: Run, fastest: int = fastest) -> Run:
                self.calls.append(len(self.calls))
                taken = 0.0 if self.calls[-1] == fastest else 1.0
                return lambda: taken

            def seconds(self, run: Run, repeats: int) -> float:
                return run()

        name, attend = fastest_attention(Chosen(torch.device("cpu")), q, k, v, causal=False)
        found[name] = attend(q, k, v)
    assert {"torch's choice", "torch's choice, grouped"} <= found.keys()
    for got in found.values():
        assert torch.allclose(got, want, atol=1e-5)


def test_int8_products_are_those_of_the_rounded_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 16, generator=generator), torch.randn(24, generator=generator).bfloat16()
    for rows in (1, 33):
        x = torch.randn(1, rows, 16, generator=generator).bfloat16()
        product, size = int8_product(DenseLinear(weight, bias))
        step, scale = x.float().abs().amax(-1, keepdim=True) / 127, weight.abs().amax(1) / 127
        sums = (x.double() / step).round() @ (weight.double() / scale[:, None]).round().t()
        want = (sums * step * scale).bfloat16() + bias
        assert torch.allclose(product(x), want, rtol=2**-7, atol=1e-6)
        assert size == 24 * 16 + 4 * 24


def test_uniform_is_the_same_method_with_one_band_of_4_bits() -> None:
    recipe = uniform(recipe_named("resq"))
    assert recipe.name == UNIFORM
    assert recipe.precision.mean_bits() == (4, 4, 4)
    assert not any("last" in words for words in recipe.precision.describe().values())
    _, layer = one_layer(shape_named("tiny"), recipe)
    assert {len(linear.bands) for linear in layer.linears.values()} == {1}
    mixed = one_layer(shape_named("tiny"), recipe_named("resq"))[1]
    maps = [[type(each.inputs[point].map) for point in Input] for each in (layer, mixed)]
    assert maps[0] == maps[1]
    assert type(layer.heads.key.map) is type(mixed.heads.key.map)


def test_copies_exceed_the_cache_of_the_device() -> None:
    assert [copies_for(replace(HOST, cache_bytes=size), 100) for size in (0, 25, 26, 60)] == [1, 1, 2, 3]
    timer = replace(HOST, cache_bytes=300_000)
    shape, layer = one_layer(shape_named("tiny"), recipe_named("resq"))
    ours = OurBlock("resq", shape, layer, CPU, timer)
    ready = ours.ready(Point("prefill", 3))
    assert ready.blocks == len(ready.run()) == -(-4 * 300_000 // ours.weight_bytes) > 1


@pytest.mark.parametrize("point", [Point("prefill", 7), Point("decode", batch=3, context=7)], ids=str)
def test_a_block_is_timed_on_the_sums_of_the_decoder_and_a_run_leaves_it_as_it_was(point: Point) -> None:
    shape, layer = one_layer(shape_named("tiny"), recipe_named("resq"))
    ready = OurBlock("resq", shape, layer, REFERENCE, HOST).ready(point)
    first, again = ready.run()[0], ready.run()[0]
    assert torch.equal(first, again)
    rows = 7 if point.mode == "prefill" else 3 * 8
    assert ready.cache_bytes == rows * cache_bytes(shape, Precision())
    theirs = OurBlock("resq", shape, layer, CPU, HOST).ready(point).run()[0]
    assert float((theirs - first).norm() / first.norm()) < 1e-3
    if point.mode == "decode":  # rows hold the same tokens and get different new ones
        assert not torch.equal(first[0], first[1])


def test_a_compiled_baseline_computes_the_same() -> None:
    architecture, shape = architecture_for("llama"), replace(shape_of("tiny"), layers=1)
    compiled: list[Any] = []

    def compile_it(function: Any, *, dynamic: bool) -> Any:
        compiled.append((function, dynamic))
        return function

    weights = random_weights(architecture, shape, HOST, integers=True)
    plain, other = (TorchBlock("t", shape, weights, HOST, compiled=how) for how in (None, compile_it))
    point = Point("prefill", 5)
    assert torch.equal(plain.ready(point).run()[0], other.ready(point).run()[0])
    assert compiled == [(block, False)]


class Recorded:
    """A clock that makes every contender take its own time, and writes down what was asked of it."""

    device, cache_bytes = torch.device("cpu"), 0

    def __init__(self) -> None:
        self.captures, self.order, self.now = 0, [], 0.0

    def captured(self, run: Run) -> Run:
        self.captures += 1
        return run

    def seconds(self, run: Run, repeats: int) -> float:
        run()
        self.order.append(run)
        self.now += 1
        return self.now


def test_contenders_are_timed_in_turn_and_ratios_are_of_rounds() -> None:
    clock = Recorded()
    plan = replace(SMALL, against=(UNIFORM,))
    report = bench_block(plan, backend=CPU, timer=clock, ceilings=lambda _: FAST)
    assert [str(point) for point in report.ideal] == [
        "prefill 12",
        "decode, batch 1, context 9",
        "decode, batch 3, context 9",
    ]
    assert clock.captures == 2 * 2  # a step of decoding each; a prefill is called
    for point in report.ideal:
        mine, other = (report.at(point)[name].seconds for name in ("resq", UNIFORM))
        assert [b - a for a, b in zip(mine, other, strict=True)] == [1, 1, 1]
        assert [b - a for a, b in pairwise(mine)] == [2, 2]
        assert report.ratios(point) == {UNIFORM: statistics.median(b / a for a, b in zip(mine, other, strict=True))}
    captured = bench_block(replace(plan, capture_prefill=True), backend=CPU, timer=clock, ceilings=lambda _: FAST)
    assert captured.ideal == report.ideal
    assert clock.captures == 2 * 2 + 3 * 2


def test_a_result_without_numbers_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(CPU, norm_quantize=lambda *given: CPU.norm_quantize(given[0] * torch.inf, *given[1:]))
    broken = replace(broken, linears=lambda x, weights, onto=None: [y * torch.nan for y in CPU.linears(x, weights)])
    with pytest.raises(RuntimeError, match="resq gives infinities or no numbers at prefill 12"):
        bench_block(replace(SMALL, against=()), backend=broken, timer=HOST, ceilings=lambda _: FAST)


def test_rows_say_what_was_measured_beside_what_is_possible(tmp_path: Path) -> None:
    ceilings = iter((FAST, replace(FAST, copy=2e11)))
    report = bench_block(SMALL, backend=CPU, timer=HOST, ceilings=lambda _: next(ceilings))
    save_block(report, SMALL, tmp_path / "rows.jsonl")
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["name"] for row in rows[:4]] == ["resq", UNIFORM, "torch-bf16", "torch-int8"]
    assert len(rows) == 3 * 4
    shape = shape_of("tiny")
    for row in rows:
        assert row["kind"] == "gpu-speed"
        assert (row["subject"], row["card"]) == ("tiny", None)
        assert row["ceilings"] == asdict(replace(FAST, copy=2e11))  # the best of both looks
        assert {"commit", "machine", "command", "torch"} <= row.keys()
        assert row["plan"]["rounds"] == len(row["seconds"]) == 3
    mine, bf16 = rows[4], rows[6]
    point = Point("decode", batch=1, context=9)
    best = replace(FAST, copy=2e11)
    least = [least_seconds(steps(shape, point, precision), best) for precision in (None, Precision())]
    assert mine["ideal"] == pytest.approx(least[0] / least[1])
    taken = statistics.median(bf16["seconds"])
    operations, moved = (
        sum(getattr(each, what) for each in steps(shape, point, None)) for what in ("operations", "bytes")
    )
    assert bf16["tops"] == pytest.approx(operations / taken / 1e12)
    assert bf16["terabytes_per_second"] == pytest.approx(moved / taken / 1e12)
    assert mine["wanted"] == {"floor": 2.1, "aim": 2.7, "loss_floor": 0.14, "loss_aim": 0.11}
    assert rows[0]["wanted"]["floor"] == pytest.approx(0.68 * rows[0]["ideal"])
    _, layer = one_layer(shape_named("tiny"), recipe_named("resq"))
    held = sum(held_bytes(weight) for weight in layer.prepacked(CPU).linears.values())
    assert mine["memory"]["weights"] == held
    assert mine["memory"]["cache"] == cache_bytes(shape, Precision())


def test_a_copy_of_the_tree_without_its_history_is_told_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # no git
    assert provenance()["commit"] == "unknown"
    monkeypatch.setenv("RESQ_COMMIT", "abc1234")
    assert provenance()["commit"] == "abc1234"


def test_ceilings_are_rates() -> None:
    found = measure_ceilings(HOST, Sizes(64, 1 << 16, (2, 32, 16)))
    assert all(1e6 < rate < 1e14 for rate in asdict(found).values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--device cuda needs a --shape"),
        (["--shape", "tinny"], "did you mean tiny?"),
        (["somewhere", "--shape", "tiny"], "takes no a checkpoint"),
        (["--shape", "tiny", "--threads", "2"], "takes no --threads"),
        (["--shape", "tiny", "--head-bits", "8"], "takes no --head-bits"),
        (["--shape", "tiny", "--backend", "cpu"], "takes no --backend"),
        (["--shape", "tiny", "--recipe", "rseq"], "did you mean resq?"),
        (["--shape", "tiny", "--against", "torch-bf6"], "did you mean torch-bf16?"),
        (["--shape", "tiny", "--against", "torch-bf16,torch-bf16"], "torch-bf16 would be measured twice"),
        (["--shape", "tiny", "--prefill", "0"], "--prefill is 0"),
        (["--shape", "tiny", "--batch", "2", "--batch", "2"], "--batch names 2 twice"),
        (["--shape", "tiny", "--rounds", "0"], "--rounds is 0"),
        (["--shape", "tiny", "--prefill", "2049"], "--prefill needs 2049 tokens; the model's context holds 2048"),
        (["--shape", "tiny", "--prefill", "9", "--context", "2048"], "--context needs 2049 tokens"),
        (["--shape", "tiny", "--out", "/nonexistent/x.jsonl"], "/nonexistent is no directory"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    done = run("bench", "--device", "cuda", *arguments)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr


def test_options_of_a_card_are_refused_elsewhere() -> None:
    for option in (["--capture-prefill"], ["--context", "4", "--context", "5"]):
        done = run("bench", "--shape", "tiny", *option)
        assert done.returncode == 2
        assert "are for --device cuda" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_there_is_nothing_to_measure() -> None:
    with pytest.raises(BackendUnavailable, match="unset TRITON_INTERPRET"):
        bench_block(SMALL)
    assert run("bench", "--device", "cuda", "--shape", "tiny").returncode == 2


def test_an_unknown_shape_is_refused_before_anything_is_built() -> None:
    with pytest.raises(InputError, match="no shape is named"):
        bench_block(replace(SMALL, shape="nothing"), backend=CPU)


def test_the_command_prints_tables_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "bench_block", partial(bench_block, backend=CPU, timer=HOST, ceilings=lambda _: FAST))
    monkeypatch.setattr(show.out, "width", 160)
    given = ["bench", "--device", "cuda", "--shape", "tiny", "--prefill", "5", "--batch", "2", "--context", "4"]
    given += ["--rounds", "1", "--out", tmp_path / "rows.jsonl"]
    done = run(*given)
    assert done.returncode == 0, done.stderr
    for words in ("One decoder block of tiny", "prefill 5", "decode, batch 2, context 4", "torch-int8", "part of it"):
        assert words in done.stdout
    rows = json.loads(run(*given, "--json").stdout)["rows"]
    assert [row["name"] for row in rows] == ["resq", UNIFORM, "torch-bf16", "torch-int8"] * 2
    assert len(read_rows(tmp_path / "rows.jsonl")) == 2 * len(rows)
