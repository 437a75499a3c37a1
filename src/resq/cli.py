"""The command `resq`: parse, call, print."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from resq.errors import InputError
from resq.progress import Progress

if TYPE_CHECKING:
    from resq.api import Result

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Quantize language models to 4-bit weights, activations and KV cache, and run them.\n\n"
    "Exit codes: 0 done · 2 something given cannot be used (one line says what) · 130 interrupted.",
)
# Paths and names are data: square brackets in them are no markup.
out, err = Console(markup=False), Console(stderr=True, markup=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@contextmanager
def bars() -> Iterator[Progress]:
    """A progress callback (phase, done, total) drawn on standard error with the time left; without a terminal a line
    every half minute and when a phase of over two seconds ends."""
    if not err.is_terminal:
        begun: dict[str, float] = {}
        told: dict[str, float] = {}

        def say(phase: str, done: int, total: int) -> None:
            now = time.perf_counter()
            spent = now - begun.setdefault(phase, now)
            if done == total and spent > 2:
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


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Hugging Face checkpoint: a directory or a hub id.")],
    out_dir: Annotated[Path, typer.Option("--out", help="New directory for the packed checkpoint.")],
    recipe: Annotated[str, typer.Option(help="Method: resq, resq-paper, rtn.")] = "resq",
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Text, or .jsonl with `text` or `messages`; may be repeated.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    rounding_windows: Annotated[
        int | None, typer.Option(help="How many of them GPTQ uses.", show_default="128 or all")
    ] = None,
    window_length: Annotated[
        int | None, typer.Option(help="Tokens per window.", show_default="2048 or the context")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits of the low band: 2, 3, 4 or 6.", show_default="the recipe's, 4")
    ] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="Bits of lm_head: 16 or 8.", show_default="the recipe's, 16")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied lm_head a matrix of its own.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of rotations and of the choice of windows.")
    ] = 0,
    json_output: JsonOption = False,
) -> None:
    """Quantize a checkpoint and write it packed."""
    from resq.api import quantize as run

    with bars() as progress:
        result = run(
            source,
            out_dir,
            recipe=recipe,
            calibration=calibration or [],
            windows=windows,
            rounding_windows=rounding_windows,
            window_length=window_length,
            bits=bits,
            head_bits=head_bits,
            untie=untie,
            seed=seed,
            progress=progress,
        )
    if json_output:
        rows = [asdict(report) for report in result.linears]
        print(json.dumps({"checkpoint": str(result.directory), "seconds": result.seconds, "linears": rows}))
        return
    _print_errors(result)
    total = sum(file.bytes for file in result.manifest.files.values())
    source_bytes = result.manifest.source.bytes
    out.print(
        f"{result.directory}: {size(total)}, {total / source_bytes:.2f} × the source's "
        f'{size(source_bytes)}, in {result.seconds:.0f} s. Next: resq generate {result.directory} "…"',
        soft_wrap=True,
    )


def _print_errors(result: Result) -> None:
    table = Table(title="relative squared output error of each linear on its calibration inputs", title_justify="left")
    roles = list(dict.fromkeys(report.role for report in result.linears))
    table.add_column("layer", justify="right")
    for role in roles:
        table.add_column(role, justify="right")
    layers = sorted({report.layer for report in result.linears})
    for layer in layers:
        cells = {report.role: report for report in result.linears if report.layer == layer}
        table.add_row(str(layer), *(f"{cells[role].error:.1e}" for role in roles))
    out.print(table)
    for note in result.manifest.notes:
        out.print(note)


@app.command("eval")
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="16-bit sources and packed checkpoints, side by side.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text or .jsonl.")],
    window_length: Annotated[int, typer.Option(help="Tokens per non-overlapping window.")] = 2048,
    wikitext: Annotated[
        bool,
        typer.Option("--wikitext", help="The text is a WikiText split: join its rows by blank lines, as papers do."),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Perplexity on a text; differences are to the first checkpoint named, with a paired 95 % interval."""
    from resq.measure.evaluate import evaluate as run

    with bars() as progress:
        rows = run(checkpoints, text, window_length=window_length, wikitext=wikitext, progress=progress)
    if json_output:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
        return
    table = Table()
    for name in ("checkpoint", "recipe", "perplexity", "× first", "Δ nats per token [95 %]", "tokens", "seconds"):
        table.add_column(name, justify="left" if name in ("checkpoint", "recipe") else "right", overflow="fold")
    for row in rows:
        ratio, delta = "", ""
        if row.ratio is not None:
            ratio, delta = f"{row.ratio:.4f}", f"{row.delta:+.4f} [{row.delta_low:+.4f}, {row.delta_high:+.4f}]"
        table.add_row(
            row.checkpoint, row.recipe, f"{row.perplexity:.3f}", ratio, delta, f"{row.tokens:,}", f"{row.seconds:.1f}"
        )
    out.print(table)


@app.command()
def generate(
    directory: Annotated[str, typer.Argument(help="A packed checkpoint: a directory or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 picks the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of sampling.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Continue a prompt, streamed as it is made."""
    from resq.runtime.generate import Sampling
    from resq.runtime.load import load

    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {max_new_tokens}; at least 1 is needed")
    sampling = Sampling(temperature, top_p, seed)
    with bars() as progress:
        model = load(directory, progress=progress)
    pieces = model.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling)
    if json_output:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}))
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if max_new_tokens > model.room(prompt):
        err.print(
            f"the context holds {model.shape.max_positions} tokens: at most {model.room(prompt)} after this prompt"
        )


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="A packed checkpoint: a directory or a hub id.")],
    json_output: JsonOption = False,
) -> None:
    """What a packed checkpoint holds: recipe, bands, true bits and bytes."""
    from resq.measure.ledger import ledger
    from resq.runtime.load import Opened

    opened = Opened(directory)
    manifest, book = opened.manifest, ledger(opened.manifest, opened.shape.head_dim)
    if json_output:
        print(json.dumps({"manifest": manifest.model_dump(), "ledger": asdict(book)}))
        return
    facts = Table(show_header=False, box=None, title=directory, title_justify="left")
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
    head = "reads the embedding table" if manifest.ends.tied else recipe.precision["head"]
    facts.add_row("lm_head", head)
    facts.add_row("made by", ", ".join(f"{name} {value}" for name, value in manifest.made_by.items()))
    out.print(facts)

    bands = Table(title="bands of the first layer", title_justify="left")
    for name in ("where", "input", "weights", "online map"):
        bands.add_column(name)
    first = manifest.layers[0]
    for point, roles in (("attn_in", "qkv"), ("o_in", "o"), ("mlp_in", "gate up"), ("down_in", "down")):
        linear = first.linears["q" if roles == "qkv" else roles.split()[0]]
        entry = first.inputs[point]
        kind = entry.map.kind if entry.map else ""
        if entry.map and entry.map.construction:
            kind += f" {entry.map.power} × {entry.map.order} ({entry.map.construction})"
        bands.add_row(roles, _bands(entry.bands), _bands(linear.bands), kind)
    for name, entry in (("keys", first.key), ("values", first.value)):
        bands.add_row(name, _bands(entry.bands), "", entry.map.kind if entry.map else "")
    out.print(bands)

    true = Table(title="true bits per value, scales and zero points included", title_justify="left")
    for name in ("weights", "activations", "keys", "values"):
        true.add_column(name, justify="right")
    true.add_row(*(f"{bits:.2f}" for bits in (book.weight_bits, book.activation_bits, book.key_bits, book.value_bits)))
    out.print(true)
    out.print(
        f"weight files {size(book.bytes)} (layers {size(book.layer_bytes)}, embedding and head "
        f"{size(book.end_bytes)}), {book.bytes / book.source_bytes:.2f} × the source's {size(book.source_bytes)}; "
        f"KV cache {size(book.kv_bytes_per_token)} per token, "
        f"{book.kv_bytes_per_token / book.kv_bytes_per_token_16bit:.2f} × 16 bit"
    )


def _bands(pairs: list[list[int]] | None) -> str:
    return "16 bit" if pairs is None else " + ".join(f"{count} × {bits} bit" for bits, count in pairs)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Print the version when asked."""
    if show:
        from resq import __version__

        print(f"resq {__version__}")
        raise typer.Exit


INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; every half-written thing is removed on the way out."""


def _interrupt(number: int, frame: object) -> None:
    for other in INTERRUPTS:  # what is being removed now is not interrupted again
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    err.print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True, highlight=False)
    sys.exit(2)


def main() -> None:
    """Run the command line; an unusable input is one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for number in INTERRUPTS:
        signal.signal(number, _interrupt)
    try:
        app()
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions")
    except Interrupted:
        err.print("interrupted; nothing half-written was kept")
        sys.exit(130)
