"""What people see: progress, tables, sizes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from resq.progress import Progress

if TYPE_CHECKING:
    from resq.api import Result
    from resq.checkpoint.manifest import Manifest, MapEntry
    from resq.compare import Row as ComparedRow
    from resq.measure.bench import Report as BenchReport
    from resq.measure.differences import Differences
    from resq.measure.evaluate import Row
    from resq.measure.gate import Report as GateReport
    from resq.measure.gpu.bench import BlockReport
    from resq.measure.ledger import Ledger
    from resq.measure.perplexity import Interval
    from resq.measure.quantizing import Timed as QuantizingTimed
    from resq.measure.speed import Limits
    from resq.measure.speed import Result as TimedResult
    from resq.ptq.recipe import Recipe


# Paths and names are data: square brackets in them are no markup, and numbers in prose no figures to colour.
out, err = Console(markup=False, highlight=False), Console(stderr=True, markup=False, highlight=False)
# Columns from which a comparison's table is whole.
WIDE = 110
# Lines of progress at once.
DRAWN = 6
# Rows of a list that may have thousands.
LISTED = 24


@contextmanager
def bars() -> Iterator[Progress]:
    """A progress callback (phase, done, total) drawn on standard error with the time left; without a terminal a line
    every half minute and when a phase of over ten seconds ends."""
    if not err.is_terminal:
        begun: dict[str, float] = {}
        told: dict[str, float] = {}

        def say(phase: str, done: int, total: int) -> None:
            now = time.perf_counter()
            spent = now - begun.setdefault(phase, now)
            if done == total and spent > 10:
                err.print(f"{phase}: done in {spent:.0f} s")
            elif done and now - told.setdefault(phase, now) > 30:
                told[phase] = now
                err.print(f"{phase}: {done} of {total}, about {spent / done * (total - done):.0f} s left")

        yield say
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=err, transient=True) as drawn:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                ended = [name for name, task in tasks.items() if drawn.tasks[drawn.task_ids.index(task)].finished]
                for name in ended if len(tasks) >= DRAWN else ():
                    drawn.remove_task(tasks.pop(name))
                tasks[phase] = drawn.add_task(phase, total=total)
            drawn.update(tasks[phase], completed=done, total=total)

        yield show


def size(count: float) -> str:
    """Bytes for people: 10.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def stream(prompt: str, pieces: Iterable[str]) -> None:
    """The prompt and its continuation, as it is made."""
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def interval(delta: Interval) -> str:
    """Mean and its 95 % interval."""
    return f"{delta.mean:+.4f} [{delta.low:+.4f}, {delta.high:+.4f}]"


def quantized(result: Result) -> None:
    """What rounding each linear cost, what was written, and what to do next."""
    looked = result.manifest.calibration is not None and result.manifest.calibration.rounding_windows
    on = "outputs on the calibration windows" if looked else "weights"
    table = Table(title=f"signal to noise of each linear's {on}, dB", title_justify="left", box=None, pad_edge=False)
    roles = list(dict.fromkeys(report.role for report in result.linears))
    for name in ("layer", *roles, "lost", "s", "memory"):
        table.add_column(name, justify="right")
    for layer in result.layers:
        cells = {report.role: report for report in result.linears if report.layer == layer.layer}
        worst = max(report.error for report in cells.values())
        took = (f"{worst:.1e}", f"{layer.seconds:.1f}", size(layer.memory))
        table.add_row(str(layer.layer), *(f"{cells[role].snr:.1f}" for role in roles), *took)
    out.print(table)
    out.print("lost: of the worst linear, squared error over squared output. memory: most that the process held.\n")
    for note in result.manifest.notes:
        out.print(note)
    total = sum(file.bytes for file in result.manifest.files.values())
    source_bytes = result.manifest.source.bytes
    out.print(
        f"{result.directory}: {size(total)}, {total / source_bytes:.2f} × the source's "
        f'{size(source_bytes)}, in {result.seconds:.0f} s. Next: resq generate {result.directory} "…"',
        soft_wrap=True,
    )


def differing(found: Differences) -> None:
    """The first of the tensors that differ between two checkpoints: how many of their values, and by how much."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True, header_style="bold", pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for column in ("differ", "of", "largest"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in found.tensors[:LISTED]:
        largest = "not finite" if each.largest is None else f"{each.largest:.3g}"
        cells = (f"{each.differing:,}", f"{each.values:,}", largest) if each.problem is None else ("", "", each.problem)
        table.add_row(each.tensor, *cells)
    out.print(table)
    if len(found.tensors) > LISTED:
        out.print(f"and {len(found.tensors) - LISTED} more; --json has them all")
    packed = [each for each in found.tensors if each.packed]
    if packed:
        wrong, values = (sum(getattr(each, name) for each in packed) for name in ("differing", "values"))
        most = max(each.largest or 0 for each in packed)
        out.print(f"integers: {wrong:,} of {values:,} in {len(packed)} qweight tensors differ, by at most {most:.0f}")
    out.print(f"tensors: {len(found.tensors)} differ, {found.same} in the same files do not")


def evaluated(rows: Sequence[Row]) -> None:
    """Perplexities side by side, and how far each is from a 16-bit original that was named first. Fits 100 columns."""
    compared = any(row.kl is not None for row in rows)
    table = Table(box=None, padding=(0, 1), collapse_padding=True, header_style="bold", pad_edge=False)
    table.add_column("checkpoint", overflow="fold", min_width=10)
    table.add_column("recipe", overflow="fold", min_width=6)
    names = ["perplexity", "× first", "Δ nats\n± 95 %"]
    names += ["KL nats\n± 95 %", "same top 1\n± 95 %"] if compared else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = ["" if row.ratio is None else f"{row.ratio:.4f}", spread(row.delta, row.delta_low, row.delta_high)]
        if compared:
            cells.append(spread(row.kl, row.kl_low, row.kl_high, "{:.4f}"))
            cells.append(spread(row.agreement, row.agreement_low, row.agreement_high, "{:.2%}"))
        table.add_row(row.checkpoint, row.recipe, f"{row.perplexity:.3f}", *cells)
    out.print(table)
    words = [f"{count}." for count in dict.fromkeys(windows_of(row.windows, row.window_length) for row in rows)]
    if compared:
        words.append("KL: divergence from the 16-bit original, nats per token.")
        words.append("Same top 1: tokens for which both find the same one most probable.")
    out.print("\n" + " ".join(words))


def windows_of(count: int, length: int) -> str:
    """What was evaluated: 40 windows of 256 tokens."""
    return f"{count:,} window{'s' if count > 1 else ''} of {length:,} tokens"


def spread(mean: float | None, low: float | None, high: float | None, form: str = "{:+.4f}") -> str:
    """A mean and half the width of its interval, as far as they are known: +0.0182 ±0.0011."""
    if mean is None:
        return ""
    half = "" if low is None or high is None else f" ±{form.format((high - low) / 2).lstrip('+').rstrip('%')}"
    return form.format(mean) + half


def judged(report: GateReport, passed: bool) -> None:
    """Each criterion with its estimate, interval, bound and verdict; then the sum of them. Fits 80 columns."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True, header_style="bold", pad_edge=False)
    table.add_column("criterion", no_wrap=True)
    for name in ("estimate", "one-sided 95 %", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    names = {"perplexity": "perplexity over 16 bit", "kl": "KL, nats per token", "agreement": "same top 1"}
    forms = {"perplexity": "{:+.2%}", "kl": "{:.4f}", "agreement": "{:.2%}"}
    for finding in report.findings:
        measure, form = finding.criterion.measure, forms[finding.criterion.measure]
        low, high, bound = (form.format(value) for value in (finding.low, finding.high, finding.criterion.bound))
        sign = "≥" if measure == "agreement" else "≤"
        style = {"pass": "green", "fail": "red"}.get(finding.verdict, "yellow")
        verdict = Text(finding.verdict, style=style)
        table.add_row(names[measure], form.format(finding.estimate), f"{low} … {high}", f"{sign} {bound}", verdict)
    out.print(table)
    out.print(
        f"\n{report.checkpoint} beside {report.source} on {windows_of(report.windows, report.window_length)}: "
        f"{'passed' if passed else 'not passed'}.",
        soft_wrap=True,
    )
    for finding in report.findings:
        if finding.verdict == "undecided":
            needed = finding.windows_needed
            words = "no number of windows" if needed is None else f"about {needed:,} windows of such text"
            out.print(f"{names[finding.criterion.measure]}: {words} would probably decide it.")


def system(facts: dict[str, Any]) -> None:
    """Backends and instruction sets: what is used, and why not the others."""
    table = Table(show_header=False, box=None)
    for entry in facts["backends"]:
        name, reason = entry["name"], entry["unusable"]
        # A backend is never taken in the place of the preferred one.
        used = "used" if name == facts["preferred"] else f"usable when asked for: --backend {name}"
        if name == "triton" and facts["card"]:
            used += f" ({facts['card']})"
        table.add_row(f"backend {name}", used if reason is None else f"not usable: {reason}")
    faster = True
    for entry in facts["instruction_sets"]:
        if entry["name"] == facts["active"]:
            why, faster = "used: the fastest usable", False
            if facts["forced"]:
                why = f"used: RESQ_CPU_ISA is {facts['forced']}"
        elif entry["missing"] is not None:
            why = f"not usable: {entry['missing']}"
        else:
            why = "usable, passed over: RESQ_CPU_ISA names another" if faster else "usable, slower"
        table.add_row(f"  {entry['name']}", why)
    table.add_row("threads", str(facts["threads"]))
    out.print(table)


# Bytes of weights from which on memory beside them is told as a ratio.
TELLING_WEIGHTS = 50_000_000


def timed(report: BenchReport) -> None:
    """Tokens per second and ratios, then where the time goes."""
    limits = report.limits
    out.print(
        f"{report.subject}, {limits.threads} threads, {limits.instruction_set}. This machine at its best: "
        f"{limits.read:.1f} GB/s of reading, {limits.integer / 1000:.2f} TOPS of integer products."
    )
    for name, words in report.about.items():
        out.print(f"{name}: {words}")
    ours = report.results[0].name
    table = Table(title="speed", title_justify="left")
    for column in ("what", "engine", "tokens/s", "ms", f"{ours} is faster"):
        table.add_column(column, justify="left" if column in ("what", "engine") else "right")
    rows = {(row["name"], str(result.point)): row for row, result in zip(report.rows(), report.results, strict=True)}
    for result in report.results:
        ratio = rows[ours, str(result.point)]["ratios"].get(result.name)
        cells = f"{result.rate:,.1f}", f"{result.median * 1e3:,.1f}", "" if ratio is None else f"× {ratio:.2f}"
        table.add_row(str(result.point) if result.name == ours else "", result.name, *cells)
    out.print(table)
    for result in report.results:
        if result.name == ours:
            out.print(_operators(result, limits))
    memory = report.memory
    # A process has some ten MB of its own, beside which a tiny model's weights say nothing.
    told = memory["weights"] >= TELLING_WEIGHTS
    share = f"{memory['anonymous'] / memory['weights']:.2f} × " if told else "beside "
    out.print(
        f"memory: loading took {size(memory['anonymous'])} of anonymous memory, {share}the packed weights "
        f"({size(memory['weights'])}); the cache holds {size(memory['cache'])}"
    )
    if len(report.about) == 1:  # peers have their own
        total, at_end = memory["weights"] + memory["cache"], memory["anonymous at the end"]
        share = f", {at_end / total:.2f} × weights and cache" if told else ""
        out.print(f"at the end {size(at_end)} anonymous{share}")


def _operators(result: TimedResult, limits: Limits) -> Table:
    table = Table(title=f"where the time of {result.point} goes", title_justify="left")
    for column in ("operator", "calls", "ms", "share", "GB/s", "of limit", "TOPS", "of limit"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name, entry in sorted(result.operators.items(), key=lambda item: -item[1].seconds):
        cells = [f"{entry.calls}", f"{entry.seconds * 1e3:.2f}", f"{entry.seconds / result.median:.1%}"]
        if entry.operations:
            rate, products = entry.bytes / entry.seconds / 1e9, entry.operations / entry.seconds / 1e9
            cells += [f"{rate:.1f}", f"{rate / limits.read:.0%}", f"{products / 1e3:.2f}"]
            cells += [f"{products / limits.integer:.0%}" if name != "attention" else ""]
        table.add_row(name, *cells)
    rest = result.median - sum(entry.seconds for entry in result.operators.values())
    table.add_row("between operators", "", f"{rest * 1e3:.2f}", f"{rest / result.median:.1%}")
    return table


def quantizing_timed(results: Sequence[QuantizingTimed]) -> None:
    """Seconds of parts of quantizing beside those of what they cannot do without."""
    table = Table(title="quantizing", title_justify="left")
    for column in ("what", "seconds", "beside", "times as long"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for result in results:
        most = "" if result.ceiling is None else f" of × {result.ceiling:.2f} at most here"
        cells = f"{median(result.seconds):.3f}", f"{median(result.against):.3f}", f"× {result.ratio:.2f}{most}"
        table.add_row(result.name, *cells)
    out.print(table)


def block_timed(report: BlockReport) -> None:
    """A block's microseconds and rates beside the ceilings, then how many times faster ours is, beside the ideal."""
    best = report.ceilings
    out.print(
        f"One decoder block of {report.subject} on {report.card or 'no card: kernels are interpreted'}. Ceilings of "
        f"this run: {best.copy / 1e12:.2f} TB/s, {best.bf16 / 1e12:.0f} TFLOPS in bfloat16, {best.int8 / 1e12:.0f} "
        f"TOPS in int8, {best.attention / 1e12:.0f} TFLOPS of attention.",
        soft_wrap=True,
    )
    for name, words in report.about.items():
        out.print(f"{name}: {words}")
    table = Table(title="speed", title_justify="left")
    for column in ("what", "engine", "µs", "TOPS", "TB/s", f"{report.ours} is faster"):
        table.add_column(column, justify="left" if column in ("what", "engine") else "right")
    asked = Table(title=f"{report.ours} beside what is possible", title_justify="left")
    for column in ("what", "over bfloat16", "ideal", "part of it", "floor", "aim", "over uniform 4 bit", "at most"):
        asked.add_column(column, justify="left" if column == "what" else "right")
    for point, ideal in report.ideal.items():
        ratios, wants = report.ratios(point), report.wanted(point)
        for name, result in report.at(point).items():
            cells = f"{result.median * 1e6:,.1f}", f"{result.tops:.1f}", f"{result.terabytes:.2f}"
            faster = f"× {ratios[name]:.2f}" if name in ratios else ""
            table.add_row(str(point) if name == report.ours else "", name, *cells, faster)
        plain, band = ratios.get("torch-bf16"), ratios.get("uniform-4")
        over = ("", "") if plain is None else (f"× {plain:.2f}", f"{plain / ideal:.0%}")
        cells = over[0], f"× {ideal:.2f}", over[1], f"× {wants.floor:.2f}", f"× {wants.aim:.2f}"
        asked.add_row(str(point), *cells, "" if band is None else f"{1 / band - 1:+.1%}", f"{wants.loss_floor:.0%}")
    out.print(table)
    out.print(asked)
    memory = report.memory
    out.print(
        f"memory: weights {size(memory.weights)}, {memory.weights_ratio:.3f} × bfloat16; keys and values "
        f"{memory.cache:,.0f} bytes a token, {memory.cache_ratio:.3f} ×. Floors and aims are those set for an H200."
    )


def inspected(name: str, manifest: Manifest, book: Ledger) -> None:
    """Facts, bands, true bits and bytes of a packed checkpoint."""
    facts = Table(show_header=False, box=None, title=name, title_justify="left")
    recipe, source, calibration = manifest.recipe, manifest.source, manifest.calibration
    facts.add_row("recipe", f"{recipe.name}, seed {recipe.seed}")
    facts.add_row("basis", ", ".join(recipe.basis) or "none")
    facts.add_row("rounding", recipe.rounding)
    facts.add_row("source", f"{source.name} ({source.model_type}, {source.dtype}, {source.parameters:,} parameters)")
    if calibration:
        facts.add_row(
            "calibration",
            f"{calibration.windows} windows of {calibration.window_length} tokens from {calibration.origin}, "
            f"{calibration.rounding_windows} for rounding",
        )
    head = "reads the embedding table" if manifest.ends.tied else _bands(manifest.ends.head.bands)
    facts.add_row("lm_head", head)
    windows = [layer.window for layer in manifest.layers if layer.window is not None]
    if windows:
        facts.add_row(
            "attention", f"sliding window of {windows[0]} tokens in {len(windows)} of {len(manifest.layers)} layers"
        )
    for note in manifest.notes:
        facts.add_row("note", note)
    facts.add_row("made by", ", ".join(f"{key} {value}" for key, value in manifest.made_by.items()))
    out.print(facts)
    from resq.ptq.ablations import ABLATIONS
    from resq.ptq.recipe_file import to_toml
    from resq.ptq.recipes import RECIPES

    if recipe.definition and recipe.name not in RECIPES | ABLATIONS:
        out.print(
            f"recipe {recipe.name}, as --recipe takes it from a file:\n{to_toml(recipe.definition)}", soft_wrap=True
        )

    bands = Table(title="bands of the first layer", title_justify="left")
    for column in ("where", "input", "weights", "online map"):
        bands.add_column(column)
    first = manifest.layers[0]
    for point, roles in (("attn_in", "qkv"), ("o_in", "o"), ("mlp_in", "gate up"), ("down_in", "down")):
        linear = first.linears["q" if roles == "qkv" else roles.split()[0]]
        entry = first.inputs[point]
        bands.add_row(roles, _bands(entry.bands), _bands(linear.bands), _map(entry.map))
    for what, entry in (("keys", first.key), ("values", first.value)):
        bands.add_row(what, _bands(entry.bands), "", _map(entry.map))
    out.print(bands)

    true = Table(title="true bits per value, scales and zero points included", title_justify="left")
    for column in ("weights", "activations", "keys", "values"):
        true.add_column(column, justify="right")
    true.add_row(*(f"{bits:.2f}" for bits in (book.weight_bits, book.activation_bits, book.key_bits, book.value_bits)))
    out.print(true)
    out.print(
        f"weight files {size(book.bytes)} (layers {size(book.layer_bytes)}, embedding and head "
        f"{size(book.end_bytes)}), {book.bytes / book.source_bytes:.2f} × the source's {size(book.source_bytes)}; "
        f"KV cache {size(book.kv_bytes_per_token)} per token, "
        f"{book.kv_bytes_per_token / book.kv_bytes_per_token_16bit:.2f} × 16 bit"
    )


def _map(entry: MapEntry | None) -> str:
    if entry is None:
        return ""
    if not entry.construction:
        return entry.kind
    across = f", across {entry.power * (entry.order or 1)} heads" if entry.inner > 1 and entry.power else ""
    return f"{entry.kind} {entry.power} × {entry.order} ({entry.construction}{across})"


def _bands(pairs: list[list[int]] | None) -> str:
    return "16 bit" if pairs is None else " + ".join(f"{count} × {bits} bit" for bits, count in pairs)


def listed(recipes: Sequence[Recipe], ablations: Sequence[Recipe] = ()) -> None:
    """One line per recipe."""
    _listed(recipes, "recipe")
    if ablations:
        out.print()
        _listed(ablations, "ablation")
    out.print("\n--bits N sets the low band of everything that is under 8 bit.")


def _listed(recipes: Sequence[Recipe], heading: str) -> None:
    table = Table(box=None)
    table.add_column(heading, no_wrap=True)
    table.add_column("bits W / A / KV", no_wrap=True)
    table.add_column("what it does")
    for recipe in recipes:
        bits = " / ".join(f"{mean:g}" for mean in recipe.precision.mean_bits())
        table.add_row(recipe.name, bits, recipe.about)
    out.print(table)


def compared(rows: Sequence[ComparedRow]) -> None:
    """Every recipe and width against 16 bit. Fits 80 columns; where there are more, says more."""
    wide = out.width >= WIDE
    scale, unit = (1e9, "GB") if max(row.bytes or 0 for row in rows) >= 1e10 else (1e6, "MB")
    table = Table(box=None, padding=(0, 1), collapse_padding=True, header_style="bold", pad_edge=False)
    table.add_column("recipe", overflow="fold")
    widths = any(row.bits is not None for row in rows)
    columns = ["low\nbits"] if widths else []
    columns += ["perpl-\nexity", "Δ nats\n± 95 %", "KL\nnats"]
    columns += ["same\ntop 1"] if wide else []
    columns += ["true bits\nW/A/KV", f"\n{unit}", "quant.\ns"]
    columns += ["peak\nMB"] if wide else []
    columns += ["tokens\n/s"] + (["× 16\nbit"] if wide else [])
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        same = before is not None and before.recipe == row.recipe and before.seed == row.seed
        name = "" if same else f"{row.recipe}, seed {row.seed}" if row.seed else row.recipe
        low = ["" if row.bits is None else str(row.bits)] if widths else []
        if row.perplexity is None:
            table.add_row(name, *low, "failed")
            continue
        cells = [*low, f"{row.perplexity:.2f}", *_distances(row, wide), _true_bits(row.ledger)]
        cells.append("" if row.bytes is None else f"{row.bytes / scale:.1f}")
        cells.append("" if row.quantize_seconds is None else f"{row.quantize_seconds:.1f}")
        if wide:
            cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}")
        cells.append("" if row.speed is None else f"{row.speed.tokens_per_second:,.0f}")
        if wide:
            cells.append("" if row.speed is None or row.ledger is None else f"{row.speed.ratio:.2f}")
        table.add_row(name, *cells)
    out.print(table)
    for row in rows:
        if row.failed is not None:
            out.print(f"{row.case} failed: {row.failed}", soft_wrap=True)
    first = rows[0]
    words = [
        f"\nOn {windows_of(first.windows or 0, first.window_length or 0)}. Δ: loss above 16 bit, nats per token, ± "
        "half of its paired 95 % interval. KL: divergence from 16 bit. True bits count scales and zero points;",
        f"{unit}: all weight files, the 16-bit embedding included.",
    ]
    if wide:
        words.append("Same top 1: tokens for which 16 bit finds the same one most probable.")
        words.append("Peak: resident memory of quantizing, libraries included.")
    if speed := next((row.speed for row in rows[1:] if row.speed is not None), None):
        backend = next((row.backend for row in rows[1:] if row.backend is not None), "")
        words.append(
            f"tokens/s: prefill of {speed.tokens} tokens on {speed.threads} thread{'s' if speed.threads > 1 else ''}, "
            f"backend {backend} (16 bit: torch in float32)."
        )
    out.print(" ".join(words))


def _distances(row: ComparedRow, wide: bool) -> list[str]:
    if row.delta is None or row.kl is None or row.agreement is None:
        return [""] * (3 if wide else 2)
    half = f"{(row.delta.high - row.delta.low) / 2:.3f}".removeprefix("0")
    return [f"{row.delta.mean:+.3f} ±{half}", f"{row.kl.mean:.4f}", *([f"{row.agreement.mean:.1%}"] if wide else [])]


def _true_bits(book: Ledger | None) -> str:
    if book is None:
        return "16/16/16"
    each = (book.weight_bits, book.activation_bits, (book.key_bits + book.value_bits) / 2)
    return "/".join(f"{bits:.1f}".removesuffix(".0") for bits in each)
