"""Placing maps into weights leaves a model's logits unchanged: rounding later is the only lossy step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import SHAPES, float64_logits
from torch import Tensor

from resq.backends.reference import dense
from resq.errors import InputError
from resq.models.architecture import READERS, Point, Role, Shape, Site
from resq.models.rope import Rope
from resq.models.source import Source
from resq.models.text import load_tokenizer, sampled_windows
from resq.numerics import hadamard
from resq.numerics.formats import HeadFormats
from resq.numerics.linear import DenseLinear
from resq.numerics.maps import Dense, Diagonal, Hadamard, LinearMap, PerHead, Permutation, random_orthogonal
from resq.ptq.pipeline import fit_maps
from resq.ptq.placement import Placement, fold_norms, in_float64, rounded_matrix
from resq.ptq.precision import Precision
from resq.ptq.recipe import At, Moments
from resq.ptq.recipes import QUAROT, RESQ, RESQ_PAPER, RTN
from resq.ptq.statistics import collect

MODELS: dict[str, dict[str, Any]] = {
    **SHAPES,
    "ffn-688": {"intermediate_size": 688},
    "ffn-344": {"intermediate_size": 344},
    "ffn-96": {"intermediate_size": 96},
    "ffn-214-without-hadamard-order": {"intermediate_size": 2 * 107},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-untied-mqa": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": False},
    "float32": {"dtype": "float32", "num_hidden_layers": 3},
}
# Float64 rounds at 1e-16; some hundred sums of some hundred terms through a few layers stay far below this.
UNCHANGED = 1e-10


def random_tokens(rows: int, count: int) -> Tensor:
    return torch.randint(3, 259, (rows, count), generator=torch.Generator().manual_seed(5))


def random_maps(shape: Shape) -> dict[At, LinearMap]:
    generator = torch.Generator().manual_seed(2)
    maps: dict[At, LinearMap] = {At(Site.RESIDUAL): Dense(random_orthogonal(shape.hidden, generator))}
    for layer in range(shape.layers):
        heads = [random_orthogonal(shape.head_dim, generator) for _ in range(shape.kv_heads)]
        scales = torch.rand(shape.kv_heads, shape.head_dim, generator=generator, dtype=torch.float64) + 0.5
        maps[At(Site.VALUE, layer)] = PerHead(torch.stack(heads), scales)
        maps[At(Site.QUERY_KEY, layer)] = Dense(random_orthogonal(shape.head_dim, generator))
        maps[At(Site.ATTN_OUT, layer)] = Permutation(torch.randperm(shape.heads * shape.head_dim, generator=generator))
        maps[At(Site.MLP_HIDDEN, layer)] = Hadamard(hadamard.plan(shape.ffn))
        scales = torch.rand(shape.hidden, generator=generator, dtype=torch.float64) + 0.5
        maps[At(Site.ATTN_NORM_OUT, layer)] = Diagonal(scales)
        maps[At(Site.MLP_NORM_OUT, layer)] = Permutation(torch.randperm(shape.hidden, generator=generator))
    return maps


def fitted_maps(source: Source, tokens: Tensor) -> dict[At, LinearMap]:
    moments = collect(source, dense(torch.float32), tokens, RESQ.needs, lambda what, done, steps: None)
    return fit_maps(RESQ, moments, source.shape, seed=0)


def hadamard_maps(shape: Shape) -> dict[At, LinearMap]:
    return fit_maps(QUAROT, Moments(0), shape, seed=0)


def there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def change(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", ["random", "fitted", "hadamard"])
@pytest.mark.parametrize("name", MODELS)
def test_placing_all_maps_leaves_logits_unchanged(name: str, kind: str, checkpoint: Callable[..., Path]) -> None:
    source, tokens = Source.open(checkpoint(**MODELS[name])), random_tokens(2, 20)
    want = float64_logits(source, tokens)
    if kind == "fitted":
        maps = fitted_maps(source, random_tokens(6, 32))
    else:
        maps = random_maps(source.shape) if kind == "random" else hadamard_maps(source.shape)
    placement = Placement(source.shape, maps, RESQ.precision, folds=True)
    for keep_tied in (False, True) if source.shape.tied else (False,):
        delta = change(float64_logits(source, tokens, placement, keep_tied=keep_tied), want)
        assert delta <= UNCHANGED, f"keep_tied={keep_tied}"


# Query heads with a Hadamard order (4 = 2², 12, 28) and without one (6, 14), (heads, kv heads, head dimension).
HEADS = [(4, 2, 16), (12, 4, 8), (28, 4, 4), (6, 2, 16), (14, 2, 8), (14, 14, 6)]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_placing_hadamard_transforms_leaves_logits_unchanged(
    heads: int, kv_heads: int, size: int, model_type: str, checkpoint: Callable[..., Path]
) -> None:
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
    changes["hidden_size"] = 8 * heads
    source, tokens = Source.open(checkpoint(model_type, **changes)), random_tokens(2, 20)
    want = float64_logits(source, tokens)
    placement = Placement(source.shape, hadamard_maps(source.shape), QUAROT.precision, QUAROT.folds_norms)
    for keep_tied in (False, True):
        assert change(float64_logits(source, tokens, placement, keep_tied=keep_tied), want) <= UNCHANGED
    before, after = in_float64(source.layer(0)), placement.layer(source.layer(0), 0)
    assert not any(torch.equal(before.linears[role].weight, after.linears[role].weight) for role in Role)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [each for each in HEADS if each[2] != 6])
def test_the_input_of_o_is_spread_over_all_heads(
    heads: int, kv_heads: int, size: int, checkpoint: Callable[..., Path]
) -> None:
    """One coordinate of one value head reaches every coordinate of o's input equally, whether H has an order or not."""
    shape = replace(Source.open(checkpoint()).shape, heads=heads, kv_heads=kv_heads, head_dim=size)
    maps = hadamard_maps(shape)
    value = maps.get(At(Site.VALUE, 0))
    x = torch.eye(heads * size, dtype=torch.float64)
    if value is not None:
        assert isinstance(value, PerHead)
        x = value.repeated(heads // kv_heads).apply(x)
    spread = maps[At(Site.ATTN_OUT, 0)].apply(x)
    torch.testing.assert_close(spread.abs(), torch.full_like(x, (heads * size) ** -0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["llama-5m", "qwen2-5m"])
def test_placing_leaves_a_trained_models_logits_unchanged(name: str, shared: Path) -> None:
    source = Source.open(shared / "models" / name)
    tokenizer = load_tokenizer(source.path)
    text = shared / "data" / "wikitext-2" / "wiki.train.first1MB.raw"
    tokens = sampled_windows([text], tokenizer, count=5, length=128, seed=0).tokens
    placement = Placement(source.shape, fitted_maps(source, tokens), RESQ.precision, folds=True)
    want = float64_logits(source, tokens[:1, :64])
    for keep_tied in (False, True):
        assert change(float64_logits(source, tokens[:1, :64], placement, keep_tied=keep_tied), want) <= UNCHANGED


@pytest.mark.parametrize("site", Site)
def test_placing_one_map_alone_leaves_logits_unchanged(site: Site, checkpoint: Callable[..., Path]) -> None:
    source, tokens = Source.open(checkpoint("qwen2")), random_tokens(2, 20)
    maps = {at: map for at, map in random_maps(source.shape).items() if at.site is site}
    placement = Placement(source.shape, maps, RESQ.precision, folds=site is Site.RESIDUAL)
    want = float64_logits(source, tokens)
    for keep_tied in (False, True):
        assert change(float64_logits(source, tokens, placement, keep_tied=keep_tied), want) <= UNCHANGED


@pytest.mark.parametrize(
    "make",
    [
        lambda size: Hadamard(hadamard.plan(size)),
        lambda size: Hadamard(hadamard.plan(size // 2), inner=2),
        lambda size: Permutation(torch.randperm(size, generator=torch.Generator().manual_seed(4))),
    ],
    ids=["hadamard", "hadamard-inner", "permutation"],
)
def test_queries_and_keys_take_any_orthogonal_map(
    make: Callable[[int], LinearMap], checkpoint: Callable[..., Path]
) -> None:
    source, tokens = Source.open(checkpoint("qwen2")), random_tokens(2, 20)
    turn = make(source.shape.head_dim)
    maps = {At(Site.QUERY_KEY, layer): turn for layer in range(source.shape.layers)}
    placement = Placement(source.shape, maps, RESQ.precision, folds=False)
    heads = placement.layer(source.layer(0), 0).heads
    assert heads.query.map is heads.key.map is turn
    assert change(float64_logits(source, tokens, placement), float64_logits(source, tokens)) <= UNCHANGED


def test_a_diagonal_before_down_goes_into_up(checkpoint: Callable[..., Path]) -> None:
    source, tokens = Source.open(checkpoint("qwen2")), random_tokens(2, 20)
    scales = torch.rand(source.shape.ffn, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    maps = {At(Site.MLP_HIDDEN, layer): Diagonal(scales) for layer in range(source.shape.layers)}
    placement = Placement(source.shape, maps, RESQ.precision, folds=False)
    layer, plain = placement.layer(source.layer(0), 0), source.layer(0)
    assert layer.inputs[Point.DOWN_IN].map is None
    assert torch.equal(layer.linears[Role.UP].weight, plain.linears[Role.UP].weight.double() * scales[:, None])
    assert change(float64_logits(source, tokens, placement), float64_logits(source, tokens)) <= UNCHANGED


@pytest.mark.parametrize("folds", [False, True])
def test_a_diagonal_after_a_norm_goes_into_its_gain_and_leaves_its_readers(
    folds: bool, checkpoint: Callable[..., Path]
) -> None:
    source, tokens = Source.open(checkpoint("qwen2")), random_tokens(2, 20)
    generator, maps = torch.Generator().manual_seed(3), dict[At, LinearMap]()
    for layer in range(source.shape.layers):
        for site in (Site.ATTN_NORM_OUT, Site.MLP_NORM_OUT):
            scales = torch.rand(source.shape.hidden, generator=generator, dtype=torch.float64) + 0.5
            maps[At(site, layer)] = Diagonal(scales)
    if folds:
        maps[At(Site.RESIDUAL)] = Dense(random_orthogonal(source.shape.hidden, generator))
    placement = Placement(source.shape, maps, RESQ.precision, folds=folds)
    layer, plain = placement.layer(source.layer(1), 1), source.layer(1)
    for point, site in ((Point.ATTN_IN, Site.ATTN_NORM_OUT), (Point.MLP_IN, Site.MLP_NORM_OUT)):
        map = maps[At(site, 1)]
        assert isinstance(map, Diagonal)
        assert layer.inputs[point].map is None
        gain = there(plain.norms[point].gain).double()
        assert torch.equal(there(layer.norms[point].gain), map.scales if folds else gain * map.scales)
        if not folds:
            for role in READERS[point]:
                assert torch.equal(layer.linears[role].weight, plain.linears[role].weight.double() / map.scales)
    want = float64_logits(source, tokens)
    for keep_tied in (False, True):
        assert change(float64_logits(source, tokens, placement, keep_tied=keep_tied), want) <= UNCHANGED


@pytest.mark.parametrize("site", [Site.ATTN_NORM_OUT, Site.MLP_NORM_OUT])
def test_any_other_map_after_a_norm_is_online(site: Site, checkpoint: Callable[..., Path]) -> None:
    source, tokens = Source.open(checkpoint("qwen2")), random_tokens(2, 20)
    point = Point.ATTN_IN if site is Site.ATTN_NORM_OUT else Point.MLP_IN
    size, generator = source.shape.hidden, torch.Generator().manual_seed(3)
    every: list[LinearMap] = [
        Dense(random_orthogonal(size, generator)),
        Permutation(torch.randperm(size, generator=generator)),
        Hadamard(hadamard.plan(size)),
    ]
    for map in every:
        maps = {At(site, layer): map for layer in range(source.shape.layers)}
        placement = Placement(source.shape, maps, RESQ.precision, folds=False)
        layer, plain = placement.layer(source.layer(0), 0), source.layer(0)
        assert layer.inputs[point].map is map
        assert torch.equal(there(layer.norms[point].gain), there(plain.norms[point].gain).double())
        assert change(float64_logits(source, tokens, placement), float64_logits(source, tokens)) <= UNCHANGED


def test_maps_that_do_not_commute_with_what_follows_are_refused_by_their_site() -> None:
    shape = Shape(16, 1, 2, 1, 8, 32, 10, 1e-5, Rope((1.0,) * 4), True, 16)
    skewed = Dense(torch.eye(16) + 1, orthogonal=False)
    scaled = PerHead(torch.eye(8)[None], torch.full((1, 8), 2.0))
    for at, map in ((At(Site.RESIDUAL), skewed), (At(Site.QUERY_KEY, 0), scaled)):
        with pytest.raises(
            InputError, match=rf"\A{at.site} needs an orthogonal map, got a {map.kind} one that is not\Z"
        ):
            Placement(shape, {at: map}, RESQ.precision, folds=True)
    for at, map in (
        (At(Site.VALUE, 0), Hadamard(hadamard.plan(8))),
        (At(Site.QUERY_KEY, 0), Diagonal(torch.ones(8))),
    ):
        with pytest.raises(InputError, match=f"a {map.kind} map at {at.site} cannot be placed"):
            Placement(shape, {at: map}, RESQ.precision, folds=False)


def test_placing_no_map_keeps_every_weight(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint("qwen2"))
    placement = Placement(source.shape, {}, RTN.precision, folds=False)
    before, after = source.layer(0), placement.layer(source.layer(0), 0)
    for role in Role:
        assert torch.equal(after.linears[role].weight, before.linears[role].weight.double())
    for point, norm in before.norms.items():
        assert norm.gain is not None
        assert torch.equal(there(after.norms[point].gain), norm.gain.double())
    ends = placement.ends(source.ends(), keep_tied=False)
    assert torch.equal(ends.embed, source.ends().embed.double())
    assert torch.equal(there(ends.norm.gain), there(source.ends().norm.gain).double())


def test_each_value_head_is_undone_by_the_query_heads_that_read_it(checkpoint: Callable[..., Path]) -> None:
    """Only one kv head is turned: exactly its own rows of v and its readers' columns of o move."""
    source = Source.open(checkpoint())  # query heads 0 … 3 read kv head 0, 4 … 7 kv head 1
    turns = torch.eye(16, dtype=torch.float64).repeat(2, 1, 1)
    turns[1] = random_orthogonal(16, torch.Generator().manual_seed(0))
    placement = Placement(source.shape, {At(Site.VALUE, 0): PerHead(turns)}, RESQ.precision, folds=False)
    before, after = in_float64(source.layer(0)), placement.layer(source.layer(0), 0)
    moved_v = (before.linears[Role.V].weight != after.linears[Role.V].weight).any(dim=1)
    moved_o = (before.linears[Role.O].weight != after.linears[Role.O].weight).any(dim=0)
    assert moved_v.tolist() == [False] * 16 + [True] * 16
    assert moved_o.tolist() == [False] * 64 + [True] * 64


def test_folding_norms_moves_every_gain_into_its_readers(checkpoint: Callable[..., Path]) -> None:
    layer = Source.open(checkpoint("qwen2")).layer(1)
    folded = fold_norms(layer)
    assert all(norm.gain is None for norm in folded.norms.values())
    gain = layer.norms[Point.MLP_IN].gain
    assert gain is not None
    assert torch.equal(folded.linears[Role.UP].weight, layer.linears[Role.UP].weight.double() * gain.double())
    assert torch.equal(folded.linears[Role.DOWN].weight, layer.linears[Role.DOWN].weight.double())
    assert torch.equal(folded.linears[Role.Q].bias, layer.linears[Role.Q].bias.double())
    assert layer.norms[Point.MLP_IN].gain is gain


def test_placing_does_not_change_the_source_layer(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint("qwen2", dtype="float32"))
    layer, again = source.layer(0), source.layer(0)
    Placement(source.shape, random_maps(source.shape), RESQ.precision, folds=True).layer(layer, 0)
    for role in Role:
        assert torch.equal(layer.linears[role].weight, again.linears[role].weight)
    assert all(torch.equal(there(layer.norms[point].gain), there(again.norms[point].gain)) for point in layer.norms)


def test_a_tied_table_stays_one_tensor_and_an_untied_one_becomes_two(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    placement = Placement(source.shape, random_maps(source.shape), RESQ.precision, folds=True)
    tied, untied = (placement.ends(source.ends(), keep_tied=kept) for kept in (True, False))
    assert isinstance(tied.head, DenseLinear)
    assert isinstance(untied.head, DenseLinear)
    assert tied.head.weight is tied.embed
    assert untied.head.weight is not untied.embed
    assert not torch.equal(untied.head.weight, untied.embed)
    assert untied.head_input.map is None


def test_inputs_are_rounded_as_the_precision_says(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    maps = random_maps(source.shape)
    layer = Placement(source.shape, maps, RESQ.precision, folds=True).layer(source.layer(1), 1)
    bands = {point: None if format.bands is None else format.bands.pairs for point, format in layer.inputs.items()}
    assert bands == {
        Point.ATTN_IN: [(4, 56), (8, 8)],
        Point.O_IN: [(4, 112), (8, 16)],
        Point.MLP_IN: [(4, 56), (8, 8)],
        Point.DOWN_IN: [(4, 172)],
    }
    assert {point for point, format in layer.inputs.items() if format.map is not None} == {
        Point.O_IN,
        Point.MLP_IN,
        Point.DOWN_IN,
    }
    assert [format.groups for format in layer.inputs.values()] == [1, 1, 1, 1]
    heads = layer.heads
    assert (heads.query.bands, heads.query.map_input_bits) == (None, None)
    for stored in (heads.key, heads.value):
        assert stored.bands is not None
        assert (stored.bands.pairs, stored.scale_dtype) == ([(4, 14), (8, 2)], torch.float16)
    assert heads.key.map is heads.query.map
    assert heads.value.map is None


def test_sixteen_bit_precision_leaves_every_point_in_floating_point(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    none = Precision(inputs=None, down_inputs=None, key=None, value=None)
    layer = Placement(source.shape, {}, none, folds=False).layer(source.layer(0), 0)
    assert all(format.bands is None for format in layer.inputs.values())
    assert layer.heads.key.bands is layer.heads.value.bands is None


def test_the_papers_options_round_the_query_key_map_and_range_o_per_head(checkpoint: Callable[..., Path]) -> None:
    source = Source.open(checkpoint())
    maps = random_maps(source.shape)
    layer = Placement(source.shape, maps, RESQ_PAPER.precision, folds=True).layer(source.layer(0), 0)
    turn = layer.heads.query.map
    assert isinstance(turn, Dense)
    assert layer.inputs[Point.O_IN].groups == source.shape.heads
    assert layer.heads.query.map_input_bits == layer.heads.key.map_input_bits == 8
    assert len(turn.matrix.unique()) <= 255
    fitted = maps[At(Site.QUERY_KEY, 0)]
    assert isinstance(fitted, Dense)
    exact = fitted.matrix
    assert float((turn.matrix - exact).abs().max()) <= float(exact.abs().max()) / 127 / 2 * (1 + 1e-6)


def test_a_rounded_map_stays_unrounded_where_no_map_is() -> None:
    shape = Shape(16, 1, 2, 1, 8, 32, 10, 1e-5, Rope((1.0,) * 4), True, 16)
    heads = Placement(shape, {}, replace(RESQ.precision, rotation_bits=8), folds=False).heads(0, HeadFormats())
    assert heads.query.map_input_bits is heads.key.map_input_bits is None


def test_a_transform_without_a_matrix_of_its_own_is_rounded_as_one() -> None:
    shape = Shape(16, 1, 2, 1, 8, 32, 10, 1e-5, Rope((1.0,) * 4), True, 16)
    maps: dict[At, LinearMap] = {At(Site.QUERY_KEY, 0): Hadamard(hadamard.plan(8))}
    heads = Placement(shape, maps, replace(RESQ.precision, rotation_bits=8), folds=False).heads(0, HeadFormats())
    assert heads.query.map_input_bits == heads.key.map_input_bits == 8
    assert isinstance(heads.query.map, Dense)
    # Entries ±1/sqrt(8): the largest integer times the scale is exact up to float32.
    torch.testing.assert_close(heads.query.map.matrix.double(), hadamard.matrix(8), rtol=2e-7, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_matrix_is_integers_times_one_scale(bits: int) -> None:
    matrix = random_orthogonal(24, torch.Generator().manual_seed(0)).float()
    rounded = rounded_matrix(matrix, bits)
    scale = matrix.abs().max() / (2 ** (bits - 1) - 1)
    integers = rounded / scale
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
    assert float((rounded - matrix).abs().max()) <= float(scale) / 2 * (1 + 1e-6)
