"""What a recipe asks of a model, asked before any work."""

from __future__ import annotations

from resq.errors import InputError
from resq.models.architecture import READERS, Point, Shape, Site
from resq.numerics.bands import Bands
from resq.ptq.precision import names_of
from resq.ptq.recipe import At, Recipe, Setting


def check_sizes(recipe: Recipe, shape: Shape) -> None:
    """Raises InputError before any work when some dimension cannot be cut as the recipe asks, or when an override names
    nothing."""
    precision = recipe.precision
    for override in precision.overrides:
        if not any(override.names(name) for name in names_of(shape.layers)):
            raise InputError(
                f"an override names {override.pattern!r}, which is nothing in a model of {shape.layers} layers; names "
                "are layers.0.q … with q, k, v, o, gate, up, down, attn_in, o_in, mlp_in, down_in, key or value"
            )
    shared = Setting(shape, precision, 0).bands(At(Site.RESIDUAL)) if recipe.folds_norms else None
    for index in range(shape.layers):
        for point, roles in READERS.items():
            inputs = precision.input_bands(index, point, shape)
            for role in roles:
                weights = precision.weight_bands(index, role, shape)
                for what, bands in ((point, inputs), (role, weights)):
                    # The residual stream's coordinates are in one order for all layers, with rotations in each part.
                    read = point in (Point.ATTN_IN, Point.MLP_IN)
                    if read and shared and bands and not starts(bands) <= starts(shared):
                        raise InputError(
                            f"layers.{index}.{what} is cut into {bands.pairs}, the residual stream that it shares with "
                            f"other layers into {shared.pairs}; use the same rank, or none"
                        )
                if inputs is None or weights is None:
                    continue
                per_head = precision.output_per_head and point is Point.O_IN
                if not starts(inputs) <= starts(weights) or (per_head and starts(inputs) != starts(weights)):
                    raise InputError(
                        f"weights of {role} are cut into {weights.pairs}, its inputs into {inputs.pairs}; integers can "
                        "be summed only where weights are cut wherever inputs are"
                        f"{', and nowhere else' if per_head else ''}"
                    )
        recipe.check_layer(index)
        precision.key_bands(index, shape)
        precision.value_bands(index, shape)


def starts(bands: Bands) -> set[int]:
    """Where a dimension is cut."""
    return {cut.start for cut in bands.slices()}
