"""Everything heavy of `quantize --device cuda` happens on the card, and gives what the CPU gives.

Without a card, `Card` stands in for one: what lies on it are CPU tensors whose storage is noted, so that the arithmetic
is the CPU's bit for bit, and an operation that a card would refuse fails with its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import Kept, brief, run
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as rerun

import resq
from resq.backends.backend import Backend
from resq.backends.reference import REFERENCE, dense, reference
from resq.checkpoint.files import CheckpointReader
from resq.errors import InputError
from resq.inputs import chosen_device
from resq.models import decoder
from resq.models.architecture import Role
from resq.models.source import Source
from resq.numerics.bands import Bands
from resq.numerics.device import CPU, moved
from resq.numerics.formats import ActivationFormat, HeadFormats
from resq.numerics.maps import Dense
from resq.ptq.ablations import ABLATIONS
from resq.ptq.pipeline import Job
from resq.ptq.pipeline import quantize as run_pipeline
from resq.ptq.recipe import InputMoments, Recipe, Rounded
from resq.ptq.recipes import RECIPES, RESQ_PAPER, RESQ_WEIGHT_ONLY, RTN
from resq.runtime.load import ends_from, layer_from

CUDA = torch.device("cuda")
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here, nothing stands in for it")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no card")
# Parts of names of what nobody wants on the CPU when there is a card.
HEAVY = ("matmul", "linear", "scaled_dot", "cholesky", "eigh", "svd", "solve", "einsum", "round", "silu")


class Card(TorchFunctionMode):
    """State: the storages that lie on the card, and which heavy functions ran on it and on the CPU.

    A call may mix the card's tensors with scalars of the CPU only, as on a real one. Backward passes run on real CPU
    tensors; what they call in Python is looked at.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self.ran: dict[bool, set[str]] = {True: set(), False: set()}

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor lies on the card; its views do too."""
        # A weak reference keeps the address from being given to another storage.
        found = self._storages.get(x.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def put(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage)
        return x

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return CUDA if self.holds(args[0]) else CPU
        if func == Tensor.backward:
            loss = args[0].flatten()
            with self:  # for the layers that run again
                return _engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if func in (Tensor.to, Tensor.cpu):
            return self._moved(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(map(self.holds, tensors))
        card = here if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "cuda"
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        assert not (here and func == Tensor.numpy), "numpy() of a tensor on the card"
        assert not (card and kwargs.get("generator")), f"{name} draws on the card"
        for x in tensors:
            assert not here or self.holds(x) or x.dim() == 0, f"{name}: {tuple(x.shape)} lies on the CPU"
        if any(part in name for part in HEAVY):
            self.ran[card].add(name)
        out = func(*args, **kwargs)
        if card:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.put(leaf)
        return out

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, *rest = args
        card = self.holds(x) and func != Tensor.cpu
        for each in [*rest, *kwargs.values()]:
            if isinstance(each, Tensor):
                card = self.holds(each)
            elif isinstance(each, (torch.device, str)):
                card = torch.device(each).type == "cuda"
        rest = [CPU if isinstance(each, (torch.device, str)) else each for each in rest]
        out = func(x, *rest, **kwargs | ({"device": CPU} if "device" in kwargs else {}))
        if card != self.holds(x) and out.untyped_storage()._cdata == x.untyped_storage()._cdata:
            out = out.clone()
        return self.put(out) if card else out


CARD = Card()  # one for all tests: transforms are cached by device


@contextmanager
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """As if torch saw one card."""
    with monkeypatch.context() as patch, CARD:
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda place: "a stand-in")
        # It compares devices inside and outside a call.
        patch.setattr("resq.ptq.simulation.checkpoint", partial(rerun, determinism_check="none"))
        patch.setattr("safetensors.torch.save_file", saved)
        CARD.ran = {True: set(), False: set()}
        yield CARD


def saved(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
    """Written from the CPU."""
    assert not any(map(CARD.holds, tensors.values()))
    save_file(tensors, path, **options)


def quantized(source: Path, out: Path, recipe: Recipe, text: Path, device: str, **options: Any) -> resq.api.Result:
    options = {"windows": 4, "rounding_windows": 2, "window_length": 32, **options}
    return resq.quantize(source, out, recipe=recipe, calibration=text, device=device, **options)


def contents(directory: Path) -> dict[str, Any]:
    """Every file's bytes; of the manifest what does not name the time and the device."""
    files: dict[str, Any] = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.*")}
    del files["SHA256SUMS.txt"]  # it has the manifest's hash
    manifest = json.loads(files.pop("resq.json"))
    for name in ("time", "device", "card"):
        manifest["made_by"].pop(name, None)
    if manifest["calibration"]:
        del manifest["calibration"]["forward"]
    return {**files, "manifest": manifest}


@no_card
def test_the_stand_in_refuses_what_a_card_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with card(monkeypatch):
        there = torch.ones(3).to(CUDA)
        assert (there.device, there.cpu().device, there[1:].clone().device) == (CUDA, CPU, CUDA)
        assert (there + torch.tensor(1.0)).device == torch.eye(2, device=CUDA).device == CUDA
        for refused in (
            lambda: there + torch.ones(3),
            lambda: torch.cat([there, torch.ones(3)]),
            lambda: there.repeat_interleave(torch.tensor([1, 2, 3])),
            lambda: there.numpy(),
            lambda: torch.randn(3, device=CUDA, generator=torch.Generator()),
        ):
            with pytest.raises(AssertionError):
                refused()


@no_card
@pytest.mark.parametrize(
    "name", [*RECIPES, *(pytest.param(name, marks=pytest.mark.slow) for name in ABLATIONS)], ids=str
)
def test_a_card_does_all_the_work_of_every_recipe_and_writes_the_cpus_bytes(
    name: str, checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With biases, a sliding window, and for one recipe a rounded head."""
    changes = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0, "num_hidden_layers": 1}
    source = checkpoint("qwen2", tie_word_embeddings=name != "resq", **changes)
    options = {"head_bits": 8 if name == "resq" else None}
    want = quantized(source, tmp_path / "cpu" / "made", brief(name), text, "cpu", **options)
    with card(monkeypatch) as used:
        got = quantized(source, tmp_path / "cuda" / "made", brief(name), text, "cuda", **options)
    assert not used.ran[False]
    assert used.ran[True] & {"round", "linalg_eigh"}
    assert contents(got.directory) == contents(want.directory)
    assert [replace(each, seconds=0.0) for each in got.linears] == [replace(each, seconds=0.0) for each in want.linears]
    if got.manifest.calibration is not None:
        assert got.manifest.calibration.forward == "float32, cuda"


@no_card
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_a_card_runs_norms_of_heads_and_fused_matrices(
    family: str, checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(family)
    want = quantized(source, tmp_path / "cpu" / "made", RESQ_PAPER, text, "cpu")
    with card(monkeypatch):
        got = quantized(source, tmp_path / "cuda" / "made", RESQ_PAPER, text, "cuda")
    assert contents(got.directory) == contents(want.directory)


def logits(ops: Backend, directory: Path, tokens: Tensor, starts: Tensor) -> Tensor:
    """Of a prompt and, token by token with the rows swapped, of what follows it."""
    read, shape = CheckpointReader(directory), Source.open(directory.parent / "source").shape
    layers = [layer_from(read.layer(index), shape, "x").prepacked(ops) for index in range(shape.layers)]
    ends, caches = ends_from(read.ends(), shape).prepacked(ops), [ops.cache(layer.heads) for layer in layers]
    found = [decoder.forward(ops, shape, ends, layers, tokens[:, :20], caches, starts)]
    for cache in caches:
        cache.select(torch.tensor([1, 0]))
    for at in range(20, 24):
        step = tokens[:, at : at + 1].flip(0)
        found.append(decoder.forward(ops, shape, ends, layers, step, caches, starts.flip(0)))
    return torch.cat(found, dim=1)


@no_card
@pytest.mark.parametrize("recipe", [RESQ_PAPER, RESQ_WEIGHT_ONLY, RTN], ids=lambda recipe: recipe.name)
def test_the_definition_runs_on_a_card(
    recipe: Recipe, checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TF32 must not matter, integer products are taken in float64: as exact as the CPU's."""
    (tmp_path / "source").symlink_to(checkpoint("qwen2"))
    made = quantized(tmp_path / "source", tmp_path / "made", recipe, text, "cpu").directory
    tokens = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 5])
    for want, there in ((REFERENCE, reference(CUDA)), (dense(torch.float64), dense(torch.float64, CUDA))):
        expected = logits(want, made, tokens, starts)
        with card(monkeypatch) as used:
            assert torch.equal(logits(there, made, tokens, starts).cpu(), expected)
        assert not used.ran[False]


def test_products_are_full_float32_while_quantizing_and_as_before_afterwards(checkpoint: Callable[..., Path]) -> None:
    matmul, seen = torch.backends.cuda.matmul, set()
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        job = Job(RTN, torch.zeros(0, 0, dtype=torch.int64), 0, 0, keep_tied=True)
        kept: Any = Kept([])
        run_pipeline(Source.open(checkpoint()), job, kept, lambda phase, done, total: seen.add(matmul.fp32_precision))
        assert (seen, matmul.fp32_precision) == ({"ieee"}, "tf32")
    finally:
        matmul.fp32_precision = before


def test_what_shares_a_tensor_shares_it_after_a_move_and_what_lies_there_is_left_alone() -> None:
    map = Dense(torch.eye(4))
    heads = HeadFormats(query=ActivationFormat(map), key=ActivationFormat(map, Bands.of((4, 4)), clip=(0.5,)))
    assert moved(heads, CPU) is heads
    there = moved({"heads": [heads]}, torch.device("meta"))["heads"][0]
    assert isinstance(there.query.map, Dense)
    assert isinstance(there.key.map, Dense)
    assert there.query.map.matrix is there.key.map.matrix
    assert there.query.map.matrix.device.type == "meta"
    assert (there.key.bands, there.key.clip, there.value) == (heads.key.bands, heads.key.clip, heads.value)


@pytest.mark.parametrize(
    ("built", "cards", "given", "said"),
    [
        (False, 0, "cuda", "is built without CUDA; install a CUDA build of torch, or use --device cpu"),
        (True, 0, "cuda", "torch sees no card; see what nvidia-smi"),
        (True, 2, "cuda:2", "--device cuda:2 was asked for; torch's last card is cuda:1"),
        (True, 1, "cude", "--device 'cude' is no device; accepted are cpu, cuda, and cuda:1"),
        (True, 1, "meta", "--device meta is not supported; accepted are cpu, cuda, and cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line_before_any_work(
    built: bool, cards: int, given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    done = run("quantize", "tiny", "--device", given, "--out", tmp_path / "made")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    with pytest.raises(InputError):
        resq.quantize("tiny", tmp_path / "made", device=given)
    assert not list(tmp_path.iterdir())


def test_a_card_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [chosen_device(given) for given in ("cpu", "cuda", "cuda:1", CUDA)] == [
        CPU,
        CUDA,
        torch.device("cuda:1"),
        CUDA,
    ]


@dataclass(frozen=True)
class Greedy:
    """A rounding for which no memory is enough."""

    needs_moment: ClassVar[bool] = False
    sees_rounded: bool = False
    corrects: bool = False

    def __call__(self, weight: Tensor, moments: InputMoments | None, bands: Bands, bias: Tensor | None) -> Rounded:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.")


def test_a_card_without_room_is_one_line_and_keeps_what_is_finished(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"cpu ran out of memory.*; use --activations disk, or fewer or shorter windows"
    ):
        resq.quantize(checkpoint(), tmp_path / "out" / "made", recipe=replace(RTN, rounding=Greedy()))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".made.partial"]


@needs_card
@pytest.mark.parametrize("name", RECIPES)
def test_a_real_card_rounds_as_well_as_the_cpu(
    name: str, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Other last digits of sums turn some integers by one; what rounding costs stays."""
    source, found = checkpoint("qwen2"), {}
    for device in ("cpu", "cuda"):
        made = quantized(source, tmp_path / device, brief(name), text, device)
        found[device] = sum(report.error for report in made.linears)
        assert {report.role for report in made.linears} == set(Role)
        assert torch.isfinite(resq.load(made.directory, backend="reference")(torch.arange(3, 23)[None])).all()
    assert found["cuda"] <= 1.1 * found["cpu"]


@needs_card
@pytest.mark.parametrize("recipe", [RESQ_PAPER, RESQ_WEIGHT_ONLY, RTN], ids=lambda recipe: recipe.name)
def test_a_real_card_gives_the_definitions_logits(
    recipe: Recipe, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Float64 between roundings: last digits there move a float32 with odds of 1e-8, an integer more seldom still."""
    (tmp_path / "source").symlink_to(checkpoint("qwen2"))
    made = quantized(tmp_path / "source", tmp_path / "made", recipe, text, "cpu").directory
    tokens = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(0))
    want, got = (logits(ops, made, tokens, torch.tensor([0, 5])) for ops in (REFERENCE, reference(CUDA)))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
