"""What tests share: small random checkpoints in Hugging Face format, and the trained models when they are at hand."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from resq.checkpoint.files import EndParts, Parts
    from resq.models.source import Source
    from resq.ptq.placement import Placement
    from resq.ptq.recipe import Recipe

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a card the Triton backend is tested in Triton's interpreter, which must be asked for before it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tiny tensors: a second thread costs more than it gives (the suite took four times as long with two).
torch.set_num_threads(1)


def use_native_from(directory: Path) -> None:
    """Put the native module of this directory in the place of the installed one, before anything imports that."""
    name, files = "resq.backends.cpu._native", list(directory.glob("_native*.so"))
    if name in sys.modules:
        return
    assert len(files) == 1, f"RESQ_TEST_NATIVE: {directory} should hold one _native*.so, it holds {len(files)}"
    spec = importlib.util.spec_from_file_location(name, files[0])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


# `make sanitize`: another build of the kernels, with checks compiled in.
if directory := os.environ.get("RESQ_TEST_NATIVE"):
    use_native_from(Path(directory))
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
# Small enough that a forward takes milliseconds, odd enough to catch a size taken for another.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 259,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# Heads and sizes that a decoder must not confuse, as changes of `TINY`.
SHAPES: dict[str, dict[str, Any]] = {
    "gqa-8-2": {},
    "mha": {"num_key_value_heads": 8},
    "mqa": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "head-dim-above-hidden-by-heads": {"head_dim": 24},
    "head-dim-below-hidden-by-heads": {"num_attention_heads": 4, "head_dim": 6, "num_key_value_heads": 2},
}


@dataclass
class Kept:
    """State: stands in for a checkpoint's writer and keeps the parts."""

    layers: list[Parts]
    ends: EndParts | None = None

    has_ends = False

    @property
    def finished(self) -> int:
        return len(self.layers)

    def told(self, name: str) -> dict[str, Any]:
        assert self.ends is not None
        return {"dtype": str(self.ends.embed.dtype).removeprefix("torch.")}

    def restart(self, layer: int) -> None:
        del self.layers[layer:]

    def begin_anew(self) -> None:
        assert self.ends is None

    def add_ends(self, names: Mapping[str, str], parts: EndParts, *more: Any) -> None:
        self.ends = parts

    def add_layer(
        self, index: int, layers: int, prefix: str, names: Mapping[str, str], parts: Parts, *more: Any
    ) -> None:
        self.layers.append(parts)


def byte_tokenizer(directory: Path, *, chat: bool = False) -> None:
    """Write a tokenizer with one token per byte (3 … 258) and <pad>, <s>, </s> as 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: index + 3 for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        fast.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(directory)


def make_checkpoint(
    directory: Path, model_type: str = "llama", seed: int = 0, *, chat: bool = False, **changes: Any
) -> Path:
    """A random model of `TINY`'s shape with `changes`, saved by transformers in bfloat16 (or `dtype`), with tokenizer.

    Norm gains and biases are random too, so that a forgotten one shows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = changes.pop("dtype", "bfloat16")
    shards = changes.pop("max_shard_size", "10GB")
    config = AutoConfig.for_model(
        model_type, **{**TINY, **changes, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.normal_(0.0, 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shards)
    byte_tokenizer(directory, chat=chat)
    return directory


def example(name: str) -> ModuleType:
    """A script of `examples/` as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # one example imports another
    spec.loader.exec_module(module)
    return module


def float64_logits(
    source: Source, tokens: Tensor, placement: Placement | None = None, *, keep_tied: bool = False
) -> Tensor:
    """The source's logits in float64, or those after placing maps; nothing is rounded."""
    from resq.backends.reference import dense
    from resq.models import decoder

    ends = source.ends()
    layers = [source.layer(index) for index in range(source.shape.layers)]
    if placement is not None:
        ends = placement.ends(ends, keep_tied=keep_tied)
        layers = [placement.layer(layer, index) for index, layer in enumerate(layers)]
    return decoder.forward(dense(torch.float64), source.shape, ends, layers, tokens)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Done:
    """The command in this process: starting Python and importing transformers takes seconds each time."""
    from resq.cli import main

    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["resq", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(num_attention_heads=4, …)` makes a random source model and returns its directory."""
    made = 0

    def make(model_type: str = "llama", **changes: Any) -> Path:
        nonlocal made
        made += 1
        return make_checkpoint(tmp_path / f"source-{made}", model_type, **changes)

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text of about 12,000 bytes with some structure."""
    file = tmp_path / "calibration.txt"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "rains"]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (2500,), generator=generator).tolist()
    file.write_text(" ".join(words[i] + ("." if n % 11 == 10 else "") for n, i in enumerate(picks)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout with trained models and texts; a stranger's clone has none."""
    if not (SHARED / "models").is_dir():
        pytest.skip("../shared with trained models is not here")
    return SHARED


def brief(name: str) -> Recipe:
    """A recipe with a few steps of learning where it has a hundred, for what does not depend on how well it learns."""
    from resq.ptq.learning import LearnRotations
    from resq.ptq.recipes import recipe_named

    recipe = recipe_named(name)
    tuning = (replace(each, steps=2) if isinstance(each, LearnRotations) else each for each in recipe.tuning)
    return replace(recipe, tuning=tuple(tuning))


def write_json(file: Path, value: Any) -> Path:
    """Write JSON and return the file."""
    file.write_text(json.dumps(value), encoding="utf-8")
    return file
