"""Recipes side by side on one model: quantize, evaluate, time each of them; what was finished is never done again.

A comparison is a directory:

- `compare.json`: `state` (running, done), `plan`, facts of the `source`, the evaluation's `windows`, `provenance`,
  `cases` (names, in order) and `failed` (name -> reason).
- `rows.jsonl`: one `Row` per line, `16-bit` first, then the cases in that order; a failed one has `failed` and no
  figures.
- `cases/<name>/`, `16-bit` among them: `row.json`; `tokens.safetensors` with nll and kl, float32 [windows, length - 1],
  and agreement, bool (of 16-bit: nll, and tokens, int64 [windows, length]); `linears.json`, a list of `LinearReport`
  (not of 16-bit); `checkpoint/`, the packed model, while it is needed or when it is to be kept.

A case's name is `<recipe>`, then `-<bits>bit` where a width was asked for and `-seed<n>` for a seed other than 0.
Everything appears whole or not at all; a name that begins with a dot is work in progress.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from resq import embedded
from resq._version import __version__
from resq.cases import BASE, ROW, Case, Job, Plan, Row, make_base, make_case, measure, scores_of
from resq.checkpoint.manifest import FORMAT_VERSION
from resq.errors import InputError
from resq.inputs import DEFAULT_LENGTH
from resq.measure.perplexity import Interval, open_streamed, paired_interval
from resq.measure.rows import provenance, write_json, write_rows
from resq.measure.windows import check_windows
from resq.models.source import Source
from resq.models.text import Windows, all_windows, load_tokenizer, text_sha256
from resq.processes import Task, run_apart, start_server
from resq.progress import Progress, silent
from resq.ptq.recipes import recipe_named

# Long enough for a prefill, short enough for a 16-bit model without kernels of its own.
SPEED_TOKENS = 512
# What every process finds imported; any family's configuration brings most of what the others need.
PRELOADED = (
    "resq.cases",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What `compare` leaves: where, and the rows in order, 16-bit first."""

    directory: Path
    rows: tuple[Row, ...]

    @property
    def failed(self) -> list[Row]:
        """Cases that could not be made."""
        return [row for row in self.rows if row.failed is not None]

    def checkpoint(self, name: str) -> Path:
        """The packed model of a case, where it was kept."""
        return self.directory / "cases" / name / "checkpoint"

    def between(self, first: Row, second: Row) -> Interval:
        """Mean difference first - second in nats per token, paired over windows."""
        return paired_interval(*(scores_of(self.directory / "cases" / row.case).window_nll for row in (first, second)))


def compare(plan: Plan, out: Path, *, progress: Progress = silent, tell: Tell = lambda line: None) -> Comparison:
    """Make every case of a plan that is not yet in the directory `out`, and its rows.

    `tell` is given a line when something is kept, redone, finished or failed. Raises InputError for a plan that cannot
    be carried out; a single case that cannot is a row that says why.
    """
    cases = planned(plan)
    start_server(PRELOADED)
    source = Source.open(plan.source)
    progress("tokenizing", 0, 1)
    windows = evaluation_windows(plan, source)
    calibration = [text_sha256(file) for file in calibration_files(plan, source)]
    progress("tokenizing", 1, 1)
    with locked(out):
        try:
            return Work.begin(plan, out, source, windows, cases, calibration).run(progress, tell)
        except BaseException as stop:
            if not isinstance(stop, Exception):
                tell(f"what was finished is kept in {out}; the same command goes on from there")
            raise
        finally:
            remove_unfinished(out)


def planned(plan: Plan) -> list[Case]:
    """The cases of a plan in order. Raises InputError for an unknown recipe, for two of one name, and when none of them
    can be had with its width."""
    found = {given: recipe_named(given).name for given in dict.fromkeys(plan.recipes)}
    cases = [
        Case(name, given, bits, seed)
        for given, name in found.items()
        for bits in dict.fromkeys(plan.bits)
        for seed in dict.fromkeys(plan.seeds)
    ]
    names = [case.name for case in cases]
    if not cases:
        raise InputError("nothing to compare; name at least one recipe")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two recipes have the name {min(twice)}; give the file's recipe another `name`")
    reasons = [why for case in cases if (why := unmakeable(plan, case))]
    if len(reasons) == len(cases):
        raise InputError(reasons[0])
    return cases


def unmakeable(plan: Plan, case: Case) -> str | None:
    """Why a case's recipe cannot be had with its width, if it cannot."""
    try:
        plan.recipe(case)
    except InputError as error:
        return str(error)
    return None


def evaluation_windows(plan: Plan, source: Source) -> Windows:
    """The windows that every case is evaluated on. Raises InputError when there are fewer than two."""
    context = source.shape.max_positions
    length = min(DEFAULT_LENGTH, context) if plan.window_length is None else plan.window_length
    every = all_windows(Path(plan.text), load_tokenizer(source.path), length, wikitext=plan.wikitext)
    wanted = len(every.tokens) if plan.evaluation_windows is None else plan.evaluation_windows
    spread = torch.linspace(0, len(every.tokens) - 1, min(max(wanted, 0), len(every.tokens))).long()
    if len(spread) < 2:
        raise InputError(
            f"{plan.text} gives {len(spread)} window of {length} tokens to evaluate; an interval needs at least 2: "
            "give more text, a shorter --window-length or more --evaluation-windows"
        )
    chosen = Windows(every.tokens[spread].clone(), every.origin)
    check_windows(open_streamed(source.path), chosen.tokens)
    return chosen


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The directory of a comparison for one process alone. Raises InputError when another one has it, or when it holds
    something else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = [file.name for file in out.iterdir() if file.name != "cases" and not file.name.startswith(".")]
        if others and not (out / "compare.json").is_file():
            raise InputError(f"{out} holds other files ({min(others)}); choose another --out")
        lock = open(out / ".lock", "a", encoding="utf-8")  # noqa: SIM115  it is held as long as the block
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another resq compare works in {out}; wait for it or choose another --out") from error
        yield


def remove_unfinished(out: Path) -> None:
    """Remove what stopped processes left half done."""
    for left in (out / "cases").glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


@dataclass
class Work:
    """State: a comparison being made: what is known of its rows."""

    plan: Plan
    out: Path
    source: Source
    windows: Windows
    cases: list[Case]
    common: dict[str, Any]
    calibration: dict[str, Any]
    base: Row | None
    rows: dict[str, Row]
    earlier: list[Row]

    @classmethod
    def begin(
        cls, plan: Plan, out: Path, source: Source, windows: Windows, cases: list[Case], texts: list[str]
    ) -> Work:
        """Read what earlier calls finished; `texts` are the hashes of the calibration's."""
        (out / "cases").mkdir(exist_ok=True)
        remove_unfinished(out)
        evaluation = {"tokens_sha256": windows.sha256, "window_length": windows.tokens.shape[1]}
        common = {
            "resq": f"{__version__}, format {FORMAT_VERSION}",
            "source": identity(source),
            "evaluation": {**evaluation, "backend": plan.backend},
        }
        calibration = {
            "text": texts,
            "windows": plan.windows,
            "rounding_windows": plan.rounding_windows,
            "window_length": windows.tokens.shape[1],
        }
        work = cls(plan, out, source, windows, cases, common, calibration, None, {}, [])
        work.base = work.current(BASE, common)
        known = {case.name for case in cases} | {BASE}
        for row in read_earlier(out):
            if row.case not in known and work.current(row.case, {**row.key, **common}):
                work.earlier.append(row)
        return work

    def folder(self, name: str) -> Path:
        """Where a case is when it is done."""
        return self.out / "cases" / name

    def current(self, name: str, key: Mapping[str, Any]) -> Row | None:
        """The finished row of a case with all its files, if it was made of what `key` says."""
        row = self.finished(name)
        return row if row is not None and row.key == key else None

    def finished(self, name: str) -> Row | None:
        """The row of a case that was finished at some time."""
        folder = self.folder(name)
        needed = ["row.json", "tokens.safetensors", *([] if name == BASE else ["linears.json"])]
        if not all((folder / file).is_file() for file in needed):
            return None
        try:
            return ROW.validate_json((folder / "row.json").read_bytes())
        except ValidationError:
            return None

    def key(self, case: Case) -> dict[str, Any]:
        """Everything that decides a case's figures."""
        words = json.loads(json.dumps(self.plan.recipe(case).describe()))  # as JSON gives them back
        return {**self.common, "calibration": self.calibration, "recipe": words, "seed": case.seed}

    def run(self, progress: Progress, tell: Tell) -> Comparison:
        """Make what is missing."""
        plan, pending = self.plan, []
        for case in self.cases:
            row = self.take(case, tell)
            if row is None:
                pending.append(case)
        if kept := [row.case for row in self.rows.values() if row.failed is None]:
            tell(f"finished before: {', '.join(kept) if len(kept) < 5 else f'{len(kept)} cases'}")
        self.publish("running")
        self.evaluate_base(bool(pending), progress)
        threads = max(1, torch.get_num_threads() // plan.at_once)
        tasks = [Task(case.name, make_case, (self.job(case),)) for case in pending]
        begun, by_name = time.monotonic(), {case.name: case for case in pending}
        progress("cases", 0, len(tasks))
        made = run_apart(tasks, at_once=plan.at_once, threads=threads, preload=PRELOADED, progress=progress)
        for done, (name, row) in enumerate(made, start=1):
            if isinstance(row, InputError):
                row = self.failed(by_name[name], str(row))
            self.rows[name] = row
            self.publish("running")
            progress("cases", done, len(tasks))
            left = (time.monotonic() - begun) / done * (len(tasks) - done)
            tell(f"{told(row)} ({done} of {len(tasks)}{f', about {duration(left)} left' if done < len(tasks) else ''})")
        self.measure_speed(progress)
        if not plan.keep_checkpoints:
            for row in self.rows.values():
                shutil.rmtree(self.folder(row.case) / "checkpoint", ignore_errors=True)
        (self.folder(BASE) / "states.npy").unlink(missing_ok=True)
        self.publish("done")
        return Comparison(self.out, tuple(self.ordered()))

    def take(self, case: Case, tell: Tell) -> Row | None:
        """Keep the row of a case that is finished; a failed row when it cannot be made; None when it is to be made."""
        if reason := unmakeable(self.plan, case):
            self.rows[case.name] = self.failed(case, reason)
            return self.rows[case.name]
        key, row = self.key(case), self.finished(case.name)
        if row is None:
            return None
        packed = (self.folder(case.name) / "checkpoint").is_dir()
        if changed := [topic for topic in key if row.key.get(topic) != key[topic]]:
            tell(f"{case.name} was made with another {' and '.join(changed)}: made again")
            return None
        if not packed and (self.plan.keep_checkpoints or (self.plan.speed_rounds and row.speed is None)):
            tell(f"{case.name} was made without keeping its checkpoint, which is needed: made again")
            return None
        self.rows[case.name] = row
        return row

    def failed(self, case: Case, reason: str) -> Row:
        """A row without figures."""
        return Row(case.name, case.recipe, case.bits, case.seed, {}, provenance(), failed=reason)

    def job(self, case: Case) -> Job:
        """What a process needs to make a case."""
        plan, length = self.plan, self.windows.tokens.shape[1]
        keep = plan.keep_checkpoints or plan.speed_rounds > 0
        return Job(case, replace(plan, window_length=length), self.folder(case.name), self.key(case), keep)

    def evaluate_base(self, needed: bool, progress: Progress) -> None:
        """Evaluate the 16-bit source, if that was not done, or its hidden states are `needed` and not there."""
        if self.base is not None and not (needed and not (self.folder(BASE) / "states.npy").is_file()):
            return
        speed = None if self.base is None else self.base.speed
        tokens = self.windows.tokens.numpy()
        task = Task(BASE, make_base, (self.plan.source, tokens, self.folder(BASE), self.common, speed))
        for _, row in run_apart(
            [task], at_once=1, threads=torch.get_num_threads(), preload=PRELOADED, progress=progress
        ):
            if isinstance(row, InputError):
                raise InputError(f"{self.plan.source} could not be evaluated: {row}")
            self.base = row

    def measure_speed(self, progress: Progress) -> None:
        """Time every case that was not, beside the 16-bit source."""
        rounds, assert_base = self.plan.speed_rounds, self.base
        assert assert_base is not None
        names = [row.case for row in self.rows.values() if row.failed is None and row.speed is None]
        if not rounds or not names:
            return
        places = [(name, str(self.folder(name) / "checkpoint")) for name in names]
        tokens = self.windows.tokens.flatten()[:SPEED_TOKENS]
        length = min(self.windows.tokens.shape[1], len(tokens))
        batch = tokens[: len(tokens) // length * length].view(-1, length).numpy()
        task = Task("speed", measure, (self.plan.source, places, batch, rounds, self.plan.backend))
        threads = torch.get_num_threads()
        for _, found in run_apart([task], at_once=1, threads=threads, preload=PRELOADED, progress=progress):
            if isinstance(found, InputError):
                raise found
            for name, speed in found.items():
                row = replace(assert_base if name == BASE else self.rows[name], speed=speed)
                write_json(self.folder(name) / "row.json", ROW.dump_python(row, mode="json"))
                if name == BASE:
                    self.base = row
                else:
                    self.rows[name] = row

    def ordered(self) -> list[Row]:
        """16-bit, then by recipe (those of earlier calls first), from the widest low band down, and seed."""
        rows = [*self.earlier, *(self.rows[case.name] for case in self.cases if case.name in self.rows)]
        recipes = list(dict.fromkeys(row.recipe for row in rows))
        rows.sort(key=lambda row: (recipes.index(row.recipe), -(row.bits or 16), row.seed))
        return [*([] if self.base is None else [self.base]), *rows]

    def publish(self, state: str) -> None:
        """Write rows.jsonl and compare.json anew."""
        rows, source = self.ordered(), self.source
        write_rows(self.out / "rows.jsonl", [ROW.dump_python(row, mode="json") for row in rows])
        facts = {
            "state": state,
            "plan": asdict(self.plan),
            "source": {
                "name": source.name,
                "model_type": source.config["model_type"],
                "dtype": source.dtype,
                "bytes": source.nbytes,
                "parameters": source.parameters(),
                "shape": shape_facts(source),
            },
            "windows": {
                "text": self.plan.text,
                "wikitext": self.plan.wikitext,
                "count": len(self.windows.tokens),
                "length": self.windows.tokens.shape[1],
                "tokens_sha256": self.windows.sha256,
            },
            "provenance": provenance(),
            "cases": [row.case for row in rows],
            "failed": {row.case: row.failed for row in rows if row.failed is not None},
        }
        write_json(self.out / "compare.json", facts)


def read_earlier(out: Path) -> list[Row]:
    """The rows that earlier calls left, failed ones apart."""
    file = out / "rows.jsonl"
    try:
        rows = [ROW.validate_json(line) for line in file.read_bytes().splitlines()] if file.is_file() else []
    except ValidationError:
        return []
    return [row for row in rows if row.failed is None]


def calibration_files(plan: Plan, source: Source) -> tuple[str, ...]:
    """What `quantize` will take."""
    if not plan.calibration and source.path == embedded.model_directory():
        return (embedded.TEXT,)
    return plan.calibration


def identity(source: Source) -> dict[str, str]:
    """What a source is, file by file: size and time of its weights, the hash of everything small beside them."""
    found = {}
    for file in sorted(source.path.iterdir()):
        if file.name in source.shards:
            at = file.stat()
            found[file.name] = f"{at.st_size} bytes, {at.st_mtime_ns}"
        elif file.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken"):
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def shape_facts(source: Source) -> dict[str, Any]:
    """Sizes for people."""
    names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_positions")
    return {name: getattr(source.shape, name) for name in names}


def told(row: Row) -> str:
    """A finished case in one line."""
    if row.failed is not None or row.kl is None:
        return f"{row.case} failed: {row.failed}"
    spent = (row.quantize_seconds or 0) + (row.evaluate_seconds or 0)
    return f"{row.case}: perplexity {row.perplexity:.3f}, KL {row.kl.mean:.4f}, {duration(spent)}"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
