"""How the bands of weights lie in the bands of the activations that they meet."""

from __future__ import annotations

from resq.errors import InputError
from resq.numerics.bands import Bands

# 255 · 128 · n must stay below 2^31: the largest product of an activation and a weight, n times.
LONGEST = (2**31 - 1) // (255 * 128)


def source_bands(inputs: Bands, weights: Bands, groups: int) -> list[int]:
    """The activation band of every weight band. Raises InputError when the cuts do not fit, or a group's sum could
    leave 32 bits."""
    outer = inputs.slices()
    source = []
    for band, cut in zip(weights, weights.slices(), strict=True):
        fits = [i for i, each in enumerate(outer) if each.start <= cut.start and cut.stop <= each.stop]
        if not fits or (groups > 1 and inputs.bands[fits[0]].size != band.size):
            raise InputError(
                f"weight bands {weights.pairs} do not fit activation bands {inputs.pairs} of {groups} groups; "
                "a weight band lies inside one activation band, and is all of it where there are several groups"
            )
        source.append(fits[0])
    widest = max(band.size for band in weights) // groups
    if widest > LONGEST:
        raise InputError(f"a band of {widest} columns overflows 32-bit sums; up to {LONGEST} are taken")
    return source
