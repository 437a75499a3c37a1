"""What quantizing a model will take and give, without reading its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resq import show_plan
from resq.cli.app import RECIPE_NAMES, HeadBitsOption, JsonOption, RoundingWindowsOption, app

if TYPE_CHECKING:
    from resq.measure.plan import Plan


@app.command()
def plan(
    source: Annotated[
        str,
        typer.Argument(
            help="Hugging Face checkpoint: a directory, a config.json alone, a hub id (no weights are fetched), or "
            "`tiny`."
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option(help="As for `resq quantize`.", autocompletion=lambda: list(RECIPE_NAMES)),
    ] = "resq",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="The calibration texts: what is tokenized takes memory. May be repeated.",
            show_default="texts of many small documents",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="A file of `resq calibrate` or `resq merge` for the bases, instead of a forward pass.",
            show_default="collected",
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Calibration windows.", show_default="128 or those of --statistics")
    ] = None,
    rounding_windows: RoundingWindowsOption = None,
    window_length: Annotated[
        int | None,
        typer.Option(help="Tokens per window.", show_default="2048 or the context, or those of --statistics"),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits of the low band: 2, 3, 4 or 6.", show_default="the recipe's, 4")
    ] = None,
    head_bits: HeadBitsOption = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied lm_head a matrix of its own.")] = False,
    device: Annotated[str, typer.Option(help="What computes: cpu, or cuda for an NVIDIA card.")] = "cpu",
    activations: Annotated[
        str, typer.Option(help="Where the windows' hidden states lie: device, memory or disk.")
    ] = "device",
    context: Annotated[
        int | None, typer.Option(help="Tokens in the KV cache that is counted.", show_default="the model's context")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences in it.")] = 1,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Run the middle layer for real on a few windows and correct the estimate."),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Say what `resq quantize` with the same options will take and give: memory, disk, time, size, bits, support.

    No weights are read. Rates are measured here, in seconds; memory comes from sizes alone.

    For example: `resq plan path/to/llama --windows 128 --activations disk`
    """
    from resq.measure.plan_rehearse import rehearsed

    found = plan_of(
        source,
        recipe=recipe,
        calibration=calibration,
        statistics=statistics,
        windows=windows,
        rounding_windows=rounding_windows,
        window_length=window_length,
        bits=bits,
        head_bits=head_bits,
        untie=untie,
        device=device,
        activations=activations,
        context=context,
        batch=batch,
    )
    if rehearse:
        found = rehearsed(found)
    if json_output:
        print(json.dumps(found.record()))
    else:
        show_plan.planned(found)


def plan_of(
    source: str,
    *,
    recipe: str,
    calibration: Sequence[Path] | None,
    statistics: Path | None,
    windows: int | None,
    rounding_windows: int | None,
    window_length: int | None,
    bits: int | None,
    head_bits: float | None,
    untie: bool,
    device: str,
    activations: str,
    context: int | None = None,
    batch: int = 1,
) -> Plan:
    """The plan of what is typed."""
    from resq import inputs
    from resq.measure.plan import Asked, check_statistics, described, planned
    from resq.models.text import check_text
    from resq.ptq.statistics_file import read_header

    chosen, place = inputs.chosen_recipe(recipe, bits, head_bits), inputs.chosen_device(device)
    kept_at, model = inputs.chosen_activations(activations), described(source)
    if statistics is not None:
        header = read_header(statistics)
        windows, window_length = inputs.windows_of(str(statistics), header, chosen, windows, window_length)
        check_statistics(str(statistics), header, model, chosen)
    for file in calibration or ():
        check_text(file)
    sizes = [(file.suffix == ".jsonl", file.stat().st_size) for file in calibration or () if file.is_file()]
    asked = Asked(
        recipe=chosen,
        windows=windows,
        rounding_windows=rounding_windows,
        window_length=window_length,
        untie=untie,
        device=place,
        activations=kept_at,
        collected=statistics is not None,
        context=context,
        batch=batch,
        text=max((size for lines, size in sizes if not lines), default=None),
        documents=max((size for lines, size in sizes if lines), default=0),
    )
    return planned(model, asked)
