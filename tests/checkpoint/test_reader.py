"""Reading: whatever is missing, altered or impossible is refused in one line that names the file or the key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.conftest import HIDDEN, LAYERS

from resq.checkpoint.files import CheckpointReader, Parts
from resq.checkpoint.manifest import read_manifest
from resq.errors import CheckpointError

LAYER_0, ENDS = "model-layer-0.safetensors", "model-ends.safetensors"
Edit = Callable[..., Path]


def read_all(directory: Path) -> list[Parts]:
    reader = CheckpointReader(directory)
    reader.ends()
    return [reader.layer(index) for index in range(LAYERS)]


def refused(directory: Path) -> str:
    """The one line with which reading everything in `directory` is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_all(directory)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_an_untouched_checkpoint_is_accepted(written: Path) -> None:
    assert [parts.window for parts in read_all(written)] == [None, 7]


@pytest.mark.parametrize("file", [LAYER_0, ENDS, "resq.json"])
def test_a_missing_file_is_named(written: Path, file: str) -> None:
    (written / file).unlink()
    assert file in refused(written)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(written: Path, keep: int) -> None:
    content = (written / LAYER_0).read_bytes()
    (written / LAYER_0).write_bytes(content[:keep])
    assert f"{LAYER_0} has {len(content[:keep])} bytes, {len(content)} were written" in refused(written)


@pytest.mark.parametrize("at", [0, 9, 2000, -1])
def test_a_flipped_bit_is_found_anywhere(written: Path, at: int) -> None:
    content = bytearray((written / LAYER_0).read_bytes())
    content[at] ^= 1
    (written / LAYER_0).write_bytes(content)
    message = refused(written)
    assert LAYER_0 in message
    assert "sha256" in message


def test_a_file_that_is_no_safetensors_is_named(written: Path, edit: Edit) -> None:
    content = b"not safetensors at all"
    (written / ENDS).write_bytes(content)
    edit(f"files/{ENDS}", {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    assert f"{ENDS} is not a safetensors file" in refused(written)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", '{"format_version": 1,}'])
def test_a_manifest_that_is_no_json_is_refused(written: Path, text: str) -> None:
    (written / "resq.json").write_text(text, encoding="utf-8")
    assert "resq.json is not valid JSON" in refused(written)


def test_a_manifest_that_is_no_text_is_refused(written: Path) -> None:
    (written / "resq.json").write_bytes(b"\xff\xfe\x00")
    assert "resq.json is not valid JSON" in refused(written)


@pytest.mark.parametrize("raw", [[], 3, "x", None, {}])
def test_a_manifest_that_is_no_manifest_is_refused(written: Path, raw: Any) -> None:
    (written / "resq.json").write_text(json.dumps(raw), encoding="utf-8")
    assert "resq.json has format version None" in refused(written)


@pytest.mark.parametrize("version", [0, 2, "1", "1\n2", None, [1], 1.5])
def test_an_unknown_version_is_refused_before_anything_else(edit: Edit, version: Any) -> None:
    edit("surprise", 1)
    message = refused(edit("format_version", version))
    assert f"resq.json has format version {version!r}; this resq reads 1" in message


@pytest.mark.parametrize(
    "path",
    [
        "new",
        "recipe/new",
        "source/new",
        "calibration/new",
        "ends/new",
        "ends/norm/new",
        "ends/head/new",
        "ends/head_input/map/new",
        "layers/1/new",
        "layers/1/linears/q/new",
        "layers/1/norms/attn_in/new",
        "layers/1/inputs/o_in/new",
        "layers/1/inputs/down_in/map/new",
        "layers/1/key/new",
        f"files/{LAYER_0}/new",
    ],
)
def test_an_unknown_key_is_named_at_every_depth(edit: Edit, path: str) -> None:
    message = refused(edit(path, None))
    assert f"resq.json: {path.replace('/', '.')}: " in message
    assert "extra inputs" in message


def test_a_key_with_a_line_break_stays_on_one_line(edit: Edit) -> None:
    assert "two\\nlines" in refused(edit("two\nlines", 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format_version", True),
        ("made_by", None),
        ("layers", {}),
        ("layers/0/window", 1.5),
        ("layers/0/linears/q/bias", 1),
        ("layers/0/linears/q/shape", ["24", 24]),
        ("layers/0/linears/q/bands", [[4, "24"]]),
        ("layers/0/inputs/o_in/groups", 0),
        ("layers/0/inputs/mlp_in/map/heads", 0),
        ("layers/0/inputs/down_in/map/inner", 0),
        ("layers/0/inputs/down_in/map/inner", None),
        ("layers/0/inputs/o_in/map/kind", "rotation"),
        ("layers/0/key/scale_dtype", "bfloat16"),
        ("layers/0/key/clip", 0.9),
        ("layers/0/key/clip", ["0.9", 1.0]),
        ("layers/0/key/clip", [0.9, None]),
        ("layers/0/norms/mlp_in/eps", "1e-6"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(edit: Edit, path: str, value: Any) -> None:
    assert f"resq.json: {path.replace('/', '.')}" in refused(edit(path, value))


def test_a_missing_key_is_named(written: Path) -> None:
    raw = json.loads((written / "resq.json").read_text("utf-8"))
    del raw["layers"][0]["linears"]["q"]["shape"]
    (written / "resq.json").write_text(json.dumps(raw), encoding="utf-8")
    assert "layers.0.linears.q.shape" in refused(written)


@pytest.mark.parametrize("bands", [[[7, HIDDEN]], [[4, 0], [8, HIDDEN]], [[4]], [[4, 12, 12]], [], [[4, -1]]])
@pytest.mark.parametrize(
    ("path", "named"), [("layers/0/linears/gate", "part.gate_proj"), ("layers/0/inputs/attn_in", "inputs.attn_in")]
)
def test_impossible_bands_are_named(edit: Edit, path: str, named: str, bands: list[list[int]]) -> None:
    message = refused(edit(f"{path}/bands", bands))
    assert LAYER_0 in message
    assert named in message


@pytest.mark.parametrize("bands", [[[6, HIDDEN - 1]], [[4, HIDDEN]], [[6, 16], [6, 8]]])
def test_bands_that_do_not_fit_their_tensors_are_named(edit: Edit, bands: list[list[int]]) -> None:
    message = refused(edit("layers/0/linears/gate/bands", bands))
    assert LAYER_0 in message
    assert "part.gate_proj" in message


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("layers/0/inputs/o_in/groups", 5, "inputs.o_in"),  # does not divide the bands
        ("layers/0/inputs/o_in/bands", [[4, 18], [8, 3]], "inputs.o_in"),  # fewer than the map gives
        ("layers/0/inputs/o_in/map/size", 23, "inputs.o_in"),
        ("layers/0/inputs/o_in/map/tensor", None, "inputs.o_in"),
        ("layers/0/inputs/mlp_in/map_input_bits", 7, "inputs.mlp_in"),
        ("layers/0/inputs/mlp_in/map/heads", None, "inputs.mlp_in"),
        ("layers/0/inputs/mlp_in/map/heads", 2, "inputs.mlp_in"),
        ("layers/0/inputs/down_in/map/order", 27, "inputs.down_in"),
        ("layers/0/inputs/down_in/map/construction", "paley3", "inputs.down_in"),
        ("layers/0/inputs/down_in/map/power", None, "inputs.down_in"),
        ("layers/0/inputs/down_in/map/inner", 2, "inputs.down_in"),
        ("layers/0/key/map/orthogonal", None, "key"),
        ("layers/0/query/map/size", 7, "query"),
        ("layers/0/query/clip", [0.9], "query"),  # has no bands
        ("layers/0/key/clip", [0.9], "key"),  # has two
        ("layers/0/key/clip", [], "key"),
        ("layers/0/key/clip", [0.9, 0], "key"),
        ("layers/0/key/clip", [0.9, -0.5], "key"),
        ("layers/0/key/clip", [0.9, 1.01], "key"),
        ("layers/0/key/clip", [float("nan"), 1.0], "key"),
        ("ends/head_input/map/size", 7, "head_input"),
    ],
)
def test_an_impossible_map_or_format_is_named(edit: Edit, path: str, value: Any, named: str) -> None:
    message = refused(edit(path, value))
    assert message.startswith((f"{LAYER_0}: {named}: ", f"{ENDS}: {named}: "))


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        (LAYER_0, "model.layers.0.part.q_proj.qweight.1"),
        (LAYER_0, "model.layers.0.part.q_proj.scale"),
        (LAYER_0, "model.layers.0.part.q_proj.bias"),
        (LAYER_0, "model.layers.0.part.v_proj.weight"),
        (LAYER_0, "model.layers.0.norm_1.gain"),
        (LAYER_0, "model.layers.0.o_in.index"),
        (LAYER_0, "model.layers.0.key.matrix"),
        (ENDS, "model.embed_tokens.weight"),
        (ENDS, "head_input.matrix"),
    ],
)
def test_a_tensor_missing_in_its_file_is_named(retensor: Edit, file: str, tensor: str) -> None:
    message = refused(retensor(file, tensor, lambda old: None))
    assert f"{file} has no tensor {tensor}" in message


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("part.q_proj.qweight.0", "part.q_proj"),
        ("part.q_proj.scale", "part.q_proj"),
        ("part.q_proj.bias", "part.q_proj.bias"),
        ("part.v_proj.weight", "part.v_proj.weight"),
        ("o_in.index", "inputs.o_in"),
        ("mlp_in.matrix", "inputs.mlp_in"),
        ("key.matrix", "key.matrix"),
    ],
)
@pytest.mark.parametrize(
    "change", [lambda old: old[:-1].clone(), lambda old: old.flatten()[:1].clone()], ids=["short", "one"]
)
def test_a_tensor_of_another_shape_is_named(
    retensor: Edit, tensor: str, named: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    message = refused(retensor(LAYER_0, f"model.layers.0.{tensor}", change))
    assert LAYER_0 in message
    assert named in message


@pytest.mark.parametrize("role", ["q", "v"])
def test_a_manifest_of_another_shape_is_named(edit: Edit, role: str) -> None:
    message = refused(edit(f"layers/0/linears/{role}/shape", [HIDDEN, HIDDEN + 1]))
    assert LAYER_0 in message
    assert f"part.{role}_proj" in message


def test_a_stored_permutation_that_repeats_an_index_is_refused(retensor: Edit) -> None:
    message = refused(retensor(LAYER_0, "model.layers.0.o_in.index", lambda old: old.clamp(min=1)))
    assert "inputs.o_in" in message


def test_a_tied_head_must_be_the_table(edit: Edit) -> None:
    assert "tied" in refused(edit("ends/head/name", "lm_head"))


def test_a_file_the_manifest_does_not_list_is_not_read(edit: Edit) -> None:
    assert "../elsewhere.safetensors is missing" in refused(edit("layers/0/file", "../elsewhere.safetensors"))


def test_defaults_may_be_left_out(written: Path) -> None:
    raw = json.loads((written / "resq.json").read_text("utf-8"))

    def without_nulls(node: Any) -> Any:
        if isinstance(node, dict):
            optional = {"window", "golden", "map", "tensor", "orthogonal", "heads", "power", "order", "construction"}
            optional |= {"clip"}
            kept = {k: v for k, v in node.items() if (v is not None or k not in optional) and (k, v) != ("inner", 1)}
            return {k: without_nulls(v) for k, v in kept.items()}
        return [without_nulls(v) for v in node] if isinstance(node, list) else node

    want = read_manifest(written)
    (written / "resq.json").write_text(json.dumps(without_nulls(raw)), encoding="utf-8")
    assert read_manifest(written) == want
