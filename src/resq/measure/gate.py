"""A verdict on a packed checkpoint: is it as close to its 16-bit original as asked, beyond the chance of the text?"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from resq.checkpoint.manifest import SourceEntry, read_manifest
from resq.errors import InputError
from resq.measure.evaluate import DEFAULT_LENGTH, comparable, is_packed
from resq.measure.perplexity import Streamed, mean_interval, open_streamed
from resq.measure.scores import Original, Scores, keep_states, score
from resq.measure.windows import check_windows
from resq.models.source import Source
from resq.models.text import all_windows, load_tokenizer
from resq.progress import Progress, silent

# One-sided 95 %: 5 % of the resamples lie beyond a bound.
TAIL = 0.05
# Standard errors between estimate and bound at which four texts in five decide: the normal quantiles of 95 and 80 %.
DECIDING = 1.645 + 0.842
# A bootstrap of fewer windows is markedly too narrow.
FEWEST_WINDOWS = 10


class Verdict(StrEnum):
    """PASS or FAIL where the one-sided 95 % interval lies on one side of the bound, UNDECIDED where it straddles it."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"


class Measure(StrEnum):
    """What is bounded: the perplexity's increase over 16 bit (a fraction) and the KL divergence (nats per token) from
    above, the share of tokens with the same most probable one from below."""

    PERPLEXITY = "perplexity"
    KL = "kl"
    AGREEMENT = "agreement"


@dataclass(frozen=True)
class Criterion:
    """A measure and what it may be: at most `bound`, for the agreement at least."""

    measure: Measure
    bound: float


@dataclass(frozen=True)
class Finding:
    """One criterion's verdict: the estimate with both one-sided 95 % bounds, and, while it is undecided, how many
    windows of such text would probably decide it (None: the estimate is the bound itself)."""

    criterion: Criterion
    estimate: float
    low: float
    high: float
    verdict: Verdict
    windows_needed: int | None = None


@dataclass(frozen=True)
class Report:
    """All findings on one checkpoint, and on how many windows of how many tokens they rest."""

    checkpoint: str
    source: str
    findings: tuple[Finding, ...]
    windows: int
    window_length: int
    text_sha256: str

    def passed(self, *, undecided: bool = False) -> bool:
        """Whether every criterion holds; `undecided` says what one that is undecided counts as."""
        accepted = {Verdict.PASS, Verdict.UNDECIDED} if undecided else {Verdict.PASS}
        return all(finding.verdict in accepted for finding in self.findings)


def judge(criterion: Criterion, values: Tensor) -> Finding:
    """The verdict on values [windows]: differences of the loss in nats for the perplexity, otherwise the measure
    itself."""
    ratio, floor = criterion.measure is Measure.PERPLEXITY, criterion.measure is Measure.AGREEMENT
    bound = math.log1p(criterion.bound) if ratio else criterion.bound
    found = mean_interval(values, tail=TAIL)
    inside, outside = found.high <= bound, found.low > bound
    if floor:
        inside, outside = found.low >= bound, found.high < bound
    verdict = Verdict.PASS if inside else Verdict.FAIL if outside else Verdict.UNDECIDED
    distance, needed = abs(found.mean - bound), None
    if verdict is Verdict.UNDECIDED and distance > 0:
        needed = max(len(values) + 1, math.ceil((DECIDING * float(values.double().std()) / distance) ** 2))
    shown = [math.expm1(value) if ratio else value for value in (found.mean, found.low, found.high)]
    return Finding(criterion, shown[0], shown[1], shown[2], verdict, needed)


def gate(
    checkpoint: str | Path,
    text: Path,
    criteria: Sequence[Criterion],
    *,
    against: str | Path | None = None,
    window_length: int | None = None,
    wikitext: bool = False,
    backend: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Judge a packed checkpoint beside its 16-bit original on a text. against: the original, default the source that
    the manifest names. window_length: tokens, default 2048 or the context. backend: what runs the checkpoint.

    Raises InputError when something given cannot be used, such as fewer than `FEWEST_WINDOWS` windows of text.
    """
    if not criteria:
        raise InputError("nothing was asked for; give --max-ppl, --max-kl or --min-agreement")
    packed = open_streamed(checkpoint, backend)
    manifest = read_manifest(packed.path)
    source = named_source(packed, manifest.source) if against is None else open_streamed(against)
    if is_packed(source):
        raise InputError(f"--against {against} is packed itself; name the 16-bit original")
    length = min(DEFAULT_LENGTH, packed.shape.max_positions) if window_length is None else window_length
    progress("tokenizing", 0, 1)
    windows, before = (all_windows(text, load_tokenizer(m.path), length, wikitext=wikitext) for m in (packed, source))
    progress("tokenizing", 1, 1)
    for model, each in ((packed, windows), (source, before)):
        check_windows(model, each.tokens)
    if not comparable(packed, windows, source, before):
        raise InputError(
            f"{source.name} and {checkpoint} do not share tokenizer and vocabulary; name another --against"
        )
    if len(windows.tokens) < FEWEST_WINDOWS:
        raise InputError(
            f"{text} has {len(windows.tokens)} windows of {length} tokens, too few to tell chance from quality; give "
            f"at least {FEWEST_WINDOWS}: more text or a shorter --window-length"
        )
    with tempfile.TemporaryDirectory(prefix="resq-states-") as folder:
        original = Original(source, Path(folder) / "states.npy")
        first = keep_states(source, windows.tokens, original.file, lambda *at: progress(source.name, *at))
        scores = score(packed, windows.tokens, original, lambda *at: progress(packed.name, *at))
    findings = tuple(judge(criterion, values_of(criterion.measure, scores, first)) for criterion in criteria)
    return Report(packed.name, source.name, findings, len(windows.tokens), length, windows.sha256)


def values_of(measure: Measure, scores: Scores, original: Scores) -> Tensor:
    """A measure in every window, float64 [windows]."""
    assert scores.kl is not None
    assert scores.agreement is not None
    return {
        Measure.PERPLEXITY: scores.window_nll - original.window_nll,
        Measure.KL: scores.kl.mean(dim=1, dtype=torch.float64),
        Measure.AGREEMENT: scores.agreement.double().mean(dim=1),
    }[measure]


def named_source(packed: Streamed, entry: SourceEntry) -> Streamed:
    """The 16-bit original that a manifest names. Raises InputError when it is not there or another one."""
    try:
        source = Source.open(entry.name)
    except InputError as error:
        raise InputError(
            f"{packed.name} was made from {entry.name}, which cannot be used: {error}; use --against"
        ) from error
    if source.nbytes != entry.bytes:
        raise InputError(
            f"{entry.name} holds {source.nbytes:,} bytes of weights, {packed.name} was made from {entry.bytes:,}; name "
            "the original with --against"
        )
    return open_streamed(entry.name)


def percentage(option: str, given: str, *, most: float) -> float:
    """`+3%` or `3 %` as 0.03. Raises InputError for everything else and for what is above `most`."""
    found = re.fullmatch(r"\s*\+?(\d+(?:\.\d+)?|\.\d+)\s*%\s*", given)
    value = None if found is None else float(found[1]) / 100
    if value is None or value > most:
        limit = "" if most == math.inf else f" of at most {most:.0%}"
        raise InputError(f"{option} {given!r} is no percentage{limit}; write it as +3% or 98.5%")
    return value


def criteria(max_ppl: str | None, max_kl: float | None, min_agreement: str | None) -> list[Criterion]:
    """What the command's options ask for. Raises InputError for what cannot be a bound."""
    found = []
    if max_ppl is not None:
        found.append(Criterion(Measure.PERPLEXITY, percentage("--max-ppl", max_ppl, most=math.inf)))
    if max_kl is not None:
        if not 0 < max_kl < math.inf:
            raise InputError(f"--max-kl {max_kl:g} is no divergence; give nats per token above 0, such as 0.05")
        found.append(Criterion(Measure.KL, max_kl))
    if min_agreement is not None:
        found.append(Criterion(Measure.AGREEMENT, percentage("--min-agreement", min_agreement, most=1.0)))
    return found
