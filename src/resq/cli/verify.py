"""Is a packed checkpoint whole, and does this machine compute what was recorded?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from resq.cli.app import BackendOption, CheckpointArgument, JsonOption, app
from resq.show import bars, out

if TYPE_CHECKING:
    from resq.measure.verify import Report

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
