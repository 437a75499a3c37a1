"""`resq report`: a comparison as one HTML page and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from resq._version import __version__
from resq.errors import InputError
from resq.measure.diagnose.attribution import Attribution
from resq.measure.rows import write_text
from resq.progress import Progress, silent
from resq.report import blame, quality, signal
from resq.report.comparison import Comparison, clean, read, width_name
from resq.report.evidence import DRAWN, SUBJECT, Evidence, gathered
from resq.report.figure import Figure, Item, Missing, Section
from resq.report.verdict import facts, table, verdict

T = TypeVar("T")

# What sweeps the rank of the 8-bit subspace.
SWEEP = ("resq-rank-0", "resq-rank-1-16", SUBJECT, "resq-rank-1-4", "resq-rank-1-2")
# Characters that Markdown would take for its own.
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")


@dataclass(frozen=True)
class Written:
    """The two files, and the verdict that both begin with."""

    html: Path
    markdown: Path
    verdict: str


def report(directory: Path, out: Path | None = None, *, progress: Progress = silent) -> Written:
    """Write the page about the comparison in `directory` to `out` (default `directory/report.html`) and the same as
    Markdown beside it. Diagnostics are computed once and kept in `directory/diagnostics`.

    `report(Path("compared"))`. Raises InputError for a directory that `resq compare` did not finish, and without
    matplotlib.
    """
    comparison = read(directory)
    html = directory / "report.html" if out is None else out
    if html.suffix != ".html":
        raise InputError(f"--out {html} is no .html file; the Markdown beside it takes the same name with .md")
    sections = list(sections_of(comparison, gathered(comparison, progress), progress))
    page = {
        "comparison": comparison,
        "verdict": verdict(comparison),
        "table": table(comparison),
        "facts": facts(comparison),
        "sections": sections,
        "version": __version__,
    }
    markdown = html.with_suffix(".md")
    for file, template in ((html, "page.html"), (markdown, "page.md")):
        write_text(file, rendered(template, page))
    return Written(html, markdown, page["verdict"])


Draw = Callable[[], Item]


def sections_of(comparison: Comparison, evidence: Evidence, progress: Progress) -> Iterator[Section]:
    """Every section with its figures drawn."""
    plans = [
        ("quality", "How much is lost", QUALITY, quality_figures(comparison, evidence)),
        ("signal", "What rounding does to activations", SIGNAL, signal_figures(comparison, evidence)),
        ("coordinates", "Why a basis helps", COORDINATES, coordinate_figures(evidence)),
        ("blame", "Where the error comes from", BLAME, blame_figures(evidence.attribution)),
    ]
    ready = [(name, title, about, list(items)) for name, title, about, items in plans]
    done, total = 0, sum(len(items) for *_, items in ready)
    for name, title, about, items in ready:
        drawn = []
        for item in items:
            drawn.append(item())
            done += 1
            progress("drawing", done, total)
        yield Section(name, title, about, tuple(drawn))


QUALITY = (
    "Loss is the mean negative log-likelihood of the evaluation text; differences are paired with the 16-bit model "
    "over its windows."
)
SIGNAL = (
    "Every recipe sees the same hidden states of the 16-bit model, and only one place is rounded at a time: SNR is "
    "10 log10(‖X‖² / ‖X − X̂‖²). Clipping of ranges, where a recipe has it, is left out."
)
COORDINATES = (
    f"What coordinates look like before and after the maps of {SUBJECT}, and how few of them hold most of the energy."
)
BLAME = (
    "Each kind of rounding alone, all others left out, and each layer alone; losses are against the 16-bit model on "
    "the windows that the diagnostics use."
)


def unless_missing(name: str, title: str, found: T | str, draw: Callable[[T], Item]) -> Draw:
    """A figure of what was found, or the reason why nothing was."""
    if isinstance(found, str):
        return lambda: Missing(name, title, found)
    return lambda: draw(found)


def quality_figures(comparison: Comparison, evidence: Evidence) -> Iterator[Draw]:
    """Loss, bits, ranks, positions."""
    cases, swept = comparison.cases, comparison.swept
    best = min(comparison.focus, key=lambda case: case.perplexity).recipe
    best = SUBJECT if SUBJECT in evidence.positions else best
    yield lambda: quality.loss(cases)
    yield lambda: quality.size(comparison.base, cases)
    none: Item = Missing("ranks", "Rank of the 8-bit subspace", sweep(comparison))
    yield lambda: quality.ranks(swept) if len({share for share, _ in swept}) > 1 else none
    yield lambda: quality.positions(evidence.positions, best)


def sweep(comparison: Comparison) -> str:
    """The command that adds a sweep of ranks to a comparison."""
    plan = comparison.plan
    calibration = "".join(f" --calibration {file}" for file in plan.calibration)
    command = f"resq compare {plan.source} --recipes {','.join(SWEEP)} --text {plan.text}{calibration}"
    command += f" --out {comparison.directory}"
    return clean(f"No ranks were swept. This adds them, with the other options as before: {command}")


def signal_figures(comparison: Comparison, evidence: Evidence) -> Iterator[Draw]:
    """SNR of every place that some recipe rounds, and of other choices of coordinates."""
    found, band = evidence.snr, width_name(comparison.width)
    if isinstance(found, str):
        yield lambda: Missing("snr", "SNR by layer", found)
    else:
        for place in signal.PLACES:
            if any(row.place == place and row.db is not None for row in found):
                yield lambda place=place: signal.snr_by_layer(found, place, band)
    yield unless_missing("bases", "Which coordinates to keep in 8 bit", evidence.bases, signal.bases)


def coordinate_figures(evidence: Evidence) -> Iterator[Draw]:
    """Spectra, distributions, massive activations."""
    yield unless_missing("spectrum", "How much energy few directions hold", evidence.spectra, signal.spectrum)
    found = evidence.distributions
    if isinstance(found, str):
        yield lambda: Missing("distributions", "Distributions before and after the maps", found)
    else:
        shown = [each for each in found if each.place in DRAWN]
        for each in shown:
            yield lambda each=each: signal.channels(each, SUBJECT)
            yield lambda each=each: signal.histogram(each, SUBJECT)
    massive = "Massive activations"
    yield unless_missing("massive", massive, evidence.massive, lambda rows: signal.massive(rows, evidence.words))


def blame_figures(found: Mapping[str, Attribution | str] | str) -> Iterator[Draw]:
    """Two figures for every checkpoint that was kept."""
    if isinstance(found, str):
        yield lambda: Missing("attribution", "Error by kind of rounding and by layer", found)
        return
    for number, (case, each) in enumerate(found.items()):
        title = f"What each rounding of {case} costs"
        parts = f"attribution-{number}"
        yield unless_missing(parts, title, each, lambda e, c=case, n=number: blame.attribution(e, c, n))
        if not isinstance(each, str):
            yield lambda each=each, case=case, number=number: blame.guilty_layers(each, case, number)


def markdown_text(value: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return MARKDOWN.sub(r"\\\1", str(value).replace("\n", " "))


def rendered(template: str, page: Mapping[str, Any]) -> str:
    """A template of this package filled in; everything is escaped, drawings apart."""
    html = template.endswith(".html")
    environment = Environment(
        loader=PackageLoader("resq.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["drawing"] = Markup
    environment.tests["drawn"] = lambda item: isinstance(item, Figure)
    environment.filters["plain"] = markdown_text
    return environment.get_template(f"{template}.jinja").render(page)
