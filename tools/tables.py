"""Write the tables of the documents from results/*.jsonl, between `<!-- table: name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from resq.measure.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; the first column reads left, the others right."""
    header = list(header)
    rule = ["---", *("--:" for _ in header[1:])]
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *lines)]


def case(row: Row) -> tuple[Any, ...]:
    """What a row measured, seed left out."""
    return row["recipe"], row.get("bits"), row.get("head_bits")


def interval(delta: Row) -> str:
    return f"{delta['mean']:+.4f} [{delta['low']:+.4f}, {delta['high']:+.4f}]"


def made_on(rows: list[Row]) -> str:
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"Commit {commits}, torch {rows[-1]['torch']}, {rows[-1]['machine']}."


def accuracy() -> list[str]:
    """Per model: 16 bit, then every recipe at 4 and 3 bits."""
    rows = [row for row in read_rows(ROOT / "results" / "accuracy.jsonl") if row.get("head_bits") != 8]
    models = sorted({row["model"] for row in rows})
    header = ["recipe, low band"]
    for model in models:
        header += [f"{model}: perplexity", "× 16 bit", "Δ nats [95 %]", "Δ to rtn"]
    lines = []
    for found in dict.fromkeys(case(row) for row in rows):
        line = [found[0] if found[1] is None else f"{found[0]}, {found[1]} bit"]
        for model in models:
            row = next(r for r in reversed(rows) if r["model"] == model and case(r) == found)
            rtn = row.get("delta_rtn")
            line += [f"{row['perplexity']:.2f}", f"{row['ratio']:.4f}" if "delta_16" in row else ""]
            line += [interval(row["delta_16"]) if "delta_16" in row else "", interval(rtn) if rtn else ""]
        lines.append(line)
    return [*table(header, lines), "", made_on(rows)]


def head() -> list[str]:
    """What an 8-bit lm_head and head input add, in nats per token."""
    rows = [row for row in read_rows(ROOT / "results" / "accuracy.jsonl") if "delta_head16" in row]
    lines = [[row["model"], row["recipe"], interval(row["delta_head16"])] for row in rows]
    return [*table(["model", "recipe", "8 bit against 16 bit, Δ nats [95 %]"], lines), "", made_on(rows)]


def ablation() -> list[str]:
    """Δ nats to 16 bit of each choice, every seed and their mean."""
    rows = [row for row in read_rows(ROOT / "results" / "ablation.jsonl") if "delta_16" in row]
    models = sorted({row["model"] for row in rows})
    header = ["recipe, 4 bit"]
    for model in models:
        header += [f"{model}: Δ nats by seed", "mean"]
    lines = []
    for found in dict.fromkeys(case(row) for row in rows):
        line = [found[0]]
        for model in models:
            deltas = [r["delta_16"]["mean"] for r in rows if r["model"] == model and case(r) == found]
            line += [", ".join(f"{d:.4f}" for d in deltas), f"{mean(deltas):.4f}" if deltas else ""]
        lines.append(line)
    return [*table(header, lines), "", made_on(rows)]


TABLES = {"accuracy": accuracy, "head": head, "ablation": ablation}


def main() -> None:
    for file in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table: (\w+) -->", text):
            made = "\n".join(TABLES[name]())
            pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            text = pattern.sub(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
