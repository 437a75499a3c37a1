"""The command `resq`: what its commands share, and how it ends."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from rich.text import Text
from typer.exceptions import TyperException

from resq.errors import InputError
from resq.show import err

# By hand, so that help and completion need no torch; a test compares them with the recipes.
RECIPE_NAMES = (
    "rtn",
    "gptq",
    "smoothquant+",
    "quik",
    "quarot",
    "spinquant",
    "resq",
    "resq+",
    "resq-paper",
    "resq-246",
    "resq-learned",
    "resq-w4a8kv4",
    "resq-weight-only",
    "resq-kv",
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Quantize language models to 4-bit weights, activations and KV cache, and run them.\n\n"
    "`resq demo` shows every recipe on a tiny model that comes with the package: nothing is downloaded.",
    epilog="Exit codes: 0 done · 1 a bug in resq (with a traceback) or a closed pipe · 2 something given cannot be "
    "used, one line says what · 3 `resq gate`: not good enough, `resq verify`: not as recorded, `resq reproduce`: not "
    "made again the same · 130 interrupted, nothing half-written is kept (`quantize` keeps finished layers for "
    "--resume). With --json, standard output is one JSON object.",
)
BackendOption = Annotated[
    str | None,
    typer.Option(
        help="What runs packed checkpoints: triton, cpu or reference.", show_default="triton with a card, else cpu"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
WindowsOption = Annotated[int, typer.Option(help="Calibration windows.")]
RoundingWindowsOption = Annotated[
    int | None, typer.Option(help="How many of them GPTQ uses.", show_default="128 or all")
]
HeadBitsOption = Annotated[
    float | None, typer.Option(help="Bits of lm_head: 16, 8 or 4.5.", show_default="the recipe's, 16")
]
WikitextOption = Annotated[
    bool,
    typer.Option("--wikitext", help="--text is a WikiText split: join its rows by blank lines, as papers do."),
]
ActivationsOption = Annotated[
    str,
    typer.Option(
        help="Where the windows' hidden states lie: device, memory (with a card, the machine's) or disk, a file beside "
        "--out."
    ),
]
CheckpointArgument = Annotated[str, typer.Argument(help="A packed checkpoint: a directory or a hub id.")]


def words(given: str) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in given.split(",") if word.strip()]


def numbers(option: str, given: str) -> list[int]:
    """Whole numbers separated by commas. Raises InputError for something else."""
    try:
        return [int(word) for word in words(given)]
    except ValueError as error:
        raise InputError(f"{option} {given!r} is no list of whole numbers; write it as 4,3") from error


@app.callback(invoke_without_command=True)
def version(asked: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Print the version when asked."""
    if asked:
        from resq import __version__

        print(f"resq {__version__}")
        raise typer.Exit


INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Signals that arrived: native code may turn the exception that a handler raises inside it into one of its own.
_arrived: list[int] = []


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; every half-written thing is removed on the way out."""


def _interrupt(number: int, frame: object) -> None:
    _arrived.append(number)
    for other in INTERRUPTS:  # what is being removed now is not interrupted again
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends all processes when one ends: this one does already
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)
    err.print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True, highlight=False)
    sys.exit(2)


def interruption(notes: Sequence[str]) -> str:
    """What is said of an interruption; torchrun makes one in every process when one ends, which has said why."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return "; ".join(["interrupted", *(notes or ("nothing half-written was kept",))])
    process = f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}"
    return "; ".join([f"{process}: stopped by torchrun, as when another process ends before its time", *notes])


def main() -> None:
    """Run the command line; an unusable input is one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for number in INTERRUPTS:
        signal.signal(number, _interrupt)
    try:
        app(standalone_mode=False)
    except TyperException as error:  # what was typed: one line instead of typer's box
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if not message:  # no command at all: the help was printed
            sys.exit(2)
        fail(f"{message.rstrip('.')}; see resq --help")
    except InputError as error:
        fail("; ".join([str(error), *getattr(error, "__notes__", ())]))
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions")
    except BaseException as error:
        if not _arrived:
            raise
        err.print(interruption(getattr(error, "__notes__", ())), soft_wrap=True, highlight=False)
        sys.exit(130)
