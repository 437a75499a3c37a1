"""Activation kernels compiled for cards that are not here, in another process: ours are the interpreter's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tests.backends.triton.cards import SHARED, SWEPT

PROGRAM = """
import json, sys
from dataclasses import asdict
import torch
from resq.backends.triton import activation
from resq.backends.triton.aot import compiling
from resq.numerics.bands import Bands
from resq.numerics.formats import ActivationFormat, Norm
from resq.numerics.hadamard import plan
from resq.numerics.maps import Hadamard, Permutation

capability, wanted = json.loads(sys.argv[1])
with compiling(capability) as made:
    for kind, size, inner in wanted:
        x = torch.empty(1, 16, size * inner)
        bands = Bands.of((4, size * inner * 7 // 8), (8, size * inner // 8))
        whole = Bands.of((4, size * inner))
        if kind == "norm":
            activation.norm_quantize(x, Norm(1e-5, torch.ones(size)), ActivationFormat(bands=bands))
        elif kind == "gathered heads":
            format = ActivationFormat(Permutation(torch.arange(size * inner)), bands, groups=size)
            activation.gather_quantize(x, format)
        elif kind == "silu":
            activation.act_hadamard_quantize(x, x, ActivationFormat(bands=whole))
        elif inner == 1:
            activation.act_hadamard_quantize(x, x, ActivationFormat(Hadamard(plan(size)), whole))
        else:
            activation.gather_quantize(x, ActivationFormat(Hadamard(plan(size), inner), whole))
print(json.dumps([asdict(each) for each in made]))
"""


def compiled(capability: int, *wanted: tuple[str, int, int]) -> list[dict[str, Any]]:
    """What the compiler made of (operator, coordinates or heads, coordinates of a head) each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps([capability, wanted])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def local_bytes(each: dict[str, Any]) -> int:
    """Bytes of local memory that a thread stores in vain."""
    return max(each["stack"], each["spill_stores"], each["spill_loads"])


@pytest.mark.parametrize("capability", [80, 90])
def test_rows_are_rounded_in_registers(capability: int) -> None:
    # Inputs of q, k, v and o of Llama-3-8B, of its down where there is no map.
    made = compiled(capability, ("norm", 4096, 1), ("gathered heads", 32, 128), ("silu", 14336, 1))
    assert len(made) == 3
    assert all(local_bytes(each) == 0 for each in made)
    # Two programs of a row on each multiprocessor at least, so that one computes while another waits for memory.
    assert all(each["registers"] * each["warps"] * 32 <= 65536 // 2 for each in made)


@pytest.mark.parametrize("capability", [80, 90])
def test_hadamard_maps_turn_in_registers_and_on_tensor_cores(capability: int) -> None:
    (made,) = compiled(capability, ("hadamard", 4096, 1))
    assert made["kernel"] == "turn_rows"
    assert made["instructions"]["HGMMA" if capability >= 90 else "HMMA"] > 0
    assert local_bytes(made) == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", SWEPT)
def test_hadamard_maps_of_published_sizes_compile(capability: int) -> None:
    # down of Llama-3.2-1B, Llama-3-8B, Llama-2-7B, Qwen2.5-7B, -0.5B, -1.5B; heads of Llama-3-8B.
    sizes = [(8192, 1), (14336, 1), (11008, 1), (18944, 1), (4864, 1), (8960, 1), (32, 128)]
    made = compiled(capability, *(("hadamard", *size) for size in sizes))
    assert all(each["shared"] <= SHARED[capability] for each in made)
    assert all(local_bytes(each) == 0 for each in made)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86])
def test_the_largest_rows_compile(capability: int) -> None:
    # Llama-3-70B: 64 values a thread leave few registers.
    made = compiled(capability, ("hadamard", 28672, 1))
    assert [each["kernel"] for each in made] == ["factor_rows", "turn_rows"]
    assert all(each["shared"] <= SHARED[capability] for each in made)
    assert all(local_bytes(each) <= 128 for each in made)
