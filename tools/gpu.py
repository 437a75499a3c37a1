"""`make gpu`: checks, measures and tunes on a machine with a card, in one call of under nine minutes.

For a fresh machine with Python 3.12, a CUDA build of torch, Triton and transformers, and no network. The package runs
from the source tree. Wheels of what is missing there (pydantic, pydantic-core, annotated-types, typing-inspection and a
recent typer on the machines we know, in the versions of constraints.txt) are installed from .whl/ where that folder
exists. Nothing here needs the CPU's kernels: they are not built.

Each step runs in a process of its own with a time limit; what fails or does not fit is told and the next goes on. Rows
and logs go to the folder that $OUT names, build/gpu without. Steps are in the order of their worth; others, in any
order: RESQ_GPU_STEPS=tests,sweep. RESQ_GPU_SECONDS: for all of them, 520. RESQ_TRAIN=llama or qwen2 trains a reference
model on the .jsonl files in the folder $RESQ_TEXT; it is written in parts of 15 MiB to be joined: cat llama.tar.*.
RESQ_COMMIT: what rows name where there is no git. RESQ_GPU_DRY=1 goes through everything, tiny, without a card.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()
DRY = os.environ.get("RESQ_GPU_DRY") == "1"
SECONDS = float(os.environ.get("RESQ_GPU_SECONDS", "520"))
ROWS = OUT / "gpu-speed.jsonl"
SHAPE = "dry" if DRY else "llama-3.1-8b"
# Processes that compile at once; each holds some 0.5 GB of the card's memory and 2 GB of the machine's.
COMPILERS = 2 if DRY else 12
NEEDED = ("torch", "triton", "transformers", "safetensors", "pydantic", "typer", "rich", "jinja2", "numpy", "pytest")
# Of a file that travels back.
PART_BYTES = 15 << 20
# Leaves time for the next step when a process must be killed.
GRACE = 5.0


@dataclass(frozen=True)
class Step:
    """A command, its limit in seconds, and what it needs of the environment beside this process's. checks: whether its
    failure is one of what was delivered."""

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str]
    checks: bool = True


def python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, *arguments


def inner(name: str, *arguments: str) -> tuple[str, ...]:
    """A step that is a function of this file."""
    return python(str(Path(__file__).resolve()), "--step", name, *arguments)


def steps() -> list[Step]:
    """Everything, the most worthy first."""
    none: Mapping[str, str] = {}
    # Plugins that happen to be installed are not asked; a warning of another torch is no failure.
    pytest = python("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--durations", "12")
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    spread = ("-p", "xdist.plugin", "-n", str(COMPILERS), "--dist", "worksteal")
    tests = ["tests/gpu", "tests/backends/triton", "tests/conformance/test_triton.py"]
    # What is compiled for other cards was compiled where there was none.
    tests += ["--ignore-glob", "*test_compile_*", *(["--collect-only"] if DRY else [])]
    block = inner("block")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor's end is an allocation's
    checked = {
        tool: block if DRY else (sanitizer, "--tool", tool, "--error-exitcode", "9", *block)
        for tool in ("memcheck", "racecheck")
    }
    found = [
        Step("facts", inner("facts"), 40, none),
        Step("tests", (*pytest, *spread, *tests), 200, alone),
        Step("bench", inner("bench", SHAPE), 120, none),
        Step("sweep", inner("sweep", SHAPE), 120, none, checks=False),
        Step("memcheck", checked["memcheck"], 75, memory),
        Step("racecheck", checked["racecheck"], 75, none),
        Step("prefill-graphs", inner("bench", SHAPE, "--capture-prefill"), 45, none),
        Step("compiled", inner("bench", SHAPE, "--compiled"), 90, none, checks=False),
    ]
    found += [
        Step(f"bench-{name}", inner("bench", name, "--short"), 60, none)
        for name in (() if DRY else ("llama-3.2-1b", "qwen2.5-7b", "llama-3.2-3b", "llama-3.1-70b"))
    ]
    if family := os.environ.get("RESQ_TRAIN"):
        # Asked for, so before what is always measured but after what says whether the kernels are right.
        found.insert(2, Step("train", inner("train", family), 300, none))
    wanted = os.environ.get("RESQ_GPU_STEPS")
    if wanted is None:
        return found
    known = {step.name: step for step in found}
    if unknown := [name for name in wanted.split(",") if name not in known]:
        raise SystemExit(f"RESQ_GPU_STEPS names {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in wanted.split(",")]


def environment() -> dict[str, str]:
    """Of every step: the package from the source tree, wheels that were brought along, nothing from a network."""
    site = OUT / "site"
    if (ROOT / ".whl").is_dir() and not site.is_dir():
        wheels = [str(wheel) for wheel in sorted((ROOT / ".whl").glob("*.whl"))]
        pip = python("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
        subprocess.run([*pip, "--target", str(site), *wheels], check=True)
    paths = [str(ROOT / "src"), str(site), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "OUT": str(OUT)}
    # Kernels that one step compiled are there for the next.
    found.setdefault("TRITON_CACHE_DIR", str(OUT / "triton"))
    return found | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if DRY else {})


def run(step: Step, around: Mapping[str, str], left: float) -> tuple[str, float]:
    """How a step ended, and its seconds. Its output goes to the log, the end of a failure's to the terminal too."""
    limit = min(step.seconds, left - GRACE)
    if limit < 10:
        return "no time left", 0.0
    started = time.monotonic()
    with open(OUT / "log.txt", "a+", encoding="utf-8", errors="replace") as log:
        log.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
        log.flush()
        begin = log.tell()
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**around, **step.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot be started: {error.strerror}", 0.0
        try:
            code = process.wait(timeout=limit)
            ended = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
            ended = f"stopped after {limit:.0f} s"
        log.seek(begin)
        lines = log.read().splitlines()
        log.seek(0, os.SEEK_END)
    print("\n".join(lines[-25:] if ended != "done" else lines[-6:]), flush=True)
    return ended, time.monotonic() - started


def main() -> int:
    """Run every step. Returns 1 when one that checks something did not end well."""
    begun = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    for old in ("log.txt", "summary.json"):
        (OUT / old).unlink(missing_ok=True)
    around, told = environment(), []
    for step in steps():
        print(f"\n===== {step.name}", flush=True)
        ended, seconds = run(step, around, SECONDS - (time.monotonic() - begun))
        told.append({"step": step.name, "ended": ended, "seconds": round(seconds, 1), "checks": step.checks})
        (OUT / "summary.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'step':<18}{'seconds':>8}  ended")
    for entry in told:
        print(f"{entry['step']:<18}{entry['seconds']:>8}  {entry['ended']}")
    print(f"rows and logs: {OUT}, {time.monotonic() - begun:.0f} s in all")
    # What travels back is few files: the caches stay.
    shutil.rmtree(OUT / "site", ignore_errors=True)
    shutil.rmtree(OUT / "triton", ignore_errors=True)
    return int(any(entry["checks"] and entry["ended"] != "done" for entry in told))


def config_of(name: str) -> dict[str, Any]:
    """Sizes by name; `dry` is small enough for Triton's interpreter, a block of it takes seconds there."""
    from resq.measure.shapes import SHAPES, shape_named

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    SHAPES.setdefault("dry", SHAPES["tiny"] | sizes)
    return shape_named(name)


def facts() -> None:
    """What this machine is; fails when something that is needed is missing."""
    print(f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} processors")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    for name in NEEDED:
        if name not in missing:
            print(name, getattr(importlib.import_module(name), "__version__", "?"))
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)}; bring wheels in .whl/")
    from resq.backends.choose import describe_system

    print(json.dumps(describe_system()))
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=True)


def bench(shape: str, *flags: str) -> None:
    """Time a block, append rows, print the tables."""
    from functools import partial

    import torch

    from resq import show
    from resq.backends.triton import TRITON
    from resq.measure.gpu.bench import BlockPlan, bench_block, save_block
    from resq.measure.gpu.ceilings import Sizes, measure_ceilings
    from resq.measure.gpu.timer import timer_on

    config_of(shape)
    show.out.width = 120
    given: dict[str, Any] = {}
    if DRY:
        given = {"prefill": (9,), "batches": (2,), "contexts": (9,), "rounds": 1}
    elif "--short" in flags:
        given = {"prefill": (512, 2048), "batches": (1, 64), "contexts": (1024,), "rounds": 5}
    if "--compiled" in flags:
        given["against"] = ("torch-bf16-compiled", "torch-int8-compiled")
        given |= {} if DRY else {"batches": (1, 64), "contexts": (1024,), "rounds": 5}
        if DRY:
            given["against"] = ("torch-bf16",)  # compiling for the CPU takes a minute and shows nothing
    if "--capture-prefill" in flags:
        given |= {"capture_prefill": True, "batches": (1,), "contexts": (1024 if not DRY else 9,)}
    plan = BlockPlan(shape, **given)
    small = partial(measure_ceilings, sizes=Sizes(64, 1 << 16, (2, 32, 16)))
    how: dict[str, Any] = {"backend": TRITON, "timer": timer_on(torch.device("cpu")), "ceilings": small} if DRY else {}
    report = bench_block(plan, **how)
    save_block(report, plan, ROWS)
    show.block_timed(report)
    if DRY:
        return
    best = report.ceilings
    for result in report.results:
        # Short products run at a higher clock than long ones, reading alone is faster than a copy: by less than this.
        if result.tops * 1e12 > 1.25 * max(best.int8, best.bf16) or result.terabytes * 1e12 > 1.25 * best.copy:
            raise SystemExit(f"{result.name} at {result.point} is beyond the ceilings: a mistake in measuring")


def sweep(shape: str, part: str | None = None) -> None:
    """Time the candidates for the linears' tiles; write every time and the proposals. part: compile that one only."""
    import torch

    from resq.backends.triton import TRITON
    from resq.backends.triton.device import card, target
    from resq.measure.gpu.sweep import CANDIDATES, compile_part, proposals
    from resq.measure.gpu.sweep import sweep as timed
    from resq.measure.gpu.timer import timer_on
    from resq.measure.rows import provenance, write_json
    from resq.measure.synthetic import one_layer
    from resq.ptq.recipes import recipe_named

    torch.set_num_threads(1)
    sizes, layer = one_layer(config_of(shape), recipe_named("resq"))
    wanted = {1: ({}, {"channels": 32})} if DRY else CANDIDATES
    if part is not None:
        compile_part(layer, sizes, int(part), COMPILERS, wanted)
        return
    compilers = [subprocess.Popen(inner("sweep", shape, str(number))) for number in range(COMPILERS)]
    for compiler in compilers:
        compiler.wait()
    found = timed(layer, sizes, timer_on(TRITON.device), wanted=wanted)
    for each in sorted(found, key=lambda each: (each.rows, each.bands, each.seconds or 1e9)):
        what = f"{each.seconds * 1e6:9.1f} µs" if each.seconds is not None else f"{each.failed}"
        print(f"{each.rows:>6} rows, {each.bands} bands  {what}  {json.dumps(each.use)}")
    times = [vars(each) for each in found]
    head = {"shape": shape, "card": card(), "capability": target().capability, **provenance()}
    write_json(OUT / "configs.json", {**head, "packed_linear": proposals(found), "times": times})


def block() -> None:
    """A small block on the card beside the reference: a prefill, then steps of a batch. What the sanitizer watches."""
    import torch

    from resq.backends.reference import REFERENCE
    from resq.backends.triton import TRITON
    from resq.measure.synthetic import one_layer
    from resq.models.decoder import Positions, forward_layer
    from resq.ptq.recipes import recipe_named

    shape, layer = one_layer(config_of("dry" if DRY else "tiny"), recipe_named("resq"))
    outs = []
    for ops in (TRITON, REFERENCE):
        packed, cache, parts = layer.prepacked(ops), ops.cache(layer.heads), []
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            for past, tokens in ((0, 20), (20, 1), (21, 1)):
                hidden = torch.randn(2, tokens, shape.hidden, generator=generator).to(ops.device)
                at = Positions.following(shape, past, 2, tokens, device=ops.device)
                parts.append(forward_layer(ops, shape, packed, hidden, at, cache).cpu())
        outs.append(torch.cat(parts, dim=1))
    error = float((outs[0] - outs[1]).norm() / outs[1].norm())
    print(f"relative difference to the reference: {error:.2e}")
    # Activations on a border become their neighbours now and then.
    if not error < 1e-3:
        raise SystemExit(1)


def train(family: str) -> None:
    """Train a reference model on every text in $RESQ_TEXT."""
    texts = sorted(Path(os.environ["RESQ_TEXT"]).rglob("*.jsonl"))
    script = str(ROOT / "examples" / "train_reference.py")
    more = ("--device", "cpu", "--tokens", "1") if DRY else ("--device", "cuda")
    (OUT / "models").mkdir(exist_ok=True)
    model = OUT / "models" / family
    subprocess.run(python(script, str(model), *map(str, texts), "--family", family, *more), check=True)
    whole = Path(shutil.make_archive(str(model), "tar", model))
    with open(whole, "rb") as stream:
        for number, part in enumerate(iter(lambda: stream.read(PART_BYTES), b"")):
            (OUT / f"{whole.name}.{number}").write_bytes(part)
    shutil.rmtree(model.parent)


STEPS: dict[str, Callable[..., None]] = {each.__name__: each for each in (facts, bench, sweep, block, train)}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        STEPS[sys.argv[2]](*sys.argv[3:])
    else:
        sys.exit(main())
