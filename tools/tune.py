"""What a change of a recipe is worth on validation text, before it becomes a recipe: rows for results/resq-plus.jsonl.

`python tools/tune.py NAME … [--bits 3]`. Weights are rounded as in a checkpoint, activations and cache straight through
in floating point; nothing is packed. Calibration: 128 windows of 256 tokens, 64 for rounding; 96 windows are evaluated.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq.backends.reference import dense, straight_through
from resq.measure.rows import append_row, provenance
from resq.models import decoder
from resq.models.source import Source
from resq.models.text import all_windows, load_tokenizer, sampled_windows
from resq.numerics.linear import DenseLinear
from resq.numerics.moments import Leaves
from resq.progress import silent
from resq.ptq.activations import Buffers
from resq.ptq.basis.fixed import GatherHeads, hadamard
from resq.ptq.basis.pca import pca, randomised_hadamard
from resq.ptq.clipping import ClipSearch
from resq.ptq.layers import Flow, round_layer
from resq.ptq.learning import learn_rotations
from resq.ptq.pipeline import Job, tuned_maps
from resq.ptq.placement import Placement
from resq.ptq.recipe import Recipe, Site
from resq.ptq.recipes import RESQ, RESQ_PLUS
from resq.ptq.rounding.gptq import Gptq
from resq.ptq.statistics import collect, in_dtype

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MODELS = ("llama-5m", "qwen2-5m")
LENGTH, WINDOWS, ROUNDING_WINDOWS, EVALUATED = 256, 128, 64, 96
EVERYWHERE = (Site.RESIDUAL, Site.VALUE, Site.QUERY_KEY)
CLIP = replace(RESQ, clipping=ClipSearch())
TRIED: dict[str, Recipe] = {
    "resq": RESQ,
    "clipped ranges": CLIP,
    "clipped, Hessians of rounded inputs": replace(CLIP, rounding=Gptq(sees_rounded=True)),
    "clipped, corrected 0.1": replace(CLIP, rounding=Gptq(sees_rounded=True, correction=0.1)),
    "clipped, corrected 1 (resq+)": RESQ_PLUS,
    "resq+, one range per head at o": replace(RESQ_PLUS, precision=replace(RESQ.precision, output_per_head=True)),
    "resq+, act-order": replace(RESQ_PLUS, rounding=Gptq(act_order=True, sees_rounded=True, correction=1.0)),
    "resq+, Hadamard inside bands": replace(
        RESQ_PLUS,
        basis=(
            pca(*EVERYWHERE, balance_heads=True, rotation=randomised_hadamard),
            GatherHeads(),
            hadamard(Site.MLP_HIDDEN),
        ),
    ),
    "rotations learned inside bands": replace(RESQ, tuning=(learn_rotations(*EVERYWHERE),)),
    "rotations learned across bands": replace(RESQ, tuning=(learn_rotations(*EVERYWHERE, whole=True),)),
}


@cache
def given(model: str) -> tuple[Source, Tensor, Tensor, list[Tensor]]:
    """The source, calibration and validation windows, and the source's log-probabilities on the latter."""
    source = Source.open(SHARED / "models" / model)
    tokenizer, texts = load_tokenizer(source.path), SHARED / "data" / "wikitext-2"
    tokens = sampled_windows(
        [texts / "wiki.train.first1MB.raw"], tokenizer, count=WINDOWS, length=LENGTH, seed=0
    ).tokens
    held = all_windows(texts / "wiki.valid.first100KB.raw", tokenizer, LENGTH, wikitext=True).tokens[:EVALUATED]
    layers = [in_dtype(source.layer(index), torch.float32) for index in range(source.shape.layers)]
    ends = source.ends()
    parts = [
        decoder.forward(dense(torch.float32), source.shape, ends, layers, part).log_softmax(-1)
        for part in held.split(8)
    ]
    return source, tokens, held, parts


def losses(recipe: Recipe, model: str) -> dict[str, float]:
    """Δ nats and KL per token to 16 bit on validation text."""
    source, tokens, held, base = given(model)
    shape, ops = source.shape, dense(torch.float32)
    moments = collect(source, ops, tokens, recipe.needs, silent)
    maps = tuned_maps(source, Job(recipe, tokens, ROUNDING_WINDOWS, 0, keep_tied=True), moments, silent).maps
    placement = Placement(shape, maps, recipe.precision, recipe.folds_norms)
    ends = placement.ends(source.ends(), keep_tied=True)
    table = ends.embed.to(torch.bfloat16)
    chosen, keep = tokens[:ROUNDING_WINDOWS], Buffers().keep
    hidden = keep((table[window[None]].float() for window in chosen), len(chosen))
    exact = keep((ends.embed[window[None]].float() for window in chosen), len(chosen))
    layers = []
    for index in range(shape.layers):
        layer = placement.layer(source.layer(index), index)
        stored, _ = round_layer(shape, layer, recipe, index, hidden, exact, Flow(Leaves(len(hidden))))
        layers.append(replace(stored, linears={role: linear.dense() for role, linear in stored.linears.items()}))
    ends = replace(ends, embed=table.float(), head=DenseLinear(table.float()))
    deltas, divergences = [], []
    for want, part in zip(base, held.split(8), strict=True):
        got = decoder.forward(straight_through(), shape, ends, layers, part).log_softmax(-1)
        divergences.append((want.exp() * (want - got)).sum(-1)[:, :-1].mean(dim=1))
        deltas.append((want - got)[:, :-1].gather(-1, part[:, 1:, None]).mean(dim=(1, 2)))
    return {"delta": float(torch.cat(deltas).mean()), "kl": float(torch.cat(divergences).mean())}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(TRIED), metavar="NAME", help=", ".join(TRIED))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "resq-plus.jsonl")
    args = parser.parse_args()
    for name in args.names:
        recipe = replace(TRIED[name], precision=TRIED[name].precision.with_low(args.bits))
        row: dict[str, Any] = {model: losses(recipe, model) for model in MODELS}
        append_row(args.out, {"tried": name, "bits": args.bits, **row, **provenance()})
        print(name, row, flush=True)


if __name__ == "__main__":
    main()
