"""The command line as a user meets it: the whole way, and one line for everything that cannot be used."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Done, run, write_json

import resq

SMALL = ["--windows", "8", "--window-length", "32"]


@pytest.fixture
def packed(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> tuple[Path, Path]:
    source, out = checkpoint(), tmp_path / "packed"
    resq.quantize(source, out, calibration=[text], windows=8, window_length=32)
    return source, out


def test_the_whole_way_from_source_to_text(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = checkpoint(), tmp_path / "out" / "packed"
    done = run("quantize", source, "--out", out, "--calibration", text, *SMALL, "--recipe", "resq", "--bits", 4)
    assert done.returncode == 0, done.stderr
    assert "the source's" in done.stdout

    rows = run("eval", source, out, "--text", text, "--window-length", 64, "--json")
    assert rows.returncode == 0, rows.stderr
    plain, packed = json.loads(rows.stdout)["rows"]
    assert plain["recipe"] == "16-bit"
    assert plain["ratio"] is None
    assert packed["recipe"] == "resq"
    assert packed["checkpoint"] == str(out)
    assert packed["tokens"] == plain["tokens"] > 0
    assert packed["delta_low"] <= packed["delta"] <= packed["delta_high"]
    assert packed["perplexity"] == pytest.approx(torch.tensor(packed["nll"]).exp().item(), rel=1e-5)

    said = run("generate", out, "the quick", "--max-new-tokens", 8)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("the quick")
    assert said.stdout == run("generate", out, "the quick", "--max-new-tokens", 8).stdout

    facts = run("inspect", out, "--json")
    book = json.loads(facts.stdout)["ledger"]
    assert 4.5 < book["weight_bits"] < 7
    assert book["bytes"] == sum(f.stat().st_size for f in out.glob("model-*.safetensors"))
    shown = run("inspect", out)
    assert "true bits" in shown.stdout
    assert "resq, seed 0" in shown.stdout


def test_logits_before_saving_and_after_loading_are_equal(packed: tuple[Path, Path], tmp_path: Path) -> None:
    from resq.backends.reference import REFERENCE, dense
    from resq.models import decoder
    from resq.models.source import Source
    from resq.models.text import load_tokenizer, sampled_windows
    from resq.numerics.moments import Leaves
    from resq.ptq.ends import store_ends
    from resq.ptq.layers import Flow, round_layer
    from resq.ptq.pipeline import fit_maps
    from resq.ptq.placement import Placement
    from resq.ptq.recipes import RESQ
    from resq.ptq.statistics import collect

    source_dir, out = packed
    source, ops = Source.open(source_dir), dense(torch.float32)
    text = tmp_path / "calibration.txt"
    tokens = sampled_windows([text], load_tokenizer(source_dir), count=8, length=32, seed=0).tokens
    with torch.inference_mode():
        moments = collect(source, ops, tokens, RESQ.needs, lambda *at: None)
        placement = Placement(source.shape, fit_maps(RESQ, moments, source.shape, 0), RESQ.precision, RESQ.folds_norms)
        parts = store_ends(placement, source, RESQ.precision, keep_tied=True)
        ends = decoder.Ends(parts.embed, parts.norm, parts.head_input, parts.head).prepacked(REFERENCE)
        hidden = [parts.embed[window[None]].float() for window in tokens]
        layers = []
        for index in range(source.shape.layers):
            layer = placement.layer(source.layer(index), index)
            rounded, _ = round_layer(source.shape, layer, RESQ, index, hidden, [], Flow(Leaves(len(hidden))))
            layers.append(rounded)
        layers = [layer.prepacked(REFERENCE) for layer in layers]
        before = decoder.forward(REFERENCE, source.shape, ends, layers, tokens[:2])
    assert torch.equal(before, resq.load(out, backend="reference")(tokens[:2]))


def test_quantizing_twice_gives_the_same_bytes(packed: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    source, out = packed
    resq.quantize(source, tmp_path / "again", calibration=[text], windows=8, window_length=32)
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    other = resq.quantize(source, tmp_path / "other", calibration=[text], windows=8, window_length=32, seed=1)
    assert other.manifest.files != resq.load(out).manifest.files


def test_an_eight_bit_head_and_an_untied_head_run(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = checkpoint()
    plain = {"calibration": [text], "windows": 8, "window_length": 32}
    kept = resq.load(resq.quantize(source, tmp_path / "kept", **plain).directory)
    untied = resq.load(resq.quantize(source, tmp_path / "untied", untie=True, **plain).directory)
    eight = resq.load(resq.quantize(source, tmp_path / "eight", head_bits=8, **plain).directory)
    assert kept.manifest.ends.tied
    assert not untied.manifest.ends.tied
    assert eight.manifest.ends.head.bands == [[8, 64]]
    tokens = torch.arange(3, 43)[None]
    reference = kept(tokens)
    # Only 16-bit rounding of another matrix, and 8-bit rounding of head and input, tell them apart.
    assert (untied(tokens) - reference).abs().max() <= 0.05 * reference.abs().max()
    assert (eight(tokens) - reference).abs().max() <= 0.10 * reference.abs().max()


def one_line(done: Done, *words: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], (word, lines[0])


def test_bad_input_gets_one_line_and_leaves_nothing(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = checkpoint(), tmp_path / "out"
    ok = ["--out", out, "--calibration", text, *SMALL]
    one_line(run("quantize", source, "--out", out), "no calibration text", "--calibration")
    one_line(run("quantize", source, "--out", out, "--calibration", tmp_path / "no.txt"), "no.txt")
    one_line(run("quantize", source, *ok, "--window-length", 999), "999", "256")
    one_line(run("quantize", source, *ok, "--windows", 100000), "--windows")
    one_line(run("quantize", source, *ok, "--windows", 1, "--window-length", 32), "at least 128")
    one_line(run("quantize", source, *ok, "--recipe", "rseq"), "did you mean resq?")
    one_line(run("quantize", source, *ok, "--bits", 5), "2, 3, 4 and 6")
    one_line(run("quantize", source, *ok, "--head-bits", 4), "16, 8, 4.5")
    one_line(run("quantize", tmp_path / "nowhere", *ok), "nowhere")
    one_line(run("quantize", text, *ok), "calibration.txt")
    one_line(run("eval", source, "--text", tmp_path / "no.txt"), "no.txt")
    one_line(run("eval", source, "--text", text, "--window-length", 1000), "1000", "256")
    one_line(run("generate", source, "hi"), "resq.json")
    one_line(run("generate", tmp_path / "nowhere", "hi"), "nowhere")
    one_line(run("inspect", source), "resq.json")
    assert not out.exists()
    assert not list(tmp_path.glob(".*partial*"))
    out.mkdir()
    one_line(run("quantize", source, *ok), "exists already")
    one_line(run("quantize", source, "--out", "/proc/here", "--calibration", text, *SMALL), "/proc")


def change(source: Path, **values: object) -> None:
    file = source / "config.json"
    write_json(file, {**json.loads(file.read_text()), **values})


def test_a_damaged_source_is_refused_by_name(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    ok = ["--out", tmp_path / "out", "--calibration", text, *SMALL]
    source = checkpoint()
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = torch.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    one_line(run("quantize", source, *ok), name, "NaN or Inf")
    source = checkpoint()
    change(source, model_type="bert")
    one_line(run("quantize", source, *ok), "'bert'", "llama")
    source = checkpoint()
    for file in source.glob("tokenizer*"):
        file.unlink()
    one_line(run("quantize", source, *ok), "tokenizer")
    assert not (tmp_path / "out").exists()


def test_dead_channels_are_told_and_an_overflow_names_its_layer(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, given = checkpoint(), ["--calibration", text, *SMALL, "--recipe", "gptq"]
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][3:5] = 0.0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    done = run("quantize", source, "--out", tmp_path / "out", *given)
    assert done.returncode == 0, done.stderr
    notes = json.loads((tmp_path / "out" / "resq.json").read_text())["notes"]
    told = ["layer 1 gate: rows without a weight: 2", "layer 1 down: inputs that are 0 on every calibration token: 2"]
    assert [note for note in notes if note.startswith("layer")] == told
    assert all(note in done.stdout for note in told)
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e30
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    one_line(run("quantize", source, "--out", tmp_path / "other", *given), "layer 1", "NaN or Inf")


def test_an_altered_checkpoint_is_refused(packed: tuple[Path, Path]) -> None:
    _, out = packed
    file = next(out.glob("model-layer-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    one_line(run("generate", out, "hi"), file.name, "altered")
    file.write_bytes(content[:-10])
    one_line(run("generate", out, "hi"), file.name, "copy the checkpoint again")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_layers_and_goes_on_to_the_same_bytes(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    source, out = checkpoint(num_hidden_layers=8), tmp_path / "made" / "out"
    command = [sys.executable, "-m", "resq", "quantize", source, "--out", out, "--calibration", text]
    command += ["--windows", "200", "--window-length", "32"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(".out.partial/checkpoint/model-layer-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; what is finished is kept: go on with --resume" in errors
    assert [file.name for file in out.parent.iterdir()] == [".out.partial"]
    one_line(run(*command[3:]), "was begun and not finished", "--resume")
    one_line(run(*command[3:], "--resume", "--seed", "5"), "seed is 5, was 0", ".out.partial")
    done = run(*command[3:], "--resume")
    assert done.returncode == 0, done.stderr
    resq.quantize(source, tmp_path / "straight", calibration=[text], windows=200, window_length=32)
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "straight" / file.name).read_bytes(), file.name
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_odd_names_and_inputs_get_one_line_or_work(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = checkpoint(), tmp_path / "x[/b]y [4bit]"
    done = run("quantize", source, "--out", f"{out}/", "--calibration", text, *SMALL)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout.replace("\n", "")
    assert run("inspect", out).returncode == 0
    assert run("eval", out, "--text", text, "--window-length", 64).returncode == 0
    # The context ends a generation, it does not fail it.
    full = run("generate", out, "x" * 250, "--max-new-tokens", 50)
    assert full.returncode == 0, full.stderr
    one_line(run("generate", out, "x" * 300), "300 tokens", "256")
    one_line(run("generate", out, "\udcff"), "not text")
    one_line(run("eval", out, "--text", text, "--window-length", 0), "at least 2")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "\\ud83d"}\n', encoding="utf-8")
    one_line(run("eval", out, "--text", bad, "--window-length", 4), "not text")
    chats = write_json(tmp_path / "chats.jsonl", {"messages": ["hi"]})
    templated = checkpoint(chat=True)
    one_line(run("quantize", templated, "--out", tmp_path / "o", "--calibration", chats, *SMALL), "chat template")
    change(source, num_hidden_layers=1)
    one_line(run("quantize", source, "--out", tmp_path / "o", "--calibration", text, *SMALL), "layers.1", "lost")


def test_prompt_and_continuation_read_as_one_text(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders

    source = checkpoint()
    file = source / "tokenizer.json"
    # A decoder that drops a text's first space, as SentencePiece models' do.
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(file))
    model = resq.load(resq.quantize(source, tmp_path / "p", calibration=text, windows=8, window_length=32).directory)
    space = tokenizer.encode(" ").ids[0]
    stream = iter([space, *tokenizer.encode("a é b").ids])

    class Fixed(resq.Sampling):
        def choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
            return next(stream)

    assert model.generate("Once", max_new_tokens=7, sampling=Fixed()) == " a é b"


def test_a_recipe_object_keeps_its_own_bits_and_head(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from resq.numerics.bands import INT8
    from resq.ptq.recipes import RESQ

    mine = replace(RESQ, name="mine", precision=replace(RESQ.precision.with_low(3), head=INT8))
    made = resq.quantize(checkpoint(), tmp_path / "p", recipe=mine, calibration=text, windows=8, window_length=32)
    assert made.manifest.ends.head.bands == [[8, 64]]
    assert made.manifest.layers[0].linears["down"].bands == [[3, 172]]


def test_what_belongs_to_a_model_is_copied_and_nothing_else(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = checkpoint()
    for name in ("corpus.txt", "trainer_state.json", "LICENSE", "chat_template.jinja"):
        (source / name).write_text("x", encoding="utf-8")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("y", encoding="utf-8")
    made = resq.quantize(source, tmp_path / "p", calibration=text, windows=8, window_length=32)
    assert (made.directory / "additional_chat_templates" / "tools.jinja").read_text(encoding="utf-8") == "y"
    assert {"LICENSE", "chat_template.jinja", "generation_config.json"} <= {f.name for f in made.directory.iterdir()}
    assert not (made.directory / "corpus.txt").exists()
    assert not (made.directory / "trainer_state.json").exists()
    assert "additional_chat_templates/tools.jinja" in made.manifest.copied


def test_a_log_has_the_plan_and_what_was(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    log, given = tmp_path / "log.jsonl", ["--calibration", text, *SMALL]
    done = run("quantize", checkpoint(), "--out", tmp_path / "out", *given, "--log", log)
    assert done.returncode == 0, done.stderr
    assert "peak memory" in done.stdout
    row = json.loads(log.read_text())
    assert [phase["phase"] for phase in row["phases"]][-2:] == ["rounding", "all"]
    whole = row["phases"][-1]
    assert 0.5 < whole["peak"] / whole["planned_peak"] < 2
    assert len(row["linears"]) == 14
    assert [layer["layer"] for layer in row["layers"]] == [0, 1]
    assert {"commit", "machine", "command"} <= set(row)
    one_line(run("quantize", checkpoint(), "--out", tmp_path / "o", *given, "--log", tmp_path / "no" / "x"), "no")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "job.json").write_text("{}")
    one_line(run("quantize", checkpoint(), "--out", tmp_path / "out", *given, "--resume"), "is finished")
    one_line(run("quantize", checkpoint(), "--out", tmp_path / "out", *given), "exists already")
    assert not (tmp_path / ".out.partial").exists()
