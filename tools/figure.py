"""Draw docs/accuracy.svg from results/compare (what each recipe adds to the loss at 4 and at 3 bits), docs/speed.svg
from results/speed.jsonl (tokens per second of every engine, and our operators under the limits) and, where a card was
measured, docs/gpu-speed.svg from results/gpu-speed.jsonl (a block's speed over torch in bfloat16)."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from resq.measure.rows import read_rows
from tables import ROOT, compared, headed, point_of, speed_rows

matplotlib.use("svg")
# The same rows give the same file.
matplotlib.rcParams |= {"svg.hashsalt": "resq", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
from matplotlib import pyplot as plt  # noqa: E402  after the backend is chosen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3b6ea5", "#d98b2b")


def accuracy() -> None:
    rows = headed(compared())
    models = sorted({row["model"] for row in rows})
    every = list(dict.fromkeys(row["recipe"] for row in rows))
    # Those measured on every model at both widths.
    names = [name for name in every if sum(row["recipe"] == name for row in rows) == 2 * len(models)]
    figure, panels = plt.subplots(1, 2, figsize=(9, 5.2), sharey=True, layout="constrained")
    for panel, bits in zip(panels, (4, 3), strict=True):
        for number, model in enumerate(models):
            found = {row["recipe"]: row["delta"] for row in rows if (row["model"], row["bits"]) == (model, bits)}
            mean = np.array([found[name]["mean"] for name in names])
            spread = np.array([[found[name][end] for name in names] for end in ("low", "high")])
            place = np.arange(len(names)) + (number - (len(models) - 1) / 2) * 0.38
            panel.barh(place, mean, 0.36, xerr=abs(spread - mean), color=COLORS[number], label=model, ecolor="#333")
        panel.set_title(f"low band {bits} bit", loc="left", fontsize=10)
        panel.axvline(0, color="#333", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("loss above 16 bit, nats per token")
    panels[0].set_yticks(np.arange(len(names)), names)
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, loc="lower right")
    figure.savefig(ROOT / "docs" / "accuracy.svg", facecolor="white", metadata={"Date": None})


def speed() -> None:
    rows = [row for row in speed_rows() if row["plan"]["head_bits"] == 8]
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for panel, mode, key in ((panels[0], "prefill", "tokens"), (panels[1], "decode", "batch")):
        for name in names:
            found = sorted(
                (row[key], row["tokens_per_second"]) for row in rows if (row["mode"], row["name"]) == (mode, name)
            )
            width = 2.5 if name == names[0] else 1.2
            panel.plot(*zip(*found, strict=True), marker="o", linewidth=width, label=name)
        panel.set_xscale("log", base=2)
        ticks = sorted({row[key] for row in rows if row["mode"] == mode})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_ylim(bottom=0)
        panel.set_ylabel("tokens per second")
        panel.set_xlabel("prompt tokens" if mode == "prefill" else "decoding batch")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    roofline(panels[2], [row for row in rows if row["name"] == names[0]])
    figure.savefig(ROOT / "docs" / "speed.svg", facecolor="white", metadata={"Date": None})


def roofline(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Our linears: operations per byte of weights against operations per second, under both limits."""
    read = max(row["limits"]["read"] for row in rows)
    integer = max(row["limits"]["integer"] for row in rows)
    intensity = np.geomspace(1, 1e5, 50)
    panel.plot(intensity, np.minimum(intensity * read, integer), color="#333", linewidth=1)
    for number, row in enumerate(rows):
        entries = [e for name, e in row["operators"].items() if e["operations"] and name != "attention"]
        x = [entry["operations"] / entry["bytes"] for entry in entries]
        y = [entry["operations"] / entry["seconds"] / 1e9 for entry in entries]
        panel.scatter(x, y, s=18, label=point_of(row), color=f"C{number}")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("operations per byte of weights")
    panel.set_ylabel("10⁹ operations per second")
    panel.legend(frameon=False, fontsize=7, loc="lower right")
    panel.spines[["top", "right"]].set_visible(False)


def gpu_speed(file: Path, out: Path) -> None:
    """How many times as fast as torch in bfloat16 every contender's block is, prefill above and decoding below, a
    column for each model (the upper row is the paper's figure 3a). Nothing without rows from a card."""
    rows = read_rows(file) if file.is_file() else []
    rows = [row for row in rows if row["card"] is not None and not row["plan"]["capture_prefill"]]
    if not rows:
        return
    models = list(dict.fromkeys(row["subject"] for row in rows))
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if name != "torch-bf16"]
    grid = plt.subplots(2, len(models), figsize=(3.2 * len(models) + 1, 5.4), squeeze=False, layout="constrained")
    figure, panels = grid
    for column, model in enumerate(models):
        for line, mode in enumerate(("prefill", "decode")):
            # A later run of the same point replaces an earlier one.
            found = {
                (row["name"], tick_of(row)): median(row["seconds"])
                for row in rows
                if (row["subject"], row["mode"]) == (model, mode)
            }
            bars(panels[line][column], found, names)
            panels[line][column].set_xlabel("prompt tokens" if mode == "prefill" else "batch, context")
        panels[0][column].set_title(model, loc="left", fontsize=10)
    for line in panels:
        line[0].set_ylabel("times as fast as bfloat16")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"One decoder block, {rows[-1]['card']}", x=0.01, ha="left", fontsize=10)
    figure.savefig(out, facecolor="white", metadata={"Date": None})


def tick_of(row: dict[str, Any]) -> str:
    """A point in a few characters: 2048, or 16 × 1k."""
    return str(row["tokens"]) if row["mode"] == "prefill" else f"{row['batch']} × {row['context'] / 1024:.2g}k"


def bars(panel: Axes, seconds: dict[tuple[str, str], float], names: list[str]) -> None:
    """A group of bars for each point that bfloat16 was measured at."""
    ticks = [tick for name, tick in seconds if name == "torch-bf16"]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        at = [place for place, tick in enumerate(ticks) if (name, tick) in seconds]
        ratios = [seconds["torch-bf16", ticks[place]] / seconds[name, ticks[place]] for place in at]
        panel.bar(np.array(at) + (number - (len(names) - 1) / 2) * width, ratios, 0.95 * width, label=name)
    panel.set_xticks(range(len(ticks)), ticks)
    panel.axhline(1, color="#333", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    accuracy()
    speed()
    gpu_speed(ROOT / "results" / "gpu-speed.jsonl", ROOT / "docs" / "gpu-speed.svg")


if __name__ == "__main__":
    main()
