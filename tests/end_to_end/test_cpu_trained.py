"""The trained models beside the checkout run on the CPU backend as on the reference: perplexity and greedy text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backends.cases import instruction_sets
from torch import Tensor

import resq
from resq.backends.backend import Backend
from resq.backends.cpu import native
from resq.backends.reference import REFERENCE
from resq.measure.perplexity import open_streamed, paired_interval, window_nll
from resq.models.text import all_windows, load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not instruction_sets(), reason=f"no CPU kernels: {native.unusable()}"),
]
WINDOWS, TOKENS = 24, 64
# Where one integer differs, those of the layers after it do too, and logits move by some 0.1: the difference of two by
# half as much again. Margins above this are 3 times that.
MARGIN = 0.5
PROMPTS = ["The history of the city", "In 1998, the team", "The species was first described by"]


@pytest.fixture(scope="module", params=["llama-5m", "qwen2-5m"])
def packed(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / request.param
    text = shared / "data" / "wikitext-2" / "wiki.train.first1MB.raw"
    source = shared / "models" / request.param
    return resq.quantize(source, out, calibration=[text], windows=32, window_length=256).directory


def test_perplexity_is_the_references(packed: Path, shared: Path) -> None:
    text = shared / "data" / "wikitext-2" / "wiki.test.first400KB.raw"
    windows = all_windows(text, load_tokenizer(packed), 256, wikitext=True).tokens[:WINDOWS]
    assert len(windows) == WINDOWS
    mine, theirs = (window_nll(open_streamed(packed, name), windows) for name in ("cpu", "reference"))
    between = paired_interval(mine, theirs)
    print(f"\n{packed.name}: Δ ln ppl {between.mean:.2e}, 95 % {between.low:.2e} … {between.high:.2e}")
    # An integer in some ten thousand is a neighbour of the reference's, at random: no bias, and far less than the 0.01
    # that rounding itself costs.
    assert abs(between.mean) <= 1e-3, between
    assert between.low <= 0 <= between.high, between


def twin(seed: int) -> Backend:
    """The reference with every linear's output off by about one rounding of float32, as other sums of it would be."""
    generator = torch.Generator().manual_seed(seed)

    def linears(x: Any, weights: Any, onto: Tensor | None = None) -> list[Tensor]:
        outs = REFERENCE.linears(x, weights, onto)
        return [y * (1 + 2.0**-24 * torch.randn(y.shape, generator=generator)) for y in outs]

    return replace(REFERENCE, name="twin", linears=linears)


def test_greedy_text_is_the_references_wherever_it_is_sure(packed: Path) -> None:
    """All are fed the reference's own text, so that one other token does not make another text of all that follows."""
    mine, theirs = (resq.load(packed, backend=name) for name in ("cpu", "reference"))
    twins = [resq.load(packed, backend=twin(seed)) for seed in range(2)]
    got, want, noisy = [], [], []
    for prompt in PROMPTS:
        tokens = torch.tensor([theirs.tokenizer(prompt)["input_ids"]])
        every, caches = tokens, [model.cache() for model in (mine, theirs)]
        for _ in range(TOKENS):
            both = [model(tokens, cache, last=True)[0, -1] for model, cache in zip((mine, theirs), caches, strict=True)]
            got.append(both[0])
            want.append(both[1])
            tokens = both[1].argmax().reshape(1, 1)
            every = torch.cat([every, tokens], dim=1)
        noisy.append(torch.stack([model(every[:, :-1])[0, -TOKENS:] for model in twins]))
    mine_logits, logits, noise = torch.stack(got), torch.stack(want), torch.cat(noisy, dim=1) - torch.stack(want)
    best = logits.topk(2).values
    equal, sure = mine_logits.argmax(-1) == logits.argmax(-1), best[:, 0] - best[:, 1] >= MARGIN
    moved, expected = float((mine_logits - logits).square().mean().sqrt()), float(noise.square().mean().sqrt())
    print(
        f"\n{packed.name}: {int(equal.sum())} of {len(equal)} tokens equal, all {int(sure.sum())} with a margin of "
        f"{MARGIN}; logits off by {moved:.3f}, by {expected:.3f} with float32 roundings of the reference's own"
    )
    assert equal[sure].all()
    assert float(sure.double().mean()) >= 0.3
    assert float(equal.double().mean()) >= 0.95
    # A few integers decide both, so they are alike in size only; a wrong kernel is off by whole logits.
    assert moved <= 4 * expected
    # Until the first differing integer of a text only float32 sums differ, 10^-6 of the logits.
    assert float((mine_logits - logits).abs().amax(dim=-1).min()) <= 1e-4
