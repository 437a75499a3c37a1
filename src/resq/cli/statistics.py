"""Pass 1 as files: collecting statistics on one machine or many, and merging them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resq.cli.app import RECIPE_NAMES, ActivationsOption, JsonOption, WindowsOption, app
from resq.errors import InputError
from resq.processes import return_blocks
from resq.show import bars, out

if TYPE_CHECKING:
    from resq.ptq.statistics_file import Header


def parsed_shard(given: str) -> tuple[int, int]:
    """`3/16` as (3, 16). Raises InputError for something else."""
    number, _, of = given.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise InputError(f"--shard {given!r} is no shard; write 3/16 for the third of 16")
    return int(number), int(of)


def _tell(file: Path, header: Header, json_output: bool) -> None:
    """What a file holds, what is missing, and what to do next."""
    from resq.ptq.statistics_file import windows_in_words

    windows, missing = header.calibration.windows, header.missing
    if json_output:
        runs = [[start + 1, stop] for start, stop in (header.span, *missing)]
        print(json.dumps({"statistics": str(file), "windows": runs[0], "of": windows, "missing": runs[1:]}))
        return
    held = f"{file}: {', '.join(header.statistics)} of {windows_in_words(header.span)} of {windows}"
    if missing:
        lacking = " and ".join(windows_in_words(run) for run in missing)
        out.print(f"{held}; missing: {lacking}. Next: resq merge, with their shards", soft_wrap=True)
    else:
        out.print(f"{held}, the whole. Next: resq quantize … --statistics {file}", soft_wrap=True)


@app.command()
def calibrate(
    source: Annotated[str, typer.Argument(help="Hugging Face checkpoint: a directory, a hub id, or `tiny`.")],
    out_file: Annotated[Path, typer.Option("--out", help="New .safetensors file for the statistics.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="For the bases of this recipe, a name or a file. May be repeated: for all of them.",
            autocompletion=lambda: list(RECIPE_NAMES),
            show_default="resq",
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="As for `resq quantize`. May be repeated.", show_default="none, for tiny stdlib"),
    ] = None,
    windows: WindowsOption = 128,
    window_length: Annotated[
        int | None, typer.Option(help="Tokens per window.", show_default="2048 or the context")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="Which part of the windows: 3/16 is the third of 16, for as many machines.")
    ] = "1/1",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the choice of windows.")] = 0,
    device: Annotated[str, typer.Option(help="What computes: cpu, or cuda for an NVIDIA card.")] = "cpu",
    activations: ActivationsOption = "device",
    json_output: JsonOption = False,
) -> None:
    """Collect what the bases are fitted on into a file that `resq quantize --statistics` takes, whole or by shards.

    For example: `resq calibrate path/to/llama --calibration wiki.train.raw --shard 3/16 --out stats-3.safetensors`
    """
    from resq.api import calibrate as run

    part = parsed_shard(shard)
    return_blocks()
    with bars() as progress:
        header = run(
            source,
            out_file,
            recipe=recipe or ["resq"],
            calibration=calibration or [],
            windows=windows,
            window_length=window_length,
            shard=part,
            seed=seed,
            device=device,
            activations=activations,
            progress=progress,
        )
    _tell(out_file, header, json_output)


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(help="Files of `resq calibrate --shard`, in any order.")],
    out_file: Annotated[Path, typer.Option("--out", help="New .safetensors file for their sum.")],
    json_output: JsonOption = False,
) -> None:
    """Merge shards of statistics: the same bits as one run over all their windows.

    Shards of different models or calibrations, given twice, or with a hole between them are refused.

    For example: `resq merge stats-*.safetensors --out stats.safetensors`
    """
    from resq.api import merge as run

    with bars() as progress:
        header = run(shards, out_file, progress=progress)
    _tell(out_file, header, json_output)
