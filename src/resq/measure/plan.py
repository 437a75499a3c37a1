"""`resq plan`: what quantizing a model will take and give, before any weight is read. docs/large-models.md."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resq.checkpoint.manifest import FileEntry
from resq.errors import InputError
from resq.inputs import counted, counted_for_rounding, window_length
from resq.measure.plan_memory import Holding, Work, holdings, maps
from resq.measure.plan_size import Size, sized, source_bytes
from resq.measure.plan_time import Rates, measured, seconds
from resq.models.architecture import Architecture, Shape, architecture_for
from resq.models.source import HEADER_DTYPES, Source, locate, original_config
from resq.models.text import load_tokenizer
from resq.numerics.device import CPU
from resq.numerics.moments import Leaves
from resq.processes import Peak, held
from resq.ptq.activations import Place
from resq.ptq.checks import check_sizes
from resq.ptq.recipe import Recipe, Statistic
from resq.ptq.statistics_file import Header, check_fit

# What of a hub model is fetched for a plan.
DESCRIBED = ["*.json", "tokenizer*"]
# What is planned times this must be free: memory is right to 15 %.
MARGIN = 1.15
# Windows and tokens a window that advice goes down to: one leaf of the tree, and half a thousand.
FEWEST, SHORTEST = 8, 512
# Steps that `Peak` saw, under the names of a plan's phases.
NAMED = {"before embedding and head": "fitting bases"}


@dataclass(frozen=True)
class Asked:
    """What `resq quantize` would be asked: see there. collected: the bases' statistics come from a file. context,
    batch: of the KV cache that is counted; text: bytes of the largest calibration text that is no .jsonl, None where it
    is not known; documents: of the largest .jsonl."""

    recipe: Recipe
    windows: int | None = None
    rounding_windows: int | None = None
    window_length: int | None = None
    untie: bool = False
    device: torch.device = CPU
    activations: Place = Place.DEVICE
    collected: bool = False
    context: int | None = None
    batch: int = 1
    text: int | None = None
    documents: int = 0


@dataclass(frozen=True)
class Model:
    """A model whose weights nobody has read. source: where its files are at hand; assumed: what then had to be."""

    name: str
    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shape: Shape
    dtype: str
    source: Source | None
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phase:
    """A phase: seconds (None: not estimated), peak of the machine's memory and of the card's in bytes, when that is,
    and what it is made of."""

    name: str
    seconds: float | None
    peak: int
    card: int
    moment: str
    terms: dict[str, int]


@dataclass(frozen=True)
class Machine:
    """Bytes that are free: of memory, this process's own included, of the card's (None: no card is asked for), and of
    the disk."""

    memory: int
    card: int | None
    disk: int


@dataclass(frozen=True)
class Plan:
    """What is known before quantizing. disk: bytes by what they are for; advice: what to change, with the peak of
    memory that is left, where it does not fit."""

    model: Model
    asked: Asked
    work: Work
    phases: tuple[Phase, ...]
    disk: dict[str, int]
    size: Size
    kv_bytes: int
    kv_bytes_16bit: int
    machine: Machine
    notes: tuple[str, ...]
    advice: tuple[tuple[str, int, bool], ...]

    @property
    def peak(self) -> int:
        """Bytes of the machine's memory."""
        return max(phase.peak for phase in self.phases)

    @property
    def card(self) -> int:
        """Bytes of the card's memory."""
        return max(phase.card for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Of all phases that are estimated."""
        return sum(phase.seconds or 0.0 for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether memory, card and disk have room."""
        card = self.machine.card is None or self.card * MARGIN < self.machine.card
        return self.peak * MARGIN < self.machine.memory and card and sum(self.disk.values()) < self.machine.disk

    def record(self) -> dict[str, Any]:
        """For --json."""
        asked, shape = self.asked, self.model.shape
        return {
            "source": self.model.name,
            "model_type": self.model.config["model_type"],
            "dtype": self.model.dtype,
            "assumed": list(self.model.assumed),
            "recipe": asked.recipe.name,
            "windows": self.work.windows,
            "rounding_windows": self.work.rounding_windows,
            "window_length": self.work.length,
            "statistics": asked.collected,
            "device": str(asked.device),
            "activations": str(asked.activations),
            "layers": shape.layers,
            "tied": shape.tied,
            "keeps_tied": self.work.keep_tied,
            "phases": [vars(phase) for phase in self.phases],
            "peak_bytes": self.peak,
            "card_bytes": self.card,
            "seconds": self.seconds,
            "disk": self.disk,
            "size": {
                "ledger": vars(self.size.ledger),
                "transforms": self.size.transforms,
            },
            "kv": {
                "context": asked.context or shape.max_positions,
                "batch": asked.batch,
                "bytes": self.kv_bytes,
                "bytes_16bit": self.kv_bytes_16bit,
            },
            "machine": vars(self.machine),
            "fits": self.fits,
            "notes": list(self.notes),
            "advice": [{"change": change, "peak_bytes": peak, "fits": fits} for change, peak, fits in self.advice],
        }


def described(source: str | Path) -> Model:
    """A source without its weights: a directory, whose tensors' names and shapes are checked where there are weight
    files, a config.json alone, or a hub id, of which only descriptions are fetched. Raises InputError as `resq
    quantize` does."""
    given, name = Path(source), str(source)
    path = given.parent if given.name == "config.json" and given.is_file() else locate(source, DESCRIBED)
    if given != path / "config.json" and any(path.glob("*.safetensors")):
        opened = Source(path, name)
        return Model(name, path, opened.config, opened.architecture, opened.shape, opened.dtype, opened)
    config = original_config(path, name)
    architecture = architecture_for(config["model_type"])
    stated = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    known = stated in HEADER_DTYPES.values()
    assumed = f"no weights are at hand: {stated if known else 'bfloat16'} weights are assumed, of this config.json"
    dtype = stated if known else "bfloat16"
    return Model(name, path, config, architecture, architecture.shape(config), dtype, None, (assumed,))


def planned(
    model: Model,
    asked: Asked,
    *,
    rates: Rates | None = None,
    process: int | None = None,
    machine: Machine | None = None,
) -> Plan:
    """The plan. rates: of this machine, measured here where they are not given; process: bytes that a process holds
    before it begins, by default what this one does. Raises InputError for everything that `resq quantize` refuses
    before it computes."""
    work = work_of(model, asked)
    process = _process(model) if process is None else process
    rates = measured(asked.device) if rates is None else rates
    machine = free(asked.device) if machine is None else machine
    of_source = source_bytes(work) if model.source is None else model.source.nbytes
    size = sized(work, model.architecture, of_source)
    took, held_by = seconds(work, rates, of_source, size.ledger.layer_bytes), holdings(work, process)
    phases = tuple(_phases(asked.recipe, took, held_by, cuda=work.cuda, process=process))
    kv = size.ledger
    tokens = (asked.context or model.shape.max_positions) * asked.batch
    notes = [*model.assumed, *size.notes]
    notes += [f"{tuning}: neither its time nor its memory is estimated" for tuning in asked.recipe.tuning]
    if work.cuda:
        notes.append("the peak of the machine's memory leaves out what CUDA itself takes")
    plan = Plan(
        model=model,
        asked=asked,
        work=work,
        phases=phases,
        disk=disk(work, size.ledger.bytes),
        size=size,
        kv_bytes=tokens * kv.kv_bytes_per_token,
        kv_bytes_16bit=tokens * kv.kv_bytes_per_token_16bit,
        machine=machine,
        notes=tuple(notes),
        advice=(),
    )
    return plan if plan.fits else replace(plan, advice=tuple(_advice(plan, process)))


def work_of(model: Model, asked: Asked) -> Work:
    """What is to be done. Raises InputError for sizes, windows and precisions that cannot be."""
    shape, recipe = model.shape, asked.recipe
    check_sizes(recipe, shape)
    windows = counted(asked.windows)
    rounding = counted_for_rounding(asked.rounding_windows, windows)
    length = window_length(asked.window_length, shape.max_positions)
    if asked.batch < 1 or (asked.context is not None and not 1 <= asked.context <= shape.max_positions):
        raise InputError(
            f"--batch {asked.batch} and --context {asked.context} must be at least 1, the second at most "
            f"{shape.max_positions}, the model's context"
        )
    for basis in recipe.basis:
        basis.check(shape, windows * length)
    return Work(
        shape=shape,
        recipe=recipe,
        windows=windows,
        rounding_windows=rounding,
        length=length,
        place=asked.activations,
        collected=asked.collected,
        cuda=asked.device.type == "cuda",
        keep_tied=shape.tied and recipe.precision.head is None and not asked.untie,
        value_bytes=4 if model.dtype == "float32" else 2,
        text=asked.text,
        documents=asked.documents,
    )


def check_statistics(file: str, header: Header, model: Model, recipe: Recipe) -> None:
    """Raises InputError as `resq quantize` does for a statistics file that does not serve model and recipe; weights,
    which are not read here, are known by their sizes."""
    here = dict(header.source)
    if model.source is not None:
        sizes = {name: (model.path / name).stat().st_size for name in model.source.shards}
        like = {name: entry for name, entry in here.items() if entry.bytes == sizes.get(name)}
        here = {name: FileEntry(bytes=size, sha256="0" * 64) for name, size in sizes.items()} | like
    config = (model.path / "config.json").read_bytes()
    here["config.json"] = FileEntry(bytes=len(config), sha256=hashlib.sha256(config).hexdigest())
    check_fit(file, header, here, recipe.needs)


def _process(model: Model) -> int:
    """Bytes that this process holds with what quantizing imports, and with the model's tokenizer where it has one."""
    import transformers  # noqa: F401

    try:
        tokenizer = load_tokenizer(model.path)
    except InputError:
        return held()
    bytes = held()
    del tokenizer
    return bytes


def _phases(
    recipe: Recipe, took: Mapping[str, float], held_by: list[Holding], *, cuda: bool, process: int
) -> list[Phase]:
    by_name = {holding.phase: holding for holding in held_by}
    tuned = [str(tuning) for tuning in recipe.tuning]
    names = ["tokenizing", "hashing the source", "collecting moments", "fitting bases", *tuned]
    found = []
    for name in [*names, "embedding and head", "rounding"]:
        holding = by_name.get(name)
        if holding is None:
            if name in took or name in tuned:
                found.append(Phase(name, took.get(name), process, 0, "", {"process": process}))
            continue
        peak, card = holding.machine(cuda=cuda), holding.card(cuda=cuda)
        moment = holding.worst(cuda=cuda).what
        found.append(Phase(name, took.get(name), peak, card, moment, holding.terms(cuda=cuda)))
    return found


def disk(work: Work, result: int) -> dict[str, int]:
    """Bytes on disk at most, by what they are for, the source not counted."""
    shape = work.shape
    rounded = work.streams * work.states(work.rounded)
    attended = 4 * work.streams * work.rounded * work.length * shape.heads * shape.head_dim
    first = work.states(work.windows) if work.passes else 0
    residual = work.passes and Statistic.RESIDUAL in work.recipe.needs
    sums = 8 * Leaves(work.windows).count * shape.hidden**2 if residual else 0
    found = {"checkpoint": result}
    # The one saved before is there until the next one is whole.
    if resumable := 2 * (max(first + sums, rounded) + maps(work)):
        found["states and maps to resume from"] = resumable
    if work.place is Place.DISK:
        found["activations"] = max(first, rounded + attended)
    return found


def free(device: torch.device, directory: Path | None = None) -> Machine:
    """What is free now; of memory, what a limit of the process's group leaves where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        entries = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        memory = int(entries["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        memory = min(memory, max(0, limit - used))
    card = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Machine(memory + held(), card, shutil.disk_usage(directory or Path.cwd()).free)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _advice(plan: Plan, process: int) -> list[tuple[str, int, bool]]:
    """Changes that leave less, each with the peak that is left and whether that has room: first one by one, then the
    first of all of them together that has."""
    work = plan.work
    changes: dict[str, Callable[[Work], Work]] = {}
    if work.looks and work.place is not Place.DISK:
        changes["--activations disk"] = lambda each: replace(each, place=Place.DISK)
    if work.rounded > FEWEST:
        changes[f"--rounding-windows {FEWEST}"] = lambda each: replace(each, rounding_windows=FEWEST)
    needed = 2 * work.shape.hidden if Statistic.RESIDUAL in work.recipe.needs else 1
    own = not work.collected  # those of a statistics file are its own
    if own and work.windows > FEWEST and FEWEST * work.length >= needed:
        changes[f"--windows {FEWEST}"] = lambda each: replace(
            each, windows=FEWEST, rounding_windows=min(FEWEST, each.rounding_windows)
        )
    if own and work.looks and work.length > SHORTEST and work.windows * SHORTEST >= needed:
        changes[f"--window-length {SHORTEST}"] = lambda each: replace(each, length=SHORTEST)
    found, together = [], work
    for change, make in changes.items():
        found.append((change, *_peak(plan, make(work), process)))
    for number, make in enumerate(changes.values()):
        together = make(together)
        if number:
            found.append((" ".join(list(changes)[: number + 1]), *_peak(plan, together, process)))
    now = max(plan.peak, plan.card)
    less = [each for each in found if each[1] < 0.98 * now]
    whole = [each for each in less if each[2]]
    return whole[:3] or less


def _peak(plan: Plan, work: Work, process: int) -> tuple[int, bool]:
    """The peak that is short, and whether all have room."""
    held_by, machine = holdings(work, process), plan.machine
    memory = max(holding.machine(cuda=work.cuda) for holding in held_by)
    card = max(holding.card(cuda=work.cuda) for holding in held_by)
    fits = memory * MARGIN < machine.memory and (machine.card is None or card * MARGIN < machine.card)
    on_disk = sum(disk(work, plan.size.ledger.bytes).values()) < machine.disk
    short = machine.card is not None and plan.card * MARGIN >= machine.card
    return card if short else memory, fits and on_disk


@dataclass(frozen=True)
class Logged:
    """A phase as it was planned and as it was: seconds (None: not estimated) and bytes."""

    phase: str
    planned_seconds: float | None
    seconds: float
    planned_peak: int
    peak: int


def logged(plan: Plan, real: Peak) -> list[Logged]:
    """What every phase took beside what was planned, and `all` of them last; `real` has watched quantizing."""
    took: dict[str, tuple[float, int]] = {}
    for step, (spent, most) in real.phases.items():
        name = NAMED.get(step, step.removeprefix("before "))
        before = took.get(name, (0.0, 0))
        took[name] = before[0] + spent, max(before[1], most)
    found = [
        Logged(phase.name, phase.seconds, *_split(took[phase.name], phase.peak))
        for phase in plan.phases
        if phase.name in took
    ]
    return [*found, Logged("all", plan.seconds, real.seconds, plan.peak, real.bytes)]


def _split(real: tuple[float, int], planned_peak: int) -> tuple[float, int, int]:
    return real[0], planned_peak, real[1]
