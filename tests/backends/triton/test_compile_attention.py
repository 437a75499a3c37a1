"""Attention and RoPE compiled for cards that are not here, at the sizes of published models: what fits in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tests.backends.triton.cards import CARDS, SWEPT

SCRIPT = """
import dataclasses, json, sys
import torch
from resq.backends.triton import TRITON
from resq.backends.triton.aot import compiling
from resq.numerics.bands import Bands
from resq.numerics.formats import ActivationFormat, HeadFormats
from resq.numerics.maps import Dense

capability, cases = json.loads(sys.argv[1])
found = []
for size, heads, kv_heads, batch, tokens, pairs, rope in cases:
    bands = Bands.of(*pairs) if pairs else Bands.of((4, size * 7 // 8), (8, size // 8))
    format = ActivationFormat(bands=bands, scale_dtype=torch.float16)
    turned = Dense(torch.eye(size))
    formats = HeadFormats(ActivationFormat(turned), dataclasses.replace(format, map=turned), format)
    cache = TRITON.cache(formats)
    with compiling(capability) as made:
        q, k, v = (torch.empty(batch, tokens, n, size) for n in (heads, kv_heads, kv_heads))
        angles = torch.empty(batch, tokens, size)
        cache.reserve(batch, kv_heads, size, 1024)
        if rope:
            TRITON.rope_project_append(q, k, v, angles, angles, formats, cache)
            cache.read()
        cache.advance(1024 - cache.length)
        if tokens <= 8:
            TRITON.attend(q, cache, size**-0.5, None, None)
    for each in made:
        found.append(dataclasses.asdict(each) | {"case": [size, heads, kv_heads, batch, tokens]})
print(json.dumps(found))
"""


def compiled(capability: int, *cases: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every kernel of (head, heads, kv heads, batch, tokens, bands or None, with RoPE), in a process without the
    interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([capability, cases])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for each in found:
        print(
            f"sm_{capability} {each['case']} {each['kernel']}: {each['registers']} registers, {each['stack']} bytes of "
            f"stack, spills {each['spill_stores']}/{each['spill_loads']}, {each['shared']} bytes shared"
        )
    return found


def assert_in_registers(found: list[dict[str, Any]], *kernels: str) -> None:
    for each in found:
        if each["kernel"] in kernels:
            assert (each["stack"], each["spill_stores"], each["spill_loads"]) == (0, 0, 0), each


@pytest.mark.parametrize("capability", CARDS)
def test_decoding_attention_runs_in_registers_on_tensor_cores(capability: int) -> None:
    """Llama-3-8B's and Llama-3.2-1B's heads, in 4 and 8 bits."""
    found = compiled(capability, (128, 32, 8, 1, 1, None, False), (64, 32, 8, 16, 1, None, False))
    assert_in_registers(found, "decode", "merge")
    assert [each["kernel"] for each in found].count("decode") == 2
    for each in found:
        if each["kernel"] == "decode":
            assert each["instructions"]["HMMA"] > 0
            # Bytes go to shared memory while the block before is multiplied.
            assert each["instructions"]["LDGSTS"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", SWEPT)
def test_other_heads_compile_and_the_tiles_of_a_step_run_in_registers(capability: int) -> None:
    """RoPE of a decoding step and of a prompt; several new tokens, Qwen2.5-7B's 7 query heads to one, three bands."""
    found = compiled(
        capability,
        (128, 32, 8, 1, 1, None, True),
        (64, 32, 8, 1, 1, None, True),
        (128, 64, 8, 1, 2, None, False),
        (128, 28, 4, 1, 4, None, False),
        (64, 14, 2, 1, 8, None, False),
        (128, 32, 8, 1, 1, ((2, 16), (4, 96), (6, 16)), False),
        (128, 32, 8, 1, 1, ((4, 128),), False),
        (96, 32, 32, 1, 1, None, False),
        (256, 8, 1, 1, 1, None, False),
        (128, 32, 8, 1, 512, None, True),
    )
    assert_in_registers([each for each in found if each["case"][4] == 1 and each["case"][0] <= 128], "rope_append")
    assert_in_registers([each for each in found if each["case"][0] in (64, 128)], "decode", "merge", "dequantize")
