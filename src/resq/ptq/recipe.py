"""A recipe is data: a basis (which coordinates), a precision (how many bits where), a rounding (how weights round)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import Point, Role, Shape, Site
from resq.numerics.bands import INT4, INT4_INT8, INT8, Bands, Layout
from resq.numerics.linear import PackedLinear
from resq.numerics.maps import LinearMap

# Named parts of a dimension are rounded to this many coordinates where the dimension allows it, so that packed rows of
# every width start on whole bytes.
BAND_MULTIPLE = 8
# What --head-bits takes.
HEADS: dict[float, Layout | None] = {16: None, 8: INT8, 4.5: INT4_INT8}


class Statistic(StrEnum):
    """What one streaming pass can collect, as uncentred second moments."""

    RESIDUAL = "residual"  # inputs of q,k,v and gate,up after gain-free norms, summed over layers [d, d]
    VALUE = "value"  # outputs of v_proj, per layer and kv head [G, h, h]
    KEY = "key"  # keys after RoPE, per layer, summed over kv heads [h, h]


@dataclass(frozen=True)
class Moments:
    """Second moments float64 over the calibration windows; a field is None when no basis needs it."""

    tokens: int
    residual: Tensor | None = None
    value: list[Tensor] | None = None
    key: list[Tensor] | None = None


@dataclass(frozen=True)
class At:
    """A site in a model: which kind, which layer (None for the whole model)."""

    site: Site
    layer: int | None = None


@dataclass(frozen=True)
class Precision:
    """Bit widths everywhere; None is 16 bit (unrounded).

    inputs and weights: of every linear but down; down_inputs, down_weights: of down; key, value: per head; head: the
    weights of lm_head, whose input then has 8 bits. output_per_head: one range per head at o's input instead of one
    per token and band. rotation_bits: width of an online query/key matrix and of its inputs, None when neither is
    rounded.
    """

    weights: Layout | None = INT4_INT8
    inputs: Layout | None = INT4_INT8
    down_weights: Layout | None = INT4
    down_inputs: Layout | None = INT4
    key: Layout | None = INT4_INT8
    value: Layout | None = INT4_INT8
    head: Layout | None = None
    output_per_head: bool = False
    rotation_bits: int | None = None

    def with_low(self, bits: int) -> Precision:
        """The low band of weights, inputs, keys, values and down at `bits` (method.md §4: the stress setting); one of 8
        bits stays."""

        def low(layout: Layout | None) -> Layout | None:
            return layout if layout is None or layout.low >= 8 else layout.with_low(bits)

        return replace(
            self,
            weights=low(self.weights),
            inputs=low(self.inputs),
            down_weights=low(self.down_weights),
            down_inputs=low(self.down_inputs),
            key=low(self.key),
            value=low(self.value),
        )

    def with_head(self, bits: float) -> Precision:
        """lm_head at 16 bits (unrounded), 8, or 4.5: 4 with the top 1/8 in 8, as elsewhere. InputError otherwise."""
        if bits not in HEADS:
            accepted = ", ".join(f"{width:g}" for width in HEADS)
            raise InputError(f"--head-bits {bits:g} is not supported; accepted are {accepted}")
        return replace(self, head=HEADS[bits])

    def mean_bits(self) -> tuple[float, float, float]:
        """Nominal bits of weights, inputs (down's apart) and keys: `4.5 / 4.5 / 4.5`, scales not counted."""
        weights, inputs, key = (16.0 if p is None else p.mean_bits for p in (self.weights, self.inputs, self.key))
        return weights, inputs, key

    def head_bands(self, layout: Layout | None, shape: Shape) -> Bands | None:
        """Bands of one head's coordinates."""
        return None if layout is None else layout.bands(shape.head_dim)

    def lm_head_bands(self, shape: Shape) -> Bands | None:
        """Bands of the columns of lm_head; its input has 8 bits, the logits are the most sensitive place of all."""
        size = shape.hidden
        return None if self.head is None else self.head.bands(size, BAND_MULTIPLE if size % BAND_MULTIPLE == 0 else 1)

    def input_bands(self, point: Point, shape: Shape) -> Bands | None:
        """Bands of the activation at `point`."""
        return self._bands(point, shape, self.down_inputs if point is Point.DOWN_IN else self.inputs)

    def weight_bands(self, role: Role, point: Point, shape: Shape) -> Bands | None:
        """Bands of the columns of the linear `role`, which reads `point`."""
        return self._bands(point, shape, self.down_weights if role is Role.DOWN else self.weights)

    def _bands(self, point: Point, shape: Shape, layout: Layout | None) -> Bands | None:
        if layout is None:
            return None
        if point is Point.O_IN:
            # Every head's last coordinates are its precise ones; a gather puts equal bands of all heads together.
            return layout.bands(shape.head_dim).repeated(shape.heads)
        size = shape.ffn if point is Point.DOWN_IN else shape.hidden
        return layout.bands(size, BAND_MULTIPLE if size % BAND_MULTIPLE == 0 else 1)

    def describe(self) -> dict[str, str]:
        """Words for a manifest."""
        parts = {
            "weights": self.weights,
            "inputs": self.inputs,
            "down_weights": self.down_weights,
            "down_inputs": self.down_inputs,
            "key": self.key,
            "value": self.value,
            "head": self.head,
        }
        words = {name: "16 bit" if layout is None else str(layout) for name, layout in parts.items()}
        words["output_ranges"] = "per head" if self.output_per_head else "per token"
        words["query_key_rotation"] = "activation dtype" if self.rotation_bits is None else f"{self.rotation_bits} bit"
        return words


def finest(*layouts: Layout | None) -> Layout | None:
    """The layout with the most bands, the first of equals; None where all are 16 bit."""
    return max((layout for layout in layouts if layout), key=lambda layout: len(layout.parts), default=None)


@dataclass(frozen=True)
class Setting:
    """What a basis may know beside the moments: sizes, precision, seed."""

    shape: Shape
    precision: Precision
    seed: int

    def generator(self, at: At, head: int | None = None) -> torch.Generator:
        """A generator seeded by (seed, site, layer, head), never by the order of draws."""
        text = f"resq|{self.seed}|{at.site}|{at.layer}|{head}"
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def bands(self, site: Site) -> Bands:
        """Bands of a site's coordinates (of one head's for value, attn_out and query_key); one 8-bit band where nothing
        is rounded."""
        shape, p = self.shape, self.precision
        # Weights may be cut finer than the inputs they meet: the finer cut decides.
        inputs = finest(p.inputs, p.weights)
        size, layout = {
            Site.RESIDUAL: (shape.hidden, inputs),
            Site.NORM_OUT: (shape.hidden, inputs),
            # Values are rounded in the cache and again, gathered, at o's input: a cut of either orders both.
            Site.VALUE: (shape.head_dim, finest(p.value, inputs)),
            Site.ATTN_OUT: (shape.head_dim, inputs),
            Site.QUERY_KEY: (shape.head_dim, p.key),
            Site.MLP_HIDDEN: (shape.ffn, finest(p.down_inputs, p.down_weights)),
        }[site]
        if layout is None:
            return Bands.of((8, size))
        per_head = site in (Site.VALUE, Site.ATTN_OUT, Site.QUERY_KEY)
        return layout.bands(size, 1 if per_head or size % BAND_MULTIPLE else BAND_MULTIPLE)


class Basis(Protocol):
    """Chooses maps for some sites from the statistics it needs."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """What the streaming pass must collect."""
        ...

    @property
    def orders(self) -> frozenset[Site]:
        """Sites whose coordinates come out least important first, so that several bands mean something there."""
        ...

    @property
    def sites(self) -> frozenset[Site]:
        """Sites this basis gives maps for."""
        ...

    def check(self, shape: Shape, tokens: int) -> None:
        """Raises InputError before any work when this model or so few calibration tokens cannot be fitted."""
        ...

    def fit(self, moments: Moments, setting: Setting) -> dict[At, LinearMap]:
        """Maps in float64."""
        ...

    def notes(self, shape: Shape) -> list[str]:
        """Remarks for the manifest: what this model's sizes did not allow, and what stands in."""
        ...


@dataclass(frozen=True)
class Rounded:
    """A rounded weight and what rounding it took: the damping that made the Hessian invertible (None: not used)."""

    linear: PackedLinear
    damping: float | None = None


class Rounding(Protocol):
    """Weights to integers: W float64 [out, in], the second moment of its inputs (if `needs_moment`), bands."""

    needs_moment: ClassVar[bool]

    def __call__(self, weight: Tensor, moment: Tensor | None, bands: Bands, bias: Tensor | None) -> Rounded:
        """The packed linear."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A method: `Recipe("resq", (pca(...), …), Precision(...), gptq())`. about: a line for people."""

    name: str
    basis: tuple[Basis, ...]
    precision: Precision
    rounding: Rounding
    about: str = ""

    def __post_init__(self) -> None:
        taken: set[Site] = set()
        for basis in self.basis:
            if twice := taken & basis.sites:
                raise InputError(f"recipe {self.name}: two bases change {min(twice)}; a site takes one map")
            taken |= basis.sites
        self._check_bands()

    def _check_bands(self) -> None:
        """A band after a map that does not order coordinates is meaningless and refused."""
        ordered = frozenset[Site]().union(*(basis.orders for basis in self.basis))
        p = self.precision
        cuts: Mapping[str, tuple[tuple[Layout | None, ...], tuple[Site, ...]]] = {
            "inputs and weights": ((p.inputs, p.weights), (Site.RESIDUAL, Site.NORM_OUT)),
            "o_proj": ((p.inputs, p.weights), (Site.ATTN_OUT,)),
            "heads of o_proj": ((p.inputs, p.weights), (Site.VALUE,)),
            "down_proj": ((p.down_inputs, p.down_weights), (Site.MLP_HIDDEN,)),
            "keys": ((p.key,), (Site.QUERY_KEY,)),
            "values": ((p.value,), (Site.VALUE,)),
            "columns of lm_head": ((p.head,), (Site.RESIDUAL,)),
        }
        for what, (layouts, sites) in cuts.items():
            banded = any(layout is not None and layout.parts for layout in layouts)
            if banded and not ordered & set(sites):
                raise InputError(
                    f"recipe {self.name}: {what} are cut into bands, but no basis orders the coordinates at "
                    f"{' or '.join(sites)}; use one band there or a basis that orders them"
                )

        inputs = finest(p.inputs, p.weights)
        if inputs is not None and p.value is not None and inputs.parts and p.value.parts and inputs.cut != p.value.cut:
            raise InputError(
                f"recipe {self.name}: values ({p.value}) and o_proj's input ({inputs}) share coordinates but are cut "
                "differently; use the same fractions"
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        """The union of what the bases need: one streaming pass."""
        return frozenset[Statistic]().union(*(basis.needs for basis in self.basis))

    @property
    def rounding_words(self) -> str:
        """Words for a manifest: the rounding of the decoder's weights, or that there is none."""
        rounded = self.precision.weights or self.precision.down_weights
        return str(self.rounding) if rounded else "none, every decoder weight stays 16 bit"

    def describe(self) -> dict[str, Any]:
        """Words for a manifest: name, basis, precision, rounding."""
        return {
            "name": self.name,
            "basis": [str(basis) for basis in self.basis],
            "precision": self.precision.describe(),
            "rounding": self.rounding_words,
        }

    @property
    def folds_norms(self) -> bool:
        """Norm gains move into the next linears exactly when the residual stream is rotated."""
        return any(Site.RESIDUAL in basis.sites for basis in self.basis)
