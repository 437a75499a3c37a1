"""Timing: what is run in which order, what a round and a ratio are, and what an operator is said to have done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain

import pytest
import torch

from resq.backends.backend import Backend
from resq.backends.cpu import CPU, native
from resq.backends.reference import REFERENCE
from resq.measure import speed
from resq.measure.shapes import shape_named
from resq.measure.speed import Limits, Ours, Point, Result, as_row, measure, measure_limits
from resq.measure.synthetic import Synthetic, synthetic
from resq.ptq.recipes import RECIPES, recipe_named

PREFILL, DECODE = Point("prefill", tokens=8), Point("decode", batch=2, context=4)
LIMITS = Limits(read=10.0, integer=100.0, instruction_set="scalar", threads=1)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SETTLE_SECONDS", 0.0)


class Clocked:
    """State: a contender whose clock the test controls; `log` has what was asked of all of them."""

    def __init__(self, name: str, log: list[str], prefills: list[float], steps: Iterable[float] = ()) -> None:
        self.name, self.log, self.prefills, self.steps = name, log, iter(prefills), iter(steps)

    def prefill(self, tokens: int) -> float:
        self.log.append(f"{self.name} prefill {tokens}")
        return next(self.prefills)

    def start_decode(self, batch: int, context: int) -> None:
        self.log.append(f"{self.name} start {batch} {context}")

    def decode(self) -> float:
        return next(self.steps)


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    log: list[str] = []
    contenders = [Clocked("a", log, [99.0, 1.0, 2.0]), Clocked("b", log, [99.0, 4.0, 6.0])]
    told: list[tuple[str, int, int]] = []
    results = measure(contenders, [PREFILL], rounds=2, progress=lambda *step: told.append(step))
    assert log == ["a prefill 8", "b prefill 8"] * 3
    assert [(result.name, result.seconds) for result in results] == [("a", (1.0, 2.0)), ("b", (4.0, 6.0))]
    assert told == [("prefill 8", done, 6) for done in range(1, 7)]


def test_a_decode_round_is_the_median_of_its_steps_after_the_cold_ones() -> None:
    log: list[str] = []
    cold = [50.0] * speed.WARM_STEPS
    # One step of each round is interrupted by something else.
    rounds = [[*cold, *[seconds] * (speed.STEPS - 1), 70.0] for seconds in (9.0, 2.0, 3.0, 5.0)]
    contender = Clocked("a", log, [], chain(*rounds))
    (result,) = measure([contender], [DECODE], rounds=3)
    assert log == ["a start 2 4"] * 4
    assert result.seconds == (2.0, 3.0, 5.0)
    assert (result.median, result.rate) == (3.0, 2 / 3)


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    ours = Result("ours", PREFILL, (1.0, 2.0, 10.0))
    row = as_row(ours, LIMITS, [Result("other", PREFILL, (3.0, 2.0, 20.0)), Result("third", PREFILL, (0.5, 1.0, 5.0))])
    assert row["ratios"] == {"other": 2.0, "third": 0.5}  # that of the medians would be 1.5
    assert row["seconds"] == [1.0, 2.0, 10.0]
    assert row["tokens_per_second"] == 4.0
    assert (row["name"], row["mode"], row["tokens"], row["limits"]["read"]) == ("ours", "prefill", 8, 10.0)


def test_points_say_what_they_are() -> None:
    assert (str(PREFILL), PREFILL.processed) == ("prefill 8", 8)
    assert (str(DECODE), DECODE.processed) == ("decode, batch 2, context 4", 2)


def test_limits_are_those_of_the_instruction_set_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "READ_BYTES", 8 << 20)
    monkeypatch.setattr(speed, "PEAK_SECONDS", 0.005)
    limits = measure_limits(1)
    assert (limits.instruction_set, limits.threads) == (native.module().active(), 1)
    assert 0 < limits.read < 10_000
    assert 0 < limits.integer < 1_000_000


def tiny(backend: Backend, recipe: str = "resq", **changes: object) -> Synthetic:
    return synthetic(shape_named("tiny") | changes, recipe_named(recipe), backend)


@pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=lambda backend: backend.name)
@pytest.mark.parametrize("recipe", ["resq", "resq-weight-only", "resq-kv"])
def test_operators_tell_calls_bytes_and_operations_of_one_run(backend: Backend, recipe: str) -> None:
    model = tiny(backend, recipe)
    ours, shape = Ours("ours", model), model.shape
    prefill, decode = measure([ours], [PREFILL, DECODE], rounds=2)
    sizes = {str(role): math.prod(size) for role, size in shape.sizes().items()}
    values = {
        "q, k, v": sizes["q"] + sizes["k"] + sizes["v"],
        "o": sizes["o"],
        "gate, up": sizes["gate"] + sizes["up"],
        "down": sizes["down"],
    }
    for result, rows in ((prefill, 8), (decode, 2)):
        for name, count in values.items():
            entry = result.operators[name]
            assert entry.calls == shape.layers
            assert entry.operations == shape.layers * 2 * rows * count
        head, attention = result.operators["lm_head"], result.operators["attention"]
        # Only the last token of a prefill has logits.
        assert (head.calls, head.operations) == (1, 2 * result.point.batch * shape.vocab * shape.hidden)
        assert attention.calls == shape.layers
        assert sum(entry.bytes for name, entry in result.operators.items() if name != "attention") == ours.weight_bytes
        assert sum(entry.seconds for entry in result.operators.values()) > 0
    # Of a prefill from nothing: each query takes every key and value of the 8 there are, masked or not.
    assert prefill.operators["attention"].operations == shape.layers * 4 * 8 * 8 * shape.heads * shape.head_dim
    # Keys and values of both rows and of the tokens so far.
    tokens = 2 * (DECODE.context + speed.WARM_STEPS + speed.STEPS)
    assert ours.cache_bytes() % tokens == 0
    if recipe == "resq-weight-only":
        assert ours.cache_bytes() == tokens * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2


def test_weights_take_the_bytes_of_their_backend() -> None:
    packed, plain = Ours("cpu", tiny(CPU, "rtn")), Ours("reference", tiny(REFERENCE, "rtn"))
    shape = packed.model.shape
    linears = shape.layers * sum(math.prod(size) for size in shape.sizes().values())
    head = shape.vocab * shape.hidden  # the bfloat16 table
    scales = shape.layers * sum(out for out, _ in shape.sizes().values())
    assert plain.weight_bytes == linears + 4 * scales + 2 * head
    # Panels hold a scale and a column sum of every output.
    assert packed.weight_bytes == linears // 2 + 8 * scales + 2 * head


TOKENS = torch.randint(0, 512, (12, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_synthetic_model_is_the_same_on_every_backend(recipe: str) -> None:
    mine, theirs = tiny(CPU, recipe), tiny(REFERENCE, recipe)
    logits, want = mine(TOKENS), theirs(TOKENS)
    assert logits.shape == (*TOKENS.shape, 512)
    assert logits.isfinite().all()
    # As in tests/conformance/test_backends.py: where one integer differs, the rest of its row does.
    apart = (logits - want).abs().amax(dim=-1) / want.abs().max()
    assert float(apart.median()) <= 1e-5
    assert float(want.std()) > 0.1
    cache = mine.cache()
    steps = [mine(TOKENS[:, i : i + 1], cache, last=True) for i in range(TOKENS.shape[1])]
    assert torch.equal(torch.cat(steps, dim=1), logits)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_a_synthetic_model_of_another_family_runs(family: str) -> None:
    changes = {"model_type": family, "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False}
    mine, theirs = (tiny(backend, layer_types=["full_attention"] * 2, **changes) for backend in (CPU, REFERENCE))
    assert mine.shape.tied is False
    apart = (mine(TOKENS) - theirs(TOKENS)).abs().amax(dim=-1)
    assert float(apart.median()) <= 1e-5 * float(theirs(TOKENS).abs().max())


def test_a_synthetic_model_depends_on_its_seed_alone() -> None:
    config, recipe = shape_named("tiny"), recipe_named("resq")
    first, again, other = (synthetic(config, recipe, CPU, seed=seed)(TOKENS) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
