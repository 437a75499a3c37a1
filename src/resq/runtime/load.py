"""A packed checkpoint as a model that runs: weights from the files, operators from a backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq.backends.backend import Backend, LayerCache
from resq.backends.reference import REFERENCE
from resq.checkpoint.files import CheckpointReader, EndParts, Parts
from resq.checkpoint.manifest import Manifest
from resq.errors import CheckpointError, InputError
from resq.models import decoder
from resq.models.architecture import READERS, Point, Role, Shape, architecture_for
from resq.models.decoder import Ends, Layer
from resq.models.source import read_config
from resq.models.text import load_tokenizer
from resq.numerics.bands import Bands
from resq.numerics.linear import Linear, PackedLinear
from resq.runtime.generate import Sampling, continue_tokens


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
        left-padded row. Raises InputError for token ids outside the vocabulary or a context that is too long.
        """
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise InputError(f"tokens are int64 [batch, tokens], got {tokens.dtype} of shape {tuple(tokens.shape)}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.shape.vocab:
            raise InputError(
                f"token ids must lie in 0 … {self.shape.vocab - 1}, got {int(tokens.min())} … {int(tokens.max())}"
            )
        past = cache[0].length if cache else 0
        if past + tokens.shape[1] > self.shape.max_positions:
            raise InputError(
                f"{past + tokens.shape[1]} tokens are more than the model's context of {self.shape.max_positions}; "
                "shorten the prompt or the output"
            )
        return decoder.forward(self.backend, self.shape, self.ends, self.layers, tokens, cache, starts, last=last)

    def stream(
        self, prompt: str | Tensor, *, max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Pieces of text as they are made; greedy unless `sampling` says otherwise. The prompt is not repeated."""
        tokens = self._encode(prompt)
        shown, ids = "", []
        for token in continue_tokens(self, tokens, max_new_tokens, sampling or Sampling(), self.end_tokens):
            if token in self.end_tokens:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids)
            # A character may span several tokens: wait until it is whole.
            if not text.endswith("�"):
                yield text[len(shown) :]
                shown = text
        rest = self.tokenizer.decode(ids)[len(shown) :]
        if rest:
            yield rest

    def generate(self, prompt: str | Tensor, *, max_new_tokens: int = 128, sampling: Sampling | None = None) -> str:
        """The continuation of `prompt` as one text: `model.generate("Once upon a time")`."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling))

    def _encode(self, prompt: str | Tensor) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt.reshape(1, -1)
        tokens = torch.tensor([self.tokenizer(prompt)["input_ids"]], dtype=torch.int64)
        if tokens.numel() == 0:
            begin = self.tokenizer.bos_token_id
            if begin is None:
                raise InputError("the prompt is empty and the tokenizer has no beginning-of-text token; give some text")
            tokens = torch.tensor([[begin]])
        return tokens


def load(
    directory: str | Path,
    *,
    backend: Backend = REFERENCE,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Model:
    """Open a packed checkpoint; every file is checked against its recorded size and hash.

    `model = resq.load("llama-resq")`. `progress` is told (phase, files read, files). Raises CheckpointError when
    something is missing, altered or of another version, InputError when the backend cannot run here.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(
            f"no checkpoint directory at {directory}; make one with resq quantize SOURCE --out {directory}"
        )
    if reason := backend.unusable():
        raise InputError(f"backend {backend.name} cannot be used here: {reason}")
    reader = CheckpointReader(directory)
    config = read_config(directory)
    shape = architecture_for(config["model_type"]).shape(config)
    if len(reader.manifest.layers) != shape.layers:
        raise CheckpointError(
            f"{directory} holds {len(reader.manifest.layers)} layers, its config.json says {shape.layers}"
        )
    ends = ends_from(reader.ends(), shape).prepacked(backend)
    layers = []
    progress("loading", 1, shape.layers + 1)
    for index, entry in enumerate(reader.manifest.layers):
        layers.append(layer_from(reader.layer(index), shape, entry.file).prepacked(backend))
        progress("loading", index + 2, shape.layers + 1)
    return Model(shape, ends, layers, backend, directory, reader.manifest, end_tokens(directory, config))


def end_tokens(directory: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids after which generation stops: generation_config.json's, else config.json's."""
    file = directory / "generation_config.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ends = stored.get("eos_token_id", config.get("eos_token_id"))
    return frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])
