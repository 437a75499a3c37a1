"""Statistics kept in files are those of one run, and nothing else is taken for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import Kept, make_checkpoint, write_json
from torch import Tensor

import resq
from resq.api import calibrate, merge
from resq.backends.reference import dense
from resq.checkpoint.writer import CheckpointWriter
from resq.errors import InputError
from resq.models.source import Source
from resq.models.text import load_tokenizer, sampled_windows
from resq.numerics.linear import PackedLinear
from resq.progress import silent
from resq.ptq.ablations import ABLATIONS, with_rank
from resq.ptq.pipeline import Job, quantize
from resq.ptq.recipe import Peaks, Recipe, Statistic
from resq.ptq.recipes import QUIK, RESQ, RESQ_KV
from resq.ptq.statistics import collect
from resq.ptq.statistics_file import METADATA_KEY, checksum, read, write

# Four leaves, the last of five windows.
WINDOWS, LENGTH = 29, 16
SIZES: dict[str, Any] = {"windows": WINDOWS, "window_length": LENGTH}
TEXT = "".join(f"{number * number} sheep jumped, then {number} more; " for number in range(600))


@dataclass(frozen=True)
class Files:
    """A model, its text, and what `calibrate` made of them; shards are whole[1], and 2 and 3 shards by number."""

    source: Path
    text: Path
    whole: Path
    shards: dict[int, list[Path]]


def calibrated(source: Path, text: Path, out: Path, **changes: Any) -> Path:
    calibrate(source, out, **{"recipe": ["resq", "quik"], "calibration": text, **SIZES, **changes})
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    home = tmp_path_factory.mktemp("statistics")
    source, text = make_checkpoint(home / "source"), home / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    shards = {
        of: [
            calibrated(source, text, home / f"{number}-of-{of}.safetensors", shard=(number, of))
            for number in range(1, of + 1)
        ]
        for of in (2, 3, 4)
    }
    return Files(source, text, calibrated(source, text, home / "whole.safetensors"), shards)


def tokens(files: Files) -> Tensor:
    tokenizer = load_tokenizer(files.source)
    return sampled_windows([files.text], tokenizer, count=WINDOWS, length=LENGTH, seed=0).tokens


def flat(found: Any) -> list[Tensor]:
    """Every tensor of moments, in order."""
    if isinstance(found, Peaks):
        return [*found.inputs.values(), *found.weights.values(), found.key, found.value]
    return [found] if isinstance(found, Tensor) else [tensor for each in found for tensor in flat(each)]


def test_a_file_holds_the_bits_of_a_run_in_memory(files: Files) -> None:
    needs = RESQ.needs | QUIK.needs
    want = collect(Source.open(files.source), dense(torch.float32), tokens(files), needs, silent)
    got = read(files.whole).moments(needs)
    assert got.tokens == want.tokens == WINDOWS * LENGTH
    for name in Statistic:
        pairs = zip(flat(getattr(got, name)), flat(getattr(want, name)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_only_what_a_recipe_needs_is_given_to_its_bases(files: Files) -> None:
    for recipe in (RESQ_KV, QUIK, RESQ):
        moments = read(files.whole).moments(recipe.needs)
        assert {name for name in Statistic if getattr(moments, name) is not None} == recipe.needs


@pytest.mark.parametrize("of", [2, 3, 4])
def test_merged_shards_are_the_single_runs_file_in_any_order(of: int, files: Files, tmp_path: Path) -> None:
    for number, order in enumerate(permutations(files.shards[of])):
        header = merge(order, tmp_path / f"{number}")
        assert header.whole
        assert (tmp_path / f"{number}").read_bytes() == files.whole.read_bytes()


def test_a_run_of_shards_says_what_is_missing_and_can_be_merged_with_the_rest(files: Files, tmp_path: Path) -> None:
    first, second, third = files.shards[3]
    part = merge([third, second], tmp_path / "part")
    assert (part.span, part.missing) == ((8, WINDOWS), [(0, 8)])
    middle = merge([second], tmp_path / "middle")
    assert middle.missing == [(0, 8), (16, WINDOWS)]
    assert merge([tmp_path / "part", first], tmp_path / "all").missing == []
    assert (tmp_path / "all").read_bytes() == files.whole.read_bytes()


def same_checkpoint(one: Path, other: Path) -> None:
    """Byte for byte, but for the manifest's time, that there was a file, and whatever names the time."""
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
    manifests = []
    for directory in (one, other):
        manifest = json.loads((directory / "resq.json").read_text(encoding="utf-8"))
        manifest["made_by"].pop("time")
        manifest["calibration"].pop("statistics")
        manifest["calibration"].pop("texts")
        manifest["copied"].pop("README.md")  # its title is the directory's name
        manifests.append(manifest)
    assert manifests[0] == manifests[1]
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


@pytest.mark.parametrize("recipe", ["resq", "quik", "smoothquant+"])
def test_a_checkpoint_from_merged_shards_is_that_of_a_single_run(recipe: str, files: Files, tmp_path: Path) -> None:
    merge(files.shards[3], tmp_path / "merged")
    given: dict[str, Any] = {"recipe": recipe, "calibration": files.text, "rounding_windows": 4, "bits": 3}
    resq.quantize(files.source, tmp_path / "plain", **given, **SIZES)
    phases: list[str] = []
    resq.quantize(
        files.source,
        tmp_path / "stored",
        statistics=tmp_path / "merged",
        progress=lambda phase, done, total: phases.append(phase),
        **given,
    )
    same_checkpoint(tmp_path / "plain", tmp_path / "stored")
    assert "collecting moments" not in phases


def test_no_text_is_needed_where_rounding_looks_at_none(files: Files, tmp_path: Path) -> None:
    resq.quantize(files.source, tmp_path / "plain", recipe="resq-kv", calibration=files.text, **SIZES)
    resq.quantize(files.source, tmp_path / "stored", recipe="resq-kv", statistics=files.whole)
    same_checkpoint(tmp_path / "plain", tmp_path / "stored")
    with pytest.raises(InputError, match=r"\Ano calibration text was given.*\Z"):
        resq.quantize(files.source, tmp_path / "none", statistics=files.whole)


def integers(kept: Kept) -> list[Tensor]:
    linears = [linear for parts in kept.layers for linear in parts.linears.values()]
    assert linears
    return [part for linear in linears if isinstance(linear, PackedLinear) for part in (*linear.qweight, linear.scale)]


@pytest.mark.parametrize(
    ("recipe", "seed"),
    [
        (with_rank(Fraction(1, 4)), 0),
        (replace(RESQ, precision=RESQ.precision.with_low(3)), 7),
        (ABLATIONS["resq-nearest"], 2**63 - 1),
    ],
    ids=lambda each: getattr(each, "name", str(each)),
)
@torch.inference_mode()
def test_other_ranks_bits_and_seeds_are_those_of_a_normal_run(recipe: Recipe, seed: int, files: Files) -> None:
    source, windows = Source.open(files.source), tokens(files)
    stored = read(files.whole).moments(recipe.needs)
    found = []
    for moments in (None, stored):
        kept = Kept([])
        job = Job(recipe, windows, 4, seed, keep_tied=True, moments=moments)
        quantize(source, job, cast(CheckpointWriter, kept), silent)
        found.append(integers(kept))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_another_seed_turns_otherwise_on_the_same_windows(files: Files, tmp_path: Path) -> None:
    given: dict[str, Any] = {"statistics": files.whole, "calibration": files.text, "rounding_windows": 4}
    one, other = (resq.quantize(files.source, tmp_path / str(seed), seed=seed, **given) for seed in (0, 1))
    assert one.manifest.files != other.manifest.files
    assert one.manifest.calibration == other.manifest.calibration


# What is refused.


def altered(file: Path, out: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Path:
    """A copy with header and tensors changed, and a checksum that fits: what a bug of ours could write."""
    with safe_open(file, framework="pt") as handle:
        header = json.loads(json.loads(handle.metadata()[METADATA_KEY])["header"])
    tensors = load_file(file)
    change(header, tensors)
    text = json.dumps(header)
    record = json.dumps({"header": text, "sha256": checksum(text, tensors)})
    save_file(tensors, out, metadata={METADATA_KEY: record})
    return out


def refused(words: str, call: Callable[..., object], *given: Any, **named: Any) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call(*given, **named)
    assert "\n" not in str(caught.value)


def test_shards_given_twice_or_with_a_hole_are_refused_by_name(files: Files, tmp_path: Path) -> None:
    (half, _), (first, second, third) = files.shards[2], files.shards[3]
    out = tmp_path / "out"
    refused("1-of-3.safetensors was given twice", merge, [first, second, first], out)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(second.read_bytes())
    refused(
        r"2-of-3.*copy.*both hold windows 9 … 16|copy.*2-of-3.*both hold windows 9 … 16", merge, [second, copy], out
    )
    refused("1-of-2.*2-of-3.*both hold windows 9 … 16", merge, [second, half, third], out)
    refused("windows 9 … 16 are missing between .*1-of-3.*3-of-3", merge, [third, first], out)
    refused("no statistics file was given", merge, [], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, r"the seed of the windows \(0 and 1\)"),
        ({"windows": 30}, r"the number of windows \(29 and 30\)"),
        ({"window_length": 15}, r"the window length \(16 and 15\)"),
        ({"recipe": "quik"}, "the statistics"),
        ({"source": True}, r"the source model \(model.safetensors\)"),
        ({"text": True}, "the calibration tokens"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_shards_of_other_models_and_calibrations_are_refused_by_what_differs(
    changes: dict[str, Any], words: str, files: Files, tmp_path: Path
) -> None:
    source, text, given = files.source, files.text, dict(changes)
    if given.pop("source", None):
        source = make_checkpoint(tmp_path / "source", seed=1)
        (source / "config.json").write_bytes((files.source / "config.json").read_bytes())
    if given.pop("text", None):
        text = tmp_path / "text.txt"
        text.write_text(TEXT.replace("sheep", "goats"), encoding="utf-8")
    other = calibrated(source, text, tmp_path / "other.safetensors", shard=(2, 2), **given)
    refused(words, merge, [other, files.shards[2][0]], tmp_path / "out")


def test_shards_of_another_device_or_arithmetic_are_refused(files: Files, tmp_path: Path) -> None:
    first, second = files.shards[2]
    cuda = altered(second, tmp_path / "cuda.safetensors", lambda header, _: header.update(device="cuda"))
    refused(r"the forward's device \(cpu and cuda\)", merge, [first, cuda], tmp_path / "out")
    newer = altered(second, tmp_path / "newer.safetensors", lambda header, _: header.update(version=0))
    refused("newer.safetensors holds statistics of version 0", merge, [first, newer], tmp_path / "out")


def test_damaged_files_are_refused_by_name(files: Files, tmp_path: Path) -> None:
    whole = files.whole.read_bytes()
    file = tmp_path / "damaged.safetensors"
    for length in (0, 7, 400, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused("damaged.safetensors", read, file)
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole), (40,), generator=generator).tolist()
    for place in [*places, len(whole) - 1]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused("damaged.safetensors", read, file)
    save_file({"x": torch.zeros(1)}, file)
    refused("damaged.safetensors holds no statistics of resq", read, file)
    refused("no statistics file at .*nowhere", read, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header, tensors: tensors["key.0.leaves.0-4"].fill_(torch.nan), "key.0.leaves.0-4 holds NaN or Inf"),
        (lambda header, tensors: tensors.pop("key.1.leaves.0-4"), "key.1.leaves.0-4 has shape none"),
        (lambda header, tensors: tensors.update(more=torch.zeros(1).double()), "more has shape"),
        (lambda header, tensors: header["sizes"].update(head_dim=8), "has shape"),
        (lambda header, tensors: header.update(leaves=[0, 5]), "leaves 0 … 5"),
        (lambda header, tensors: header.update(leaves=[3, 3]), "leaves 3 … 3"),
        (lambda header, tensors: header.update(surprise=1), "surprise"),
    ],
    ids=["nan", "missing", "more", "shape", "beyond", "empty", "unknown"],
)
def test_what_a_header_does_not_say_is_refused(
    change: Callable[[dict[str, Any], dict[str, Tensor]], object], words: str, files: Files, tmp_path: Path
) -> None:
    refused(words, read, altered(files.whole, tmp_path / "altered.safetensors", change))


def test_statistics_that_do_not_fit_a_job_are_refused(files: Files, tmp_path: Path) -> None:
    out, (first, _, third) = tmp_path / "out", files.shards[3]
    given: dict[str, Any] = {"calibration": files.text, "statistics": files.whole}

    def job(words: str, source: Path = files.source, **changes: Any) -> None:
        refused(words, resq.quantize, source, out, **{**given, **changes})

    job("another model: model.safetensors differs", rope_only(files.source, tmp_path / "other", weights=True))
    job("another model: config.json differs", rope_only(files.source, tmp_path / "turned", weights=False))
    job("lacks windows 9 … 29 of 29", statistics=first)
    job("lacks windows 1 … 16 of 29", statistics=third)
    peaks = calibrated(files.source, files.text, tmp_path / "peaks.safetensors", recipe="quik")
    job("has peaks but not key, residual, value", statistics=peaks)
    job("recipe gptq fits no basis", recipe="gptq")
    job("--windows is 30, .*was made with 29", windows=30)
    job("--window-length is 8, .*was made with 16", window_length=8)
    job("--rounding-windows 30 must lie in 1 … 29", rounding_windows=30)
    other = tmp_path / "goats.txt"
    other.write_text(TEXT.replace("sheep", "goats"), encoding="utf-8")
    job("--calibration gives other windows", calibration=other)
    assert not out.exists()


def rope_only(source: Path, copy: Path, *, weights: bool) -> Path:
    """A copy of a model with one weight changed, or with another base of its rotations."""
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if weights:
        tensors = load_file(copy / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        write_json(copy / "config.json", {**config, "rms_norm_eps": 1e-6})
    return copy


def test_what_cannot_be_calibrated_is_refused(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def job(words: str, **changes: Any) -> None:
        given: dict[str, Any] = {"calibration": files.text, **SIZES, **changes}
        refused(words, calibrate, files.source, out, **given)

    job("--shard 1/5: 29 windows are summed as 4 neighbours of 8", shard=(1, 5))
    job("rtn fits no basis", recipe="rtn")
    job("at least 128", windows=1)
    job("--windows is 0", windows=0)
    job("--window-length 999", window_length=999)
    job("no calibration text", calibration=())
    refused("exists already", calibrate, files.source, files.whole, calibration=files.text, **SIZES)
    refused("exists already", merge, files.shards[2], files.whole)
    assert not out.exists()


def test_a_failed_write_leaves_nothing(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    statistics = read(files.whole)
    monkeypatch.setattr(os, "fsync", full)
    refused("the disk is full", write, statistics, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []
