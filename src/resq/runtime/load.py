"""A packed checkpoint as a model that runs: weights from the files, operators from a backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from resq.backends.backend import Backend, LayerCache, ReplayedCache
from resq.backends.choose import backend_named
from resq.checkpoint.files import CheckpointReader, EndParts, Parts
from resq.checkpoint.manifest import Manifest
from resq.errors import CheckpointError, InputError
from resq.models import decoder
from resq.models.architecture import READERS, Point, Role, Shape, architecture_for
from resq.models.decoder import Ends, Layer
from resq.models.source import locate, read_config, read_generation_config
from resq.models.text import encode, load_tokenizer
from resq.numerics.bands import Bands
from resq.numerics.linear import Linear, PackedLinear
from resq.progress import Progress, silent
from resq.runtime.generate import Sampling, continue_tokens
from resq.runtime.steps import Steps

# Tokens decoded before a new piece of text.
DECODE_CONTEXT = 8


def layer_from(parts: Parts, shape: Shape, file: str) -> Layer:
    """A decoder layer from its stored parts. Raises CheckpointError when a linear's size is not the configuration's."""
    for role, size in shape.sizes().items():
        linear = parts.linears.get(role)
        if linear is None or linear.shape != size:
            found = "nothing" if linear is None else f"shape {linear.shape}"
            raise CheckpointError(f"{file}: {role} should have shape {size} by config.json, found {found}")
    for point, roles in READERS.items():
        for role in roles:
            check_cuts(parts.inputs[point].bands, parts.linears[role], f"{file}: {role}")
    return Layer(
        {Role(role): linear for role, linear in parts.linears.items()},
        {Point(point): norm for point, norm in parts.norms.items()},
        parts.heads,
        {Point(point): format for point, format in parts.inputs.items()},
        parts.window,
    )


def check_cuts(inputs: Bands | None, linear: Linear, where: str) -> None:
    """Every weight band must lie inside one band of the input. Raises CheckpointError."""
    if inputs is None or not isinstance(linear, PackedLinear):
        return
    outer = [(cut.start, cut.stop) for cut in inputs.slices()]
    for cut in linear.bands.slices():
        if not any(start <= cut.start and cut.stop <= stop for start, stop in outer):
            raise CheckpointError(
                f"{where}: weight bands {linear.bands.pairs} cross the input's {inputs.pairs}; the manifest was altered"
            )


def ends_from(parts: EndParts, shape: Shape) -> Ends:
    """Embedding, norm and head from their stored parts."""
    if tuple(parts.embed.shape) != (shape.vocab, shape.hidden) or parts.head.shape != (shape.vocab, shape.hidden):
        raise CheckpointError(
            f"embedding {tuple(parts.embed.shape)} and head {parts.head.shape} should both be "
            f"{(shape.vocab, shape.hidden)} by config.json; copy the checkpoint again"
        )
    return Ends(parts.embed, parts.norm, parts.head_input, parts.head)


@dataclass
class Model:
    """State: a loaded model; weights in the backend's layout. `resq.load(directory)` makes one.

    `model.generate("Once upon a time")` returns text; `model(tokens)` returns logits float32 [b, t, vocab].
    """

    shape: Shape
    ends: Ends
    layers: Sequence[Layer]
    backend: Backend
    directory: Path
    manifest: Manifest
    end_tokens: frozenset[int]

    @cached_property
    def _steps(self) -> Steps:
        return Steps(self.backend, self.shape, self.ends, self.layers)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer stored with the checkpoint."""
        return load_tokenizer(self.directory)

    def cache(self) -> list[LayerCache]:
        """An empty cache, one entry per layer, for any batch size."""
        return [self.backend.cache(layer.heads) for layer in self.layers]

    @torch.inference_mode()
    def __call__(
        self,
        tokens: Tensor,
        cache: Sequence[LayerCache] | None = None,
        starts: Tensor | None = None,
        *,
        last: bool = False,
    ) -> Tensor:
        """tokens int64 [b, t] -> logits float32 [b, t, vocab], or of the last token only with `last`.

        With a cache the tokens follow what it holds and are appended. starts int64 [b]: the first valid slot of each
        left-padded row. Logits lie on the backend's device. Raises InputError for token ids outside the vocabulary
        (where the tokens lie on the CPU: on a card looking would mean waiting) or a context that is too long.
        """
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise InputError(f"tokens are int64 [batch, tokens], got {tokens.dtype} of shape {tuple(tokens.shape)}")
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.shape.vocab:
            raise InputError(
                f"token ids must lie in 0 … {self.shape.vocab - 1}, got {int(tokens.min())} … {int(tokens.max())}"
            )
        past = cache[0].length if cache else 0
        if past + tokens.shape[1] > self.shape.max_positions:
            raise InputError(
                f"{past + tokens.shape[1]} tokens are more than the model's context of {self.shape.max_positions}; "
                "shorten the prompt or the output"
            )
        if cache and tokens.shape[1] == 1 and self.backend.record is not None:
            return self._steps(tokens, cast("Sequence[ReplayedCache]", cache), starts)
        return decoder.forward(self.backend, self.shape, self.ends, self.layers, tokens, cache, starts, last=last)

    def room(self, prompt: str | Tensor) -> int:
        """New tokens that fit in the context after `prompt`."""
        return self.shape.max_positions - self._encode(prompt).shape[1]

    def stream(
        self, prompt: str | Tensor, *, max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Pieces of text as they are made; greedy unless `sampling` says otherwise. The prompt is not repeated; ends
        with an end token or where the context is full. Raises InputError when the prompt alone fills it."""
        tokens = self._encode(prompt)
        room = self.shape.max_positions - tokens.shape[1]
        if room < 1:
            raise InputError(
                f"the prompt has {tokens.shape[1]} tokens, the model's context is {self.shape.max_positions}; "
                "shorten it"
            )
        ids = tokens[0].tolist()
        # Each piece is decoded after a few tokens before it: some decoders drop a text's leading space, and a
        # character may span several tokens.
        shown, before = len(ids), max(0, len(ids) - DECODE_CONTEXT)
        count = min(max_new_tokens, room)
        for token in continue_tokens(self, tokens, count, sampling or Sampling(), self.end_tokens):
            if token in self.end_tokens:
                break
            ids.append(token)
            piece = self._new_text(ids, before, shown)
            if piece and not piece.endswith("\ufffd"):
                yield piece
                before, shown = max(before, shown - DECODE_CONTEXT), len(ids)
        if shown < len(ids):
            yield self._new_text(ids, before, shown)

    def _new_text(self, ids: list[int], before: int, shown: int) -> str:
        old = self.tokenizer.decode(ids[before:shown], clean_up_tokenization_spaces=False)
        return self.tokenizer.decode(ids[before:], clean_up_tokenization_spaces=False)[len(old) :]

    def generate(self, prompt: str | Tensor, *, max_new_tokens: int = 128, sampling: Sampling | None = None) -> str:
        """The continuation of `prompt` as one text: `model.generate("Once upon a time")`."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling))

    def _encode(self, prompt: str | Tensor) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt.reshape(1, -1)
        tokens = torch.tensor([encode(prompt, self.tokenizer, "the prompt")], dtype=torch.int64)
        if tokens.numel() == 0:
            begin = self.tokenizer.bos_token_id
            if begin is None:
                raise InputError("the prompt is empty and the tokenizer has no beginning-of-text token; give some text")
            tokens = torch.tensor([[begin]])
        return tokens


class Opened:
    """State: a packed checkpoint's manifest, configuration and files; layers are read when asked for.

    `Opened("llama-resq")` takes a directory or a hub id. Raises CheckpointError when manifest and config.json disagree.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.path = locate(checkpoint)
        self.reader = CheckpointReader(self.path)
        self.manifest: Manifest = self.reader.manifest
        self.config = read_config(self.path)
        self.architecture = architecture_for(self.config["model_type"])
        self.shape: Shape = self.architecture.shape(self.config)
        if len(self.manifest.layers) != self.shape.layers:
            raise CheckpointError(
                f"{self.path} holds {len(self.manifest.layers)} layers, its config.json says {self.shape.layers}"
            )

    def ends(self) -> Ends:
        """Embedding, norm and head."""
        return ends_from(self.reader.ends(), self.shape)

    def layer(self, index: int) -> Layer:
        """Decoder layer `index`."""
        parts, file = self.reader.layer(index), self.manifest.layers[index].file
        layer = layer_from(parts, self.shape, file)
        if parts.window != self.shape.window(index):
            raise CheckpointError(
                f"{file}: its manifest has window {parts.window}, config.json {self.shape.window(index)}; one of them "
                "was altered"
            )
        norms = {Role.Q: parts.heads.query_norm, Role.K: parts.heads.key_norm}
        for role, norm in norms.items():
            if (norm is not None) != (role in self.architecture.head_norms):
                raise CheckpointError(f"{file}: the norm of {role} heads is not as its model type has it")
            if norm is not None and (norm.gain is None or tuple(norm.gain.shape) != (self.shape.head_dim,)):
                raise CheckpointError(f"{file}: the norm of {role} heads needs {self.shape.head_dim} gains")
        return layer


def load(checkpoint: str | Path, *, backend: str | Backend | None = None, progress: Progress = silent) -> Model:
    """Open a packed checkpoint, a directory or a hub id; every file is checked against its recorded size and hash.

    `model = resq.load("llama-resq")`. backend: cpu (default) or reference, by name. `progress` is told (phase, files
    read, files). Raises CheckpointError when something is missing, altered or of another version, BackendUnavailable
    when the backend cannot run here.
    """
    backend = backend_named(backend)
    opened = Opened(checkpoint)
    files = opened.shape.layers + 1
    ends = opened.ends().prepacked(backend)
    layers = []
    for index in range(opened.shape.layers):
        progress("loading", index + 1, files)
        layers.append(opened.layer(index).prepacked(backend))
    progress("loading", files, files)
    stops = end_tokens(opened.path, opened.config)
    return Model(opened.shape, ends, layers, backend, opened.path, opened.manifest, stops)


def end_tokens(directory: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids after which generation stops: generation_config.json's, else config.json's."""
    ends = read_generation_config(directory).get("eos_token_id")
    ends = config.get("eos_token_id") if ends is None else ends
    return frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])
