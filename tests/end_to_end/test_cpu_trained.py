"""The trained models beside the checkout run on the CPU backend as on the reference: perplexity and greedy text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import resq
from resq.measure.perplexity import open_streamed, paired_interval, window_nll
from resq.models.text import all_windows, load_tokenizer

pytestmark = pytest.mark.slow
WINDOWS, TOKENS = 24, 64
# Where one integer differs from the reference's, those of later layers do too and the logits of that text move: by 0.01
# to 0.08 (rms; logits have a deviation of 3). They move as much when the reference's own linears are each off by one
# rounding of float32 (measured, 4 windows of 256 tokens). Half of that again for the difference of two, 4 times.
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


def test_greedy_text_is_the_references_wherever_it_is_sure(packed: Path) -> None:
    """Both are fed the reference's own text, so that one other token does not make another text of all that follows."""
    mine, theirs = (resq.load(packed, backend=name) for name in ("cpu", "reference"))
    pairs = []
    for prompt in PROMPTS:
        tokens = torch.tensor([theirs.tokenizer(prompt)["input_ids"]])
        caches = [model.cache() for model in (mine, theirs)]
        for _ in range(TOKENS):
            pair = [model(tokens, cache, last=True)[0, -1] for model, cache in zip((mine, theirs), caches, strict=True)]
            pairs.append(torch.stack(pair))
            tokens = pair[1].argmax().reshape(1, 1)
    got, want = torch.stack(pairs, dim=1)
    best = want.topk(2).values
    equal, sure = got.argmax(-1) == want.argmax(-1), best[:, 0] - best[:, 1] >= MARGIN
    moved = float((got - want).square().mean().sqrt())
    print(
        f"\n{packed.name}: {int(equal.sum())} of {len(equal)} tokens, {int(sure.sum())} sure; logits off by {moved:.3f}"
    )
    assert equal[sure].all()
    assert float(sure.double().mean()) >= 0.3
    assert float(equal.double().mean()) >= 0.95
    assert moved <= 0.1 * float(want.std())
    # Until the first differing integer of a text only float32 sums differ, 10^-6 of the logits.
    assert float((got - want).abs().amax(dim=-1).min()) <= 1e-4
