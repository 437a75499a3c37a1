"""Every method side by side, on a model of yours and on ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from resq import show
from resq.cli.app import (
    RECIPE_NAMES,
    BackendOption,
    HeadBitsOption,
    JsonOption,
    RoundingWindowsOption,
    WikitextOption,
    WindowsOption,
    app,
    numbers,
    words,
)
from resq.embedded import MODEL, TEXT
from resq.errors import InputError
from resq.show import bars, err


@app.command()
def compare(
    out_dir: Annotated[Path, typer.Option("--out", help="Directory of the comparison; a later call goes on in it.")],
    source: Annotated[str, typer.Argument(help="Hugging Face checkpoint: a directory, a hub id, or `tiny`.")] = MODEL,
    recipes: Annotated[
        str,
        typer.Option(
            help=f"`all`, or methods and recipe files separated by commas: {', '.join(RECIPE_NAMES)}.",
            autocompletion=lambda: ["all", *RECIPE_NAMES],
        ),
    ] = "all",
    bits: Annotated[
        str, typer.Option(help="Widths of the low band, such as 4,3.", show_default="each recipe's own")
    ] = "",
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seeds of rotations and windows, such as 0,1,2.")
    ] = "0",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="As in quantize. May be repeated.", show_default="none, for tiny stdlib"),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Evaluation text: UTF-8, .jsonl or `stdlib`.", show_default="none, for tiny stdlib"),
    ] = None,
    windows: WindowsOption = 128,
    rounding_windows: RoundingWindowsOption = None,
    window_length: Annotated[
        int | None,
        typer.Option(help="Tokens per window of calibration and evaluation.", show_default="2048 or the context"),
    ] = None,
    evaluation_windows: Annotated[
        int | None, typer.Option(help="Windows to evaluate, evenly spread over the text.", show_default="all")
    ] = None,
    wikitext: WikitextOption = False,
    head_bits: HeadBitsOption = None,
    speed_rounds: Annotated[
        int, typer.Option(min=0, help="Rounds of prefill. With 0 no checkpoint is kept to be timed.")
    ] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Cases at once, which share the threads.")] = 1,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the packed models in DIR/cases/*/checkpoint.")
    ] = False,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Recipes side by side on a model of yours: perplexity, KL divergence, true bits, bytes, time, memory, speed.

    What is finished is kept: after Ctrl-C, or with more recipes, the same command goes on.

    For example: `resq compare path/to/llama --recipes all --bits 4,3 --calibration wiki.train.raw --text wiki.test.raw
    --wikitext --out comparison`
    """
    from resq.compare import ROW, Plan
    from resq.compare import compare as run
    from resq.ptq.recipes import RECIPES

    if text is None:
        if source != MODEL:
            raise InputError("no evaluation text was given; name one with --text, or stdlib for a first try")
        text = Path(TEXT)
    names = words(recipes)
    plan = Plan(
        source=source,
        text=str(text),
        recipes=tuple(dict.fromkeys(each for name in names for each in (RECIPES if name == "all" else (name,)))),
        bits=tuple(numbers("--bits", bits)) or (None,),
        seeds=tuple(numbers("--seeds", seeds)),
        calibration=tuple(map(str, calibration or [])),
        windows=windows,
        rounding_windows=rounding_windows,
        window_length=window_length,
        evaluation_windows=evaluation_windows,
        head_bits=head_bits,
        wikitext=wikitext,
        backend=backend,
        speed_rounds=speed_rounds,
        at_once=jobs,
        keep_checkpoints=keep_checkpoints,
    )
    with bars() as progress:
        found = run(plan, out_dir, progress=progress, tell=lambda line: err.print(line, soft_wrap=True))
    if json_output:
        print(
            json.dumps({"directory": str(out_dir), "rows": [ROW.dump_python(row, mode="json") for row in found.rows]})
        )
    else:
        show.compared(found.rows)
    if len(found.failed) == len(found.rows) - 1:
        raise InputError(f"no case could be made: {found.failed[0].failed}")
    if not json_output:
        show.out.print(f"\nEverything is in {out_dir}. Next: resq report {out_dir}", soft_wrap=True)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="What resq compare wrote.")],
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="The page; Markdown goes beside it.", show_default="DIRECTORY/report.html"),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    json_output: JsonOption = False,
) -> None:
    """A comparison as one page with figures: what is lost, where, and why.

    Diagnostics are computed once and kept in the directory.

    For example: `resq compare tiny --out compared --keep-checkpoints`, then `resq report compared --open`
    """
    import webbrowser

    from resq.report.report import report as run

    with bars() as progress:
        written = run(directory, out_file, progress=progress)
    if json_output:
        print(json.dumps({"html": str(written.html), "markdown": str(written.markdown), "verdict": written.verdict}))
    else:
        show.out.print(written.verdict)
        show.out.print(f"\nWritten: {written.html} and {written.markdown}", soft_wrap=True)
    if open_page and not webbrowser.open(written.html.resolve().as_uri()):
        err.print(f"no browser was found; open {written.html} by hand", soft_wrap=True)


@app.command()
def demo(
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="New directory that keeps the packed checkpoints.", show_default="none kept"),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Every recipe on the tiny model that comes with the package: quantize, evaluate, compare, generate.

    Takes about three minutes on two cores. Model and text are on this machine already.
    """
    from resq import demo as run
    from resq.compare import ROW

    with run.workplace(out_dir) as work:
        if not json_output:
            show.out.print(run.INTRODUCTION)
        with bars() as progress:
            found = run.run(work, progress=progress)
        if json_output:
            print(json.dumps({"rows": [ROW.dump_python(row, mode="json") for row in found.rows]}))
        else:
            show.compared(found.rows)
            show.out.print("\n" + run.conclusion(found))
            show.out.print("\nThe packed 4-bit ResQ model continues a method's first line:\n")
            show.stream(run.PROMPT, run.continuation(found.checkpoint(run.SHOWN)))
    if out_dir is not None and not json_output:
        directory = out_dir / "cases" / run.SHOWN / "checkpoint"
        show.out.print(f"\nKept in {out_dir}. Try:", soft_wrap=True)
        for line in (f"inspect {directory}", f'generate {directory} "import "'):
            show.out.print(f"  {sys.argv[0]} {line}", soft_wrap=True)
