"""A recipe is data: a basis (which coordinates), a precision (how many bits where), a rounding (how weights round)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from resq.errors import InputError
from resq.models.architecture import READERS, Point, Role, Shape, Site
from resq.numerics.bands import Bands, Layout, cuts
from resq.numerics.device import CPU
from resq.numerics.linear import PackedLinear
from resq.numerics.maps import LinearMap
from resq.numerics.moments import symmetric
from resq.progress import Progress
from resq.ptq.clipping import ClipSearch
from resq.ptq.precision import BAND_MULTIPLE, Precision, finest

if TYPE_CHECKING:
    from resq.models.source import Source

T = TypeVar("T")
# What roundings make of one moment and keep, [in, in] each: a factor for rounding and one for correcting.
KEPT = 2
# Columns of a moment that are multiplied at once.
PANEL = 512


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
class Setting:
    """What a basis may know beside the moments: sizes, precision, seed; and the device that a tuning runs on, where the
    moments lie."""

    shape: Shape
    precision: Precision
    seed: int
    device: torch.device = CPU

    def generator(self, at: At, head: int | None = None) -> torch.Generator:
        """A generator seeded by (seed, site, layer, head), never by the order of draws; always on the CPU, so that no
        device draws otherwise."""
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
        """Maps in float64, on any device."""
        ...

    def notes(self, setting: Setting) -> list[str]:
        """Remarks for the manifest: what this model's sizes did not allow, and what stands in."""
        ...


@dataclass(frozen=True)
class InputMoments:
    """Sums over the calibration inputs of a linear, float64 [in, in].

    seen: Σ x̂ x̂^T of the inputs x̂ as the rounding sees them, of which nothing below the diagonal is read; cross: Σ x̂ x^T
    with the inputs x of the unrounded model, None unless the rounding corrects. gives_up: what lies below the diagonal
    of `seen` may be overwritten, by what is made of these sums.
    """

    seen: Tensor
    cross: Tensor | None = None
    gives_up: bool = False
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _room: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._room.extend([self.seen] if self.gives_up else [])

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes of these sums alone: made once for all linears and rows that ask for the same `key`, while
        it is among the last `KEPT`."""
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make()
        return self._kept[key]

    def room(self) -> Tensor:
        """Float64 [in, in] with room below the diagonal, and nothing above it to be touched: `seen` itself for the
        first who asks, where it is given up."""
        return self._room.pop() if self._room else torch.empty_like(self.seen)

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries of the symmetric `seen` at rows int64 [k] and columns int64 [m], [k, m]."""
        size, rows = len(self.seen), rows[:, None]
        return self.seen.take(torch.minimum(rows, columns) * size + torch.maximum(rows, columns))

    def energy(self, weight: Tensor) -> float:
        """Σ ||W x̂||² = tr(W H W^T) of W float64 [out, in], H = Σ x̂ x̂^T: what a linear puts out, or a change of its
        weights. By panels of columns, so that of the symmetric H only half is multiplied."""
        total = weight.new_zeros(())
        for panel in cuts(weight.shape[1], PANEL):
            before = weight[:, : panel.start] @ self.seen[: panel.start, panel]
            own = weight[:, panel] @ symmetric(self.seen[panel, panel])
            total += (before.mul_(2).add_(own) * weight[:, panel]).sum()
        return float(total)


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
    with the unrounded model's inputs. Any rows of a linear may be rounded by themselves; what a row becomes depends on
    how many others there are in last digits of sums only.
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
class Bookmark:
    """Where a tuning keeps how far it is, so that one that was stopped goes on there; by default nowhere.

    load: what was saved last, on the CPU; None for nothing. save: keep what its argument makes, tensors in plain
    containers, durably; or not yet, where that would take more than a share of the time.
    """

    load: Callable[[], Any] = lambda: None
    save: Callable[[Callable[[], Any]], None] = lambda make: None


@dataclass(frozen=True)
class Fitted:
    """What a tuning starts from: the source, the recipe, the maps so far and what they were fitted on; tokens int64
    [windows, length]; and where it was when it was stopped."""

    source: Source
    recipe: Recipe
    maps: Mapping[At, LinearMap]
    moments: Moments
    tokens: Tensor
    setting: Setting
    bookmark: Bookmark = Bookmark()


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
        """What of the moments it looks at; a job that goes on with it has no others."""
        ...

    def __call__(self, fitted: Fitted, progress: Progress) -> Tuned:
        """The better maps, the same bits when it went on at its bookmark."""
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
