"""Linears compiled for cards that are not here, in another process: this one's kernels are the interpreter's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tests.backends.triton.cards import CARDS, SHARED, SWEPT

PROGRAM = """
import json, sys
from dataclasses import asdict
import torch
from resq.backends.dense import DenseWeight
from resq.backends.triton import linear
from resq.backends.triton.aot import compiling
from resq.backends.triton.configs import using
from resq.backends.triton.rows import Rows
from resq.numerics.bands import Bands

CPU = torch.device("cpu")


def packed(bands, groups=1, out=4096):
    panels = linear._panels(bands, bands, list(range(len(bands))), groups)
    width = panels[-1].base + groups * panels[-1].length
    parts = torch.empty(out, width, dtype=torch.int8), torch.empty(len(panels) * groups, out, dtype=torch.int32)
    return linear.PackedWeight(*parts, torch.empty(len(panels), out), None, bands.size, bands, groups, panels)


def run(capability, rows, kind, pairs, groups, use):
    bands = Bands.of(*pairs)
    with compiling(capability) as made:
        if kind == "dense":
            weight = DenseWeight(torch.empty(4096, bands.size, dtype=torch.bfloat16), None)
        else:
            weight = packed(bands, groups)
        x = torch.empty(rows, bands.size)
        if kind == "packed":
            x = Rows(torch.Size([rows]), bands.size, bands, groups, CPU)
        with using("packed_linear", **use):
            linear.linears(x, [weight], torch.empty(rows, weight.out))
    (only,) = made
    return asdict(only)


print(json.dumps([run(*case) for case in json.loads(sys.argv[1])]))
"""
LLAMA, DOWN = [(4, 3584), (8, 512)], [(4, 14336)]
MERGED = {"tokens": 128, "channels": 128, "block": 64, "warps": 8, "merge": True}
Case = tuple[int, int, str, list[tuple[int, int]], int, dict[str, Any]]


def compiled(cases: list[Case]) -> list[dict[str, Any]]:
    """What the compiler made of (capability, rows, kind of linear, bands, groups, choices) each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def holds(case: Case, made: dict[str, Any]) -> None:
    """No register is spilled where products are taken, and none at all but after the sums of a tile of 128 tokens;
    shared memory suffices, and products are those of tensor cores on bytes."""
    capability, _, kind, *_ = case
    assert made["loop_spills"] == 0, case
    if made["constants"]["BM"] < 128:
        spilled = made["stack"], made["spill_stores"], made["spill_loads"]
        assert spilled == (0, 0, 0), case
    assert made["shared"] <= SHARED[capability], case
    counts = made["instructions"]
    if kind == "packed":
        assert counts.get("IGMMA" if capability >= 90 else "IMMA", 0) > 0, case
        assert not counts.get("IDP"), case
        assert counts["LDGSTS"] > 0, case


@pytest.mark.parametrize("capability", CARDS)
def test_linears_of_a_block_take_tensor_cores_and_spill_nothing(capability: int) -> None:
    cases: list[Case] = [
        (capability, 16, "packed", LLAMA, 1, {}),
        (capability, 2048, "packed", LLAMA, 1, {}),
    ]
    for case, made in zip(cases, compiled(cases), strict=True):
        holds(case, made)
        assert (made["constants"]["SPLIT"] > 1) == (case[1] == 16)


THREE = [(2, 448), (4, 2688), (6, 448)]
SWEEP: dict[str, Callable[[int], Case]] = {
    "32 rows": lambda capability: (capability, 32, "packed", LLAMA, 1, {}),
    "64 rows": lambda capability: (capability, 64, "packed", LLAMA, 1, {}),
    "128 rows": lambda capability: (capability, 128, "packed", LLAMA, 1, {}),
    "down, 1 row": lambda capability: (capability, 1, "packed", DOWN, 1, {}),
    "down, 2048 rows": lambda capability: (capability, 2048, "packed", DOWN, 1, {}),
    "a range a head, 1 row": lambda capability: (capability, 1, "packed", LLAMA, 32, {}),
    "a range a head, 2048 rows": lambda capability: (capability, 2048, "packed", LLAMA, 32, {}),
    "half granules": lambda capability: (capability, 2048, "packed", [(4, 3136), (8, 448)], 1, {}),
    "three bands": lambda capability: (capability, 2048, "packed", THREE, 1, {}),
    "merged": lambda capability: (capability, 2048, "packed", LLAMA, 1, MERGED),
    "float, 1 row": lambda capability: (capability, 1, "float", LLAMA, 1, {}),
    "float, 2048 rows": lambda capability: (capability, 2048, "float", LLAMA, 1, {}),
    "dense, 1 row": lambda capability: (capability, 1, "dense", LLAMA, 1, {}),
    "dense, 4 rows": lambda capability: (capability, 4, "dense", LLAMA, 1, {}),
    "dense, 16 rows": lambda capability: (capability, 16, "dense", LLAMA, 1, {}),
    "dense, 2048 rows": lambda capability: (capability, 2048, "dense", LLAMA, 1, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SWEPT)
def test_every_kernel_of_linears_spills_nothing(capability: int) -> None:
    cases = [case(capability) for case in SWEEP.values()]
    for case, made in zip(cases, compiled(cases), strict=True):
        holds(case, made)
