"""Vector figures that take their colours from the page: matplotlib draws, colours become CSS variables."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from resq.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMESPACE = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
# Colours that stand for the page's own: text, thin lines, and series that keep apart in both schemes; markers do too.
TEXT, RULE = "#010101", "#020202"
SERIES = tuple(f"#0300{index:02x}" for index in range(8))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VARIABLES = {TEXT: "currentColor", RULE: "var(--rule)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(SERIES)
}
# A figure is drawn about as wide as a phone shows it, so that its text is never scaled far down.
WIDTH, HEIGHT = 4.5, 3.1
# Inches of height that one line of a dot plot takes.
LINE = 0.26
# Characters of a legend that fit side by side.
LEGEND = 56
SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: it can be found, and takes the page's font
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.parse_math": False,  # names are data
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.4,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.4,
}


def style(index: int) -> dict[str, Any]:
    """Colour and marker of series `index`; after eight, colours meet other markers."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[(index + index // len(SERIES)) % len(MARKERS)]}


def shortened(name: str, most: int) -> str:
    """A name of at most `most` characters; tables have it whole."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def legend_below(axes: Axes) -> None:
    """The legend under the axis label, where it covers no data, in as many columns as fit."""
    handles, names = axes.get_legend_handles_labels()
    labels = [shortened(name, LEGEND - 8) for name in names]

    def width(columns: int) -> int:
        # Columns are filled one after the other; a marker takes about as much as five characters.
        rows = -(-len(labels) // columns)
        return sum(5 + max(map(len, labels[start : start + rows])) for start in range(0, len(labels), rows))

    columns = next((count for count in (3, 2) if width(count) <= LEGEND), 1)
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2)


def plain_log(axes: Axes, which: str, *, base: float = 10) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    getattr(axes, f"set_{which}scale")("log", base=base)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def dots(axes: Axes, lines: Sequence[str]) -> None:
    """One horizontal line for each name, the first on top."""
    axes.set_yticks(range(len(lines)), [shortened(line, LEGEND // 2) for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.axvline(0, color=TEXT, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)


def draw(name: str, alternative: str, plot: Callable[[Axes], None], *, height: float = HEIGHT) -> str:
    """What `plot` puts on a pair of axes, as an <svg> for inlining whose ids begin with `name`.

    alternative: what a reader who cannot see it is told. Raises InputError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures need matplotlib; install it with pip install 'resq-llm[report]'") from error
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's font has its own glyphs
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        plot(figure.add_subplot())
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return themed(stream.getvalue().decode(), name, alternative)


def themed(text: str, name: str, alternative: str) -> str:
    """matplotlib's SVG for inlining: colours as variables, no fixed size, no font names, unique ids, a text
    alternative."""
    ElementTree.register_namespace("", NAMESPACE)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(text)
    for metadata in root.findall(f"{{{NAMESPACE}}}metadata"):
        root.remove(metadata)
    for key in ("width", "height"):
        del root.attrib[key]
    root.set("role", "img")
    root.set("aria-label", alternative)
    whole = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(re.findall(r"#([\w-]+)", whole))
    for element in root.iter():
        identity = element.get("id")
        if identity is not None and identity not in used:
            del element.attrib["id"]
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == f"{{{XLINK}}}href":
                value = f"#{name}-{value.removeprefix('#')}"
            else:
                value = re.sub(r"url\(#", f"url(#{name}-", value)
            if key in ("style", "fill", "stroke"):
                value = _colored(value)
            element.set(key, value)
    for definitions in root.iter(f"{{{NAMESPACE}}}defs"):
        for sheet in definitions.findall(f"{{{NAMESPACE}}}style"):
            definitions.remove(sheet)  # it would hold for the whole page
    root.set("stroke-linejoin", "round")
    return ElementTree.tostring(root, encoding="unicode")


def _colored(value: str) -> str:
    for color, variable in VARIABLES.items():
        value = value.replace(color, variable)
    return re.sub(r"font-family: [^;]*; ?", "", value)  # the page's
