"""What people see of a plan: one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from resq.show import out, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resq.measure.plan import Logged, Plan

# Terms of a peak that are named one by one.
NAMED = 6


def duration(seconds: float) -> str:
    """For people: 42 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def planned(plan: Plan) -> None:
    """What quantizing takes, whether it fits, what it gives, what to change."""
    model, work, asked = plan.model, plan.work, plan.asked
    shape, book = model.shape, plan.size.ledger
    head = "tied, kept tied" if work.keep_tied else "tied, given a head of its own" if shape.tied else "head of its own"
    heads = f"{shape.heads} heads of {shape.head_dim} ({shape.kv_heads} for keys and values)"
    _say(
        f"{model.name}: {model.config['model_type']}, supported; {shape.layers} layers of {shape.hidden}, FFN "
        f"{shape.ffn}, {heads}, vocabulary {shape.vocab}, {head}; {model.dtype}, {size(book.source_bytes)}"
    )
    seen = work.looks or work.collected
    windows = f"{work.windows} windows of {work.length} tokens" if seen else "no windows"
    windows += ", collected before" if work.collected else ""
    if work.rounded and work.rounded < work.windows:
        windows += f", {work.rounded} of them for rounding"
    _say(f"recipe {asked.recipe.name}, {windows}, on {asked.device}, activations on {asked.activations}\n")
    table = Table(box=None, padding=(0, 1), collapse_padding=True, header_style="bold", pad_edge=False)
    table.add_column("phase")
    for column in ("time", "memory", *(["card"] if work.cuda else [])):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("at")
    for phase in plan.phases:
        time = "?" if phase.seconds is None else duration(phase.seconds)
        unknown = phase.seconds is None and not phase.moment
        cells = ["?" if unknown else size(phase.peak), *(["?" if unknown else size(phase.card)] if work.cuda else [])]
        table.add_row(phase.name, time, *cells, phase.moment)
    table.add_row("all", duration(plan.seconds), size(plan.peak), *([size(plan.card)] if work.cuda else []))
    out.print(table)
    worst = max(plan.phases, key=lambda phase: phase.peak)
    terms = list(worst.terms.items())
    rest = sum(bytes for _, bytes in terms[NAMED:])
    parts = [f"{name} {size(bytes)}" for name, bytes in terms[:NAMED]] + ([f"others {size(rest)}"] if rest else [])
    _say(f"\npeak: {', '.join(parts)}")
    machine = plan.machine
    fits = [f"memory {size(plan.peak)} of {size(machine.memory)} free"]
    if machine.card is not None:
        fits.append(f"card {size(plan.card)} of {size(machine.card)} free")
    total = sum(plan.disk.values())
    kinds = ", ".join(f"{name} {size(bytes)}" for name, bytes in plan.disk.items())
    fits.append(f"disk {size(total)} ({kinds}) of {size(machine.disk)} free here")
    _say(f"{'fits' if plan.fits else 'does not fit'}: {'; '.join(fits)}")
    for change, peak, enough in plan.advice:
        _say(f"  with {change}: {size(peak)}, {'fits' if enough else 'still too much'}")
    if not plan.fits and not plan.advice:
        _say("  nothing that `resq quantize` takes makes it fit: use a machine with more memory or disk")
    _say(
        f"\nresult: {size(book.bytes)}, {book.bytes / book.source_bytes:.2f} × the source; true bits: weights "
        f"{book.weight_bits:.2f}, activations {book.activation_bits:.2f}, keys {book.key_bits:.2f}, values "
        f"{book.value_bits:.2f}"
    )
    context = asked.context or shape.max_positions
    batch = f" × {asked.batch}" if asked.batch > 1 else ""
    _say(f"KV cache of {context}{batch} tokens: {size(plan.kv_bytes)}, of 16 bit {size(plan.kv_bytes_16bit)}")
    for site, transform in plan.size.transforms.items():
        _say(f"online at {site}: {transform}")
    for note in plan.notes:
        _say(f"note: {note}")


def beside(rows: Sequence[Logged]) -> str:
    """One line: what quantizing took beside the plan."""
    whole = rows[-1]
    planned_time = "" if whole.planned_seconds is None else f" (planned {duration(whole.planned_seconds)})"
    return (
        f"peak memory {size(whole.peak)} (planned {size(whole.planned_peak)}), {duration(whole.seconds)}{planned_time}"
    )


def _say(line: str) -> None:
    out.print(line, soft_wrap=True)
