"""Perplexity of every recipe on the trained models in ../shared: rows for results/accuracy.jsonl.

`python tools/accuracy.py [--models llama-5m,…] [--cases resq:4,rtn:3,…] [--out results/accuracy.jsonl]`
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

import resq
from resq.measure.perplexity import open_streamed, paired_interval, perplexity, window_nll
from resq.measure.rows import append_row, provenance
from resq.models.text import all_windows, load_tokenizer
from resq.ptq.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# rtn and quarot first: the others are compared with them.
CASES = (*(f"{recipe}:{bits}" for bits in (4, 3) for recipe in RECIPES), "resq:4:head8", "rtn:4:head8")
AGAINST = ("rtn", "quarot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama-5m,qwen2-5m")
    parser.add_argument("--cases", default=",".join(CASES), help="recipe, ablation or file:bits[:head8]")
    parser.add_argument("--seed", type=int, default=0)
    wiki = SHARED / "data" / "wikitext-2" / "wiki.train.first1MB.raw"
    parser.add_argument("--calibration", default=str(wiki), help="a text file, or stdlib")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "accuracy.jsonl")
    args = parser.parse_args()
    texts = SHARED / "data" / "wikitext-2"
    work = Path(tempfile.mkdtemp(prefix="resq-accuracy-"))
    try:
        for name in args.models.split(","):
            source = SHARED / "models" / name
            windows = all_windows(texts / "wiki.test.first400KB.raw", load_tokenizer(source), 256, wikitext=True)
            base = window_nll(open_streamed(source), windows.tokens)
            common = {**provenance(), "model": name, "text": "wikitext-2 test, first 400 KB", "window_length": 256}
            common |= {"windows": len(base), "text_sha256": windows.sha256}
            append_row(args.out, {**common, "recipe": "16-bit", "perplexity": perplexity(base), "ratio": 1.0})
            print(f"{name} 16-bit {perplexity(base):.3f}", flush=True)
            losses: dict[str, torch.Tensor] = {}
            for case in args.cases.split(","):
                recipe, bits, *rest = case.split(":")
                head = 8 if "head8" in rest else 16
                out = work / f"{name}-{case.replace(':', '-').replace('/', '-')}"
                resq.quantize(
                    source,
                    out,
                    recipe=recipe,
                    bits=int(bits),
                    head_bits=head,
                    seed=args.seed,
                    calibration=[args.calibration],
                    windows=512,
                    rounding_windows=128,
                    window_length=256,
                )
                nll = losses[case] = window_nll(open_streamed(out), windows.tokens)
                delta = paired_interval(nll, base)
                row = {**common, "recipe": recipe, "bits": int(bits), "head_bits": head, "seed": args.seed}
                row["calibration"] = Path(args.calibration).name
                row |= {"perplexity": perplexity(nll), "ratio": perplexity(nll) / perplexity(base)}
                row |= {"delta_16": vars(delta)}
                for other in AGAINST:
                    if recipe != other and f"{other}:{bits}" in losses:
                        row[f"delta_{other}"] = vars(paired_interval(nll, losses[f"{other}:{bits}"]))
                if head == 8 and f"{recipe}:{bits}" in losses:
                    row["delta_head16"] = vars(paired_interval(nll, losses[f"{recipe}:{bits}"]))
                append_row(args.out, row)
                print(f"{name} {case} {row['perplexity']:.3f} × {row['ratio']:.4f} {delta}", flush=True)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
