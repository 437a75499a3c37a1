"""Properties of resq.numerics.maps."""

import json
import math
from collections.abc import Callable

import pytest
import torch

from resq.errors import InputError
from resq.numerics import hadamard, maps
from resq.numerics.maps import (
    Dense,
    Diagonal,
    Hadamard,
    LinearMap,
    PerHead,
    Permutation,
    as_reader,
    as_writer,
    random_orthogonal,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(sum(shape)), dtype=torch.float64)


def dense(size: int) -> Dense:
    return Dense(random_orthogonal(size, seeded(size)))


def per_head(heads: int, size: int) -> PerHead:
    return PerHead(torch.stack([random_orthogonal(size, seeded(head)) for head in range(heads)]))


def permutation(size: int) -> Permutation:
    return Permutation(torch.randperm(size, generator=seeded(size)))


MAPS: dict[str, Callable[[], LinearMap]] = {
    "dense": lambda: dense(24),
    "dense of one": lambda: dense(1),
    "per head": lambda: per_head(3, 8),
    "one head": lambda: per_head(1, 24),
    "heads of one": lambda: per_head(24, 1),
    "permutation": lambda: permutation(24),
    "identity permutation": lambda: Permutation(torch.arange(24)),
    "permutation in int32": lambda: Permutation(permutation(24).index.to(torch.int32)),
    "hadamard 24": lambda: Hadamard(hadamard.plan(24)),
    "hadamard 64": lambda: Hadamard(hadamard.plan(64)),
    "hadamard 14": lambda: Hadamard(hadamard.plan(14)),
    "hadamard 4 over 6": lambda: Hadamard(hadamard.plan(4), inner=6),
    "hadamard 12 over 2": lambda: Hadamard(hadamard.plan(12), inner=2),
    "hadamard 3 over 8": lambda: Hadamard(hadamard.plan(3), inner=8),
    "hadamard 1 over 24": lambda: Hadamard(hadamard.plan(1), inner=24),
}
every_map = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())


def close(a: torch.Tensor, b: torch.Tensor, *factors: torch.Tensor) -> bool:
    """Equal up to float64 rounding of a chain of products: each of its at most 4 products of inner size n adds
    n · 2^-53 of the product of the factors' norms (orthogonal maps have norm 1 on rows)."""
    bound = 4 * max(factor.shape[-1] for factor in factors) * 2.0**-53
    return bool((a - b).abs().max() <= bound * math.prod(float(factor.norm()) for factor in factors))


@every_map
def test_the_dual_keeps_inner_products(make: Callable[[], LinearMap]) -> None:
    map = make()
    x, w = random(5, map.size), random(7, map.size)
    assert close(map.apply(x) @ map.dual(w).T, x @ w.T, x, w)


@every_map
def test_a_map_is_linear_and_its_matrix_is_orthogonal(make: Callable[[], LinearMap]) -> None:
    map = make()
    matrix = map.apply(torch.eye(map.size, dtype=torch.float64))
    x = random(5, map.size)
    assert close(map.apply(x), x @ matrix, x)
    assert (matrix @ matrix.T - torch.eye(map.size)).abs().max() <= 1e-12


@every_map
def test_leading_axes_are_rows_and_may_be_empty(make: Callable[[], LinearMap]) -> None:
    map = make()
    x = random(2, 3, map.size)
    out = map.apply(x)
    assert out.shape == x.shape
    for batch in range(2):
        assert close(out[batch], map.apply(x[batch]), x)
    assert close(out[0, 1], map.apply(x[0, 1]), x)
    assert map.apply(x[:, :0]).shape == (2, 0, map.size)


@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_computes_in_the_dtype_of_its_input(make: Callable[[], LinearMap], dtype: torch.dtype) -> None:
    map = make()
    x = random(5, map.size)
    out = map.apply(x.to(dtype))
    assert out.dtype == dtype
    # Storing x, the matrix and at most two partial results in `dtype` each adds half an ulp of the row's norm.
    assert ((out.double() - map.apply(x)).norm(dim=-1) <= 4 * torch.finfo(dtype).eps * x.norm(dim=-1)).all()


@every_map
def test_maps_do_not_write_their_input(make: Callable[[], LinearMap]) -> None:
    map = make()
    x = random(5, map.size)
    kept = x.clone()
    map.apply(x).fill_(0)
    map.dual(x).fill_(0)
    assert torch.equal(x, kept)


@every_map
@pytest.mark.parametrize("biased", [True, False])
def test_a_new_basis_between_writer_and_reader_changes_nothing(make: Callable[[], LinearMap], biased: bool) -> None:
    map = make()
    writer, reader = random(map.size, 9), random(6, map.size)
    bias = random(map.size) if biased else None
    x = random(4, 9)
    hidden = x @ writer.T + (0 if bias is None else bias)
    moved_writer, moved_bias = as_writer(map, writer, bias)
    assert moved_writer.shape == writer.shape
    assert (moved_bias is None) == (bias is None)
    moved = x @ moved_writer.T + (0 if moved_bias is None else moved_bias)
    assert close(moved, map.apply(hidden), x, writer)
    before, after = hidden @ reader.T, moved @ as_reader(map, reader).T
    assert close(before, after, hidden.abs() + x.abs().amax(), writer.abs() + 1, reader)


@every_map
def test_bases_compose(make: Callable[[], LinearMap]) -> None:
    first = make()
    second = dense(first.size)
    writer, reader, x = random(first.size, 9), random(6, first.size), random(4, 9)
    moved_writer, _ = as_writer(second, as_writer(first, writer, None)[0], None)
    moved_reader = as_reader(second, as_reader(first, reader))
    assert close((x @ moved_writer.T) @ moved_reader.T, (x @ writer.T) @ reader.T, x, writer, reader)


def test_a_dense_map_multiplies_rows_from_the_right() -> None:
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert Dense(matrix).apply(torch.tensor([3.0, 5.0])).tolist() == [-5.0, 3.0]


def test_a_permutation_gathers() -> None:
    assert Permutation(torch.tensor([2, 0, 1])).apply(torch.tensor([10.0, 11.0, 12.0])).tolist() == [12.0, 10.0, 11.0]


def test_each_head_has_its_own_matrix() -> None:
    map, x = per_head(3, 8), random(5, 24)
    out = map.apply(x)
    for head in range(3):
        cut = slice(8 * head, 8 * head + 8)
        assert close(out[:, cut], x[:, cut] @ map.matrices[head], x)


@pytest.mark.parametrize("times", [1, 2, 4])
def test_repeated_maps_query_head_j_like_kv_head_j_over_times(times: int) -> None:
    values = per_head(3, 8)
    queries = values.repeated(times)
    assert queries.size == 24 * times
    x = random(5, 24 * times)
    out = queries.apply(x)
    for head in range(3 * times):
        cut = slice(8 * head, 8 * head + 8)
        assert close(out[:, cut], x[:, cut] @ values.matrices[head // times], x)


@pytest.mark.parametrize(("outer", "inner"), [(4, 6), (12, 16), (28, 3), (3, 8), (2, 1)])
def test_a_hadamard_map_with_inner_mixes_equal_coordinates_of_all_heads(outer: int, inner: int) -> None:
    map, x = Hadamard(hadamard.plan(outer), inner), random(5, outer * inner)
    out, t = map.apply(x).view(5, outer, inner), hadamard.matrix(outer)
    for coordinate in range(inner):
        assert close(out[..., coordinate], x.view(5, outer, inner)[..., coordinate] @ t, x)
    assert close(map.apply(x), x @ torch.kron(t, torch.eye(inner, dtype=torch.float64)), x)


@pytest.mark.parametrize(("heads", "size"), [(4, 16), (12, 8), (28, 4)])
def test_heads_turned_and_mixed_are_one_hadamard_transform_of_all_coordinates(heads: int, size: int) -> None:
    within = PerHead(hadamard.matrix(size).repeat(heads, 1, 1))
    across = Hadamard(hadamard.plan(heads), inner=size)
    both = across.apply(within.apply(torch.eye(heads * size, dtype=torch.float64)))
    torch.testing.assert_close(both.abs(), torch.full_like(both, (heads * size) ** -0.5), rtol=1e-12, atol=0)


def test_a_map_knows_whether_it_is_orthogonal() -> None:
    for make in MAPS.values():
        assert make().orthogonal
    assert not Dense(random(4, 4), orthogonal=False).orthogonal
    assert not PerHead(per_head(3, 8).matrices, random(3, 8)).orthogonal


@pytest.mark.parametrize(
    "map",
    [Diagonal(random(24).abs() + 0.1), PerHead(per_head(3, 8).matrices, random(3, 8).abs() + 0.1)],
    ids=["diagonal", "per head with scales"],
)
def test_a_map_with_factors_has_a_dual_with_their_inverses(map: Diagonal | PerHead) -> None:
    assert (map.size, map.orthogonal) == (24, False)
    x, w, bias = random(5, 24), random(7, 24), random(24)
    # The factors lie within 0.1 … 4: up to 40 times the rounding of an orthogonal map.
    assert close((map.apply(x) @ map.dual(w).T) / 40, x @ w.T / 40, x, w)
    assert map.apply(x.to(torch.float32)).dtype == torch.float32
    writer, moved = as_writer(map, random(24, 9), bias)
    assert close((writer - map.apply(random(24, 9).T).T) / 40, torch.zeros(24, 9), bias)
    assert moved is not None
    assert torch.equal(moved, map.apply(bias))


def test_a_diagonal_multiplies_every_coordinate() -> None:
    map, x = Diagonal(torch.tensor([2.0, 0.5, 4.0])), torch.tensor([1.0, 2.0, 3.0])
    assert map.apply(x).tolist() == [2.0, 1.0, 12.0]
    assert as_reader(map, x[None]).tolist() == [[0.5, 4.0, 0.75]]
    assert map.kind == "diagonal"


def test_a_map_that_is_not_orthogonal_has_no_dual() -> None:
    map = Dense(random(4, 4), orthogonal=False)
    assert map.apply(random(2, 4)).shape == (2, 4)
    with pytest.raises(InputError, match="non-orthogonal") as refusal:
        as_reader(map, random(3, 4))
    assert "\n" not in str(refusal.value)


def same(a: LinearMap, b: LinearMap) -> bool:
    """The same kind with the same numbers."""
    x = random(3, a.size)
    return type(a) is type(b) and a.size == b.size and torch.equal(a.apply(x), b.apply(x))


@every_map
def test_restore_inverts_describe(make: Callable[[], LinearMap]) -> None:
    map = make()
    parameters, tensors = maps.describe(map)
    restored = maps.restore(json.loads(json.dumps(parameters)), tensors)
    assert same(restored, map)
    assert maps.describe(restored)[0] == parameters
    assert parameters["kind"] == map.kind
    assert parameters["size"] == map.size


def test_restore_keeps_the_claim_of_orthogonality() -> None:
    for map in (dense(4), Dense(random(4, 4), orthogonal=False)):
        restored = maps.restore(*maps.describe(map))
        assert isinstance(restored, Dense)
        assert restored.orthogonal == map.orthogonal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [MAPS["dense"], MAPS["per head"]], ids=["dense", "per head"])
def test_a_map_stored_in_another_dtype_restores_to_the_rounded_matrix(
    make: Callable[[], Dense | PerHead], dtype: torch.dtype
) -> None:
    parameters, tensors = maps.describe(make())
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    restored = maps.restore(parameters, stored)
    assert isinstance(restored, Dense | PerHead)
    (matrix,) = maps.describe(restored)[1].values()
    assert matrix.dtype == dtype
    exact = maps.restore(parameters, {name: tensor.double() for name, tensor in stored.items()})
    assert same(restored, exact)


def test_a_permutation_is_stored_in_int32() -> None:
    _, tensors = maps.describe(permutation(24))
    assert tensors["index"].dtype == torch.int32
    restored = maps.restore({"kind": "permutation", "size": 24}, tensors)
    assert isinstance(restored, Permutation)
    assert restored.index.dtype == torch.int64


def refused(message: str, parameters: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        maps.restore(parameters, tensors)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "index",
    [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 1, 3], [0, 1, 2, 4], [-1, 0, 1, 2], [[0, 1, 2, 3]], []],
    ids=["too short", "too long", "repeated", "out of range", "negative", "two axes", "empty"],
)
def test_an_index_that_is_no_permutation_is_refused(index: list[int]) -> None:
    tensors = {"index": torch.tensor(index, dtype=torch.int32)}
    refused("not one of 4 coordinates", {"kind": "permutation", "size": 4}, tensors)


@pytest.mark.parametrize(
    "tensors", [{}, {"matrix": torch.eye(4)}, {"index": torch.arange(4)}], ids=["no tensor", "matrix", "index"]
)
def test_an_unknown_kind_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    refused("'wavelet'", {"kind": "wavelet", "size": 4}, tensors)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (4,), (), (1, 4, 4)])
def test_a_dense_matrix_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    refused("'dense' and size 4", {"kind": "dense", "size": 4, "orthogonal": True}, {"matrix": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("size", "heads", "shape"),
    [
        (6, 2, (2, 2, 2)),
        (6, 2, (3, 2, 2)),
        (6, 2, (6, 6)),
        (6, 2, ()),
        (7, 2, (2, 3, 3)),
        (6, 0, (0, 0, 0)),
        (6, 2, (2, 3, 2)),
    ],
)
def test_head_matrices_of_the_wrong_shape_are_refused(size: int, heads: int, shape: tuple[int, ...]) -> None:
    parameters: dict[str, object] = {"kind": "per_head", "size": size, "heads": heads}
    refused(f"'per_head' and size {size}", parameters, {"matrix": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 25}, r"power · order · inner = 2 · 12 · 1, got 25$"),
        ({"power": 3, "order": 8}, "power of two, got 3$"),
        ({"power": -2, "order": -12}, "at least 1, got -2$"),
        ({"order": 6}, r"power · order · inner = 2 · 6 · 1, got 24$"),
        ({"inner": 2}, r"power · order · inner = 2 · 12 · 2, got 24$"),
        ({"inner": -1, "size": -24}, "inner of at least 1, got -1$"),
        ({"inner": 0, "size": 0}, "inner of at least 1, got 0$"),
        ({"construction": "sylvester"}, "needs order 1, got order 12$"),
        ({"construction": "walsh"}, "got 'walsh'$"),
    ],
)
def test_an_impossible_hadamard_plan_is_refused(change: dict[str, object], message: str) -> None:
    parameters, tensors = maps.describe(Hadamard(hadamard.plan(24)))
    refused(message, parameters | change, tensors)


def test_a_hadamard_map_stored_without_inner_has_one_of_1() -> None:
    parameters, _ = maps.describe(Hadamard(hadamard.plan(24)))
    assert parameters.pop("inner") == 1
    assert maps.restore(parameters, {}) == Hadamard(hadamard.plan(24))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 97])
def test_random_orthogonal_is_orthogonal(size: int) -> None:
    q = random_orthogonal(size, seeded(3))
    assert q.dtype == torch.float64
    assert q.shape == (size, size)
    assert (q.T @ q - torch.eye(size)).abs().max() <= 1e-12


def test_random_orthogonal_is_determined_by_its_generator() -> None:
    assert torch.equal(random_orthogonal(8, seeded(5)), random_orthogonal(8, seeded(5)))
    assert not torch.equal(random_orthogonal(8, seeded(5)), random_orthogonal(8, seeded(6)))
    generator = seeded(5)
    assert not torch.equal(random_orthogonal(8, generator), random_orthogonal(8, generator))
    before = torch.random.get_rng_state()
    random_orthogonal(8, generator)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_random_orthogonal_has_the_moments_of_the_haar_measure(size: int) -> None:
    draws = 2000
    generator = seeded(0)
    q = torch.stack([random_orthogonal(size, generator) for _ in range(draws)])
    # Each entry has mean 0 and variance 1/n, the trace mean 0 and variance 1, both signs of the determinant are
    # equally likely; the means of N draws lie within 5 standard errors.
    error = 5 / math.sqrt(draws)
    assert (q.mean(0).abs() <= error / math.sqrt(size)).all()
    assert abs(float(q.diagonal(dim1=-2, dim2=-1).sum(-1).mean())) <= error
    assert abs(float(torch.linalg.det(q).mean())) <= error
    # The variance of q_ij² is below its mean, 1/n.
    assert ((q.square().mean(0) - 1 / size).abs() <= error / math.sqrt(size)).all()
    assert (q[:, 0] > 0).any(dim=0).all()
    assert (q[:, 0] < 0).any(dim=0).all()
