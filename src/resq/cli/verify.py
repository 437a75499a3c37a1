"""Is a packed checkpoint whole, does this machine compute with it what was recorded, and is it made again the same?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resq.cli.app import ActivationsOption, BackendOption, CheckpointArgument, JsonOption, app
from resq.show import bars, differing, out

if TYPE_CHECKING:
    from resq.measure.verify import Report
    from resq.reproduce import Report as Reproduced

MISMATCH = 3


@app.command()
def verify(directory: CheckpointArgument, backend: BackendOption = None, json_output: JsonOption = False) -> None:
    """Check every file of a packed checkpoint, and replay recorded integers on this machine's kernels.

    Sizes, hashes and tensor shapes are compared with those written; then each linear with integer weights and inputs
    gets its golden vectors, and the sums must be equal bit for bit. Exit code 3: something is not as recorded.

    For example: `resq verify llama-resq`
    """
    from resq.measure.verify import verify as run

    with bars() as progress:
        report = run(directory, backend=backend, progress=progress)
    if json_output:
        print(json.dumps({"good": not report.problems, "problems": report.problems, **asdict(report)}))
    else:
        _say(report)
    if report.problems:
        raise SystemExit(MISMATCH)


def _say(report: Report) -> None:
    whole = sum(problem is None for problem in report.files.values())
    exact, plain = len(report.linears.exact), len(report.linears.plain)
    tried = exact + len(report.linears.problems)
    lines = [f"files: {whole} of {len(report.files)} as written"]
    if tried:
        lines.append(
            f"integers: {exact} of {tried} linears as recorded, on backend {report.backend} ({report.kernels})"
        )
    if plain:
        lines.append(f"nothing to replay in {plain} linears: their weights or inputs are no integers")
    lines += [f"not checked: {what}" for what in report.unchecked]
    lines += [f"wrong: {problem}" for problem in report.problems]
    lines.append("not as recorded" if report.problems else "good")
    for line in lines:
        out.print(line, soft_wrap=True)


@app.command()
def reproduce(
    directory: CheckpointArgument,
    source: Annotated[
        str | None,
        typer.Option(help="The original: a directory or a hub id.", show_default="where it was"),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="The calibration text. Repeated for several, in the order they were given.",
            show_default="where it was",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="The statistics file, for a checkpoint made with one.", show_default="collected from the text"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="What computes: cpu, or cuda for an NVIDIA card.", show_default="the recorded one"),
    ] = None,
    activations: ActivationsOption = "device",
    work: Annotated[
        Path | None,
        typer.Option(
            help="A directory with room for the rerun, which is as large as the checkpoint and removed after.",
            show_default="beside the checkpoint",
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Quantize again from what a packed checkpoint records, and compare every tensor.

    Source and texts must have the recorded hashes; recipe, seeds, windows and number of threads are those recorded.
    Exit code 3: something is not identical.

    For example: `resq reproduce llama-resq`
    """
    from resq.reproduce import reproduce as run

    with bars() as progress:
        report = run(
            directory,
            source=source,
            calibration=calibration or (),
            statistics=statistics,
            device=device,
            activations=activations,
            work=work,
            progress=progress,
        )
    identical = report.differences.identical
    if json_output:
        print(json.dumps({"identical": identical, **asdict(report)}))
    else:
        _say_reproduced(report)
    if not identical:
        raise SystemExit(MISMATCH)


def _say_reproduced(report: Reproduced) -> None:
    found = report.differences
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    lines = [f"made again from {report.source} in {report.seconds:.0f} s with {threads}"]
    lines += [f"not as it was: {what}" for what in report.environment]
    same = sum(found.files.values())
    lines.append(f"files: {same} of {len(found.files)} identical")
    compared = {difference.file for difference in found.tensors}
    for name, identical in found.files.items():
        if not identical and name not in compared:
            other = " in its bytes, every tensor is the same" if name.endswith(".safetensors") else ""
            lines.append(f"differs: {name}{other}")
    for line in lines:
        out.print(line, soft_wrap=True)
    if found.tensors:
        differing(found)
    for name, (before, now) in found.fields.items():
        out.print(f"manifest: {name} is {json.dumps(before)}, made again {json.dumps(now)}", soft_wrap=True)
    out.print("identical" if found.identical else "not identical")
