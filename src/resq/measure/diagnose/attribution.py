"""Where a packed checkpoint's error comes from: each kind of rounding alone, and each layer alone.

A variant of a layer takes its weights from the checkpoint or, unrounded, from the source through the same maps, and
its formats with or without bands; the one decoder runs them all. What the parts do not add up to is their interaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from resq.backends.backend import Backend
from resq.backends.choose import backend_named
from resq.backends.reference import dense
from resq.checkpoint.manifest import Manifest
from resq.errors import InputError
from resq.measure.diagnose.places import embedded_windows
from resq.measure.perplexity import LOGIT_BYTES, Interval, paired_interval
from resq.measure.scores import compare
from resq.measure.windows import check_windows
from resq.models import decoder
from resq.models.architecture import Role, Site
from resq.models.decoder import Ends, Layer, Positions
from resq.models.source import Source
from resq.numerics.device import moved
from resq.numerics.linear import DenseLinear, PackedLinear
from resq.progress import Progress, silent
from resq.ptq.placement import Placement
from resq.ptq.statistics import in_dtype
from resq.runtime.load import Opened

# ||W - Ŵ|| / ||W|| of a rounded weight against the source's through the same maps: 2-bit rounding stays below, another
# rotation gives √2.
SAME_BASIS = 1.0
# The same of the embedding table, which is stored in 16 bit: bfloat16 has 8 digits.
SAME_TABLE = 2**-7


@dataclass(frozen=True)
class Part:
    """What one kind of rounding alone, or one layer, adds: nats per token with its paired 95 % interval over windows,
    and the mean KL divergence of the 16-bit model from it, nats per token."""

    name: str
    delta: Interval
    kl: float


@dataclass(frozen=True)
class Attribution:
    """parts: weights, inputs, keys, values, rotation, ends alone (those that are rounded at all); layers: all of one
    layer alone, in order; whole: the checkpoint as it is. interaction: whole.delta - Σ parts, nats per token."""

    parts: tuple[Part, ...]
    layers: tuple[Part, ...]
    whole: Part
    interaction: float


@dataclass
class _Stream:
    """State: one variant on its way through the layers; hidden [1, t, d] of every window, in the placement's basis."""

    name: str
    variant: Callable[[_Variants, int], tuple[Backend, Layer]]
    hidden: list[Tensor]


@dataclass(frozen=True)
class _Variants:
    """One layer prepacked in every way that a stream may ask for."""

    exact: tuple[Backend, Layer]
    whole: tuple[Backend, Layer]
    kinds: dict[str, tuple[Backend, Layer]]


def without_bands(layer: Layer) -> Layer:
    """The same layer with unrounded inputs, keys, values and online maps' inputs."""
    inputs = {point: replace(format, bands=None, groups=1, clip=None) for point, format in layer.inputs.items()}
    heads = replace(
        layer.heads,
        query=replace(layer.heads.query, map_input_bits=None),
        key=replace(layer.heads.key, bands=None, clip=None, map_input_bits=None),
        value=replace(layer.heads.value, bands=None, clip=None),
    )
    return replace(layer, inputs=inputs, heads=heads)


def variants(packed: Layer, placed: Layer) -> dict[str, Layer]:
    """One kind of rounding each: `packed` as stored, `placed` the source's layer in the same basis, float32, its maps
    exact. Kinds that this layer does not round are left out."""
    plain = without_bands(placed)
    found: dict[str, Layer] = {}
    if any(isinstance(linear, PackedLinear) for linear in packed.linears.values()):
        found["weights"] = replace(plain, linears=packed.linears)
    if any(format.bands is not None for format in packed.inputs.values()):
        found["inputs"] = replace(plain, inputs=packed.inputs)
    for name in ("key", "value"):
        format = getattr(packed.heads, name)
        if format.bands is not None:
            # The map of the plain layer: its rounding is another part.
            exact = replace(format, map=getattr(plain.heads, name).map, map_input_bits=None)
            found[f"{name}s"] = replace(plain, heads=replace(plain.heads, **{name: exact}))
    if packed.heads.query.map_input_bits is not None:
        heads = replace(packed.heads, key=replace(packed.heads.key, bands=None, clip=None), value=plain.heads.value)
        found["rotation"] = replace(plain, heads=heads)
    return found


def kinds_of(manifest: Manifest) -> list[str]:
    """The kinds of rounding that some layer has."""
    every = manifest.layers
    there = {
        "weights": any(linear.bands is not None for layer in every for linear in layer.linears.values()),
        "inputs": any(format.bands is not None for layer in every for format in layer.inputs.values()),
        "keys": any(layer.key.bands is not None for layer in every),
        "values": any(layer.value.bands is not None for layer in every),
        "rotation": any(layer.query.map_input_bits is not None for layer in every),
    }
    return [kind for kind, found in there.items() if found]


def check_basis(packed: Layer, placed: Layer, index: int) -> None:
    """Raises InputError when a packed linear is not the placed one, rounded: the maps are not the checkpoint's."""
    for role in Role:
        theirs = packed.linears[role]
        weight = theirs.dequantize() if isinstance(theirs, PackedLinear) else theirs.weight.to(torch.float32)
        exact = placed.linears[role].weight.to(torch.float32)
        error = float((weight - exact).norm() / exact.norm().clamp(min=1e-30))
        if error > SAME_BASIS:
            raise InputError(
                f"layer {index}: {role} of the checkpoint is not the source's in the basis given (relative difference "
                f"{error:.2f}); use the checkpoint's own recipe, calibration windows and seed"
            )


def check_table(packed: Ends, placed: Ends) -> None:
    """Raises InputError when the stored embedding is not the placed one in 16 bit."""
    exact = placed.embed.to(torch.float32)
    error = float((packed.embed.to(torch.float32) - exact).norm() / exact.norm())
    if error > SAME_TABLE:
        raise InputError(
            f"the checkpoint's embedding is not the source's in the basis given (relative difference {error:.3f}); use "
            "the checkpoint's own source, recipe, calibration windows and seed"
        )


@torch.inference_mode()
def attribute(
    checkpoint: Opened,
    source: Source,
    placement: Placement,
    windows: Tensor,
    *,
    backend: str | None = None,
    progress: Progress = silent,
) -> Attribution:
    """Run every variant over windows int64 [windows, length], all side by side, one layer in memory at a time.

    placement: the maps that the checkpoint was made with, fitted again (`ptq.pipeline.fit_maps` on the same windows
    with the same seed). Hidden states of about layers + 7 variants are held. Raises InputError when source, placement
    and checkpoint do not belong together, before the first forward where that shows.
    """
    check_windows(source, windows)
    shape, ops = source.shape, backend_named(backend)
    device = ops.device
    exact = dense(torch.float32, device)
    if checkpoint.shape != shape:
        raise InputError(f"{checkpoint.path} is not a quantized {source.name}: their config.json differ")
    placement = replace(placement, precision=replace(placement.precision, rotation_bits=None))
    packed_ends, tied = checkpoint.ends(), checkpoint.manifest.ends.tied
    placed_ends = placement.ends(source.ends(), keep_tied=tied)
    check_table(packed_ends, placed_ends)
    placed_ends = moved(placed_ends, device)
    at = Positions.following(shape, 0, 1, windows.shape[1], device=device)
    residual = placement.map_at(Site.RESIDUAL)

    def turned(hidden: list[Tensor]) -> list[Tensor]:
        if residual is None:
            return list(hidden)
        return [residual.apply(states.to(torch.float64)).to(torch.float32) for states in hidden]

    base = [states.to(device) for states in embedded_windows(source, windows)]
    stored = [F.embedding(window[None], packed_ends.embed).to(device, torch.float32) for window in windows]
    whole = _Stream("whole", lambda layers, index: layers.whole, stored)
    ends = _Stream("ends", lambda layers, index: layers.exact, stored)
    parts = [_Stream(kind, _only_kind(kind), turned(base)) for kind in kinds_of(checkpoint.manifest)]
    alone: list[_Stream] = []
    done, total = 0, shape.layers * (shape.layers + 1) // 2 + shape.layers * (len(parts) + 3)
    for index in range(shape.layers):
        original = source.layer(index)
        placed = in_dtype(placement.layer(original, index), torch.float32)
        packed = checkpoint.layer(index)
        check_basis(packed, placed, index)
        kinds = variants(packed, placed)
        layers = _Variants(
            (exact, moved(without_bands(placed), device)),
            (ops, packed.prepacked(ops)),
            {name: (ops, layer.prepacked(ops)) for name, layer in kinds.items()},
        )
        alone.append(_Stream(str(index), _only_layer(index), turned(base)))
        for stream in (whole, ends, *parts, *alone):
            run, layer = stream.variant(layers, index)
            stream.hidden = [decoder.forward_layer(run, shape, layer, states, at) for states in stream.hidden]
            done += 1
            progress("attributing the error", done, total)
        plain = in_dtype(moved(original, device), torch.float32)
        base = [decoder.forward_layer(exact, shape, plain, states, at) for states in base]
        done += 1
        progress("attributing the error", done, total)
        del original, placed, packed, kinds, layers, plain

    rounded_ends = (ops, packed_ends.prepacked(ops))
    exact_ends = (exact, replace(placed_ends, head=DenseLinear(placed_ends.head.weight.to(torch.float32))))
    found = divergences(
        (exact, moved(source.ends(), device), base),
        [
            *((*exact_ends, stream.hidden) for stream in parts),
            (*rounded_ends, ends.hidden),
            *((*exact_ends, stream.hidden) for stream in alone),
            (*rounded_ends, whole.hidden),
        ],
        windows,
        progress,
    )
    rows = [
        Part(stream.name, paired_interval(nll, found.base), float(kl.mean()))
        for stream, (nll, kl) in zip([*parts, ends, *alone, whole], found.others, strict=True)
    ]
    kinds_found, layers_found, all_found = rows[: len(parts) + 1], rows[len(parts) + 1 : -1], rows[-1]
    interaction = all_found.delta.mean - sum(part.delta.mean for part in kinds_found)
    return Attribution(tuple(kinds_found), tuple(layers_found), all_found, interaction)


def _only_kind(kind: str) -> Callable[[_Variants, int], tuple[Backend, Layer]]:
    return lambda layers, index: layers.kinds.get(kind, layers.exact)


def _only_layer(own: int) -> Callable[[_Variants, int], tuple[Backend, Layer]]:
    return lambda layers, index: layers.whole if index == own else layers.exact


@dataclass(frozen=True)
class Divergences:
    """Mean losses of each window in nats per token, float64 [windows]: of the base, and (loss, KL to the base) of each
    other."""

    base: Tensor
    others: list[tuple[Tensor, Tensor]]


def divergences(
    base: tuple[Backend, Ends, list[Tensor]],
    others: Sequence[tuple[Backend, Ends, list[Tensor]]],
    windows: Tensor,
    progress: Progress = silent,
) -> Divergences:
    """Losses and KL(base ‖ other) from final hidden states [1, t, d] of every window; log-softmax and
    sums in float64, a block of tokens at a time."""
    models = [base, *others]
    rows = max(1, LOGIT_BYTES // (8 * base[1].embed.shape[0]))
    losses, kls = (torch.zeros(len(models), len(windows), dtype=torch.float64) for _ in range(2))
    for number, window in enumerate(windows):
        for start in range(0, len(window) - 1, rows):
            cut = slice(start, min(start + rows, len(window) - 1))
            target, expected = window[1:][cut].to(base[1].embed.device), _logits(base, number, cut)
            for index, model in enumerate(models):
                loss, kl, _ = compare(expected, _logits(model, number, cut) if index else expected, target)
                losses[index, number] += float(loss.sum())
                kls[index, number] += float(kl.sum())
        progress("comparing the logits", number + 1, len(windows))
    losses, kls = losses / (windows.shape[1] - 1), kls / (windows.shape[1] - 1)
    return Divergences(losses[0], list(zip(losses[1:], kls[1:], strict=True)))


def _logits(model: tuple[Backend, Ends, list[Tensor]], window: int, cut: slice) -> Tensor:
    ops, ends, hidden = model
    return decoder.logits(ops, ends, hidden[window][:, cut])[0].to(torch.float64)
