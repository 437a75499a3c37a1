"""Golden vectors: inputs that reach every end, and totals that name the one channel that is wrong."""

from __future__ import annotations

import pytest
import torch

from resq.checkpoint.golden import Golden, from_tensors, golden_input, to_tensors
from resq.errors import CheckpointError
from resq.numerics.bands import Bands

BANDS = Bands.of((2, 96), (4, 64), (8, 32))
SEGMENTS, OUT = 6, 37


def made(seed: int = 0) -> tuple[Golden, torch.Tensor]:
    """Random sums of the size that the longest bands give, and what is recorded of them."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(-(2**31), 2**31, (4, SEGMENTS, OUT), generator=generator)
    return Golden.of(golden_input(BANDS, 2), sums), sums


def test_every_weight_counts_and_every_range_is_reached() -> None:
    x = golden_input(BANDS, 2)
    for index, (band, cut) in enumerate(zip(BANDS, BANDS.slices(), strict=True)):
        top = 2**band.bits - 1
        factors = x.q[:, cut].to(torch.int64).unflatten(1, (2, -1)) - x.zero[:, index, :, None].to(torch.int64)
        assert (factors[0] == top).all()
        assert (factors[1] == -top).all()
        assert set(x.q[2, cut].tolist()) == {0, top}
        assert int(x.q[:, cut].max()) <= top
        assert int(x.zero[:, index].max()) <= top
        assert len(set(x.q[3, cut].tolist())) > min(top, 16) // 2
    assert (x.zero[2:].to(torch.int64).flatten().unique().numel()) > 3


def test_what_was_recorded_is_no_difference() -> None:
    golden, sums = made()
    assert golden.difference(sums) is None
    again = golden.rows([2, 2, 0])
    assert again.difference(sums[[2, 2, 0]]) is None
    assert again.difference(sums[[2, 0, 0]]) is not None


@pytest.mark.parametrize("channel", range(OUT))
def test_one_wrong_channel_is_named_with_both_numbers(channel: int) -> None:
    golden, sums = made(channel)
    wrong = sums.clone()
    wrong[1, 2, channel] += 1
    wrong[3, 5, channel] -= 2**30
    got, want = int(wrong[1, 2, channel]), int(sums[1, 2, channel])
    assert golden.difference(wrong) == f"channel {channel} gives {got}, {want} is recorded (row 1, segment 2)"


def test_several_wrong_channels_are_no_single_one() -> None:
    golden, sums = made()
    others = [channel for channel in range(OUT) if channel not in golden.channels.tolist()]
    wrong = sums.clone()
    wrong[0, 0, others[1]] += 5
    wrong[0, 0, others[8]] -= 5  # the sum of all channels stays
    assert str(golden.difference(wrong)).endswith("several channels are wrong")
    wrong = sums.clone()
    wrong[0, 0, others[1]] += 5
    wrong[2, 1, others[8]] += 5
    assert str(golden.difference(wrong)).endswith("several channels are wrong")
    assert "shape [4, 6, 9]" in str(golden.difference(sums[..., :9]))


def test_tensors_give_back_the_vectors_and_share_one_input() -> None:
    golden, sums = made()
    other, _ = made(1)
    tensors = to_tensors({"a.q": golden, "a.k": other})
    assert sorted(tensors) == sorted(
        [f"{name}.{part}" for name in ("a.q", "a.k") for part in ("channels", "sums", "totals")]
        + ["input.2x96+4x64+8x32.2.q", "input.2x96+4x64+8x32.2.zero"]
    )
    found = from_tensors(tensors, "a.q", BANDS, 2)
    assert found.difference(sums) is None
    assert torch.equal(found.x.q, golden.x.q)
    for name, bands, groups in (("a.v", BANDS, 2), ("a.q", BANDS, 4), ("a.q", Bands.of((4, 192)), 2)):
        with pytest.raises(CheckpointError, match=r"golden\.safetensors has no tensor"):
            from_tensors(tensors, name, bands, groups)
    tensors["a.q.totals"] = tensors["a.q.totals"][:2]
    with pytest.raises(CheckpointError, match=r"a.q.totals is torch.int64 of shape \[2, 6, 2\]"):
        from_tensors(tensors, "a.q", BANDS, 2)
