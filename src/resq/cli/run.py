"""Running packed checkpoints, timing them, and looking into them."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from resq import show
from resq.cli.app import (
    RECIPE_NAMES,
    BackendOption,
    CheckpointArgument,
    JsonOption,
    app,
    words,
)
from resq.errors import InputError
from resq.show import bars, err


class Device(StrEnum):
    """Where speed is measured."""

    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def generate(
    directory: CheckpointArgument,
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
    quantizing: Annotated[
        bool, typer.Option("--quantizing", help="Quantizing instead: GPTQ of a --shape's down_proj, and pass 1.")
    ] = False,
    processes: Annotated[
        int, typer.Option(help="quantizing: a whole job by so many processes of one thread, beside one process.")
    ] = 1,
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
    if quantizing:
        other = {"a checkpoint": directory, "--context": context, "--head-bits": head_bits, "--backend": backend}
        other |= {"--device cuda": True if device is Device.CUDA else None, "--prefill": prefill, "--batch": batch}
        other |= {"--capture-prefill": capture_prefill or None, "--against": against}
        if wrong := [name for name, value in other.items() if value is not None]:
            raise InputError(f"--quantizing times parts of quantizing a --shape and takes no {wrong[0]}; leave it out")
        from resq.measure import quantizing as times

        work = times.QuantizingPlan(
            shape or "llama-3.2-1b",
            recipe,
            threads=threads,
            rounds=3 if rounds is None else rounds,
            processes=processes,
        )
        with bars() as progress:
            found = times.quantizing(work, progress=progress)
        if out_file is not None:
            times.save(found, work, out_file)
        print(json.dumps({"rows": [part.row() for part in found]})) if json_output else show.quantizing_timed(found)
        return
    if processes != 1:
        raise InputError("--processes is for --quantizing; add it, or leave --processes out")
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
