"""Figures of activations: what rounding does to them, and what the coordinates look like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from resq.measure.diagnose.histograms import BINS, Distribution
from resq.measure.diagnose.massive import TIMES_MEDIAN, LayerOutliers
from resq.measure.diagnose.snr import Snr, mean_db
from resq.measure.diagnose.spectra import TOP, Spectrum
from resq.report.figure import Figure, Table, decibels, listed
from resq.report.svg import LEGEND, SERIES, TEXT, draw, legend_below, plain_log, style, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What a reader is told of the places, and in which order.
PLACES = {
    "attn_in": "input of q, k, v",
    "o_in": "input of o",
    "mlp_in": "input of gate, up",
    "down_in": "input of down",
    "key": "keys",
    "value": "values",
}
# At most this many coordinates are drawn; more are drawn by the largest of each group of neighbours.
DRAWN = 256


def snr_by_layer(rows: Sequence[Snr], place: str, band: str) -> Figure:
    """One place: SNR over the layers, one line per recipe (paper Fig. 1b)."""
    here = [row for row in rows if row.place == place and row.db is not None]
    methods = list(dict.fromkeys(row.method for row in here))
    every = list(dict.fromkeys(row.method for row in rows))
    layers = sorted({row.layer for row in here})
    db = {(row.method, row.layer): row.db for row in here}

    groups = alike(methods, {method: [db.get((method, layer)) for layer in layers] for method in methods})

    def plot(axes: Axes) -> None:
        for group in groups:
            heights = [math.nan if (value := db.get((group[0], layer))) is None else value for layer in layers]
            axes.plot(layers, heights, label=together(group), **style(every.index(group[0])))
        whole_numbers(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("SNR, dB (higher is better)")
        legend_below(axes)

    means = {method: mean_db(list(here), method, place) or 0.0 for method in methods}
    ordered = sorted(methods, key=lambda method: -means[method])
    best = [method for method in ordered if means[ordered[0]] - means[method] < 0.05]
    finding = f"{listed(best)} {'has' if len(best) == 1 else 'have'} the highest mean, {means[best[0]]:.1f} dB"
    if ordered[-1] not in best:
        finding += f"; {ordered[-1]} the lowest, {means[ordered[-1]]:.1f} dB"
    table = tuple(
        (method, *(decibels(db.get((method, layer))) for layer in layers), decibels(means[method]))
        for method in methods
    )
    return Figure(
        f"snr-{place.replace('_', '-')}",
        f"SNR of the {PLACES[place]}",
        f"{finding}.",
        draw(f"snr-{place}", f"Line plot over layers at {band}. {finding}.", plot, height=3.5),
        Table(
            f"SNR in dB by layer, {PLACES[place]}, low band {band}",
            ("recipe", *(f"{layer}" for layer in layers), "mean"),
            table,
        ),
    )


def alike(names: Sequence[str], values: Mapping[str, Sequence[float | None]]) -> list[list[str]]:
    """Names whose values would be drawn on top of each other, together: less than 0.1 dB apart in every layer."""
    groups: list[list[str]] = []
    for name in names:
        for group in groups:
            pairs = zip(values[name], values[group[0]], strict=True)
            if all(a == b or (a is not None and b is not None and abs(a - b) < 0.1) for a, b in pairs):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def together(names: Sequence[str]) -> str:
    """Names for one line of a legend; the first and how many more where there is no room for all."""
    every = ", ".join(names)
    return every if len(every) <= LEGEND - 8 else f"{names[0]} and {len(names) - 1} more"


def bases(rows: Sequence[Snr]) -> Figure:
    """The same cut in other coordinates: what PCA's choice is worth."""
    picks = list(dict.fromkeys(row.method for row in rows))
    places = [place for place in ("attn_in", "mlp_in", "key", "value") if any(row.place == place for row in rows)]
    means = {(pick, place): mean_db(list(rows), pick, place) for pick in picks for place in places}

    def plot(axes: Axes) -> None:
        axes.set_yticks(range(len(places)), [PLACES[place] for place in places])
        axes.set_ylim(len(places) - 0.5, -0.5)
        for number, pick in enumerate(picks):
            values = [math.nan if (mean := means[pick, place]) is None else mean for place in places]
            heights = [index + (number - (len(picks) - 1) / 2) * 0.18 for index in range(len(places))]
            axes.plot(values, heights, linestyle="none", label=pick, **style(number))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("SNR, dB (mean over layers)")
        legend_below(axes)

    first, *others = picks
    gains = [(means[first, place] or 0.0) - max(means[other, place] or 0.0 for other in others) for place in places]
    if min(gains) >= 0:
        finding = (
            f"Keeping the {first} in 8 bit is worth {min(gains):.1f} to {max(gains):.1f} dB over the better of "
            f"{listed(others)}, as many of them"
        )
    else:
        lost = [PLACES[place] for place, gain in zip(places, gains, strict=True) if gain < 0]
        finding = f"Keeping the {first} in 8 bit is not the best choice for {listed(lost)}"
    table = tuple((pick, *(decibels(means[pick, place]) for place in places)) for pick in picks)
    return Figure(
        "bases",
        "Which coordinates to keep in 8 bit",
        f"{finding}.",
        draw("bases", f"Dot plot by place. {finding}.", plot, height=2.7),
        Table("Mean SNR in dB by choice of the 8-bit coordinates", ("choice", *(PLACES[p] for p in places)), table),
    )


def _coarse(values: Sequence[float]) -> list[float]:
    group = -(-len(values) // DRAWN)
    return [max(values[start : start + group]) for start in range(0, len(values), group)]


def channels(found: Distribution, recipe: str) -> Figure:
    """Largest |x| of every coordinate before and after the maps (paper Fig. 1a)."""
    before, after = _coarse(found.before_channels), _coarse(found.after_channels)
    size = len(found.before_channels)

    def plot(axes: Axes) -> None:
        step = size / len(before)
        for number, (name, values) in enumerate((("as it comes", before), (f"after {recipe}'s maps", after))):
            axes.plot([index * step for index in range(len(values))], values, color=SERIES[number], label=name, lw=1.0)
        start = 0
        for band in found.after[:-1]:
            start += band.size
            axes.axvline(start, color=TEXT, linewidth=0.8, linestyle="--")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("coordinate" + (" (dashed: where bands meet)" if len(found.after) > 1 else ""))
        axes.set_ylabel("largest |x|")
        legend_below(axes)

    low = max(band.peak for band in found.after)
    finding = (
        f"The largest |x| of the {PLACES[found.place]} of layer {found.layer} is {found.before.peak:.1f} times its "
        f"root mean square as it comes, and at most {low:.1f} times in a band after {recipe}'s maps"
    )
    every = (found.before, *found.after)
    names = ("as it comes", *(_band_name(band.bits, band.size) for band in found.after))
    rows = tuple(
        (name, str(band.size), f"{band.peak:.2f}", f"{band.kurtosis:.2f}")
        for name, band in zip(names, every, strict=True)
    )
    return Figure(
        f"channels-{found.place.replace('_', '-')}",
        f"Outliers in the {PLACES[found.place]}",
        f"{finding}.",
        draw(f"channels-{found.place}", f"Line plot over coordinates. {finding}.", plot),
        Table(
            f"{PLACES[found.place]}, layer {found.layer}",
            ("coordinates", "how many", "largest |x| / root mean square", "kurtosis (Gaussian: 3)"),
            rows,
        ),
    )


def _band_name(bits: int | None, size: int) -> str:
    return "after the maps" if bits is None else f"{bits}-bit band after the maps"


def histogram(found: Distribution, recipe: str) -> Figure:
    """Counts of values before and after the maps, band by band (paper Fig. 7)."""
    edges = [found.limit * (2 * index / BINS - 1) for index in range(BINS + 1)]
    every = [("as it comes", found.before)]
    every += [(_band_name(band.bits, band.size), band) for band in found.after]

    def plot(axes: Axes) -> None:
        for number, (name, band) in enumerate(every):
            total = max(1, sum(band.counts))
            axes.stairs(
                [count / total for count in band.counts], edges, color=SERIES[number], label=name, linewidth=1.2
            )
        plain_log(axes, "y")
        axes.set_xlabel("x")
        axes.set_ylabel("share of values")
        legend_below(axes)

    kurtosis = max(band.kurtosis for band in found.after)
    finding = (
        f"Kurtosis of the {PLACES[found.place]} of layer {found.layer} goes from {found.before.kurtosis:.1f} to at "
        f"most {kurtosis:.1f} in a band after {recipe}'s maps (a Gaussian has 3)"
    )
    rows = tuple(
        (f"{edges[index]:.3g} … {edges[index + 1]:.3g}", *(str(band.counts[index]) for _, band in every))
        for index in range(BINS)
        if any(band.counts[index] for _, band in every)
    )
    return Figure(
        f"histogram-{found.place.replace('_', '-')}",
        f"Distribution of the {PLACES[found.place]}",
        f"{finding}.",
        draw(f"histogram-{found.place}", f"Histogram. {finding}.", plot, height=3.4),
        Table(f"Counts, {PLACES[found.place]}, layer {found.layer}", ("x", *(name for name, _ in every)), rows),
    )


SITES = {"residual": "residual stream", "value": "values", "query_key": "keys"}


def spectrum(rows: Sequence[Spectrum]) -> Figure:
    """Cumulative energy over the share of directions, and where the band begins."""
    curves = []
    for site, name in SITES.items():
        found = [row for row in rows if row.site == site]
        if found:
            mean = [sum(values) / len(found) for values in zip(*(row.shares for row in found), strict=True)]
            curves.append((name, list(accumulate(mean)), sum(row.top for row in found) / len(found)))

    def plot(axes: Axes) -> None:
        for number, (name, values, _) in enumerate(curves):
            group = -(-len(values) // DRAWN)
            x = [(index + 1) / len(values) for index in range(len(values))]
            axes.plot([0, *x[group - 1 :: group]], [0, *values[group - 1 :: group]], color=SERIES[number], label=name)
        axes.axvline(TOP, color=TEXT, linewidth=0.8, linestyle="--")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("share of directions, most energy first (dashed: 1/8)")
        axes.set_ylabel("share of energy")
        legend_below(axes)

    finding = "The first 1/8 of the directions hold " + listed(
        [f"{top:.0%} of the energy of the {name}" for name, _, top in curves]
    )
    table = tuple(
        (SITES[row.site], "all" if row.layer is None else str(row.layer), f"{row.top:.1%}", f"{row.shares[0]:.1%}")
        for row in rows
    )
    return Figure(
        "spectrum",
        "How much energy few directions hold",
        f"{finding} (mean over layers).",
        draw("spectrum", f"Line plot. {finding}.", plot),
        Table("Energy by site", ("site", "layer", "in the first 1/8", "in the first direction"), table),
    )


def massive(found: Sequence[LayerOutliers], words: Mapping[int, str]) -> Figure:
    """Largest against median |x| before every layer; words: of the tokens listed."""
    layers = [row.layer for row in found]

    def plot(axes: Axes) -> None:
        axes.plot(layers, [row.largest for row in found], label="largest |x|", **style(0))
        axes.plot(layers, [TIMES_MEDIAN * row.median for row in found], color=TEXT, linestyle="--", label="100 medians")
        axes.plot(layers, [row.median for row in found], label="median |x|", **style(1))
        plain_log(axes, "y")
        whole_numbers(axes)
        axes.set_xlabel("before layer")
        axes.set_ylabel("|x| of the hidden states")
        legend_below(axes)

    total = sum(row.count for row in found)
    most = max(found, key=lambda row: row.largest / row.median if row.median else 0.0)
    times = f"the largest |x| is {most.largest / most.median:.0f} times the median, before layer {most.layer}"
    if total:
        channels = sorted({each.channel for row in found for each in row.outliers})
        where = f"in channel{'s' if len(channels) > 1 else ''} {listed([str(each) for each in channels[:6]])}"
        finding = f"{total} hidden values exceed 100 medians, the largest of each layer {where}; {times}."
        rows = tuple(
            (
                str(row.layer),
                words.get(each.token, str(each.token)),
                str(each.position),
                str(each.channel),
                f"{each.value:.4g}",
                f"{abs(each.value) / row.median:.0f}",
            )
            for row in found
            for each in row.outliers
        )
        table = Table(
            "Massive activations, the largest of each layer",
            ("layer", "token", "position", "channel", "value", "× median"),
            rows,
            frozenset({1}),
        )
    else:
        finding = f"No hidden value exceeds 100 medians; {times}."
        rows = tuple(
            (str(row.layer), f"{row.largest:.4g}", f"{row.median:.4g}", f"{row.largest / row.median:.0f}")
            for row in found
        )
        table = Table("Largest and median |x| before each layer", ("layer", "largest", "median", "ratio"), rows)
    return Figure(
        "massive", "Massive activations", finding, draw("massive", f"Line plot over layers. {finding}", plot), table
    )
