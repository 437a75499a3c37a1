"""Collected moments are those of transformers' own activations, and a model that overflows is refused by its layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resq.backends.reference import dense
from resq.errors import InputError
from resq.models import decoder
from resq.models.architecture import READERS
from resq.models.source import Source
from resq.numerics.moments import second_moment
from resq.ptq.placement import in_float64
from resq.ptq.recipe import Moments, Peaks, Statistic
from resq.ptq.statistics import collect

LENGTH = 24


def random_tokens(windows: int) -> Tensor:
    return torch.randint(3, 259, (windows, LENGTH), generator=torch.Generator().manual_seed(2))


def collected(source: Source, tokens: Tensor, needs: frozenset[Statistic] = frozenset(Statistic)) -> Moments:
    return collect(source, dense(torch.float32), tokens, needs, lambda what, done, steps: None)


def there(value: Any) -> Any:
    assert value is not None
    return value


def moments_of_transformers(directory: Path, tokens: Tensor) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name}.input"], seen[f"{name}.output"] = args[0], output

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(watch(f"v{index}"))
        layer.mlp.up_proj.register_forward_hook(watch(f"up{index}"))
    with torch.inference_mode():
        cache = model(tokens, use_cache=True).past_key_values
    residual, values, keys = 0.0, [], []
    for index, layer in enumerate(model.model.layers):
        for name, norm in (("v", layer.input_layernorm), ("up", layer.post_attention_layernorm)):
            x = seen[f"{name}{index}.input"].double() / norm.weight.detach().double()
            residual = residual + second_moment(x.flatten(0, 1))
        v = seen[f"v{index}.output"].unflatten(-1, (-1, model.config.head_dim)).flatten(0, 1)
        values.append(second_moment(v.transpose(0, 1)))
        keys.append(second_moment(cache.layers[index].keys.flatten(0, 2)))
    return {"residual": residual, "value": values, "key": keys}


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 1}, {"attention_bias": True}], ids=["gqa", "mqa", "bias"]
)
def test_moments_are_those_of_the_activations_in_transformers(
    changes: dict[str, Any], checkpoint: Callable[..., Path]
) -> None:
    directory, tokens = checkpoint(**changes), random_tokens(11)
    got, want = collected(Source.open(directory), tokens), moments_of_transformers(directory, tokens)
    assert got.tokens == tokens.numel()
    assert got.value is not None
    assert got.key is not None
    found = [got.residual, *got.value, *got.key]
    for a, b in zip(found, [want["residual"], *want["value"], *want["key"]], strict=True):
        assert a is not None
        assert a.dtype == torch.float64
        # The activations agree to about 1e-6; a product doubles that.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def flat(found: Any) -> list[Tensor]:
    """Every tensor of a statistic, in order."""
    if isinstance(found, Peaks):
        return [*found.inputs.values(), *found.weights.values(), found.key, found.value]
    return [found] if isinstance(found, Tensor) else [tensor for each in found for tensor in flat(each)]


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_peaks_are_the_largest_magnitudes_that_the_models_linears_meet(
    model: str, checkpoint: Callable[..., Path]
) -> None:
    source, tokens = Source.open(checkpoint(model)), random_tokens(3)
    peaks = there(collected(source, tokens, frozenset({Statistic.PEAKS})).peaks)
    ops, inputs = dense(torch.float64), list[Tensor]()

    def linears(x: Tensor, weights: Sequence[Any], onto: Tensor | None = None) -> list[Tensor]:
        inputs.append(x.abs().flatten(0, -2).amax(dim=0))
        return ops.linears(x, weights, onto)

    layers = [in_float64(source.layer(index)) for index in range(source.shape.layers)]
    caches = [ops.cache(layer.heads) for layer in layers]
    watched = replace(ops, linears=linears)
    decoder.forward(watched, source.shape, source.ends(), layers, tokens, caches)
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        found, (keys, values) = peaks[index], cache.read()
        for number, (point, roles) in enumerate(READERS.items()):
            torch.testing.assert_close(found.inputs[point], inputs[4 * index + number], rtol=1e-4, atol=1e-6)
            columns = torch.stack([layer.linears[role].weight.abs().amax(dim=0) for role in roles]).amax(dim=0)
            assert torch.equal(found.weights[point], columns)
        torch.testing.assert_close(found.key, keys.abs().amax(dim=(0, 1, 2)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.value, values.abs().amax(dim=(0, 2)), rtol=1e-4, atol=1e-6)


def test_only_what_is_needed_is_collected(checkpoint: Callable[..., Path]) -> None:
    source, tokens = Source.open(checkpoint()), random_tokens(2)
    every = collected(source, tokens)
    for statistic in Statistic:
        one = collected(source, tokens, frozenset({statistic}))
        for name in Statistic:
            assert (getattr(one, name) is None) == (name != statistic)
        got, want = getattr(one, statistic), getattr(every, statistic)
        assert all(torch.equal(a, b) for a, b in zip(flat(got), flat(want), strict=True))
    assert collected(source, tokens, frozenset()) == Moments(2 * LENGTH)


def test_moments_of_windows_add_up(checkpoint: Callable[..., Path]) -> None:
    source, tokens = Source.open(checkpoint()), random_tokens(9)
    whole, parts = collected(source, tokens), [collected(source, part) for part in tokens.split(4)]
    total = torch.stack([there(part.residual) for part in parts]).sum(dim=0)
    torch.testing.assert_close(there(whole.residual), total, rtol=1e-12, atol=1e-12)


def test_progress_counts_every_window_of_every_layer(checkpoint: Callable[..., Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    source = Source.open(checkpoint())
    needs = frozenset({Statistic.KEY})
    collect(source, dense(torch.float32), random_tokens(3), needs, lambda *report: seen.append(report))
    assert seen == [("collecting moments", number, 6) for number in range(1, 7)]


@pytest.mark.parametrize("window", [0, 1, 2])
def test_an_overflow_in_any_window_is_refused_by_its_layer(window: int, checkpoint: Callable[..., Path]) -> None:
    """One token alone stands on coordinate 0, whose way through the first feed-forward block leaves float32's range."""
    directory = checkpoint(dtype="float32", tie_word_embeddings=False)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    embed = tensors["model.embed_tokens.weight"]
    embed[:, 0] = embed[7] = 0.0
    embed[7, 0] = 1.0
    tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0.0
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"][:, 0] = 1e30
    save_file(tensors, file, metadata={"format": "pt"})
    tokens = random_tokens(3)
    tokens[tokens == 7] = 8
    assert torch.isfinite(there(collected(Source.open(directory), tokens).residual)).all()
    tokens[window, -1] = 7
    with pytest.raises(InputError, match=r"\Alayer 0 gives NaN or Inf.*\Z"):
        collected(Source.open(directory), tokens)
