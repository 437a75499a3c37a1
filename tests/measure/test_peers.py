"""A peer computes the model it names: its decode continues its prefill, on logits equal to those of transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resq.errors import InputError
from resq.measure.peers import choose, llama_cpp, openvino
from resq.measure.peers import peer as contract
from resq.measure.peers.choose import PACKAGES, PEERS, check_peer, peer_named
from resq.measure.peers.peer import tokens_of
from resq.measure.shapes import shape_named
from resq.models.architecture import architecture_for

VOCAB = shape_named("tiny")["vocab_size"]
PUBLISHED_KINDS = ("tiny", "qwen2", "qwen3", "untied")


def installed(name: str) -> None:
    """Skip where an engine that is no dependency of this package is not installed."""
    engine = next(engine for engine in PACKAGES if name.startswith(engine))
    for module, distribution in PACKAGES[engine].items():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{distribution} is not installed: pip install 'resq-llm[bench]'")


def tiny(kind: str) -> dict[str, Any]:
    """The tiny shape as one of another family, or with a head of its own."""
    config = shape_named("tiny")
    if kind == "untied":
        return config | {"tie_word_embeddings": False}
    if kind != "tiny":
        config |= {"model_type": kind, "layer_types": ["full_attention"] * 2, "use_sliding_window": False}
    return config


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Iterator[Any]:
    installed(request.param)
    built = peer_named(request.param, shape_named("tiny"), threads=1)
    yield built
    built.engine.close()


def test_decode_continues_the_context_of_every_row(peer: Any) -> None:
    # Equal up to rounding: keys and values are cached in 8 bits (1/127 of their range) at the coarsest, bfloat16 has
    # 2^-8; another context or another token makes a difference of the logits' own size.
    near, far = 0.05, 0.5
    peer.prefill(24)
    whole = peer.engine.logits()
    peer.start_decode(3, 20)
    for step in range(4):
        before = peer.engine.logits() if step else None
        assert peer.decode() > 0
        assert before is None or distance(peer.engine.logits(), before) > far
    logits = peer.engine.logits()
    assert logits.shape == (3, VOCAB)
    assert distance(logits[:1], whole) < near
    assert distance(logits[1:2], whole) > far
    # Each row by itself: the second row's text alone in a batch of two gives what it gave among three.
    peer.start_decode(2, 23)
    peer.decode()
    assert distance(peer.engine.logits(), logits[:2]) < near


def test_a_prefill_starts_from_nothing(peer: Any) -> None:
    peer.prefill(9)
    first = peer.engine.logits()
    peer.start_decode(2, 5)
    peer.decode()
    assert peer.prefill(9) > 0
    assert peer.engine.logits().shape == (1, VOCAB)
    assert torch.equal(peer.engine.logits(), first)


def test_a_decode_without_a_context_is_refused(peer: Any) -> None:
    with pytest.raises(ValueError, match="start_decode"):
        peer.decode()
    peer.start_decode(1, 4)
    peer.prefill(4)
    with pytest.raises(ValueError, match="start_decode"):
        peer.decode()


def test_weights_take_the_bytes_of_their_type(peer: Any) -> None:
    shape = architecture_for("llama").shape(shape_named("tiny"))
    linears, head = shape.layers * sum(out * inner for out, inner in shape.sizes().values()), VOCAB * shape.hidden
    # Payload and 16-bit scales: of 128 weights (INT4), of a row (INT8), of 32 (Q4_0, Q8_0), of 256 (Q6_K).
    expected = {
        "torch-bf16": 2 * linears + 2 * head,
        "openvino": linears * (1 / 2 + 2 / 128) + head + 2 * VOCAB,
        "openvino-f32dq": linears * (1 / 2 + 2 / 128) + head + 2 * VOCAB,
        "llama.cpp": linears * 18 / 32 + head * 210 / 256,
        "llama.cpp-q8_0": linears * 34 / 32 + head * 34 / 32,
    }[peer.name]
    norms = 4 * (2 * shape.layers + 1) * shape.hidden
    assert 0 <= peer.engine.weight_bytes - expected <= norms


def test_torch_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    built = peer_named("torch-bf16", shape_named("tiny"), threads=before + 1)
    built.prefill(3)
    built.engine.close()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("name", "four", "eight"),
    [
        ("openvino", "INT4 head", "INT8 head"),
        ("openvino-f32dq", "INT4 head", "INT8 head"),
        ("llama.cpp", "Q4_0 head", "Q6_K head"),
        ("llama.cpp-q8_0", "Q4_0 head", "Q8_0 head"),
    ],
)
def test_a_head_of_four_bits_is_smaller_and_said(name: str, four: str, eight: str) -> None:
    installed(name)
    sizes = []
    for bits, words in ((4, four), (8, eight)):
        built = peer_named(name, shape_named("tiny"), threads=1, head_bits=bits)
        built.prefill(2)
        assert words in built.engine.about
        sizes.append(built.engine.weight_bytes)
        built.engine.close()
    assert sizes[0] < sizes[1]


def reference(config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [1, vocab] of the last token by transformers in float32, norms 1 and biases 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    left = dict(model.named_parameters())
    for name, weight in weights.items():
        left.pop(name).data.copy_(weight)
    assert all(parameter.dim() == 1 for parameter in left.values())
    for name, parameter in left.items():
        parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    with torch.inference_mode():
        return model(tokens).logits[:, -1]


@pytest.mark.parametrize("kind", PUBLISHED_KINDS)
def test_openvino_computes_what_transformers_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("openvino")
    import openvino as engine

    config, nodes = tiny(kind), []
    make = openvino._Graph._weight

    def kept(self: Any, *arguments: int) -> Any:
        nodes.append(make(self, *arguments))
        return nodes[-1]

    monkeypatch.setattr(openvino._Graph, "_weight", kept)
    built: Any = peer_named("openvino-f32dq", config, threads=1)
    names = ["model.embed_tokens"]
    for layer in range(2):
        names += [f"model.layers.{layer}.self_attn.{role}_proj" for role in "qkvo"]
        names += [f"model.layers.{layer}.mlp.{role}_proj" for role in ("gate", "up", "down")]
    names += ["lm_head"] if kind == "untied" else []
    weights = {}
    for name, node in zip(names, nodes, strict=True):
        model = engine.Model([engine.opset13.result(node)], [])
        values = engine.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
        weights[f"{name}.weight"] = torch.from_numpy(values.copy())
    built.prefill(24)
    exact = reference(config, weights, torch.from_numpy(tokens_of(VOCAB, 1, 0, 24)))
    # Inputs are rounded to 8 bits in groups of 128 by the engine, one rounding after another through 15 linears.
    assert distance(built.engine.logits(), exact) < 0.05
    built.engine.close()


@pytest.mark.parametrize("kind", PUBLISHED_KINDS)
def test_llama_cpp_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    installed("llama.cpp")
    import gguf

    config = tiny(kind)
    llama_cpp.write_gguf(tmp_path / "model.gguf", config, "Q8_0", "Q8_0")
    stored = {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    theirs = {"token_embd": "model.embed_tokens", "output": "lm_head"}
    for layer in range(2):
        for role, name in llama_cpp.GGUF_LINEARS.items():
            block = "mlp" if name.startswith("ffn") else "self_attn"
            theirs[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{block}.{role}_proj"
    weights = {}
    for name, weight in stored.items():
        module = name.removesuffix(".weight")
        if module not in theirs or not name.endswith(".weight"):
            continue
        if config["model_type"] == "llama" and module.endswith(("attn_q", "attn_k")):
            # Its llama turns neighbouring coordinates of a head, transformers the two halves.
            weight = weight.view(-1, 32, 2, 256).transpose(1, 2).reshape(-1, 256)
        weights[f"{theirs[module]}.weight"] = weight
    built: Any = peer_named("llama.cpp-q8_0", config, threads=1)
    built.prefill(24)
    exact = reference(config, weights, torch.from_numpy(tokens_of(VOCAB, 1, 0, 24)))
    # Inputs are rounded to 8 bits in blocks of 32 by the engine, one rounding after another through 15 linears.
    assert distance(built.engine.logits(), exact) < 0.05
    built.engine.close()


def test_llama_cpp_makes_room_when_a_context_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    installed("llama.cpp")
    monkeypatch.setattr(contract, "ROOM", 2)
    built: Any = peer_named("llama.cpp", shape_named("tiny"), threads=1)
    built.start_decode(2, 254)  # 256 tokens a row with the room: the engine rounds a context up to such a multiple
    for _ in range(5):
        built.decode()
    logits = built.engine.logits()
    built.prefill(259)
    assert distance(logits[:1], built.engine.logits()) < 0.05
    built.engine.close()


def test_nothing_temporary_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in PEERS:
        try:
            check_peer(name)
        except InputError:
            continue
        built = peer_named(name, shape_named("tiny"), threads=1)
        built.prefill(2)
        built.engine.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "absent", "distribution"),
    [
        ("openvino", "openvino", "openvino"),
        ("openvino-f32dq", "openvino", "openvino"),
        ("llama.cpp", "llama_cpp", "llama-cpp-python"),
        ("llama.cpp-q8_0", "gguf", "gguf"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    name: str, absent: str, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(
        InputError, match=rf"{distribution}.* not installed.*pip install 'resq-llm\[bench\]'"
    ) as refused:
        peer_named(name, shape_named("tiny"), threads=1)
    assert "\n" not in str(refused.value)


def test_a_package_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libgomp.so.1: cannot open shared object file\nand more")

    monkeypatch.setattr(choose.importlib, "import_module", broken)
    with pytest.raises(InputError, match=r"openvino.*cannot be loaded: libgomp\.so\.1.*pip install") as refused:
        check_peer("openvino")
    assert "\n" not in str(refused.value)


def test_an_unknown_peer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"'open-vino'.*llama\.cpp-q8_0.*did you mean openvino\?"):
        peer_named("open-vino", shape_named("tiny"), threads=1)


@pytest.mark.parametrize(
    ("change", "reason"), [({"head_bits": 16}, "4 or 8 bits, not 16"), ({"threads": 0}, "at least 1")]
)
def test_unusable_numbers_are_refused(change: dict[str, int], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        peer_named("torch-bf16", shape_named("tiny"), **{"threads": 1, **change})


@pytest.mark.parametrize("name", ["openvino", "llama.cpp"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, "sliding windows"),
        ({"intermediate_size": 500}, "500 inputs"),
    ],
)
def test_a_model_that_would_be_built_differently_is_refused(name: str, change: dict[str, Any], reason: str) -> None:
    installed(name)
    with pytest.raises(InputError, match=reason):
        peer_named(name, shape_named("tiny") | change, threads=1)


def test_texts_are_continued_and_rows_differ() -> None:
    whole = tokens_of(VOCAB, 3, 0, 50)
    assert (tokens_of(VOCAB, 3, 20, 50) == whole[:, 20:]).all()
    assert whole.min() >= 0
    assert whole.max() < VOCAB
    assert len({tuple(row) for row in whole.tolist()}) == 3
