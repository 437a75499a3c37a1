"""The command `resq`: parse, call, print."""

from __future__ import annotations

import io
import json
import signal
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text
from typer.exceptions import TyperException

from resq import show
from resq.embedded import MODEL, TEXT
from resq.errors import InputError
from resq.show import bars, err

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

NOT_GOOD_ENOUGH = 3

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Quantize language models to 4-bit weights, activations and KV cache, and run them.\n\n"
    "`resq demo` shows every recipe on a tiny model that comes with the package: nothing is downloaded.",
    epilog="Exit codes: 0 done · 1 a bug in resq (with a traceback) or a closed pipe · 2 something given cannot be "
    "used, one line says what · 3 `resq gate`: not good enough · 130 interrupted, nothing half-written is kept. With "
    "--json, standard output is one JSON object.",
)
BackendOption = Annotated[
    str | None,
    typer.Option(
        help="What runs packed checkpoints: triton, cpu or reference.", show_default="triton with a card, else cpu"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
def quantize(
    out_dir: Annotated[Path, typer.Option("--out", help="New directory for the packed checkpoint.")],
    source: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face checkpoint: a directory, a hub id, or `tiny`, which comes with resq.",
            show_default="tiny where --calibration is left out too",
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=f"Method: {', '.join(RECIPE_NAMES)}, or a .toml or .json file. `resq recipes` says what they do.",
            autocompletion=lambda: list(RECIPE_NAMES),
        ),
    ] = "resq",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text, .jsonl with `text` or `messages`, or `stdlib`, the sources of Python's library. May be "
            "repeated.",
            show_default="none, for tiny stdlib",
        ),
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
        float | None, typer.Option(help="Bits of lm_head: 16, 8 or 4.5.", show_default="the recipe's, 16")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied lm_head a matrix of its own.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of rotations and of the choice of windows.")
    ] = 0,
    device: Annotated[str, typer.Option(help="What computes: cpu, or cuda for an NVIDIA card.")] = "cpu",
    json_output: JsonOption = False,
) -> None:
    """Quantize a checkpoint and write it packed.

    For example: `resq quantize path/to/llama --calibration wiki.train.raw --out llama-resq`
    """
    from resq.api import quantize as run

    if source is None:
        if calibration:
            raise InputError(f"no source was given; name a checkpoint directory, a hub id or {MODEL}")
        source = MODEL
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
            device=device,
            progress=progress,
        )
    if json_output:
        rows = [asdict(report) for report in result.linears]
        print(json.dumps({"checkpoint": str(result.directory), "seconds": result.seconds, "linears": rows}))
        return
    show.quantized(result)


@app.command("eval")
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="16-bit sources and packed checkpoints, side by side.")],
    text: Annotated[
        Path,
        typer.Option(help="UTF-8 text, .jsonl, or `stdlib`: files of Python's library that calibration never sees."),
    ],
    window_length: Annotated[
        int | None, typer.Option(help="Tokens per non-overlapping window.", show_default="2048 or the shortest context")
    ] = None,
    wikitext: Annotated[
        bool,
        typer.Option("--wikitext", help="The text is a WikiText split: join its rows by blank lines, as papers do."),
    ] = False,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Perplexity of checkpoints on a text, side by side.

    Differences are to the first one named, with a paired 95 % interval. When that is a 16-bit source, so are the KL
    divergence and the share of tokens that both find most probable.

    For example: `resq eval path/to/llama llama-resq --text wiki.test.raw --wikitext`
    """
    from resq.measure.evaluate import evaluate as run

    with bars() as progress:
        rows = run(
            checkpoints, text, window_length=window_length, wikitext=wikitext, backend=backend, progress=progress
        )
    if json_output:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
        return
    show.evaluated(rows)


@app.command()
def compare(
    out_dir: Annotated[Path, typer.Option("--out", help="Directory of the comparison; a later call goes on in it.")],
    source: Annotated[str, typer.Argument(help="Hugging Face checkpoint: a directory, a hub id, or `tiny`.")] = MODEL,
    recipes: Annotated[
        str,
        typer.Option(
            help=f"`all`, or methods and recipe files separated by commas: {', '.join(RECIPE_NAMES)}.",
            autocompletion=lambda: ["all", *RECIPE_NAMES],
        ),
    ] = "all",
    bits: Annotated[
        str, typer.Option(help="Widths of the low band, such as 4,3.", show_default="each recipe's own")
    ] = "",
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seeds of rotations and windows, such as 0,1,2.")
    ] = "0",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="As in quantize. May be repeated.", show_default="none, for tiny stdlib"),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Evaluation text: UTF-8, .jsonl or `stdlib`.", show_default="none, for tiny stdlib"),
    ] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    rounding_windows: Annotated[
        int | None, typer.Option(help="How many of them GPTQ uses.", show_default="128 or all")
    ] = None,
    window_length: Annotated[
        int | None,
        typer.Option(help="Tokens per window of calibration and evaluation.", show_default="2048 or the context"),
    ] = None,
    evaluation_windows: Annotated[
        int | None, typer.Option(help="Windows to evaluate, evenly spread over the text.", show_default="all")
    ] = None,
    wikitext: Annotated[
        bool, typer.Option("--wikitext", help="--text is a WikiText split: join its rows by blank lines.")
    ] = False,
    head_bits: Annotated[
        float | None, typer.Option(help="Bits of lm_head: 16, 8 or 4.5.", show_default="the recipe's, 16")
    ] = None,
    speed_rounds: Annotated[
        int, typer.Option(min=0, help="Rounds of prefill. With 0 no checkpoint is kept to be timed.")
    ] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Cases at once, which share the threads.")] = 1,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the packed models in DIR/cases/*/checkpoint.")
    ] = False,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Recipes side by side on a model of yours: perplexity, KL divergence, true bits, bytes, time, memory, speed.

    What is finished is kept: after Ctrl-C, or with more recipes, the same command goes on.

    For example: `resq compare path/to/llama --recipes all --bits 4,3 --calibration wiki.train.raw --text wiki.test.raw
    --wikitext --out comparison`
    """
    from resq.compare import ROW, Plan
    from resq.compare import compare as run
    from resq.ptq.recipes import RECIPES

    if text is None:
        if source != MODEL:
            raise InputError("no evaluation text was given; name one with --text, or stdlib for a first try")
        text = Path(TEXT)
    names = words(recipes)
    plan = Plan(
        source=source,
        text=str(text),
        recipes=tuple(dict.fromkeys(each for name in names for each in (RECIPES if name == "all" else (name,)))),
        bits=tuple(numbers("--bits", bits)) or (None,),
        seeds=tuple(numbers("--seeds", seeds)),
        calibration=tuple(map(str, calibration or [])),
        windows=windows,
        rounding_windows=rounding_windows,
        window_length=window_length,
        evaluation_windows=evaluation_windows,
        head_bits=head_bits,
        wikitext=wikitext,
        backend=backend,
        speed_rounds=speed_rounds,
        at_once=jobs,
        keep_checkpoints=keep_checkpoints,
    )
    with bars() as progress:
        found = run(plan, out_dir, progress=progress, tell=lambda line: err.print(line, soft_wrap=True))
    if json_output:
        print(
            json.dumps({"directory": str(out_dir), "rows": [ROW.dump_python(row, mode="json") for row in found.rows]})
        )
    else:
        show.compared(found.rows)
    if len(found.failed) == len(found.rows) - 1:
        raise InputError(f"no case could be made: {found.failed[0].failed}")
    if not json_output:
        show.out.print(f"\nEverything is in {out_dir}. Next: resq report {out_dir}", soft_wrap=True)


def words(given: str) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in given.split(",") if word.strip()]


def numbers(option: str, given: str) -> list[int]:
    """Whole numbers separated by commas. Raises InputError for something else."""
    try:
        return [int(word) for word in words(given)]
    except ValueError as error:
        raise InputError(f"{option} {given!r} is no list of whole numbers; write it as 4,3") from error


class Undecided(StrEnum):
    """What a criterion counts as that the text does not decide."""

    FAIL = "fail"
    PASS = "pass"


@app.command()
def gate(
    directory: Annotated[str, typer.Argument(help="A packed checkpoint: a directory or a hub id.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text, .jsonl, or `stdlib`.")],
    max_ppl: Annotated[
        str | None, typer.Option(help="Perplexity at most so far above 16 bit, such as +3%.", show_default="any")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="KL divergence from 16 bit at most, nats per token, such as 0.05.", show_default="any"),
    ] = None,
    min_agreement: Annotated[
        str | None,
        typer.Option(help="Share of tokens with 16 bit's most probable one at least, such as 98%.", show_default="any"),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The 16-bit original.", show_default="the source that the checkpoint names")
    ] = None,
    undecided: Annotated[
        Undecided, typer.Option(help="What counts where the interval straddles the bound: fail or pass.")
    ] = Undecided.FAIL,
    window_length: Annotated[
        int | None, typer.Option(help="Tokens per non-overlapping window.", show_default="2048 or the context")
    ] = None,
    wikitext: Annotated[
        bool, typer.Option("--wikitext", help="The text is a WikiText split: join its rows by blank lines.")
    ] = False,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Is a packed checkpoint as close to 16 bit as asked? For scripts: exit code 0 when it is, 3 when not.

    A criterion passes when its whole one-sided 95 % interval (bootstrap over windows, paired with 16 bit) satisfies it,
    and fails when none of it does; in between the text is too short to tell.

    For example: `resq gate llama-resq --text wiki.test.raw --wikitext --max-ppl +3% --max-kl 0.05 --min-agreement 98%`
    """
    from resq.measure.gate import criteria
    from resq.measure.gate import gate as run

    wanted = criteria(max_ppl, max_kl, min_agreement)
    with bars() as progress:
        report = run(
            directory,
            text,
            wanted,
            against=against,
            window_length=window_length,
            wikitext=wikitext,
            backend=backend,
            progress=progress,
        )
    passed = report.passed(undecided=undecided is Undecided.PASS)
    if json_output:
        print(json.dumps({"passed": passed, **asdict(report)}))
    else:
        show.judged(report, passed)
    if not passed:
        sys.exit(NOT_GOOD_ENOUGH)


@app.command()
def generate(
    directory: Annotated[str, typer.Argument(help="A packed checkpoint: a directory or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 picks the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of sampling.")] = 0,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Continue a prompt, streamed as it is made.

    For example: `resq generate llama-resq "Once upon a time" --temperature 0.7`
    """
    from resq.runtime.generate import Sampling
    from resq.runtime.load import load

    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {max_new_tokens}; at least 1 is needed")
    sampling = Sampling(temperature, top_p, seed)
    with bars() as progress:
        model = load(directory, backend=backend, progress=progress)
    pieces = model.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling)
    if json_output:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}))
        return
    show.stream(prompt, pieces)
    if max_new_tokens > model.room(prompt):
        err.print(
            f"the context holds {model.shape.max_positions} tokens: at most {model.room(prompt)} after this prompt"
        )


class Device(StrEnum):
    """Where speed is measured."""

    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def bench(
    directory: Annotated[Path | None, typer.Argument(help="A packed checkpoint.", show_default="see --shape")] = None,
    shape: Annotated[
        str | None, typer.Option(help="A published model's sizes with random weights, such as llama-3.2-1b.")
    ] = None,
    device: Annotated[
        Device, typer.Option(help="cuda: one decoder block of a --shape on an NVIDIA card, beside torch's.")
    ] = Device.CPU,
    recipe: Annotated[
        str, typer.Option(help="Recipe of a --shape.", autocompletion=lambda: list(RECIPE_NAMES))
    ] = "resq",
    head_bits: Annotated[
        float | None, typer.Option(help="Bits of a --shape's lm_head: 16, 8 or 4.5.", show_default="8")
    ] = None,
    prefill: Annotated[
        list[int] | None,
        typer.Option(help="Prompt length. May be repeated.", show_default="512; cuda: 512, 2048, 8192"),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Decoding batch. May be repeated.", show_default="1; cuda: 1, 16, 64")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens in the cache while decoding. May be repeated with cuda.", show_default="512; cuda: 1024, 4096"
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Peers timed in the same run, separated by commas: torch-bf16, openvino, openvino-f32dq, llama.cpp, "
            "llama.cpp-q8_0 (pip install 'resq-llm[bench]'), or other recipes. cuda: uniform-4, torch-bf16, "
            "torch-bf16-compiled, torch-int8, torch-int8-compiled.",
            show_default="none; cuda: uniform-4, torch-bf16, torch-int8",
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Measured rounds; everything runs once in each.", show_default="5; cuda: 7")
    ] = None,
    capture_prefill: Annotated[
        bool, typer.Option("--capture-prefill", help="cuda: prefill as a CUDA graph, as decoding is.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads.", show_default="one per core")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Append rows to this .jsonl file.")] = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Tokens per second of prefill and decoding, operator by operator, beside this machine's limits and beside peers.

    For example: `resq bench --shape llama-3.2-1b --prefill 512 --batch 1 --batch 8 --against torch-bf16,openvino`

    On a card: `resq bench --device cuda --shape llama-3.1-8b`
    """
    from resq.measure.rows import check_appendable

    if out_file is not None:
        check_appendable(out_file)
    given: dict[str, Any] = {
        "prefill": None if prefill is None else tuple(prefill),
        "batches": None if batch is None else tuple(batch),
        "against": None if against is None else tuple(words(against)),
        "rounds": rounds,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if device is Device.CUDA:
        other = {"a checkpoint": directory, "--head-bits": head_bits, "--threads": threads, "--backend": backend}
        if wrong := [name for name, value in other.items() if value is not None]:
            raise InputError(f"--device cuda times one block of a --shape and takes no {wrong[0]}; leave it out")
        if shape is None:
            raise InputError("--device cuda needs a --shape, such as llama-3.1-8b")
        from resq.measure.gpu.bench import BlockPlan, bench_block, save_block

        if context is not None:
            given["contexts"] = tuple(context)
        block = BlockPlan(shape, recipe, capture_prefill=capture_prefill, **given)
        with bars() as progress:
            measured = bench_block(block, progress=progress)
        if out_file is not None:
            save_block(measured, block, out_file)
        print(json.dumps({"rows": measured.rows()})) if json_output else show.block_timed(measured)
        return
    from resq.measure.bench import Plan, save
    from resq.measure.bench import bench as run

    if capture_prefill or (context is not None and len(context) > 1):
        raise InputError("--capture-prefill and several contexts are for --device cuda; leave them out")
    if context is not None:
        given["context"] = context[0]
    plan = Plan(
        checkpoint=directory,
        shape=shape,
        recipe=recipe,
        head_bits=8 if head_bits is None else head_bits,
        backend=backend,
        threads=threads,
        **given,
    )
    with bars() as progress:
        report = run(plan, progress=progress)
    if out_file is not None:
        save(report, plan, out_file)
    if json_output:
        print(json.dumps({"rows": report.rows()}))
        return
    show.timed(report)


@app.command()
def inspect(
    directory: Annotated[
        str | None, typer.Argument(help="A packed checkpoint: a directory or a hub id.", show_default="see --system")
    ] = None,
    system: Annotated[bool, typer.Option("--system", help="This machine: what the kernels use, and why.")] = False,
    json_output: JsonOption = False,
) -> None:
    """What a packed checkpoint holds: recipe, bands, true bits and bytes. With --system, what runs on this machine."""
    if (directory is None) != system:
        raise InputError("name a packed checkpoint or give --system, one of them")
    if directory is None:
        from resq.backends.choose import describe_system

        facts = describe_system()
        print(json.dumps(facts)) if json_output else show.system(facts)
        return
    from resq.measure.ledger import ledger
    from resq.runtime.load import Opened

    opened = Opened(directory)
    manifest, book = opened.manifest, ledger(opened.manifest, opened.shape.head_dim)
    if json_output:
        print(json.dumps({"manifest": manifest.model_dump(), "ledger": asdict(book)}))
        return
    show.inspected(directory, manifest, book)


@app.command()
def recipes(
    ablations: Annotated[
        bool, typer.Option("--ablations", help="The recipes with single choices undone or added, too.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """The methods that --recipe takes beside .toml and .json files, and what each rounds to how many bits."""
    from resq.ptq.ablations import ABLATIONS
    from resq.ptq.recipes import RECIPES

    found = {"recipes": RECIPES, **({"ablations": ABLATIONS} if ablations else {})}
    if json_output:
        told = {
            kind: [{**recipe.describe(), "about": recipe.about} for recipe in each.values()]
            for kind, each in found.items()
        }
        print(json.dumps(told))
        return
    show.listed(*(list(each.values()) for each in found.values()))


@app.command()
def demo(
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="New directory that keeps the packed checkpoints.", show_default="none kept"),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Every recipe on the tiny model that comes with the package: quantize, evaluate, compare, generate.

    Takes about three minutes on two cores. Model and text are on this machine already.
    """
    from resq import demo as run
    from resq.compare import ROW

    with run.workplace(out_dir) as work:
        if not json_output:
            show.out.print(run.INTRODUCTION)
        with bars() as progress:
            found = run.run(work, progress=progress)
        if json_output:
            print(json.dumps({"rows": [ROW.dump_python(row, mode="json") for row in found.rows]}))
        else:
            show.compared(found.rows)
            show.out.print("\n" + run.conclusion(found))
            show.out.print("\nThe packed 4-bit ResQ model continues a method's first line:\n")
            show.stream(run.PROMPT, run.continuation(found.checkpoint(run.SHOWN)))
    if out_dir is not None and not json_output:
        directory = out_dir / "cases" / run.SHOWN / "checkpoint"
        show.out.print(f"\nKept in {out_dir}. Try:", soft_wrap=True)
        for line in (f"inspect {directory}", f'generate {directory} "import "'):
            show.out.print(f"  {sys.argv[0]} {line}", soft_wrap=True)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="What resq compare wrote.")],
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="The page; Markdown goes beside it.", show_default="DIRECTORY/report.html"),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    json_output: JsonOption = False,
) -> None:
    """A comparison as one page with figures: what is lost, where, and why.

    Diagnostics are computed once and kept in the directory.

    For example: `resq compare tiny --out compared --keep-checkpoints`, then `resq report compared --open`
    """
    import webbrowser

    from resq.report.report import report as run

    with bars() as progress:
        written = run(directory, out_file, progress=progress)
    if json_output:
        print(json.dumps({"html": str(written.html), "markdown": str(written.markdown), "verdict": written.verdict}))
    else:
        show.out.print(written.verdict)
        show.out.print(f"\nWritten: {written.html} and {written.markdown}", soft_wrap=True)
    if open_page and not webbrowser.open(written.html.resolve().as_uri()):
        err.print(f"no browser was found; open {written.html} by hand", soft_wrap=True)


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
        app(standalone_mode=False)
    except TyperException as error:  # what was typed: one line instead of typer's box
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if not message:  # no command at all: the help was printed
            sys.exit(2)
        fail(f"{message.rstrip('.')}; see resq --help")
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions")
    except BaseException:
        if not _arrived:
            raise
        err.print("interrupted; nothing half-written was kept")
        sys.exit(130)
