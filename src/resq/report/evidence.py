"""The diagnostics that the report shows, computed once and kept in the comparison's directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor

from resq.backends.reference import dense
from resq.cases import Case as Compared
from resq.compare import calibration_files, identity
from resq.errors import InputError
from resq.inputs import DEFAULT_LENGTH, DEFAULT_ROUNDING_WINDOWS, chosen_recipe
from resq.measure.diagnose.attribution import Attribution, attribute
from resq.measure.diagnose.histograms import Distribution, distributions
from resq.measure.diagnose.massive import LayerOutliers, massive_activations
from resq.measure.diagnose.positions import Bucket, by_position
from resq.measure.diagnose.snr import Snr, other_bases, snr
from resq.measure.diagnose.spectra import Spectrum, spectra
from resq.models.source import Source
from resq.models.text import load_tokenizer, sampled_windows, text_sha256
from resq.numerics.maps import LinearMap
from resq.progress import Progress
from resq.ptq.pipeline import Job, tuned_maps
from resq.ptq.placement import Placement
from resq.ptq.recipe import At, Moments, Recipe
from resq.ptq.recipes import recipe_named
from resq.ptq.statistics import collect
from resq.report.cache import kept
from resq.report.comparison import Case, Comparison, clean
from resq.runtime.load import Opened

T = TypeVar("T")
# Evaluation tokens that diagnostics run on: ratios of energies settle within a few thousand.
TOKENS = 4096
# Whose basis is taken apart: the spectra, distributions and other choices of coordinates are of its maps.
SUBJECT = "resq"
# Places whose distributions are drawn.
DRAWN = ("attn_in", "down_in", "key", "value")
NO_CHECKPOINT = (
    "No packed checkpoint was kept, so the error cannot be taken apart; run resq compare again with --keep-checkpoints."
)


@dataclass(frozen=True)
class Evidence:
    """What was found, or in words why it could not be. words: of the tokens that the massive activations stand on."""

    snr: list[Snr] | str
    bases: list[Snr] | str
    spectra: list[Spectrum] | str
    distributions: list[Distribution] | str
    massive: list[LayerOutliers] | str
    words: Mapping[int, str]
    attribution: Mapping[str, Attribution | str] | str
    positions: Mapping[str, list[Bucket]]


class Laboratory:
    """State: the source, its windows and moments, opened and computed when first asked for.

    Raises InputError when nothing can be kept in the comparison's directory.
    """

    def __init__(self, comparison: Comparison, progress: Progress) -> None:
        self.comparison, self.plan, self.progress = comparison, comparison.plan, progress
        self.directory = comparison.directory / "diagnostics"
        self._tuned: dict[str, dict[At, LinearMap]] = {}
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.directory} cannot be made: {error.strerror}; copy the comparison first") from error

    @cached_property
    def source(self) -> Source:
        """The 16-bit model. Raises InputError when it is gone or another one now."""
        source = Source.open(self.plan.source)
        if identity(source) != self.comparison.base.row.key["source"]:
            raise InputError(f"{self.plan.source} is not what was compared; run resq compare again")
        return source

    @cached_property
    def windows(self) -> Tensor:
        """About `TOKENS` of the evaluated tokens, int64 [windows, length], evenly spread."""
        every = self.comparison.base.tokens["tokens"]
        count = min(len(every), max(2, TOKENS // every.shape[1]))
        return every[torch.linspace(0, len(every) - 1, count).long()]

    @cached_property
    def calibration(self) -> Tensor:
        """The windows that the cases looked at were calibrated on. Raises InputError when a text is gone or changed."""
        plan, files = self.plan, calibration_files(self.plan, self.source)
        if [text_sha256(file) for file in files] != self.comparison.focus[0].row.key["calibration"]["text"]:
            raise InputError(f"the calibration text {', '.join(files)} has changed; run resq compare again")
        length = min(DEFAULT_LENGTH, self.source.shape.max_positions)
        return sampled_windows(
            [Path(file) for file in files],
            load_tokenizer(self.source.path),
            count=plan.windows,
            length=length if plan.window_length is None else plan.window_length,
            seed=self.comparison.seed,
        ).tokens

    @cached_property
    def subject(self) -> Recipe:
        """The recipe whose basis is taken apart."""
        return chosen_recipe(SUBJECT, self.comparison.width, None)

    @cached_property
    def moments(self) -> Moments:
        """Everything that the bases of the compared recipes need, in one pass."""
        recipes = [self.subject, *(self.recipe(case) for case in self.comparison.focus)]
        needs = frozenset().union(*(recipe.needs for recipe in recipes))
        return collect(self.source, dense(torch.float32), self.calibration, needs, self.progress)

    def recipe(self, case: Case) -> Recipe:
        """The recipe of a case. Raises InputError when it is gone or another one now."""
        row, named = case.row, {recipe_named(given).name: given for given in self.plan.recipes}
        recipe = self.plan.recipe(Compared(row.recipe, named.get(row.recipe, row.recipe), row.bits, row.seed))
        if described(recipe) != row.key["recipe"]:
            raise InputError(f"recipe {case.recipe} is not what was compared; run resq compare again")
        return recipe

    def placement(self, recipe: Recipe) -> Placement:
        """The maps that the recipe gives, fitted as they were; what took a search or learning is held."""
        maps = self._tuned.get(recipe.name)
        if maps is None:
            maps = self._fitted(recipe)
            if recipe.tuning:
                self._tuned[recipe.name] = maps
        return Placement(self.source.shape, maps, recipe.precision, recipe.folds_norms)

    def _fitted(self, recipe: Recipe) -> dict[At, LinearMap]:
        plan, rounding = self.plan, self.plan.rounding_windows
        rounding = min(DEFAULT_ROUNDING_WINDOWS, plan.windows) if rounding is None else rounding
        keep_tied = self.source.shape.tied and recipe.precision.head is None
        job = Job(recipe, self.calibration, rounding, self.comparison.seed, keep_tied)
        return dict(tuned_maps(self.source, job, self.moments, self.progress).maps)

    def keep(self, name: str, kind: type[T], compute: Callable[[], Sequence[T]], **depends: Any) -> list[T] | str:
        """Rows of a diagnostic from its file, computed if need be; in words why that cannot be."""
        key = self.comparison.focus[0].row.key
        of = {topic: key[topic] for topic in ("source", "evaluation", "calibration", "seed")}
        rows_of: TypeAdapter[list[T]] = TypeAdapter(list[kind])  # pyright: ignore[reportInvalidTypeForm]
        try:
            rows = kept(
                self.directory,
                name,
                {**of, **depends},
                lambda: rows_of.dump_python(list(compute()), mode="json"),
            )
        except InputError as error:
            return clean(str(error))
        return rows_of.validate_python(rows)


def described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON gives it back."""
    return json.loads(json.dumps(recipe.describe()))


def gathered(comparison: Comparison, progress: Progress) -> Evidence:
    """Every diagnostic, from its file where there is one."""
    work = Laboratory(comparison, progress)
    recipes = {case.recipe: case.row.key["recipe"] for case in comparison.focus}
    subject = described(work.subject)

    def methods() -> dict[str, Placement]:
        return {case.recipe: work.placement(work.recipe(case)) for case in comparison.focus}

    def bases() -> dict[str, Placement]:
        return other_bases(work.subject, work.moments, work.source.shape, comparison.seed)

    def middle() -> list[Distribution]:
        layer = work.source.shape.layers // 2
        return distributions(work.source, work.placement(work.subject), work.windows, layer, progress)

    massive = work.keep("massive", LayerOutliers, lambda: massive_activations(work.source, work.windows, progress))
    return Evidence(
        snr=work.keep("snr", Snr, lambda: snr(work.source, methods(), work.windows, progress), recipes=recipes),
        bases=work.keep("bases", Snr, lambda: snr(work.source, bases(), work.windows, progress), recipe=subject),
        spectra=work.keep("spectra", Spectrum, lambda: spectra(work.moments, work.source.shape)),
        distributions=work.keep("distributions", Distribution, middle, recipe=subject),
        massive=massive,
        words=words(work, massive),
        attribution=attributions(work),
        positions=positions(comparison),
    )


def words(work: Laboratory, massive: list[LayerOutliers] | str) -> dict[int, str]:
    """The text of every token that a massive activation stands on."""
    tokens = set() if isinstance(massive, str) else {each.token for row in massive for each in row.outliers}
    tokenizer = load_tokenizer(work.source.path) if tokens else None
    return {token: clean(repr(tokenizer.decode([token]))) for token in tokens} if tokenizer is not None else {}


def attributions(work: Laboratory) -> Mapping[str, Attribution | str] | str:
    """Of every kept checkpoint among the cases looked at; in words when there is none."""
    found = {}
    for case in work.comparison.focus:
        directory = case.checkpoint
        if directory is None:
            continue

        def compute(case: Case = case, directory: Path = directory) -> list[Attribution]:
            placement = work.placement(work.recipe(case))

            def told(phase: str, done: int, total: int) -> None:
                work.progress(f"{phase} of {case.name}", done, total)

            return [attribute(Opened(directory), work.source, placement, work.windows, progress=told)]

        rows = work.keep(f"attribution-{case.row.case}", Attribution, compute, key=case.row.key)
        found[case.name] = rows if isinstance(rows, str) else rows[0]
    return found or NO_CHECKPOINT


def positions(comparison: Comparison) -> dict[str, list[Bucket]]:
    """Of the cases looked at."""
    base = comparison.base.tokens["nll"]
    return {case.recipe: by_position(case.tokens["nll"], base, case.tokens["kl"]) for case in comparison.focus}
