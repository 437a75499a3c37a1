"""Write the tables of the documents from results/*.jsonl, between `<!-- table: name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

from resq.measure.rows import read_rows
from resq.measure.speed import Point
from resq.ptq.ablations import ABLATIONS
from resq.ptq.recipes import RECIPES

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


def compared() -> list[Row]:
    """Every row of the comparisons of the models, in results/compare/<model>.jsonl."""
    return [row for row in every_run() if row["run"] == row["model"]]


def every_run() -> list[Row]:
    """Every row with figures in results/compare; runs with another calibration are <model>-<what>."""
    files = sorted((ROOT / "results" / "compare").glob("*.jsonl"))
    return [row for file in files for row in read_rows(file) if row["failed"] is None]


def made_by(rows: list[Row]) -> str:
    """`made_on` of rows whose provenance stands apart."""
    return made_on([row["provenance"] for row in rows])


def headed(rows: list[Row]) -> list[Row]:
    """Rows of recipes.py, in its order, the 16-bit one left out."""
    return [row for name in RECIPES for row in rows if row["recipe"] == name and row["seed"] == 0]


def overview() -> list[str]:
    """One line per recipe: nominal bits, and perplexity over 16 bit's at 4 and 3 bits of each model."""
    rows = compared()
    models = sorted({row["model"] for row in rows})
    header = ["recipe", "bits W / A / KV", *(f"{model}, {bits} bit" for model in models for bits in (4, 3))]
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in headed(rows)):
        bits = " / ".join(f"{mean:g}" for mean in RECIPES[name].precision.mean_bits())
        found = {(row["model"], row["bits"]): row for row in rows if row["recipe"] == name}
        cells = [
            f"× {found[model, width]['ratio']:.3f}" if (model, width) in found else ""
            for model in models
            for width in (4, 3)
        ]
        lines.append([f"**{name}**" if name in ("resq", "resq+") else name, bits, *cells])
    return [*table(header, lines), "", made_by(rows)]


def accuracy() -> list[str]:
    """Per model: 16 bit, then every recipe at 4 and 3 bits."""
    rows, lines = compared(), []
    for model in sorted({row["model"] for row in rows}):
        of_model = [row for row in rows if row["model"] == model]
        base = next(row for row in of_model if row["recipe"] == "16-bit")
        lines.append([f"**{model}**", f"{base['perplexity']:.2f}", "", "", "", ""])
        for bits in (4, 3):
            for row in (row for row in headed(of_model) if row["bits"] == bits):
                cells = [f"{row['perplexity']:.2f}", interval(row["delta"]), f"{row['kl']['mean']:.4f}"]
                cells += [f"{row['agreement']['mean']:.1%}"]
                lines.append([f"{row['recipe']}, {bits} bit", *cells, against(row, "resq")])
    header = ["model, recipe, low band", "perplexity", "Δ to 16 bit", "KL", "top-1", "Δ to resq"]
    return [*table(header, lines), "", made_by(rows)]


def against(row: Row, other: str) -> str:
    """The paired difference to another recipe, where there is one."""
    return interval(row["against"][other]) if other in row["against"] else ""


def order() -> list[str]:
    """Paired differences at 3 bits between ResQ's recipes and the baselines."""
    rows, lines = compared(), []
    for model in sorted({row["model"] for row in rows}):
        for row in (row for row in headed(rows) if row["model"] == model and row["bits"] == 3):
            if row["recipe"] in ("quarot", "spinquant", "resq", "resq+", "resq-paper", "resq-246", "resq-learned"):
                cells = [against(row, other) for other in ("rtn", "quarot", "spinquant", "resq")]
                lines.append([f"{model}, {row['recipe']}", *cells])
    header = ["3 bit", "Δ to rtn", "Δ to quarot", "Δ to spinquant", "Δ to resq"]
    return [*table(header, lines), "", made_by(rows)]


def cost() -> list[str]:
    """What each recipe takes: true bits, bytes, seconds, memory, speed."""
    rows, lines = [row for row in compared() if row["bits"] == 4], []
    for row in headed(rows):
        book, speed = row["ledger"], row["speed"]
        bits = f"{book['weight_bits']:.2f} / {book['activation_bits']:.2f} / "
        bits += f"{(book['key_bits'] + book['value_bits']) / 2:.2f}"
        rate = "" if speed is None else f"{speed['tokens_per_second']:,.0f} (× {speed['ratio']:.2f})"
        cells = [bits, f"{book['bytes'] / 1e6:.1f}", f"{row['quantize_seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        lines.append([f"{row['model']}, {row['recipe']}", *cells, rate])
    header = ["4 bit", "true bits W / A / KV", "MB", "seconds", "peak GB", "prefill, tokens/s (× float32 source)"]
    return [*table(header, lines), "", made_by(rows)]


def gap() -> list[str]:
    """What part of resq's gap to 16 bit resq+ closes, in loss and in KL, summed over models and widths."""
    rows, lines = compared(), []
    totals = dict.fromkeys(("resq", "resq+"), (0.0, 0.0))
    for model in sorted({row["model"] for row in rows}):
        for bits in (4, 3):
            at = {row["recipe"]: row for row in headed(rows) if (row["model"], row["bits"]) == (model, bits)}
            cells = [interval(at[name]["delta"]) for name in totals] + [interval(at["resq+"]["against"]["resq"])]
            cells += [f"{at[name]['kl']['mean']:.4f}" for name in totals]
            lines.append([f"{model}, {bits} bit", *cells])
            for name, (loss, divergence) in totals.items():
                totals[name] = loss + at[name]["delta"]["mean"], divergence + at[name]["kl"]["mean"]
    (loss, divergence), (better, nearer) = totals["resq"], totals["resq+"]

    closed = (
        f"{better:.4f}, **{1 - better / loss:.0%} closed**",
        f"{nearer:.4f}, **{1 - nearer / divergence:.0%} less**",
    )
    lines.append(["sum", f"{loss:.4f}", closed[0], "", f"{divergence:.4f}", closed[1]])
    return [*table(["", "Δ resq", "Δ resq+", "resq+ − resq", "KL resq", "KL resq+"], lines), "", made_by(rows)]


def tuning() -> list[str]:
    """What was tried for resq+, on validation text."""
    rows = read_rows(ROOT / "results" / "resq-plus.jsonl")
    lines = []
    for row in rows:
        cells = [
            f"{row[model][what]:+.4f}" if what == "delta" else f"{row[model][what]:.4f}"
            for what in ("delta", "kl")
            for model in ("llama-5m", "qwen2-5m")
        ]
        lines.append([row["tried"], str(row["bits"]), *cells])
    header = ["tried", "bits", "Δ llama-5m", "Δ qwen2-5m", "KL llama-5m", "KL qwen2-5m"]
    return table(header, lines)


def head() -> list[str]:
    """What an 8-bit lm_head and head input add, in nats per token."""
    rows = [row for row in read_rows(ROOT / "results" / "head.jsonl") if "delta_head16" in row]
    lines = [[row["model"], row["recipe"], interval(row["delta_head16"])] for row in rows]
    return [*table(["model", "recipe", "8 bit against 16 bit, Δ nats [95 %]"], lines), "", made_on(rows)]


def ablation() -> list[str]:
    """What each choice inside resq is worth at 3 bits, and the rank sweep."""
    rows, lines = compared(), []
    for name in ("resq", *ABLATIONS):
        for row in (row for row in rows if (row["recipe"], row["bits"], row["seed"]) == (name, 3, 0)):
            cells = [
                f"{row['perplexity']:.2f}",
                interval(row["delta"]),
                f"{row['kl']['mean']:.4f}",
                against(row, "resq"),
            ]
            lines.append([f"{row['model']}, {name}", *cells])
    return [*table(["3 bit", "perplexity", "Δ to 16 bit", "KL", "Δ to resq"], lines), "", made_by(rows)]


def texts() -> list[str]:
    """The same recipe calibrated on other texts and other numbers of windows."""
    lines = []
    rows = [row for row in every_run() if (row["recipe"], row["bits"], row["seed"]) == ("resq", 3, 0)]
    for row in rows:
        cells = [", ".join(row["calibration"]), str(row["calibration_windows"]), interval(row["delta"])]
        lines.append([row["model"], *cells, f"{row['kl']['mean']:.4f}"])
    header = ["resq, 3 bit", "calibration text", "windows", "Δ to 16 bit", "KL"]
    return [*table(header, lines), "", made_by(rows)]


def seeds() -> list[str]:
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


def calibration() -> list[str]:
    """What the calibration text and the rounding of one recipe do to the loss."""
    rows = [row for row in read_rows(ROOT / "results" / "calibration.jsonl") if "bits" in row]
    lines = [
        [f"{row['recipe']}, {row['bits']} bit", row["model"], row["calibration"], interval(row["delta_16"])]
        for row in rows
    ]
    return [*table(["recipe", "model", "calibration", "Δ nats [95 %]"], lines), "", made_on(rows)]


def speed_rows() -> list[Row]:
    """The newest row of every engine at every point and head width."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in read_rows(ROOT / "results" / "speed.jsonl"):
        point = (row["subject"], row["plan"]["head_bits"], row["mode"], row["tokens"], row["batch"], row["context"])
        newest[*point, row["name"]] = row
    return list(newest.values())


def point_of(row: Row) -> str:
    """What a speed row measured, in words."""
    return str(Point(row["mode"], row["tokens"], row["batch"], row["context"]))


def speed() -> list[str]:
    """Our tokens per second at every point, and every other engine's, with how many times faster we are."""
    rows = speed_rows()
    ours = sorted((row for row in rows if row["ratios"]), key=lambda row: (row["mode"], row["tokens"], row["batch"]))
    ours.sort(key=lambda row: (row["mode"] != "prefill", -row["plan"]["head_bits"]))
    peers = list(dict.fromkeys(name for row in ours for name in row["ratios"]))
    lines = []
    for row in ours:
        line = [f"{point_of(row)}, {row['plan']['head_bits']:g}-bit head", f"**{row['tokens_per_second']:.1f}**"]
        for peer in peers:
            found = [r for r in rows if r["name"] == peer and r["plan"] == row["plan"] and point_of(r) == point_of(row)]
            rate = f"{found[-1]['tokens_per_second']:.1f} (× {row['ratios'][peer]:.2f})" if found else ""
            line.append(rate)
        lines.append(line)
    limits = ours[-1]["limits"]
    machine = (
        f"{ours[-1]['subject']}, random weights, tokens per second; in brackets how many times faster "
        f"{ours[-1]['name']} is, the median of interleaved rounds. {limits['threads']} threads, "
        f"{limits['instruction_set']}, limits "
        f"{max(row['limits']['read'] for row in ours):.1f} GB/s and "
        f"{max(row['limits']['integer'] for row in ours) / 1000:.2f} TOPS."
    )
    engines = [f"{row['name']}: {row['about']}" for row in rows if row["name"] in peers and row["about"]]
    words = [machine, *(f"{engine}." for engine in dict.fromkeys(engines)), made_on(ours)]
    return [*table(["what", ours[-1]["name"], *peers], lines), "", *words]


def operators() -> list[str]:
    """Where the time of our newest rows goes, operator by operator."""
    ours = [row for row in speed_rows() if row["ratios"] and row["plan"]["head_bits"] == 8]
    names = sorted({name for row in ours for name in row["operators"]})
    lines = []
    for name in names:
        line = [name]
        for row in ours:
            entry, limits = row["operators"].get(name), row["limits"]
            if entry is None:
                line += ["", ""]
                continue
            bound = max(entry["bytes"] / limits["read"] / 1e9, entry["operations"] / limits["integer"] / 1e9)
            share = "" if name == "attention" or not entry["operations"] else f"{bound / entry['seconds']:.0%}"
            line += [f"{entry['seconds'] * 1e3:.2f}", share]
        lines.append(line)
    header = ["operator"]
    for row in ours:
        header += [f"{point_of(row)}: ms", "of limit"]
    return [*table(header, lines), "", made_on(ours)]


def gpu_rows(kind: str) -> list[Row]:
    """What kernels became for cards that are not here, or what they hold."""
    return [row for row in read_rows(ROOT / "results" / "gpu-code.jsonl") if row["kind"] == kind]


def kernel_of(row: Row) -> str:
    """A kernel and the tile it was compiled for."""
    sizes = row["constants"]
    tile = f", {sizes['BM']} tokens × {sizes['BN']} channels" if "BM" in sizes and "BN" in sizes else ""
    split = ", rows split" if sizes.get("SPLIT", 1) > 1 else ""
    return f"{row['kernel']}{tile}{split}, {row['warps']} warps"


def gpu_code() -> list[str]:
    """Registers a thread and bytes of spills, the most of a kernel over all shapes and calls."""
    rows = gpu_rows("gpu-code")
    cards = sorted({row["capability"] for row in rows})
    lines = []
    for name in sorted({kernel_of(row) for row in rows}):
        line = [name]
        for card in cards:
            found = [row for row in rows if kernel_of(row) == name and row["capability"] == card]
            if not found:
                line.append("")
                continue
            spilled = max(row["spill_stores"] + row["spill_loads"] for row in found)
            inside = sum(row["loop_spills"] for row in found)
            cell = f"{max(row['registers'] for row in found)}" + (f", {spilled} B" if spilled else "")
            line.append(cell + (" in the loop" if inside else ""))
        lines.append(line)
    shapes = ", ".join(dict.fromkeys(row["shape"] for row in rows))
    return [*table(["kernel", *(f"sm_{card}" for card in cards)], lines), "", f"Blocks of {shapes}.", made_on(rows)]


def gpu_memory() -> list[str]:
    """Bytes of a block's weights and of a token's keys and values beside bfloat16."""
    rows = gpu_rows("gpu-memory")
    lines = [
        [
            row["shape"],
            str(row["head_dim"]),
            f"{row['weights'] / 1e6:.1f} MB (× {row['weights'] / row['weights_16bit']:.3f})",
            f"{row['kv']} (× {row['kv'] / row['kv_16bit']:.3f})",
        ]
        for row in rows
    ]
    header = ["one block of", "head", "weights (of bfloat16's)", "bytes of a token's keys and values (of bfloat16's)"]
    return [*table(header, lines), "", made_on(rows)]


def large() -> list[str]:
    rows = read_rows(ROOT / "results" / "large.jsonl")
    lines = []
    for row in rows:
        whole, per_layer = row["phases"][-1], sorted(layer["seconds"] for layer in row["layers"])
        planned = f"{whole['planned_peak'] / 1e9:.2f} GB (× {whole['peak'] / whole['planned_peak']:.2f})"
        took = f"{whole['seconds'] / 60:.1f} min"
        time = "" if whole["planned_seconds"] is None else f"{whole['planned_seconds'] / 60:.1f} min"
        layer = f"{per_layer[len(per_layer) // 2]:.0f} s"
        lines.append([row["checkpoint"], f"{whole['peak'] / 1e9:.2f} GB", planned, took, time, layer])
    header = ["checkpoint", "peak", "planned", "time", "planned", "a layer's rounding"]
    return [*table(header, lines), "", made_on(rows)]


def quantizing() -> list[str]:
    read = read_rows(ROOT / "results" / "quantizing.jsonl")
    newest = {(row["name"], row["plan"]["shape"]): row for row in read}
    lines = []
    for (name, shape), row in newest.items():
        seconds, against = (sorted(row[key])[len(row[key]) // 2] for key in ("seconds", "against"))
        times = f"× {row['ratio']:.2f}"
        if "ceiling" in row["about"]:
            times += f" of × {median(row['about']['ceiling']):.2f} at most"
        lines.append([name, shape, f"{seconds:.1f} s", f"{against:.1f} s", times])
    rows = list(newest.values())
    return [*table(["what", "sizes of", "took", "beside", "times as long"], lines), "", made_on(rows)]


TABLES = {
    "gpu_code": gpu_code,
    "gpu_memory": gpu_memory,
    "overview": overview,
    "accuracy": accuracy,
    "order": order,
    "cost": cost,
    "gap": gap,
    "tuning": tuning,
    "head": head,
    "ablation": ablation,
    "texts": texts,
    "seeds": seeds,
    "calibration": calibration,
    "speed": speed,
    "operators": operators,
    "large": large,
    "quantizing": quantizing,
}


def main() -> None:
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table: (\w+) -->", text):
            made = "\n".join(TABLES[name]())
            pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            text = pattern.sub(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
