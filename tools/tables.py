"""Write the tables of README.md from results/*.jsonl, between `<!-- table: name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from resq.measure.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent


def accuracy() -> str:
    """Per model: 16 bit, then every recipe at 4 and 3 bits; of repeated cases the newest row counts."""
    rows = read_rows(ROOT / "results" / "accuracy.jsonl")
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        newest[row["model"], row["recipe"], row.get("bits"), row.get("head_bits"), row.get("seed")] = row
    models = sorted({row["model"] for row in rows})
    cases = list(dict.fromkeys((r["recipe"], r.get("bits"), r.get("head_bits")) for r in newest.values()))
    lines = ["| recipe | low band | lm_head |" + "".join(f" {model} | Δ nats |" for model in models)]
    lines.append("|---|---|---|" + "---|---|" * len(models))
    for recipe, bits, head in cases:
        cells = []
        for model in models:
            found = [r for k, r in newest.items() if k[:4] == (model, recipe, bits, head)]
            cells.append(_cells(found))
        words = ("", "") if bits is None else (f"{bits} bit", f"{head} bit")
        lines.append(f"| {recipe} | {words[0]} | {words[1]} | " + " | ".join(cells) + " |")
    newest_row = rows[-1]
    lines.append("")
    lines.append(
        f"Seed 0, {newest_row['windows']} windows or as many as the text gives; bases from 512 windows of 256 tokens, "
        f"GPTQ from 128 of them. torch {newest_row['torch']}, {newest_row['machine']}."
    )
    return "\n".join(lines)


def _cells(found: list[dict[str, Any]]) -> str:
    if not found:
        return " | "
    row = found[-1]
    if "delta_16" not in row:
        return f"{row['perplexity']:.2f} | "
    delta = row["delta_16"]
    return f"{row['perplexity']:.2f} | {delta['mean']:+.4f} [{delta['low']:+.4f}, {delta['high']:+.4f}]"


TABLES = {"accuracy": accuracy}


def main() -> None:
    file = ROOT / "README.md"
    text = file.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        table = make()
        text = pattern.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
