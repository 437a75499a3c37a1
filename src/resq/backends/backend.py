"""The contract of a backend: exactly the operators a decoder needs, and the reason when it cannot run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from resq.numerics.affine import Quantized
from resq.numerics.formats import ActivationFormat, HeadFormats, Norm

Activations = Quantized | Tensor


class LayerCache(Protocol):
    """State: one decoder layer's keys and values, opaque to everyone but its backend. Grows by append only."""

    @property
    def length(self) -> int:
        """Tokens stored."""
        ...

    @property
    def batch(self) -> int:
        """Rows stored, once a token is."""
        ...

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys (after RoPE and their map) and values as stored, dequantized: [b, G, tokens, h] each."""
        ...

    def crop(self, length: int) -> None:
        """Forget every token from `length` on."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` int64 [new batch], in that order (beam search reorders and repeats)."""
        ...

    def nbytes(self) -> int:
        """Bytes of the stored tokens (not of reserved room)."""
        ...


class ReplayedCache(LayerCache, Protocol):
    """State: a cache whose storage can stay where it is while tokens are appended, so that a step can be replayed."""

    clock: Tensor | None
    """int32 [1] on the device: the tokens stored before a step, read by its operators in place of `length`; or None."""

    recording: Any
    """What whoever records steps over this cache keeps with it, None at first."""

    def reserve(self, batch: int, kv_heads: int, head_dim: int, capacity: int) -> None:
        """Room for `capacity` tokens at least; more is taken, so that it seldom grows."""
        ...

    def advance(self, tokens: int) -> None:
        """Count tokens that a replay stored."""
        ...

    def storage(self) -> tuple[int, ...]:
        """Addresses; a recorded step is good as long as they are the same."""
        ...


def wait(device: torch.device) -> None:
    """Until all that was given to `device` is done: a clock read before says nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Backend:
    """A record of operators. `dtype` is that of float tensors between operators: float32, the reference's named points.
    `device` is where they lie, and where `prepack` puts weights; norms and formats may lie anywhere.

    norm_quantize(x [b, t, n], norm, format) -> Activations: RMSNorm, online map, rounding.
    linears(x, weights, onto=None) -> [b, t, out] per weight: quantized or float activations times prepacked weights
        that share this input; the first is added to onto [b, t, out] where given.
    rope_project_append(q [b, t, H, h], k [b, t, G, h], v [b, t, G, h], cos, sin [b, t, h], formats, cache) ->
        projected q: each head's norm, RoPE (half-split), the query and key maps, rounding, append to the cache.
    attend(q [b, t, H, h], cache, scale, starts, window) -> [b, t, H·h]: causal softmax attention of the last t cached
        tokens over the cache; starts int64 [b] is each row's first valid slot (left padding) or None; window is the
        sliding window in tokens or None.
    gather_quantize(x [b, t, n], format) -> Activations: online map and rounding of the attention output.
    act_hadamard_quantize(gate [b, t, F], up [b, t, F], format) -> Activations: SiLU(gate) · up, map, rounding.
    cache(formats) -> an empty LayerCache.
    prepack(linear, inputs=PLAIN) -> the weight in this backend's own layout, made once at load; inputs is the format of
        the activations that it will meet.
    together(weights): at load, these prepacked weights will share every input; None where that changes nothing.
    accumulate(x, weight) -> the exact part of a linear: Σ (q_x - z_x) q_w of every (weight band, group) of quantized
        activations and a prepacked weight, integers [rows, segments, out]. None where there are no integers.
    kernels() -> what the operators are, in words: an instruction set, a card.
    record(step) -> a function that repeats `step`, which reads and writes the same tensors each time, at less cost (a
        CUDA graph); its result is overwritten by the next call. None where there is nothing to gain; caches are
        `ReplayedCache`s otherwise.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    unusable: Callable[[], str | None]
    prepack: Callable[..., Any]
    norm_quantize: Callable[[Tensor, Norm, ActivationFormat], Activations]
    linears: Callable[..., list[Tensor]]
    rope_project_append: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, HeadFormats, Any], Tensor]
    attend: Callable[[Tensor, Any, float, Tensor | None, int | None], Tensor]
    gather_quantize: Callable[[Tensor, ActivationFormat], Activations]
    act_hadamard_quantize: Callable[[Tensor, Tensor, ActivationFormat], Activations]
    cache: Callable[[HeadFormats], LayerCache]
    together: Callable[[Sequence[Any]], None] | None = None
    accumulate: Callable[[Quantized, Any], Tensor] | None = None
    kernels: Callable[[], str] = lambda: "torch"
    record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None

    def linear(self, x: Activations, weight: Any, onto: Tensor | None = None) -> Tensor:
        """`linears` of one weight."""
        return self.linears(x, (weight,), onto)[0]
