"""transformers as a host: the shell of its model class stays, everything that computes becomes the project's decoder.

`import resq` registers the method; `AutoModelForCausalLM.from_pretrained(directory)` then builds the empty model, this
file replaces embedding, decoder layers, final norm and head by modules that run our operators, and fills them with our
own loader (hashes checked). The residual stream is float32; `.generate`, beam search and padding work as usual.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from resq.backends.backend import Backend, LayerCache
from resq.backends.choose import backend_named
from resq.checkpoint.manifest import FORMAT_VERSION, MANIFEST_FILE
from resq.errors import CheckpointError, InputError
from resq.models import decoder
from resq.models.architecture import Shape, architecture_for
from resq.models.decoder import Ends, Layer, Positions
from resq.numerics.device import changed
from resq.runtime.load import Opened


class ResQConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the manifest beside it holds everything else."""

    def __init__(
        self,
        quant_method: str = "resq",
        format_version: int = FORMAT_VERSION,
        manifest: str = MANIFEST_FILE,
        **extra: Any,
    ) -> None:
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]  their enum is closed
        self.format_version, self.manifest = format_version, manifest
        for key, value in extra.items():
            setattr(self, key, value)


@dataclass
class Shared:
    """What all modules of one model know: sizes, operators, and the left padding read from the current mask."""

    shape: Shape
    ops: Backend
    _seen: tuple[weakref.ref[Tensor], Tensor | None] | None = None

    def starts(self, mask: Tensor | None, past: int, tokens: int, window: int | None) -> Tensor | None:
        """First valid slot of each row, int64 [b], from transformers' 4-D mask; None for plain causal attention, also
        in a sliding window.

        Raises InputError for a mask that is not causal with left padding (right padding only hides slots that causal
        queries of real tokens never see, and passes): such attention patterns are not run.
        """
        if mask is None:
            return None
        seen = self._seen
        if seen is None or seen[0]() is not mask:
            seen = self._seen = weakref.ref(mask), left_padding(mask, past, tokens, window)
        return seen[1]


def left_padding(mask: Tensor, past: int, tokens: int, window: int | None) -> Tensor | None:
    """First valid slot of each row of a mask [b, 1, tokens, slots], bool or additive, of causal attention or of that
    within a sliding window; None where every row begins at 0. A slot that no query's window reaches counts as padding.
    """
    length = past + tokens
    keep = mask[..., :length] if mask.dtype == torch.bool else mask[..., :length] == 0
    keep = keep[:, 0, -tokens:]
    slot = torch.arange(length, device=mask.device)
    query = slot[past:]
    # Rows of real tokens see at least themselves.
    real = keep[:, query - past, query]
    seen = keep & real[:, :, None]
    starts = torch.where(seen, slot, length).amin(dim=(1, 2)).clamp(max=length - 1)
    causal = slot <= query[:, None]
    if window is not None:
        causal &= slot > query[:, None] - window
    allowed = causal[None] & (slot[None, None] >= starts[:, None, None])
    if not torch.equal(seen, allowed & real[:, :, None]):
        raise InputError("the attention mask is not causal with padding at one end; pad on the left, one text per row")
    return starts if bool(starts.any()) else None


class ResQCacheLayer(CacheLayerMixin):
    """State: one layer of packed keys and values in the shape of transformers' cache layers."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, make: Callable[[], LayerCache]) -> None:
        super().__init__()
        self._make = make
        self.inner = make()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: room grows with the tokens."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: only the layer that owns this cache knows how to round into it."""
        raise InputError("a packed cache is written by its own decoder layer only")

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.inner.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots after `query_length` more tokens, offset 0)."""
        return self.inner.length + query_length, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    def offload(self) -> None:
        """Refused: packed caches stay where they are."""
        raise InputError("packed caches cannot be offloaded; use the default cache")

    def prefetch(self) -> None:
        """Nothing was moved away."""

    def reset(self) -> None:
        """Forget everything."""
        self.inner = self._make()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: a number ≤ 0."""
        if tokens_to_remove > 0:
            raise InputError(f"crop takes minus the number of tokens to drop, got {tokens_to_remove}")
        self.inner.crop(max(0, self.inner.length + tokens_to_remove))

    def _select(self, rows: Tensor) -> None:
        if self.inner.length:
            self.inner.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the surviving beams."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.inner.length:
            self.inner.select(torch.arange(self.inner.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._select(torch.arange(self.inner.batch)[indices] if self.inner.length else indices)


def layer_cache(cache: Any, index: int, make: Callable[[], LayerCache]) -> LayerCache:
    """Our cache for layer `index` inside transformers' cache object, put there at first use."""
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise InputError(f"{type(cache).__name__} cannot hold packed keys and values; use the default cache")
    while len(cache.layers) <= index:
        cache.layers.append(ResQCacheLayer(make))
    layer: Any = cache.layers[index]
    if not isinstance(layer, ResQCacheLayer):
        if layer.is_initialized and layer.get_seq_length() > 0:
            raise InputError("this cache already holds keys and values of another model; start with an empty one")
        layer = cache.layers[index] = ResQCacheLayer(make)
    layer.is_initialized = True
    return layer.inner


class _Held(nn.Module):
    """A module whose tensors live in dataclasses: registered as buffers so that they are counted, never cast."""

    shared: Shared

    def hold(self, data: Any) -> Any:
        """Register every tensor of `data` as a buffer; returns `data`."""

        def register(tensor: Tensor) -> Tensor:
            self.register_buffer(f"tensor_{len(self._buffers)}", tensor, persistent=False)
            return tensor

        return changed(data, register)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Held:
        """Refuse other devices and ignore dtype changes: integers, scales and maps are exact as stored, and lie where
        the backend wants them."""
        device = self.shared.ops.device
        if fn(torch.empty(0, device=device)).device.type != device.type:
            raise InputError(
                f"this checkpoint runs on backend {self.shared.ops.name}, on {device.type}; leave it there "
                f"(in a pipeline: device='{device.type}')"
            )
        return self


class ResQDecoderLayer(_Held):
    """One decoder layer of the project's decoder, called the way transformers calls its own."""

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared, self.layer_idx = shared, index
        self.layer: Layer | None = None

    def fill(self, layer: Layer) -> None:
        """Take the loaded, prepacked weights."""
        self.layer = self.hold(layer)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden [b, t, d] -> [b, t, d] float32."""
        assert self.layer is not None
        for wanted in ("output_hidden_states", "output_attentions"):
            if kwargs.get(wanted):
                raise InputError(f"{wanted} is not available from a packed model; leave it out")
        shared, formats = self.shared, self.layer.heads

        def make() -> LayerCache:
            return shared.ops.cache(formats)

        cache = make() if past_key_values is None else layer_cache(past_key_values, self.layer_idx, make)
        batch, tokens = hidden_states.shape[:2]
        last = cache.length + tokens - 1 if position_ids is None else int(position_ids.max())
        limit = shared.shape.rope.limit
        if limit is not None and last >= limit:
            raise InputError(
                f"position {last} lies beyond the {limit} tokens up to which this model's RoPE is the same for every "
                "prompt; shorten prompt and output"
            )
        starts = shared.starts(attention_mask, cache.length, tokens, self.layer.window)
        if position_ids is None:
            at = Positions.following(shared.shape, cache.length, batch, tokens, starts, shared.ops.device)
        else:
            at = Positions(*shared.shape.rope.tables(position_ids.expand(batch, -1)), starts)
        return decoder.forward_layer(shared.ops, shared.shape, self.layer, hidden_states.float(), at, cache)


class _Embedding(_Held):
    """Rows of the 16-bit table as float32, in the checkpoint's own basis."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared
        self.ends: Ends | None = None

    @property
    def weight(self) -> Tensor:
        """The table [vocab, hidden], read only."""
        assert self.ends is not None
        return self.ends.embed

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.ends is not None
        return decoder.embed(self.shared.ops, self.ends, tokens)


class _Pass(nn.Module):
    """The final norm's place: the norm is part of the head's operator."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _Head(_Held):
    """Final norm and lm_head."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared
        self.ends: Ends | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.ends is not None
        return decoder.logits(self.shared.ops, self.ends, hidden)


class ResQQuantizer(HfQuantizer):
    """The hooks of transformers' loader."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._opened: Opened | None = None
        self.ops = backend_named()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Float tensors between operators are float32, whatever was asked for."""
        return torch.float32

    def update_device_map(self, device_map: Any) -> Any:
        """Everything goes where the backend runs; a map that says otherwise is refused."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(place is not None and place != "auto" and not _is_device(place, self.ops.device) for place in places):
            raise InputError(
                f"device_map {device_map!r} is not possible: backend {self.ops.name} runs on {self.ops.device.type}; "
                "leave it out, or name another backend in the environment, RESQ_BACKEND"
            )
        return None if device_map is None else {"": str(self.ops.device)}

    def update_attn_implementation(self, config: Any) -> Any:
        """Attention is ours; sdpa only decides how transformers builds its masks."""
        config._attn_implementation = "sdpa"
        return config

    def is_serializable(self) -> Any:
        """Saving is refused with the way that works."""
        raise InputError("a packed checkpoint is saved by copying its directory; save_pretrained would lose it")

    @property
    def is_trainable(self) -> bool:  # pyright: ignore
        """Integers take no gradients."""
        return False

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not checkpoint_files:
            raise CheckpointError("transformers named no checkpoint files; load a directory written by resq quantize")
        directory = _with_manifest(Path(checkpoint_files[0]), model.config.name_or_path)
        architecture = architecture_for(model.config.model_type)
        if model.get_output_embeddings() is None or not type(model).__name__.endswith("ForCausalLM"):
            raise InputError(
                f"{type(model).__name__} cannot be loaded from a packed checkpoint; use AutoModelForCausalLM"
            )
        self._opened = Opened(directory)
        shape = self._opened.shape
        shared = Shared(shape, self.ops)
        model.set_submodule(architecture.embed, _Embedding(shared))
        model.set_submodule(architecture.final_norm, _Pass())
        model.set_submodule(architecture.head, _Head(shared))
        for index in range(shape.layers):
            model.set_submodule(f"{architecture.layers}.{index}", ResQDecoderLayer(shared, index))
        model.set_attn_implementation("sdpa")
        # Nothing is left for transformers to read, tie or initialize.
        for module in model.modules():
            if hasattr(module, "all_tied_weights_keys"):
                module._tied_weights_keys, module.all_tied_weights_keys = {}, {}
        model._keys_to_ignore_on_load_unexpected = {r".*"}
        model._no_split_modules = {ResQDecoderLayer.__name__}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._opened is not None
        opened, architecture = self._opened, architecture_for(model.config.model_type)
        embedding, head = model.get_submodule(architecture.embed), model.get_submodule(architecture.head)
        shared: Shared = embedding.shared
        ends = opened.ends().prepacked(shared.ops)
        embedding.ends = ends
        head.ends = head.hold(ends)
        for index in range(opened.shape.layers):
            layer = opened.layer(index).prepacked(shared.ops)
            model.get_submodule(f"{architecture.layers}.{index}").fill(layer)
        # model.device and model.dtype ask the parameters; the norm's place is free.
        anchor = nn.Parameter(torch.empty(0, dtype=torch.float32, device=shared.ops.device), requires_grad=False)
        model.get_submodule(architecture.final_norm).anchor = anchor
        return model


def _is_device(place: Any, device: torch.device) -> bool:
    """Whether a place of a device map, a name, an index or a device, is of that kind."""
    try:
        return torch.device(place).type == device.type
    except (RuntimeError, TypeError):  # "disk" and the like
        return False


def _with_manifest(file: Path, name: str) -> Path:
    """The directory of a checkpoint file; the manifest is fetched beside it when it came from a hub."""
    directory = file.parent
    if not (directory / MANIFEST_FILE).is_file() and not Path(name).is_dir():
        cached_file(name, MANIFEST_FILE, revision=directory.name, cache_dir=str(directory.parents[2]))
    return directory


def register(auto: Any) -> None:
    """Tell transformers' `quantizers.auto` module about the method. Idempotent."""
    if "resq" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config("resq")(ResQConfig)
        auto.register_quantizer("resq")(ResQQuantizer)
