"""Figures of what is lost: loss, bits, ranks, position in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from resq.measure.diagnose.positions import Bucket
from resq.measure.perplexity import Interval
from resq.report.comparison import Case, width_name, widths
from resq.report.figure import Figure, Table, listed, signed
from resq.report.svg import LINE, RULE, TEXT, dots, draw, legend_below, plain_log, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss(cases: Sequence[Case]) -> Figure:
    """Loss above 16 bit of every case with its interval."""
    recipes = list(dict.fromkeys(case.recipe for case in cases))
    bands = widths(cases)

    def plot(axes: Axes) -> None:
        dots(axes, recipes)
        for number, width in enumerate(bands):
            found = [case for case in cases if case.bits == width]
            mean = [case.delta.mean for case in found]
            ends = [[d.mean - d.low for d in map(_delta, found)], [d.high - d.mean for d in map(_delta, found)]]
            lines = [recipes.index(case.recipe) + (number - (len(bands) - 1) / 2) * 0.3 for case in found]
            label = f"low band {width_name(width)}"
            axes.errorbar(mean, lines, xerr=ends, linestyle="none", capsize=2, label=label, **style(number))
        axes.set_xlabel("loss above 16 bit, nats per token")
        axes.grid(axis="y", visible=False)
        legend_below(axes)

    parts = []
    for width in bands:
        ordered = sorted((case.delta.mean, case.recipe) for case in cases if case.bits == width)
        (least, best), (most, worst) = ordered[0], ordered[-1]
        found = f"at {width_name(width)} {best} adds {signed(least)} nats per token"
        parts.append(found if best == worst else f"{found}, {worst} {signed(most)}")
    rows = tuple(
        (case.name, signed(case.delta.mean), signed(case.delta.low), signed(case.delta.high)) for case in cases
    )
    finding = "; ".join(parts)
    finding = f"{finding[0].upper()}{finding[1:]}; lines are paired 95 % intervals."
    return Figure(
        "loss",
        "What each recipe adds to the loss",
        finding,
        draw("loss", f"Dot plot by recipe. {finding}", plot, height=1.2 + LINE * 1.2 * len(recipes)),
        Table("Loss above 16 bit, nats per token", ("case", "mean", "low", "high"), rows),
    )


def _delta(case: Case) -> Interval:
    return case.delta


def size(base: Case, rounded: Sequence[Case]) -> Figure:
    """Perplexity against true bits; base: the 16-bit model."""
    recipes = list(dict.fromkeys(case.recipe for case in rounded))
    front, best = [], float("inf")
    for case in sorted(rounded, key=lambda case: (case.mean_bits, case.perplexity)):
        if case.perplexity < best:
            front.append(case)
            best = case.perplexity

    def plot(axes: Axes) -> None:
        axes.plot(
            [case.mean_bits for case in front], [case.perplexity for case in front], color=RULE, linewidth=1.5, zorder=1
        )
        for number, recipe in enumerate(recipes):
            found = [case for case in rounded if case.recipe == recipe]
            axes.plot(
                [case.mean_bits for case in found],
                [case.perplexity for case in found],
                linestyle="none",
                label=recipe,
                **style(number),
            )
        axes.axhline(base.perplexity, color=TEXT, linewidth=0.8, linestyle="--")
        axes.set_xlabel("true bits per value, mean of weights, inputs, keys, values")
        axes.set_ylabel("perplexity (dashed: 16 bit)")
        legend_below(axes)

    names = [case.name for case in front]
    finding = (
        f"No other case is both smaller and better than {listed(names)}, the joined points."
        if len(front) > 1
        else f"{names[0]} is both the smallest and the best."
    )
    rows = tuple((case.name, f"{case.mean_bits:.2f}", f"{case.perplexity:.3f}") for case in rounded)
    return Figure(
        "size",
        "Perplexity against true bits",
        finding,
        draw("size", f"Scatter plot of perplexity over bits. {finding}", plot, height=3.5),
        Table("Perplexity and true bits, scales and zero points included", ("case", "true bits", "perplexity"), rows),
    )


def ranks(swept: Sequence[tuple[float, Case]]) -> Figure:
    """Perplexity against the share of coordinates in 8 bit (paper Fig. 3b); swept: (share, case) by rising share."""
    bands = widths([case for _, case in swept])

    def plot(axes: Axes) -> None:
        for number, width in enumerate(bands):
            found = [(share, case.perplexity) for share, case in swept if case.bits == width]
            shares, heights = zip(*found, strict=True)
            axes.plot(shares, heights, label=f"low band {width_name(width)}", **style(number))
        axes.set_xlabel("share of coordinates in 8 bit")
        axes.set_ylabel("perplexity")
        legend_below(axes)

    narrow = [(share, case) for share, case in swept if case.bits == bands[-1]]
    (least, before), (most, after) = narrow[0], narrow[-1]
    falls = all(first.kl >= second.kl for (_, first), (_, second) in pairwise(narrow))
    finding = (
        f"At {width_name(bands[-1])}, going from {least:.1%} of the coordinates in 8 bit to {most:.1%} takes "
        f"perplexity from {before.perplexity:.2f} to {after.perplexity:.2f} and KL to 16 bit from {before.kl:.4f} to "
        f"{after.kl:.4f}{', which falls all the way' if falls else ''}."
    )
    rows = tuple((case.name, f"{share:.4f}", f"{case.perplexity:.3f}", f"{case.kl:.4f}") for share, case in swept)
    return Figure(
        "ranks",
        "Perplexity against the rank of the 8-bit subspace",
        finding,
        draw("ranks", f"Line plot. {finding}", plot),
        Table("Rank sweep", ("case", "share in 8 bit", "perplexity", "KL to 16 bit"), rows),
    )


def positions(found: Mapping[str, Sequence[Bucket]], subject: str) -> Figure:
    """KL to 16 bit against the length of the context; subject: whose change is told."""
    names = list(found)

    def plot(axes: Axes) -> None:
        for number, name in enumerate(names):
            axes.plot(
                [(bucket.first * bucket.last) ** 0.5 for bucket in found[name]],
                [bucket.kl for bucket in found[name]],
                label=name,
                **style(number),
            )
        plain_log(axes, "x", base=2)
        plain_log(axes, "y")
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("KL to 16 bit, nats per token")
        legend_below(axes)

    begin, end = found[subject][0], found[subject][-1]
    ends = f"{begin.kl:.4f} nats with {_range(begin)} of context, {end.kl:.4f} with {_range(end)}"
    grows = "grows" if end.kl > 1.1 * begin.kl else "falls" if end.kl < 0.9 * begin.kl else "hardly changes"
    finding = f"KL of {subject} {grows} along the text: {ends}"
    rows = tuple(
        (name, f"{bucket.first}–{bucket.last}", str(bucket.count), signed(bucket.delta), f"{bucket.kl:.5f}")
        for name in names
        for bucket in found[name]
    )
    return Figure(
        "positions",
        "Error along the text",
        f"{finding}.",
        draw("positions", f"Line plot. {finding}.", plot, height=3.5),
        Table("Error by tokens of context", ("case", "context", "predictions", "Δ nats", "KL to 16 bit"), rows),
    )


def _range(bucket: Bucket) -> str:
    if bucket.first == bucket.last:
        return f"{bucket.first} token{'s' if bucket.first > 1 else ''}"
    return f"{bucket.first}–{bucket.last} tokens"
