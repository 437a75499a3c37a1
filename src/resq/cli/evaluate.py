"""How good a packed checkpoint is."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from resq import show
from resq.cli.app import (
    BackendOption,
    CheckpointArgument,
    JsonOption,
    WikitextOption,
    app,
)
from resq.show import bars

NOT_GOOD_ENOUGH = 3


class Undecided(StrEnum):
    """What a criterion counts as that the text does not decide."""

    FAIL = "fail"
    PASS = "pass"


@app.command("eval")
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="16-bit sources and packed checkpoints, side by side.")],
    text: Annotated[
        Path,
        typer.Option(help="UTF-8 text, .jsonl, or `stdlib`: files of Python's library that calibration never sees."),
    ],
    window_length: Annotated[
        int | None, typer.Option(help="Tokens per non-overlapping window.", show_default="2048 or the shortest context")
    ] = None,
    wikitext: WikitextOption = False,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Perplexity of checkpoints on a text, side by side.

    Differences are to the first one named, with a paired 95 % interval. When that is a 16-bit source, so are the KL
    divergence and the share of tokens that both find most probable.

    For example: `resq eval path/to/llama llama-resq --text wiki.test.raw --wikitext`
    """
    from resq.measure.evaluate import evaluate as run

    with bars() as progress:
        rows = run(
            checkpoints, text, window_length=window_length, wikitext=wikitext, backend=backend, progress=progress
        )
    if json_output:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
        return
    show.evaluated(rows)


@app.command()
def gate(
    directory: CheckpointArgument,
    text: Annotated[Path, typer.Option(help="UTF-8 text, .jsonl, or `stdlib`.")],
    max_ppl: Annotated[
        str | None, typer.Option(help="Perplexity at most so far above 16 bit, such as +3%.", show_default="any")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="KL divergence from 16 bit at most, nats per token, such as 0.05.", show_default="any"),
    ] = None,
    min_agreement: Annotated[
        str | None,
        typer.Option(help="Share of tokens with 16 bit's most probable one at least, such as 98%.", show_default="any"),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The 16-bit original.", show_default="the source that the checkpoint names")
    ] = None,
    undecided: Annotated[
        Undecided, typer.Option(help="What counts where the interval straddles the bound: fail or pass.")
    ] = Undecided.FAIL,
    window_length: Annotated[
        int | None, typer.Option(help="Tokens per non-overlapping window.", show_default="2048 or the context")
    ] = None,
    wikitext: WikitextOption = False,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Is a packed checkpoint as close to 16 bit as asked? For scripts: exit code 0 when it is, 3 when not.

    A criterion passes when its whole one-sided 95 % interval (bootstrap over windows, paired with 16 bit) satisfies it,
    and fails when none of it does; in between the text is too short to tell.

    For example: `resq gate llama-resq --text wiki.test.raw --wikitext --max-ppl +3% --max-kl 0.05 --min-agreement 98%`
    """
    from resq.measure.gate import criteria
    from resq.measure.gate import gate as run

    wanted = criteria(max_ppl, max_kl, min_agreement)
    with bars() as progress:
        report = run(
            directory,
            text,
            wanted,
            against=against,
            window_length=window_length,
            wikitext=wikitext,
            backend=backend,
            progress=progress,
        )
    passed = report.passed(undecided=undecided is Undecided.PASS)
    if json_output:
        print(json.dumps({"passed": passed, **asdict(report)}))
    else:
        show.judged(report, passed)
    if not passed:
        sys.exit(NOT_GOOD_ENOUGH)
