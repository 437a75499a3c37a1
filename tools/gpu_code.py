"""Compile every kernel of a decoder block for cards that are not here, and write results/gpu-code.jsonl anew.

A row per kernel and specialization: registers, spills, local and shared memory, tensor-core instructions. What is
compiled is what would be launched for the shape on that card. And a row per shape: bytes held of weights and of a
token's keys and values, beside bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from resq.backends.triton import TRITON
from resq.backends.triton.aot import compiling
from resq.backends.triton.device import TARGETS
from resq.measure.rows import provenance, write_rows
from resq.measure.shapes import shape_named
from resq.measure.synthetic import one_layer
from resq.models import decoder
from resq.models.decoder import Layer, Positions, Shape
from resq.ptq.recipes import recipe_named

SHAPES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-7b", "llama-3.1-70b")
# (rows, tokens of each): a prefill, and a step of decoding for one row and for a batch.
CALLS = ((1, 512), (1, 1), (16, 1), (64, 1))
CONTEXT = 256


def compiled(shape: Shape, layer: Layer, capability: int) -> Iterator[dict[str, Any]]:
    """Rows of one decoder block on one kind of card."""
    for batch, tokens in CALLS:
        past = 0 if tokens > 1 else CONTEXT
        with compiling(capability) as made, torch.inference_mode():
            cache: Any = TRITON.cache(layer.heads)
            cache.reserve(batch, shape.kv_heads, shape.head_dim, past + tokens)
            cache.advance(past)
            at = Positions.following(shape, past, batch, tokens)
            decoder.forward_layer(TRITON, shape, layer, torch.zeros(batch, tokens, shape.hidden), at, cache)
        for each in made:
            yield {"batch": batch, "tokens": tokens, **asdict(each)}


def memory(shape: Shape, layer: Layer) -> dict[str, Any]:
    """Bytes of a prepacked block and of a token of its cache, and the same in bfloat16."""
    cache: Any = TRITON.cache(layer.heads)
    cache.reserve(1, shape.kv_heads, shape.head_dim, 1)
    cache.advance(1)
    return {
        "weights": sum(weight.nbytes for weight in layer.linears.values()),
        "weights_16bit": sum(2 * out * size for out, size in shape.sizes().values()),
        "kv": cache.nbytes(),
        "kv_16bit": 4 * shape.kv_heads * shape.head_dim,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--capabilities", nargs="*", type=int, default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("results/gpu-code.jsonl"))
    given = parser.parse_args()
    found, made_with = [], provenance()
    for name in given.shapes:
        shape, layer = one_layer(shape_named(name), recipe_named("resq"))
        with torch.inference_mode():
            layer = layer.prepacked(TRITON)
        found.append({"kind": "gpu-memory", "shape": name, "head_dim": shape.head_dim, **memory(shape, layer)})
        for capability in given.capabilities:
            rows = [{"kind": "gpu-code", "shape": name, **row} for row in compiled(shape, layer, capability)]
            found += rows
            spilling = sum(row["spill_stores"] > 0 for row in rows)
            print(f"{name}, sm_{capability}: {len(rows)} kernels compiled, {spilling} spill", flush=True)
    write_rows(given.out, [{**row, **made_with} for row in found])


if __name__ == "__main__":
    main()
