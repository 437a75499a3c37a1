"""Normalised Hadamard transforms of any size 2^k · m: x' = x T, T = H_{2^k} (x) F_m (method.md §2, U_D)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from resq.errors import InputError

# First rows of Williamson's circulants, {n: four codes}: entry 0 is +1, bit i-1 set means -1 at i and n-i.
# Found in minutes by a meet in the middle over pairs of rows with spectrum <= 4n, squared row sums adding to
# 4n, and a_i b_i c_i d_i = -1 for i > 0 (Williamson 1944). These are the orders 4n below 188 that neither
# Paley nor doubling reaches; 188 has no such rows.
WILLIAMSON = {
    23: (0xA7, 0x613, 0x254, 0x31F),
    29: (0x2F3, 0x30A6, 0x6BB, 0xB11),
    39: (0x159F9, 0x2BC37, 0x7D346, 0x3C977),
    43: (0x1D9AE, 0x121D3F, 0xD6D0F, 0x15661),
}

# Coordinates that one butterfly joins, a product with H_32: several times faster than pairs on a CPU, where
# memory and not arithmetic limits the transform.
RADIX = 32
# A larger dense factor costs more than the smaller random one of the fallback gains: 924 is the largest in use.
LARGEST_ORDER = 1024


@dataclass(frozen=True)
class HadamardPlan:
    """T = H_power (x) F_order on size = power · order coordinates, power = 2^k.

    Coordinate i·order + j has i < power and j < order. `construction` names F: "sylvester" (order 1),
    "paley1", "paley2", "williamson" (all entries ±1/sqrt(order)) or "random-orthogonal" (Haar, odd order).
    The four fields determine T. Raises InputError, a ValueError, when they do not fit together.
    Usage: `plan(4864) == HadamardPlan(4864, 64, 76, "paley2")`.
    """

    size: int
    power: int
    order: int
    construction: str

    def __post_init__(self) -> None:
        for name in ("size", "power", "order"):
            _check_positive(name, getattr(self, name))
        if self.power & (self.power - 1):
            raise InputError(f"power must be a power of two, got {self.power}")
        if self.size != self.power * self.order:
            raise InputError(f"size must be power · order = {self.power} · {self.order}, got {self.size}")
        if self.construction not in tuple(_FAMILIES):
            raise InputError(f"construction must be one of {', '.join(_FAMILIES)}, got {self.construction!r}")
        family = _FAMILIES[self.construction]
        if not family.has(self.order):
            raise InputError(f"{self.construction} needs {family.accepts}, got order {self.order}")


@lru_cache(maxsize=None, typed=True)
def plan(size: int) -> HadamardPlan:
    """The transform of `size` coordinates, with the smallest Hadamard order there is up to `LARGEST_ORDER`, else a
    random orthogonal factor.

    Raises InputError unless size is an int of at least 1. Usage: `plan(11008).order`.
    """
    _check_positive("size", size)
    power = size & -size
    odd = size // power
    while True:
        order = size // power
        for name, family in _FAMILIES.items():
            if name != "random-orthogonal" and order <= LARGEST_ORDER and family.has(order):
                return HadamardPlan(size, power, order, name)
        if power == 1:
            return HadamardPlan(size, size // odd, odd, "random-orthogonal")
        power //= 2


@lru_cache(maxsize=32)
def factor(plan: HadamardPlan) -> Tensor:
    """F_m, float64 [order, order], orthogonal. Cached: do not write to it. Usage: `F = factor(plan(172))`."""
    with torch.inference_mode(False):
        return _dense(plan.construction, plan.order) * plan.order**-0.5


def unscaled_factor(plan: HadamardPlan) -> Tensor:
    """sqrt(order) F_m, float64 [order, order]: entries ±1 unless it is random. Cached: do not write."""
    return _dense(plan.construction, plan.order)


def matrix(plan_or_size: HadamardPlan | int, dtype: torch.dtype = torch.float64) -> Tensor:
    """T [n, n] with transform(x) = x T, computed in float64 and cast once. Usage: `T = matrix(28)`."""
    p = plan_or_size if isinstance(plan_or_size, HadamardPlan) else plan(plan_or_size)
    with torch.device("cpu"):
        t = torch.kron(_sylvester(p.power), _dense(p.construction, p.order)) * p.size**-0.5
    return t.to(dtype)


def transform(x: Tensor, plan: HadamardPlan) -> Tensor:
    """x T along the last dimension, x [..., n] floating point; computed and returned in x.dtype, on x.device.

    Raises InputError for another last dimension or an integer dtype. Usage: `y = transform(x, plan(28))`.
    """
    return _transform(x, plan, inverse=False)


def inverse_transform(y: Tensor, plan: HadamardPlan) -> Tensor:
    """y T^T, the inverse of `transform`, on the same terms. Usage: `x = inverse_transform(y, plan(28))`."""
    return _transform(y, plan, inverse=True)


def _transform(x: Tensor, plan: HadamardPlan, *, inverse: bool) -> Tensor:
    if x.ndim == 0 or x.shape[-1] != plan.size:
        raise InputError(f"the Hadamard transform needs shape [..., {plan.size}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"the Hadamard transform needs a floating-point tensor, got {x.dtype}")
    rows = x.numel() // plan.size
    # Scaling first keeps float16 from overflowing. The factors stay ±1: a 1/sqrt(m) rounded to bfloat16 would
    # scale every output by the same wrong amount.
    y = (x * plan.size**-0.5).reshape(rows * plan.power, plan.order)
    if plan.order > 1:
        dense = _dense_as(plan.construction, plan.order, x.dtype, x.device)
        y = y @ (dense.T if inverse else dense)
    done = 1
    while done < plan.power:
        radix = min(RADIX, plan.power // done)
        butterfly = _dense_as("sylvester", radix, x.dtype, x.device)
        y = butterfly @ y.reshape(rows * plan.power // (done * radix), radix, done * plan.order)
        done *= radix
    return y.reshape(x.shape)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"the {name} of a Hadamard transform must be an int of at least 1, got {value!r}")


@lru_cache(maxsize=32)
def _dense_as(construction: str, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _dense(construction, order).to(device=device, dtype=dtype)


@lru_cache(maxsize=32)
def _dense(construction: str, order: int) -> Tensor:
    """sqrt(m) F_m, float64 [m, m]: S S^T = m I."""
    # The cache outlives the caller's `with torch.device("meta")` or inference mode, so neither may reach it.
    with torch.inference_mode(False), torch.device("cpu"):
        return _FAMILIES[construction].build(order)


def _sylvester(order: int) -> Tensor:
    """H_{2n} = [[H_n, H_n], [H_n, -H_n]], H_1 = [[1]]."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < order:
        h = torch.cat((torch.cat((h, h), dim=1), torch.cat((h, -h), dim=1)))
    return h


def _paley1(order: int) -> Tensor:
    """H = I + [[0, 1], [-1, Q]], q = order - 1 ≡ 3 mod 4, so Q is skew (Paley 1933)."""
    border = torch.ones(order, order, dtype=torch.float64)
    border[1:, 0] = -1
    border[0, 0] = 0
    border[1:, 1:] = _jacobsthal(order - 1)
    return border + torch.eye(order, dtype=torch.float64)


def _paley2(order: int) -> Tensor:
    """H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with C = [[0, 1], [1, Q]] (Paley 1933).

    q = order/2 - 1 ≡ 1 mod 4, so Q is symmetric.
    """
    conference = torch.ones(order // 2, order // 2, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(order // 2 - 1)
    off_diagonal = torch.kron(conference, torch.tensor([[1, 1], [1, -1]], dtype=torch.float64))
    identity = torch.eye(order // 2, dtype=torch.float64)
    return off_diagonal + torch.kron(identity, torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64))


def _williamson(order: int) -> Tensor:
    """[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]] of symmetric circulants."""
    n = order // 4
    offset = (torch.arange(n)[:, None] - torch.arange(n)) % n
    blocks = []
    for code in WILLIAMSON[n]:
        half = [-1 if code >> i & 1 else 1 for i in range(n // 2)]
        blocks.append(torch.tensor([1, *half, *reversed(half)], dtype=torch.float64)[offset])
    a, b, c, d = blocks
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _random_orthogonal(order: int) -> Tensor:
    """sqrt(m) times a Haar orthogonal matrix: QR of a Gaussian with R's signs moved into Q (Mezzadri 2007).

    The Gaussian is Box-Muller on a hash stream: torch promises no fixed random numbers across versions.
    """
    seed = hashlib.sha256(f"resq.numerics.hadamard:random-orthogonal:{order}".encode()).digest()
    count = order * order
    words = torch.frombuffer(bytearray(hashlib.shake_256(seed).digest(16 * count)), dtype=torch.int64)
    uniform = ((words >> 11 & (2**53 - 1)).to(torch.float64) + 0.5) * 2.0**-53  # (0, 1)
    gaussian = torch.sqrt(-2 * torch.log(uniform[:count])) * torch.cos(2 * math.pi * uniform[count:])
    q, r = torch.linalg.qr(gaussian.reshape(order, order))
    return (q * torch.sign(torch.diagonal(r)) * math.sqrt(order)).contiguous()


def _jacobsthal(q: int) -> Tensor:
    """Q[a, b] = chi(a - b), float64 [q, q], chi the quadratic character of GF(q).

    Elements are numbered by their base-p digits, the coefficients of polynomials modulo an irreducible one.
    """
    field = _prime_power(q)
    assert field is not None
    p, degree = field
    chi = torch.full((q,), -1, dtype=torch.float64)
    chi[0] = 0
    modulus = _irreducible(p, degree)
    for element in product(range(p), repeat=degree):
        if any(element):
            square = _remainder(_times(element, element, p), modulus, p)
            chi[sum(digit * p**i for i, digit in enumerate(square))] = 1
    number = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for i in range(degree):
        digit = number // p**i % p
        difference += (digit[:, None] - digit) % p * p**i
    return chi[difference]


Polynomial = tuple[int, ...]  # coefficients over GF(p), constant term first


def _irreducible(p: int, degree: int) -> Polynomial:
    """The first monic polynomial of its degree over GF(p) without factors."""

    def monic(n: int) -> list[Polynomial]:
        return [(*tail, 1) for tail in product(range(p), repeat=n)]

    splits = [(low, degree - low) for low in range(1, degree // 2 + 1)]
    reducible = {_times(f, g, p) for low, high in splits for f in monic(low) for g in monic(high)}
    return next(f for f in monic(degree) if f not in reducible)


def _times(f: Polynomial, g: Polynomial, p: int) -> Polynomial:
    coefficients = [0] * (len(f) + len(g) - 1)
    for i, a in enumerate(f):
        for j, b in enumerate(g):
            coefficients[i + j] = (coefficients[i + j] + a * b) % p
    return tuple(coefficients)


def _remainder(f: Polynomial, modulus: Polynomial, p: int) -> Polynomial:
    rest, degree = list(f), len(modulus) - 1
    while len(rest) > degree:
        lead, shift = rest.pop(), len(rest) - degree
        for i in range(degree):
            rest[shift + i] = (rest[shift + i] - lead * modulus[i]) % p
    return tuple(rest)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


@dataclass(frozen=True)
class _Family:
    """A construction of sqrt(m) F_m: the orders it has, the same in words, and the matrix of one order."""

    has: Callable[[int], bool]
    accepts: str
    build: Callable[[int], Tensor]


# In order of preference at equal order.
_FAMILIES = {
    "sylvester": _Family(lambda m: m == 1, "order 1", _sylvester),
    "paley1": _Family(
        lambda m: m % 4 == 0 and _prime_power(m - 1) is not None,
        "order q + 1, q ≡ 3 mod 4 a prime power",
        _paley1,
    ),
    "paley2": _Family(
        lambda m: m % 8 == 4 and _prime_power(m // 2 - 1) is not None,
        "order 2q + 2, q ≡ 1 mod 4 a prime power",
        _paley2,
    ),
    "williamson": _Family(
        lambda m: m % 4 == 0 and m // 4 in WILLIAMSON,
        f"an order of {', '.join(str(4 * n) for n in WILLIAMSON)}",
        _williamson,
    ),
    "random-orthogonal": _Family(lambda m: m % 2 == 1 and m > 1, "an odd order above 1", _random_orthogonal),
}
