"""How many bits where: a precision, and overrides of it by layer and name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import TYPE_CHECKING

from resq.errors import InputError
from resq.models.architecture import Point, Role, Shape
from resq.numerics.bands import INT4, INT4_INT8, INT8, Bands, Layout

if TYPE_CHECKING:
    from resq.ptq.recipe import Rounding

# Named parts of a dimension are rounded to this many coordinates where the dimension allows it, so that packed rows of
# every width start on whole bytes.
BAND_MULTIPLE = 8
# What --head-bits takes.
HEADS: dict[float, Layout | None] = {16: None, 8: INT8, 4.5: INT4_INT8}


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
