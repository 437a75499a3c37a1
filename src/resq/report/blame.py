"""Figures of a packed checkpoint's error taken apart: by kind of rounding, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resq.measure.diagnose.attribution import Attribution, Part
from resq.report.figure import Figure, Table, listed, signed
from resq.report.svg import LINE, dots, draw, legend_below, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = {
    "weights": "weights",
    "inputs": "inputs (activations)",
    "keys": "keys",
    "values": "values",
    "rotation": "query/key rotation",
    "ends": "embedding and head",
}


def _budget(
    name: str, title: str, parts: Sequence[tuple[str, Part]], finding: str, extra: tuple[tuple[str, ...], ...]
) -> Figure:
    def plot(axes: Axes) -> None:
        dots(axes, [label for label, _ in parts])
        for number, (_, part) in enumerate(parts):
            mean, low, high = part.delta.mean, part.delta.low, part.delta.high
            axes.errorbar(
                mean,
                number - 0.12,
                xerr=[[mean - low], [high - mean]],
                linestyle="none",
                capsize=2,
                label=None if number else "loss above 16 bit",
                **style(0),
            )
            axes.plot(part.kl, number + 0.16, linestyle="none", label=None if number else "KL to 16 bit", **style(1))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("nats per token")
        legend_below(axes)

    rows = tuple(
        (label, signed(part.delta.mean), signed(part.delta.low), signed(part.delta.high), f"{part.kl:.5f}")
        for label, part in parts
    )
    return Figure(
        name,
        title,
        finding,
        draw(name, f"Dot plot. {finding}", plot, height=1.2 + LINE * 1.15 * len(parts)),
        Table(title, ("rounded alone", "Δ nats", "low", "high", "KL to 16 bit"), (*rows, *extra)),
    )


def attribution(found: Attribution, case: str, number: int) -> Figure:
    """What each kind of rounding adds alone."""
    parts = [(PARTS[part.name], part) for part in found.parts]
    ordered = sorted(found.parts, key=lambda part: -part.kl)
    finding = f"In {case}, rounding {PARTS[ordered[0].name]} costs most (KL {ordered[0].kl:.4f} nats)"
    if len(ordered) > 1:
        finding += f", then {PARTS[ordered[1].name]} ({ordered[1].kl:.4f})"
    finding += f"; what the parts' losses do not add up to is {signed(found.interaction)} nats."
    extra = (("interaction", signed(found.interaction), "", "", ""),)
    return _budget(
        f"attribution-{number}",
        f"What each rounding of {case} costs",
        [*parts, ("everything", found.whole)],
        finding,
        extra,
    )


def guilty_layers(found: Attribution, case: str, number: int) -> Figure:
    """What each layer adds when it alone is quantized."""
    ordered = sorted(found.layers, key=lambda part: -part.kl)
    total = sum(part.kl for part in found.layers)
    half, count = 0.0, 0
    for part in ordered:
        half, count = half + part.kl, count + 1
        if half >= total / 2:
            break
    named = [f"layer {part.name}" for part in ordered[:count]]
    finding = f"In {case}, {listed(named)} make up half of what the {len(ordered)} layers cost alone (KL to 16 bit)."
    shown = [(f"layer {part.name}", part) for part in found.layers]
    return _budget(f"layers-{number}", f"What each layer of {case} costs", shown, finding, ())
