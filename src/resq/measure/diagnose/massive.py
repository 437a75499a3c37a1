"""Massive activations: the few coordinates of hidden states that are hundreds of times the rest (arXiv 2402.17762)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq.measure.diagnose.places import visits
from resq.models.source import Source
from resq.progress import Progress, silent

# How many times the median of |x| an activation must be. The paper asks for 1000 and |x| > 100; outliers that hurt 4
# bits begin earlier.
TIMES_MEDIAN = 100.0
# Coordinates listed in each layer.
LISTED = 10


@dataclass(frozen=True)
class Outlier:
    """One coordinate: in which window, at which position, which token id, which channel, its value."""

    window: int
    position: int
    token: int
    channel: int
    value: float


@dataclass(frozen=True)
class LayerOutliers:
    """The hidden states before one layer: largest and median |x|, how many exceed `TIMES_MEDIAN` medians, the largest
    of those, largest first."""

    layer: int
    largest: float
    median: float
    count: int
    outliers: tuple[Outlier, ...]


@torch.inference_mode()
def massive_activations(source: Source, windows: Tensor, progress: Progress = silent) -> list[LayerOutliers]:
    """Coordinates with |x| > 100 · median |x| over all windows int64 [windows, length], before every layer."""
    found = []
    for visit in visits(source, windows, "looking for massive activations", progress):
        hidden = torch.cat(visit.hidden)
        size = hidden.abs()
        median = float(size.flatten().median())
        above = (size > TIMES_MEDIAN * median).nonzero()
        order = size[tuple(above.T)].argsort(descending=True, stable=True)[:LISTED]
        outliers = tuple(
            Outlier(w, p, int(windows[w, p]), c, float(hidden[w, p, c])) for w, p, c in above[order].tolist()
        )
        found.append(LayerOutliers(visit.index, float(size.max()), median, len(above), outliers))
    return found
