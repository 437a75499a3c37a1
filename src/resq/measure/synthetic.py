"""Models with random weights of a published shape: as fast or slow as the real ones, without a download."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from resq.backends.backend import Backend, LayerCache
from resq.models import decoder
from resq.models.architecture import Architecture, Config, Point, Role, Shape, Site, architecture_for
from resq.models.decoder import Ends, Layer
from resq.numerics.bands import INT8, Bands
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, Linear, PackedLinear
from resq.numerics.maps import Dense, Diagonal, LinearMap
from resq.numerics.packing import packed_bytes
from resq.progress import Progress, silent
from resq.ptq.placement import INPUT_SITES, Placement
from resq.ptq.recipe import At, Basis, Moments, Peaks, Recipe, Setting

# Maps at these sites run online; the others vanish in the weights, which are random here.
ONLINE = frozenset({Site.QUERY_KEY, *INPUT_SITES.values()})


@dataclass(frozen=True)
class Synthetic:
    """State: a model of random weights that runs like a loaded checkpoint."""

    shape: Shape
    ends: Ends
    layers: Sequence[Layer]
    backend: Backend

    def cache(self) -> list[LayerCache]:
        """An empty cache, one entry per layer."""
        return [self.backend.cache(layer.heads) for layer in self.layers]

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: Sequence[LayerCache] | None = None, *, last: bool = False) -> Tensor:
        """tokens int64 [b, t] -> logits float32 [b, t, vocab], of the last token only with `last`."""
        return decoder.forward(self.backend, self.shape, self.ends, self.layers, tokens, cache, last=last)


def synthetic(
    config: Config, recipe: Recipe, backend: Backend, *, seed: int = 0, progress: Progress = silent
) -> Synthetic:
    """A model of `config`'s sizes with the recipe's bands, online maps and head, weights at random and prepacked.

    Raises InputError when the recipe cannot cut these sizes.
    """
    architecture = architecture_for(config["model_type"])
    shape = architecture.shape(config)
    generator = torch.Generator().manual_seed(seed)
    placement = Placement(shape, online_maps(recipe, shape, seed), recipe.precision, recipe.folds_norms)
    layers = []
    for index in range(shape.layers):
        progress("building", index, shape.layers)
        layers.append(random_layer(architecture, placement, index, generator).prepacked(backend))
    progress("building", shape.layers, shape.layers)
    return Synthetic(shape, _ends(shape, recipe, generator).prepacked(backend), layers, backend)


def one_layer(config: Config, recipe: Recipe, *, seed: int = 0) -> tuple[Shape, Layer]:
    """The first decoder layer of such a model, not prepacked, and the sizes of a model of this layer alone."""
    architecture = architecture_for(config["model_type"])
    whole = architecture.shape(config)
    shape = replace(whole, layers=1, windows=whole.windows[:1])
    placement = Placement(shape, online_maps(recipe, shape, seed), recipe.precision, recipe.folds_norms)
    return shape, random_layer(architecture, placement, 0, torch.Generator().manual_seed(seed))


def random_layer(architecture: Architecture, placement: Placement, index: int, generator: torch.Generator) -> Layer:
    """Decoder layer `index` with random weights in the placement's bands, and its norms, maps and formats."""
    shape = placement.shape
    norm = Norm(shape.eps, None if placement.folds else torch.ones(shape.hidden))
    head_norm = Norm(shape.eps, torch.ones(shape.head_dim))
    norms = {role: head_norm if role in architecture.head_norms else None for role in (Role.Q, Role.K)}
    linears: dict[Role, Any] = {
        role: random_linear(
            size, placement.precision.weight_bands(index, role, shape), role in architecture.biased, generator
        )
        for role, size in shape.sizes().items()
    }
    return Layer(
        linears,
        dict.fromkeys((Point.ATTN_IN, Point.MLP_IN), norm),
        placement.heads(index, HeadFormats(query_norm=norms[Role.Q], key_norm=norms[Role.K])),
        placement.inputs(index),
        shape.window(index),
    )


def _ends(shape: Shape, recipe: Recipe, generator: torch.Generator) -> Ends:
    """The table in bfloat16; the head as the recipe has it: packed, or the table after the online map of a tied one."""
    embed = mapped_table(shape, generator)
    norm = Norm(shape.eps)
    bands = recipe.precision.lm_head_bands(shape)
    if bands is not None:
        head = random_linear((shape.vocab, shape.hidden), bands, False, generator)
        return Ends(embed, norm, ActivationFormat(bands=INT8.bands(shape.hidden)), head)
    if not shape.tied:
        return Ends(embed, norm, PLAIN, DenseLinear(embed.clone()))
    turn = Dense(torch.randn(shape.hidden, shape.hidden, generator=generator) * shape.hidden**-0.5, orthogonal=False)
    return Ends(embed, norm, ActivationFormat(turn) if recipe.folds_norms else PLAIN, DenseLinear(embed))


def mapped_table(shape: Shape, generator: torch.Generator) -> Tensor:
    """A random bfloat16 table [vocab, hidden] in a mapped file, as a checkpoint's is; the file has no name any more."""
    with tempfile.NamedTemporaryFile(prefix="resq-table-") as file:
        size = shape.vocab * shape.hidden
        os.truncate(file.name, 2 * size)
        table = torch.from_file(file.name, shared=True, size=size, dtype=torch.bfloat16)
    table = table.view(shape.vocab, shape.hidden)
    rows = torch.randn(min(shape.vocab, 4096), shape.hidden, generator=generator).to(torch.bfloat16)
    for start in range(0, shape.vocab, len(rows)):
        part = table[start : start + len(rows)]
        part.copy_(rows[: len(part)])
    return table


def online_maps(recipe: Recipe, shape: Shape, seed: int) -> dict[At, LinearMap]:
    """The recipe's maps at the sites where they run online, as `random_maps` gives them, in float32."""
    maps = random_maps(recipe, shape, seed)
    online = {at: map for at, map in maps.items() if at.site in ONLINE and not isinstance(map, Diagonal)}
    return {
        at: replace(map, matrix=map.matrix.to(torch.float32)) if isinstance(map, Dense) else map
        for at, map in online.items()
    }


def random_maps(recipe: Recipe, shape: Shape, seed: int) -> dict[At, LinearMap]:
    """The recipe's maps but for the residual's, fitted to random statistics; tuning, which would move their values
    alone, is left out."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=generator, dtype=torch.float64) + 0.1

    head, groups = shape.head_dim, shape.kv_heads
    sizes = {Point.ATTN_IN: shape.hidden, Point.O_IN: shape.heads * head}
    sizes |= {Point.MLP_IN: shape.hidden, Point.DOWN_IN: shape.ffn}
    inputs = {point: random(size) for point, size in sizes.items()}
    moments = Moments(
        tokens=4 * shape.hidden,
        value=[torch.diag_embed(random(groups, head)) for _ in range(shape.layers)],
        key=[torch.diag(random(head)) for _ in range(shape.layers)],
        peaks=[Peaks(inputs, inputs, random(head), random(groups, head)) for _ in range(shape.layers)],
    )
    setting = Setting(shape, recipe.precision, seed)
    maps: dict[At, LinearMap] = {}
    for basis in recipe.basis:
        maps |= _without_residual(basis).fit(moments, setting)
    return maps


def _without_residual(basis: Basis) -> Basis:
    """The same without the residual's matrix, which is large and folded away."""
    on = getattr(basis, "on", ())
    return replace(basis, on=tuple(site for site in on if site is not Site.RESIDUAL)) if on else basis  # pyright: ignore


def random_linear(size: tuple[int, int], bands: Bands | None, bias: bool, generator: torch.Generator) -> Linear:
    """Random integers over each band's range, scaled to keep activations in size; 16 bit where bands is None."""
    out, inner = size
    offset = torch.randn(out, generator=generator) * 0.01 if bias else None
    if bands is None:
        weight = torch.randn(out, inner, generator=generator) * inner**-0.5
        return DenseLinear(weight.to(torch.bfloat16), offset)
    parts = tuple(
        torch.randint(0, 256, (out, packed_bytes(band.size, band.bits)), generator=generator, dtype=torch.uint8)
        for band in bands
    )
    # Uniform integers of b bits have a deviation of 2^b / sqrt(12).
    scale = torch.tensor([(12 / inner) ** 0.5 / 2**band.bits for band in bands]).repeat(out, 1)
    return PackedLinear(bands, parts, scale, offset)
