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
from resq.models.architecture import READERS, Config, Point, Role, Shape, Site, architecture_for
from resq.models.decoder import Ends, Layer
from resq.numerics.bands import INT8, Bands
from resq.numerics.formats import PLAIN, ActivationFormat, HeadFormats, Norm
from resq.numerics.linear import DenseLinear, Linear, PackedLinear
from resq.numerics.maps import Dense, LinearMap, random_orthogonal
from resq.numerics.packing import packed_bytes
from resq.progress import Progress, silent
from resq.ptq.basis.pca import Pca
from resq.ptq.placement import Placement
from resq.ptq.recipe import At, Basis, Moments, Recipe, Setting

# Maps at these sites run online; the others vanish in the weights, which are random here.
ONLINE = frozenset({Site.QUERY_KEY, Site.ATTN_OUT, Site.MLP_HIDDEN})


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
    norm = Norm(shape.eps, None if recipe.folds_norms else torch.ones(shape.hidden))
    head_norm = Norm(shape.eps, torch.ones(shape.head_dim))
    norms = {role: head_norm if role in architecture.head_norms else None for role in (Role.Q, Role.K)}
    points = {role: point for point, roles in READERS.items() for role in roles}
    layers = []
    for index in range(shape.layers):
        progress("building", index, shape.layers)
        linears: dict[Role, Any] = {
            role: random_linear(
                size,
                recipe.precision.weight_bands(role, points[role], shape),
                role in architecture.biased,
                generator,
            )
            for role, size in shape.sizes().items()
        }
        heads = placement.heads(index, HeadFormats(query_norm=norms[Role.Q], key_norm=norms[Role.K]))
        layer = Layer(
            linears,
            dict.fromkeys((Point.ATTN_IN, Point.MLP_IN), norm),
            heads,
            placement.inputs(index),
            shape.window(index),
        )
        layers.append(layer.prepacked(backend))
    progress("building", shape.layers, shape.layers)
    return Synthetic(shape, _ends(shape, recipe, generator).prepacked(backend), layers, backend)


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
    """The recipe's maps at the sites where they run online; PCA's are random rotations of the same size."""
    moments = Moments(tokens=4 * shape.hidden)
    setting = Setting(shape, recipe.precision, seed)
    maps: dict[At, LinearMap] = {}
    for basis in recipe.basis:
        if isinstance(basis, Pca):
            if Site.QUERY_KEY in basis.on:
                for layer in range(shape.layers):
                    at = At(Site.QUERY_KEY, layer)
                    maps[at] = Dense(random_orthogonal(shape.head_dim, setting.generator(at)))
        else:
            maps |= _without_residual(basis).fit(moments, setting)
    stored = {at: map for at, map in maps.items() if at.site in ONLINE}
    return {
        at: replace(map, matrix=map.matrix.to(torch.float32)) if isinstance(map, Dense) else map
        for at, map in stored.items()
    }


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
