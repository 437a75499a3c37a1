"""How fast a model runs, operator by operator, beside the limits of the machine and beside peers, in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from resq.backends.backend import Activations, Backend, LayerCache
from resq.backends.cpu.native import module
from resq.backends.reference import UnpackedLinear
from resq.models import decoder
from resq.models.architecture import Role, Shape
from resq.models.decoder import Ends, Layer
from resq.numerics.linear import DenseLinear
from resq.progress import Progress, silent

# Long enough that caches hold a small part of it.
READ_BYTES = 768 << 20
PEAK_SECONDS = 0.2
SETTLE_SECONDS = 0.5
# Decode steps of one round: the first ones find caches and threads cold.
STEPS, WARM_STEPS = 12, 2


class Measured(Protocol):
    """A model that runs: a loaded checkpoint or one of random weights."""

    @property
    def shape(self) -> Shape:
        """Sizes."""
        ...

    @property
    def ends(self) -> Ends:
        """Embedding, norm, head."""
        ...

    @property
    def layers(self) -> Sequence[Layer]:
        """Prepacked layers."""
        ...

    @property
    def backend(self) -> Backend:
        """What runs it."""
        ...


@dataclass(frozen=True)
class Limits:
    """What the machine does at most with these threads: GB/s of reading memory, 10^9 integer operations a second on
    registers (a multiply-add is 2) by the instruction set in use."""

    read: float
    integer: float
    instruction_set: str
    threads: int


def measure_limits(threads: int) -> Limits:
    """The better of two read loops over `READ_BYTES`, and the register-resident peak: best of several passes, for a
    limit is what was reached once."""
    native = module()
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    address = memory.data_ptr()
    read = max(native.read_bandwidth(address, READ_BYTES, pattern, threads) for pattern in (0, 1) * 4)
    peak = max(native.integer_peak(threads, PEAK_SECONDS) for _ in range(4))
    return Limits(read / 1e9, peak, native.active(), threads)


@dataclass
class Operator:
    """State: what one kind of operator took: seconds and calls, bytes of weights read, integer operations done."""

    seconds: float = 0.0
    calls: int = 0
    bytes: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Point:
    """One thing to measure: a prefill of `tokens`, or decoding `batch` rows that each hold `context` tokens."""

    mode: str
    tokens: int = 0
    batch: int = 1
    context: int = 0

    @property
    def processed(self) -> int:
        """Tokens of one run or step."""
        return self.tokens if self.mode == "prefill" else self.batch

    def __str__(self) -> str:
        if self.mode == "prefill":
            return f"prefill {self.tokens}"
        return f"decode, batch {self.batch}, context {self.context}"


@dataclass(frozen=True)
class Result:
    """Seconds of every round of one contender at one point, and its operators (ours only)."""

    name: str
    point: Point
    seconds: tuple[float, ...]
    operators: dict[str, Operator] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.point.processed / self.median


class Contender(Protocol):
    """What is timed: ours or a peer (measure/peers)."""

    name: str

    def prefill(self, tokens: int) -> float:
        """Seconds of one prefill of a fresh context."""
        ...

    def start_decode(self, batch: int, context: int) -> None:
        """Fill the cache."""
        ...

    def decode(self) -> float:
        """Seconds of one step."""
        ...


@dataclass(frozen=True)
class Held:
    """What a backend holds of a linear [out, in]: the operator that reads it, bytes, out · in."""

    label: str
    bytes: int
    values: int


def held_bytes(weight: Any) -> int:
    """Bytes of a prepacked weight; of the reference's, which are plain tensors, their own."""
    match weight:
        case UnpackedLinear():
            return weight.integers.nbytes + weight.scale.nbytes
        case DenseLinear():
            return weight.weight.nbytes
        case _:
            return weight.nbytes


class Ours:
    """State: a model of ours as a contender; collects its operators' times."""

    def __init__(self, name: str, model: Measured) -> None:
        self.name, self.model = name, model
        self.operators: dict[str, Operator] = {}
        self._caches: list[LayerCache] = []
        sizes, head = model.shape.sizes(), model.ends.head
        self._held = {id(head): Held("lm_head", held_bytes(head), model.shape.vocab * model.shape.hidden)}
        for layer in model.layers:
            for role, weight in layer.linears.items():
                self._held[id(weight)] = Held(_label(role), held_bytes(weight), math.prod(sizes[role]))
        self._timed = self._watched(model.backend)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all linears as the backend holds them."""
        return sum(held.bytes for held in self._held.values())

    def cache_bytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(cache.nbytes() for cache in self._caches)

    def prefill(self, tokens: int) -> float:
        """Seconds of one prefill of a fresh context, up to the last token's logits."""
        self._caches = self._fresh()
        return self._run(self._tokens(1, tokens))

    def start_decode(self, batch: int, context: int) -> None:
        """Fill the cache with the same `context` tokens for every row."""
        self._caches = self._fresh()
        self._run(self._tokens(1, context))
        for cache in self._caches:
            cache.select(torch.zeros(batch, dtype=torch.int64))
        self._next = self._tokens(batch, 1)

    def decode(self) -> float:
        """Seconds of one step of the batch."""
        return self._run(self._next)

    def _fresh(self) -> list[LayerCache]:
        return [self.model.backend.cache(layer.heads) for layer in self.model.layers]

    def _tokens(self, batch: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch * 100003 + tokens)
        return torch.randint(0, self.model.shape.vocab, (batch, tokens), generator=generator)

    @torch.inference_mode()
    def _run(self, tokens: Tensor) -> float:
        model = self.model
        started = time.perf_counter()
        decoder.forward(self._timed, model.shape, model.ends, model.layers, tokens, self._caches, last=True)
        return time.perf_counter() - started

    def _watched(self, ops: Backend) -> Backend:
        def watch(label: Callable[..., str], run: Callable[..., Any], work: Callable[..., tuple[int, int]]) -> Any:
            def timed(*arguments: Any) -> Any:
                started = time.perf_counter()
                result = run(*arguments)
                taken = time.perf_counter() - started
                entry = self.operators.setdefault(label(*arguments), Operator())
                amount, operations = work(*arguments)
                entry.seconds += taken
                entry.calls += 1
                entry.bytes += amount
                entry.operations += operations
                return result

            return timed

        def nothing(*_: Any) -> tuple[int, int]:
            return 0, 0

        def products(x: Activations, weights: Sequence[Any], *_: Any) -> tuple[int, int]:
            rows = (x if isinstance(x, Tensor) else x.q).shape[:-1].numel()
            held = [self._held[id(weight)] for weight in weights]
            return sum(each.bytes for each in held), sum(2 * rows * each.values for each in held)

        def read(q: Tensor, cache: LayerCache, *_: Any) -> tuple[int, int]:
            return cache.nbytes(), 4 * q.numel() * cache.length

        def named(name: str) -> Callable[..., str]:
            return lambda *_: name

        return replace(
            ops,
            norm_quantize=watch(named("norm, quantize"), ops.norm_quantize, nothing),
            linears=watch(lambda x, weights, *_: self._held[id(weights[0])].label, ops.linears, products),
            rope_project_append=watch(named("RoPE, project, append"), ops.rope_project_append, nothing),
            attend=watch(named("attention"), ops.attend, read),
            gather_quantize=watch(named("gather, quantize"), ops.gather_quantize, nothing),
            act_hadamard_quantize=watch(named("SiLU, Hadamard, quantize"), ops.act_hadamard_quantize, nothing),
        )


def _label(role: Role) -> str:
    if role in (Role.Q, Role.K, Role.V):
        return "q, k, v"
    return "gate, up" if role in (Role.GATE, Role.UP) else str(role)


def measure(
    contenders: Sequence[Contender], points: Iterable[Point], *, rounds: int = 5, progress: Progress = silent
) -> list[Result]:
    """Every contender at every point, interleaved: in each round all run once, in turn. One unmeasured round first.

    A decode round is the median of some steps.
    """
    points = list(points)
    results, done, total = [], 0, len(points) * (rounds + 1) * len(contenders)
    for point in points:
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for number in range(rounds + 1):
            for contender in contenders:
                if number == 1 and isinstance(contender, Ours):
                    contender.operators.clear()
                taken = _once(contender, point)
                if number:
                    seconds[contender.name].append(taken)
                done += 1
                progress(str(point), done, total)
        for contender in contenders:
            operators = {}
            if isinstance(contender, Ours):
                runs = rounds * (1 if point.mode == "prefill" else STEPS)
                operators = {name: _per_run(entry, runs) for name, entry in contender.operators.items()}
            results.append(Result(contender.name, point, tuple(seconds[contender.name]), operators))
    return results


def _once(contender: Contender, point: Point) -> float:
    # The threads of the one before may still be waiting for work with their eyes open.
    time.sleep(SETTLE_SECONDS)
    if point.mode == "prefill":
        return contender.prefill(point.tokens)
    before = (
        {name: replace(entry) for name, entry in contender.operators.items()} if isinstance(contender, Ours) else {}
    )
    contender.start_decode(point.batch, point.context)
    for _ in range(WARM_STEPS):
        contender.decode()
    if isinstance(contender, Ours):  # what filled the cache is not decoding
        contender.operators.clear()
        contender.operators.update(before)
    return statistics.median(contender.decode() for _ in range(STEPS))


def _per_run(entry: Operator, runs: int) -> Operator:
    return Operator(entry.seconds / runs, entry.calls // runs, entry.bytes // runs, entry.operations // runs)


def anonymous_bytes() -> int:
    """Anonymous memory of this process (RssAnon): mapped files do not count. 0 where the system does not tell."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def as_row(result: Result, limits: Limits, against: Sequence[Result]) -> dict[str, Any]:
    """A result as a row; ratios: how many times faster than each peer, the median of the rounds' ratios."""
    ratios = {
        other.name: statistics.median(b / a for a, b in zip(result.seconds, other.seconds, strict=True))
        for other in against
    }
    return {
        "name": result.name,
        **asdict(result.point),
        "tokens_per_second": result.rate,
        "seconds": list(result.seconds),
        "ratios": ratios,
        "limits": asdict(limits),
        "operators": {name: asdict(entry) for name, entry in result.operators.items()},
    }
