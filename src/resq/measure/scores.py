"""A checkpoint beside its 16-bit original, token by token: loss, KL divergence, agreement of the most probable token.

The original is evaluated once. What stays of it is a file of final hidden states, from which its logits are made again
in blocks beside those of each checkpoint: nowhere are all logits of a text held.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resq.errors import InputError
from resq.measure.perplexity import (
    Interval,
    Steps,
    Streamed,
    final_states,
    logit_rows,
    mean_interval,
    paired_interval,
    unseen,
)
from resq.models.decoder import Ends

# Logits compared at once, of each model: what stays in a core's cache is compared in half the time of what does not
# (2**22 against 2**27, vocabulary 2048, Xeon with AVX-512).
COMPARED_BYTES = 2**22


@dataclass(frozen=True)
class Scores:
    """Of every predicted token, [windows, length - 1] each: nll and kl, KL(16 bit ‖ checkpoint), float32 in nats;
    agreement bool, whether both find the same token most probable. The last two are None without an original."""

    nll: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None

    @property
    def window_nll(self) -> Tensor:
        """Mean loss of each window, float64 [windows]."""
        return self.nll.mean(dim=1, dtype=torch.float64)

    def kl_interval(self, tail: float = 0.025) -> Interval | None:
        """Mean KL divergence in nats per token, bootstrapped over windows."""
        return None if self.kl is None else mean_interval(self.kl.mean(dim=1, dtype=torch.float64), tail=tail)

    def agreement_interval(self, tail: float = 0.025) -> Interval | None:
        """Share of tokens on which both agree, bootstrapped over windows."""
        return None if self.agreement is None else mean_interval(self.agreement.double().mean(dim=1), tail=tail)

    def delta(self, original: Scores) -> Interval:
        """Mean difference of the losses in nats per token, paired over windows."""
        return paired_interval(self.window_nll, original.window_nll)


@dataclass
class Original:
    """State: the 16-bit side of a comparison: its head, and its final hidden states in a file.

    `Original(model, file)` after `keep_states(model, windows, file)`.
    """

    model: Streamed
    file: Path

    @cached_property
    def ends(self) -> Ends:
        """Embedding, norm and head."""
        return self.model.ends()

    @cached_property
    def states(self) -> np.ndarray:
        """Hidden states before the final norm, float32 [windows, length - 1, d], mapped. Raises InputError when the
        file is not whole."""
        try:
            return np.load(self.file, mmap_mode="c")
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file} holds no hidden states ({error}); remove it and try again") from error


@torch.inference_mode()
def keep_states(model: Streamed, windows: Tensor, file: Path, progress: Steps = unseen) -> Scores:
    """Evaluate the 16-bit side on windows int64 [windows, length] and keep its final hidden states in the new .npy
    `file`, 4 bytes a value. Raises InputError when the disk cannot hold them."""
    count, length = windows.shape
    shape = (count, length - 1, model.shape.hidden)
    needed, free = 4 * count * (length - 1) * model.shape.hidden, shutil.disk_usage(file.parent).free
    if needed > free:
        raise InputError(
            f"{file.parent} has {free / 1e9:.1f} GB free, the 16-bit model's hidden states take {needed / 1e9:.1f} GB; "
            "free some, or evaluate fewer windows"
        )
    ends, losses = model.ends(), []
    try:
        with open(file, "xb") as stream:
            np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for tokens, states in final_states(model, ends, windows, progress):
                kept = states[:, :-1].float().contiguous()
                stream.write(kept.cpu().numpy().astype("<f4", copy=False).tobytes())
                losses.append(_against(model, ends, kept, tokens, None).nll)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; free some space there") from error
    return Scores(torch.cat(losses))


@torch.inference_mode()
def score(model: Streamed, windows: Tensor, original: Original | None = None, progress: Steps = unseen) -> Scores:
    """Evaluate a model on windows int64 [windows, length], beside the original if there is one (of the same vocabulary,
    its states kept for the same windows)."""
    ends, parts, first = model.ends(), [], 0
    for tokens, states in final_states(model, ends, windows, progress):
        rows = slice(first, first + len(tokens))
        parts.append(_against(model, ends, states[:, :-1], tokens, None if original is None else (original, rows)))
        first = rows.stop
    if original is None:
        return Scores(torch.cat([part.nll for part in parts]))
    pairs = [(part.kl, part.agreement) for part in parts if part.kl is not None and part.agreement is not None]
    return Scores(
        torch.cat([part.nll for part in parts]),
        torch.cat([kl for kl, _ in pairs]),
        torch.cat([agreement for _, agreement in pairs]),
    )


def _against(
    model: Streamed, ends: Ends, states: Tensor, tokens: Tensor, original: tuple[Original, slice] | None
) -> Scores:
    """Scores of some windows: states [b, length - 1, d], tokens int64 [b, length]."""
    targets, size = tokens[:, 1:].reshape(-1).to(model.ops.device), tokens[:, 1:].shape
    blocks = logit_rows(model, ends, states.flatten(0, 1))
    if original is None:
        losses = [F.cross_entropy(logits, targets[cut], reduction="none") for cut, logits in blocks]
        return Scores(torch.cat(losses).view(size).cpu())
    rows = max(1, COMPARED_BYTES // (4 * model.shape.vocab))
    found = []
    for (cut, logits), (_, expected) in zip(blocks, _expected(*original), strict=True):
        parts = zip(expected.to(logits.device).split(rows), logits.split(rows), targets[cut].split(rows), strict=True)
        found += [compare(*part) for part in parts]
    nll, kl, agreement = (torch.cat(each).view(size).cpu() for each in zip(*found, strict=True))
    return Scores(nll, kl, agreement)


def _expected(original: Original, rows: slice) -> Iterator[tuple[slice, Tensor]]:
    states = torch.from_numpy(original.states[rows]).flatten(0, 1)
    return logit_rows(original.model, original.ends, states)


def compare(expected: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the original and of a checkpoint [n, vocab], target tokens int64 [n] -> [n] each: the checkpoint's loss
    -ln q_t and the divergence sum_v p_v (ln p_v - ln q_v) in nats, p and q the softmax of the two, and whether their
    greatest entries are the same."""
    log_p, log_q = F.log_softmax(expected, dim=-1), F.log_softmax(logits, dim=-1)
    loss = -log_q.gather(-1, targets[:, None])[:, 0]
    return loss, torch.linalg.vecdot(log_p.exp(), log_p - log_q), log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
