"""Copy the rows of a comparison into results/, with what every case is worth against others on the same windows.

`python tools/collect.py DIR [DIR …]` writes results/compare/<name of DIR>.jsonl.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from resq.cases import ROW, scores_of
from resq.measure.perplexity import paired_interval
from resq.measure.rows import write_text

ROOT = Path(__file__).resolve().parent.parent
# Every row gets its paired difference in nats per token to these recipes at the same width and seed.
AGAINST = ("rtn", "quarot", "spinquant", "resq")


def collect(directory: Path) -> Path:
    """Write the rows of one comparison and return the file."""
    rows = [ROW.validate_json(line) for line in (directory / "rows.jsonl").read_text("utf-8").splitlines()]
    done = [row for row in rows if row.failed is None]
    losses = {row.case: scores_of(directory / "cases" / row.case).nll.double().mean(dim=1) for row in done}
    at = {(row.recipe, row.bits, row.seed): row.case for row in done}
    plan = json.loads((directory / "compare.json").read_text("utf-8"))["plan"]
    run = {"run": directory.name, "model": Path(plan["source"]).name}
    run |= {"calibration": [Path(file).name for file in plan["calibration"]], "calibration_windows": plan["windows"]}
    lines = []
    for row in rows:
        others = {other: at.get((other, row.bits, row.seed)) for other in AGAINST if other != row.recipe}
        against = {
            other: asdict(paired_interval(losses[row.case], losses[case]))
            for other, case in others.items()
            if case is not None and row.case in losses
        }
        plain = json.loads(ROW.dump_json(row))
        plain.pop("key")  # paths and hashes of this machine
        lines.append(json.dumps({**run, **plain, "against": against}))
    out = ROOT / "results" / "compare" / f"{directory.name}.jsonl"
    out.parent.mkdir(exist_ok=True)
    write_text(out, "\n".join(lines) + "\n")
    return out


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(collect(Path(argument)))
