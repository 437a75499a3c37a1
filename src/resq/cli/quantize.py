"""Making packed checkpoints, and what they can be made by."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resq import show, show_plan
from resq.cli.app import (
    RECIPE_NAMES,
    ActivationsOption,
    HeadBitsOption,
    JsonOption,
    RoundingWindowsOption,
    app,
)
from resq.cli.devices import launch
from resq.cli.plan import plan_of
from resq.embedded import MODEL
from resq.errors import InputError
from resq.processes import Peak, return_blocks
from resq.show import bars, out

if TYPE_CHECKING:
    from resq.api import Result


@app.command()
def quantize(
    out_dir: Annotated[Path, typer.Option("--out", help="New directory for the packed checkpoint.")],
    source: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face checkpoint: a directory, a hub id, or `tiny`, which comes with resq.",
            show_default="tiny where --calibration is left out too",
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=f"Method: {', '.join(RECIPE_NAMES)}, or a .toml or .json file. `resq recipes` says what they do.",
            autocompletion=lambda: list(RECIPE_NAMES),
        ),
    ] = "resq",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text, .jsonl with `text` or `messages`, or `stdlib`, the sources of Python's library. May be "
            "repeated.",
            show_default="none, for tiny stdlib",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="A file of `resq calibrate` or `resq merge` for the bases, instead of a forward pass. Its windows are "
            "used, --seed is for the rotations alone.",
            show_default="collected here",
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Calibration windows.", show_default="128 or those of --statistics")
    ] = None,
    rounding_windows: RoundingWindowsOption = None,
    window_length: Annotated[
        int | None,
        typer.Option(help="Tokens per window.", show_default="2048 or the context, or those of --statistics"),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits of the low band: 2, 3, 4 or 6.", show_default="the recipe's, 4")
    ] = None,
    head_bits: HeadBitsOption = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied lm_head a matrix of its own.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of rotations and of the choice of windows.")
    ] = 0,
    device: Annotated[str, typer.Option(help="What computes: cpu, or cuda for an NVIDIA card.")] = "cpu",
    devices: Annotated[
        str | None,
        typer.Option(
            help="Processes that share the work on this machine: a number, or auto for one a card.", show_default="one"
        ),
    ] = None,
    activations: ActivationsOption = "device",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a job that was stopped; start it where there is none.")
    ] = False,
    log: Annotated[
        Path | None,
        typer.Option(help="Append a row to this .jsonl file: time and memory beside `resq plan`, layers, linears."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Quantize a checkpoint and write it packed.

    A job that is stopped keeps its finished layers: the same command with --resume goes on.

    For example: `resq quantize path/to/llama --calibration wiki.train.raw --out llama-resq`
    """
    from resq.api import quantize as run
    from resq.measure.plan import logged
    from resq.measure.rows import append_row, check_appendable, provenance
    from resq.ptq.ranks import started

    launch(devices, device)
    first = not started() or os.environ["RANK"] == "0"  # of several processes one tells
    if log is not None:
        check_appendable(log)
    if source is None:
        if calibration:
            raise InputError(f"no source was given; name a checkpoint directory, a hub id or {MODEL}")
        source = MODEL
    return_blocks()
    asked: dict[str, Any] = {
        "recipe": recipe,
        "calibration": calibration,
        "statistics": statistics,
        "windows": windows,
        "rounding_windows": rounding_windows,
        "window_length": window_length,
        "bits": bits,
        "head_bits": head_bits,
        "untie": untie,
        "device": device,
        "activations": activations,
    }
    plan = plan_of(source, **asked) if log is not None and first else None
    with bars() as progress, Peak() as peak:
        result = run(
            source,
            out_dir,
            **{**asked, "calibration": calibration or []},
            seed=seed,
            resume=resume,
            progress=peak.watched(progress),
        )
    if not first:
        return
    beside = None if plan is None else logged(plan, peak)
    if log is not None and plan is not None and beside is not None:
        row = {"kind": "quantized", "checkpoint": result.directory.name, **_costs(result), **provenance()}
        append_row(log, {**row, "plan": plan.record(), "phases": [asdict(each) for each in beside]})
    if json_output:
        print(json.dumps({"checkpoint": str(result.directory), "seconds": result.seconds, **_costs(result)}))
        return
    show.quantized(result)
    if beside is not None:
        out.print(show_plan.beside(beside), soft_wrap=True)


def _costs(result: Result) -> dict[str, Any]:
    linears = [{**asdict(report), "snr": report.snr if report.error else None} for report in result.linears]
    return {"linears": linears, "layers": [asdict(report) for report in result.layers]}


@app.command()
def recipes(
    ablations: Annotated[
        bool, typer.Option("--ablations", help="The recipes with single choices undone or added, too.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """The methods that --recipe takes beside .toml and .json files, and what each rounds to how many bits."""
    from resq.ptq.ablations import ABLATIONS
    from resq.ptq.recipes import RECIPES

    found = {"recipes": RECIPES, **({"ablations": ABLATIONS} if ablations else {})}
    if json_output:
        told = {
            kind: [{**recipe.describe(), "about": recipe.about} for recipe in each.values()]
            for kind, each in found.items()
        }
        print(json.dumps(told))
        return
    show.listed(*(list(each.values()) for each in found.values()))
