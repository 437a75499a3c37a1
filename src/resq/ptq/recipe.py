"""A recipe is data: a basis (which coordinates), a precision (how many bits where), a rounding (how weights round)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import READERS, Point, Role, Shape, Site
from resq.numerics.bands import INT4, INT4_INT8, INT8, Bands, Layout
from resq.numerics.linear import PackedLinear
from resq.numerics.maps import LinearMap
from resq.progress import Progress
from resq.ptq.clipping import ClipSearch

if TYPE_CHECKING:
    from resq.models.source import Source

# Named parts of a dimension are rounded to this many coordinates where the dimension allows it, so that packed rows of
# every width start on whole bytes.
BAND_MULTIPLE = 8
# What --head-bits takes.
HEADS: dict[float, Layout | None] = {16: None, 8: INT8, 4.5: INT4_INT8}


class Statistic(StrEnum):
    """What one streaming pass can collect: uncentred second moments, and largest magnitudes."""

    RESIDUAL = "residual"  # inputs of q,k,v and gate,up after gain-free norms, summed over layers [d, d]
    VALUE = "value"  # outputs of v_proj, per layer and kv head [G, h, h]
    KEY = "key"  # keys after RoPE, per layer, summed over kv heads [h, h]
    PEAKS = "peaks"  # max |x| and max |W| of every channel, per layer


@dataclass(frozen=True)
class Peaks:
    """Largest magnitudes in one layer of the source as it is, norm gains included, float64.

    inputs, weights: by point, over tokens [n] and over all rows of the linears that read it [n]; key [h]: after RoPE,
    over kv heads; value [G, h].
    """

    inputs: dict[Point, Tensor]
    weights: dict[Point, Tensor]
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Moments:
    """Second moments float64 over the calibration windows, and peaks; a field is None when no basis needs it."""

    tokens: int
    residual: Tensor | None = None
    value: list[Tensor] | None = None
    key: list[Tensor] | None = None
    peaks: list[Peaks] | None = None


@dataclass(frozen=True)
class At:
    """A site in a model: which kind, which layer (None for the whole model)."""

    site: Site
    layer: int | None = None


@dataclass(frozen=True)
class Override:
    """Another treatment of what `pattern` names, in the manner of a shell: `layers.0.*`, `layers.*.down_in`.

    Names are layers.<index>. and a role (q, k, v, o, gate, up, down: its weights), a point (attn_in, o_in, mlp_in,
    down_in: the input there), key or value (the cache). bits: of the low band; rank: of the 8-bit band, a fraction or a
    count, 0 for none; skip: 16 bit; rounding: of the weights. What is None stays as it is.
    """

    pattern: str
    bits: int | None = None
    rank: Fraction | int | None = None
    skip: bool = False
    rounding: Rounding | None = None

    def names(self, name: str) -> bool:
        """Whether the pattern matches."""
        return fnmatchcase(name, self.pattern)

    def layout(self, before: Layout | None) -> Layout | None:
        """What becomes of a layout. Raises InputError for a rank without bits where there are 16."""
        if self.skip:
            return None
        if before is None:
            if self.bits is None and self.rank is not None:
                raise InputError(f"override {self.pattern!r} gives a rank to what has 16 bit; give it bits too")
            before = None if self.bits is None else Layout(self.bits)
        elif self.bits is not None:
            before = before.with_low(self.bits)
        return before if before is None or self.rank is None else before.with_rank(self.rank)

    def __str__(self) -> str:
        changes = ["16 bit"] if self.skip else []
        changes += [] if self.bits is None else [f"{self.bits} bit"]
        changes += [] if self.rank is None else [f"rank {self.rank}"]
        changes += [] if self.rounding is None else [str(self.rounding)]
        return f"{self.pattern}: {', '.join(changes)}"


def names_of(layers: int) -> Iterator[str]:
    """Everything an override may name in a model of so many layers."""
    for index in range(layers):
        yield from (f"layers.{index}.{part}" for part in (*Role, *Point, "key", "value"))


@dataclass(frozen=True)
class Precision:
    """Bit widths everywhere; None is 16 bit (unrounded).

    inputs and weights: of every linear but down; down_inputs, down_weights: of down; key, value: per head; head: the
    weights of lm_head, whose input then has 8 bits. output_per_head: one range per head at o's input instead of one
    per token and band. rotation_bits: width of an online query/key matrix and of its inputs, None when neither is
    rounded. overrides: applied in order, the last one wins.
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
    overrides: tuple[Override, ...] = ()

    def layout(self, layer: int | None, name: Role | Point | str) -> Layout | None:
        """The layout of a linear's weights (a role), an input (a point), `key` or `value`; before any override where
        layer is None."""
        layouts = {
            **dict.fromkeys(Role, self.weights),
            **dict.fromkeys(Point, self.inputs),
            Role.DOWN: self.down_weights,
            Point.DOWN_IN: self.down_inputs,
            "key": self.key,
            "value": self.value,
        }
        found = layouts[name]
        for override in self.overrides if layer is not None else ():
            if override.names(f"layers.{layer}.{name}"):
                found = override.layout(found)
        return found

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

    def key_bands(self, layer: int, shape: Shape) -> Bands | None:
        """Bands of one head's keys."""
        return self._bands("key", layer, shape)

    def value_bands(self, layer: int, shape: Shape) -> Bands | None:
        """Bands of one head's values."""
        return self._bands("value", layer, shape)

    def lm_head_bands(self, shape: Shape) -> Bands | None:
        """Bands of the columns of lm_head; its input has 8 bits, the logits are the most sensitive place of all."""
        size = shape.hidden
        return None if self.head is None else self.head.bands(size, BAND_MULTIPLE if size % BAND_MULTIPLE == 0 else 1)

    def input_bands(self, layer: int, point: Point, shape: Shape) -> Bands | None:
        """Bands of the activation at `point`."""
        return self._bands(point, layer, shape)

    def weight_bands(self, layer: int, role: Role, shape: Shape) -> Bands | None:
        """Bands of the columns of the linear `role`."""
        return self._bands(role, layer, shape)

    def _bands(self, name: Role | Point | str, layer: int, shape: Shape) -> Bands | None:
        layout = self.layout(layer, name)
        if layout is None:
            return None
        if name in (Point.O_IN, Role.O):
            # Every head's last coordinates are its precise ones; a gather puts equal bands of all heads together.
            return layout.bands(shape.head_dim).repeated(shape.heads)
        if name in ("key", "value"):
            return layout.bands(shape.head_dim)
        size = shape.ffn if name in (Point.DOWN_IN, Role.DOWN) else shape.hidden
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
        if self.overrides:
            words["overrides"] = "; ".join(map(str, self.overrides))
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

    def bands(self, at: At) -> Bands:
        """Bands of a site's coordinates (of one head's for value, attn_out and query_key); one 8-bit band where nothing
        is rounded."""
        shape, p = self.shape, self.precision

        def layouts(*names: Role | Point | str) -> list[Layout | None]:
            return [p.layout(at.layer, name) for name in names]

        # Weights may be cut finer than the inputs they meet: the finer cut decides.
        size, layout = {
            Site.RESIDUAL: (shape.hidden, finest(*layouts(Point.ATTN_IN, Role.Q))),
            Site.ATTN_NORM_OUT: (shape.hidden, finest(*layouts(Point.ATTN_IN, *READERS[Point.ATTN_IN]))),
            Site.MLP_NORM_OUT: (shape.hidden, finest(*layouts(Point.MLP_IN, *READERS[Point.MLP_IN]))),
            # Values are rounded in the cache and again, gathered, at o's input: a cut of either orders both.
            Site.VALUE: (shape.head_dim, finest(*layouts("value", Point.O_IN, Role.O))),
            Site.ATTN_OUT: (shape.head_dim, finest(*layouts(Point.O_IN, Role.O))),
            Site.QUERY_KEY: (shape.head_dim, finest(*layouts("key"))),
            Site.MLP_HIDDEN: (shape.ffn, finest(*layouts(Point.DOWN_IN, Role.DOWN))),
        }[at.site]
        if layout is None:
            return Bands.of((8, size))
        per_head = at.site in (Site.VALUE, Site.ATTN_OUT, Site.QUERY_KEY)
        return layout.bands(size, 1 if per_head or size % BAND_MULTIPLE else BAND_MULTIPLE)


def check_sites(kind: str, given: Iterable[Site], accepted: Iterable[Site]) -> None:
    """Raises InputError for sites that a kind of basis has no map for."""
    accepted = tuple(accepted)
    if wrong := set(given) - set(accepted):
        raise InputError(f"{kind} has no map for {min(wrong)}; it has for {', '.join(accepted)}")


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

    def notes(self, setting: Setting) -> list[str]:
        """Remarks for the manifest: what this model's sizes did not allow, and what stands in."""
        ...


@dataclass(frozen=True)
class InputMoments:
    """Sums over the calibration inputs of a linear, float64 [in, in].

    seen: Σ x̂ x̂^T of the inputs x̂ as the rounding sees them; cross: Σ x̂ x^T with the inputs x of the unrounded model,
    None unless the rounding corrects.
    """

    seen: Tensor
    cross: Tensor | None = None


@dataclass(frozen=True)
class Rounded:
    """A rounded weight, the weight float64 [out, in] that was rounded, and what damping made the Hessian invertible
    (None: not used)."""

    linear: PackedLinear
    target: Tensor
    damping: float | None = None


class Rounding(Protocol):
    """Weights to integers: W float64 [out, in], moments of its inputs (if `needs_moment`), bands.

    sees_rounded: its moments are of inputs whose activations and cache are rounded. corrects: it wants the cross moment
    with the unrounded model's inputs.
    """

    needs_moment: ClassVar[bool]

    @property
    def sees_rounded(self) -> bool:
        """Whether moments are of rounded inputs."""
        ...

    @property
    def corrects(self) -> bool:
        """Whether the cross moment is needed."""
        ...

    def __call__(self, weight: Tensor, moments: InputMoments | None, bands: Bands, bias: Tensor | None) -> Rounded:
        """The packed linear."""
        ...


@dataclass(frozen=True)
class Fitted:
    """What a tuning starts from: the source, the recipe, the bases' maps and what they were fitted on; tokens int64
    [windows, length]."""

    source: Source
    recipe: Recipe
    maps: Mapping[At, LinearMap]
    moments: Moments
    tokens: Tensor
    setting: Setting


@dataclass(frozen=True)
class Tuned:
    """Maps after a tuning, remarks for the manifest, and the loss in nats per token at each of its steps."""

    maps: Mapping[At, LinearMap]
    notes: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()


class Tuning(Protocol):
    """Betters the bases' maps on the loss of the rounded model on calibration text."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """What the streaming pass must collect beside what the bases need."""
        ...

    def __call__(self, fitted: Fitted, progress: Progress) -> Tuned:
        """The better maps."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A method: `Recipe("resq", (pca(...), …), Precision(...), Gptq())`. tuning: applied to the bases' maps in order.
    clipping: of the activations' ranges. about: a line for people."""

    name: str
    basis: tuple[Basis, ...]
    precision: Precision
    rounding: Rounding
    tuning: tuple[Tuning, ...] = ()
    about: str = ""
    clipping: ClipSearch | None = None

    def __post_init__(self) -> None:
        taken: set[Site] = set()
        for basis in self.basis:
            if twice := taken & basis.sites:
                raise InputError(f"recipe {self.name}: two bases change {min(twice)}; a site takes one map")
            taken |= basis.sites
        self._check_order(None)
        self.check_layer(0)

    def check_layer(self, layer: int) -> None:
        """Raises InputError where a layer is cut without a meaning, overrides included."""
        self._check_order(layer)
        self._check_heads(layer)

    def _check_order(self, layer: int | None) -> None:
        """A band after a map that does not order coordinates is meaningless and refused."""
        ordered = frozenset[Site]().union(*(basis.orders for basis in self.basis))
        p = self.precision
        o, down = (Point.O_IN, Role.O), (Point.DOWN_IN, Role.DOWN)
        attention, mlp = ((point, *READERS[point]) for point in (Point.ATTN_IN, Point.MLP_IN))
        cuts: Mapping[str, tuple[tuple[str, ...], tuple[Site, ...]]] = {
            "inputs and weights": (attention, (Site.RESIDUAL, Site.ATTN_NORM_OUT)),
            "inputs and weights of gate and up": (mlp, (Site.RESIDUAL, Site.MLP_NORM_OUT)),
            "o_proj": (o, (Site.ATTN_OUT,)),
            "heads of o_proj": (o, (Site.VALUE,)),
            "down_proj": (down, (Site.MLP_HIDDEN,)),
            "keys": (("key",), (Site.QUERY_KEY,)),
            "values": (("value",), (Site.VALUE,)),
        }
        found = [(what, [p.layout(layer, name) for name in names], sites) for what, (names, sites) in cuts.items()]
        for what, layouts, sites in (*found, ("columns of lm_head", [p.head], (Site.RESIDUAL,))):
            banded = any(layout is not None and layout.parts for layout in layouts)
            if banded and not ordered & set(sites):
                raise InputError(
                    f"recipe {self.name}: {what} are cut into bands, but no basis orders the coordinates at "
                    f"{' or '.join(sites)}; use one band there or a basis that orders them"
                )

    def _check_heads(self, layer: int) -> None:
        """Values and o_proj's input share coordinates: two cuts of them are refused."""
        p = self.precision
        value, output = p.layout(layer, "value"), finest(p.layout(layer, Point.O_IN), p.layout(layer, Role.O))
        if output is not None and value is not None and output.parts and value.parts and output.cut != value.cut:
            raise InputError(
                f"recipe {self.name}: values ({value}) and o_proj's input ({output}) share coordinates but are cut "
                "differently; use the same fractions"
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        """The union of what the bases and the tuning need: one streaming pass."""
        return frozenset[Statistic]().union(*(part.needs for part in (*self.basis, *self.tuning)))

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """The rounding, and those of overrides."""
        others = (override.rounding for override in self.precision.overrides)
        return self.rounding, *(rounding for rounding in others if rounding is not None)

    def rounding_of(self, layer: int, role: Role) -> Rounding:
        """How one linear's weights are rounded."""
        found = self.rounding
        for override in self.precision.overrides:
            if override.rounding is not None and override.names(f"layers.{layer}.{role}"):
                found = override.rounding
        return found

    @property
    def needs_moment(self) -> bool:
        """Whether a rounding looks at the linears' inputs."""
        return any(rounding.needs_moment for rounding in self.roundings)

    @property
    def needs_windows(self) -> bool:
        """Whether calibration windows are run through the layers as they are rounded."""
        return self.needs_moment or self.clipping is not None

    @property
    def sees_rounded(self) -> bool:
        """Whether a rounding wants inputs with activations and cache rounded."""
        return any(rounding.sees_rounded for rounding in self.roundings)

    @property
    def corrects(self) -> bool:
        """Whether a rounding wants the unrounded model's inputs too."""
        return any(rounding.corrects for rounding in self.roundings)

    @property
    def rounding_words(self) -> str:
        """Words for a manifest: the rounding of the decoder's weights, or that there is none."""
        rounded = self.precision.weights or self.precision.down_weights
        return str(self.rounding) if rounded else "none, every decoder weight stays 16 bit"

    def describe(self) -> dict[str, Any]:
        """For a manifest: name, basis, precision and rounding in words, and the definition as a file has it."""
        # It knows every kind of basis, each of which builds on this file.
        from resq.ptq.recipe_file import definition_of

        return {
            "name": self.name,
            "basis": [str(part) for part in (*self.basis, *self.tuning, self.clipping) if part is not None],
            "precision": self.precision.describe(),
            "rounding": self.rounding_words,
            "definition": definition_of(self),
        }

    @property
    def folds_norms(self) -> bool:
        """Norm gains move into the next linears exactly when the residual stream is rotated."""
        return any(Site.RESIDUAL in basis.sites for basis in self.basis)
