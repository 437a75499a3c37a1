"""`resq plan`: its memory is what real runs take, its sizes are those of real checkpoints, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_checkpoint, run

import resq
from resq.api import calibrate
from resq.checkpoint.manifest import FileEntry
from resq.errors import InputError
from resq.inputs import chosen_recipe
from resq.measure.ledger import ledger
from resq.measure.plan import Asked, Machine, check_statistics, described, logged, planned
from resq.measure.plan_memory import TOKENIZED, Work, holdings, nodes
from resq.measure.plan_rehearse import rehearsed
from resq.measure.plan_time import Rates, seconds
from resq.measure.rows import read_rows
from resq.measure.shapes import shape_named
from resq.models.architecture import architecture_for
from resq.models.text import WHOLE
from resq.processes import Peak
from resq.ptq.activations import Place
from resq.ptq.statistics_file import Header, read_header

GB = 10**9
RATES = Rates(1e11, 5e10, 1e10, 1e9, 1e10, 1e7, 1e8, 1e9, 1e9)
ROOM = Machine(64 * GB, None, 64 * GB)
# What `quantize` is planned and then run with, in a process of its own: one that has done nothing yet.
RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from resq import api, inputs
from resq.measure.plan import Asked, described, logged, planned
from resq.processes import Peak, return_blocks
from resq.ptq.activations import Place

source, out, recipe, windows, rounding, length, place, text, file = sys.argv[1:]
return_blocks()
asked = Asked(inputs.chosen_recipe(recipe, None, None), int(windows), int(rounding), int(length),
              activations=Place(place), collected=bool(file))
plan = planned(described(source), asked)
with Peak() as peak:
    api.quantize(source, out, recipe=recipe, calibration=[text], windows=int(windows), window_length=int(length),
                 statistics=file or None, rounding_windows=int(rounding), activations=place, progress=peak.watched())
print(json.dumps([vars(row) for row in logged(plan, peak)]))
"""


def asked(recipe: str = "resq", **changes: Any) -> Asked:
    bits, head = changes.pop("bits", None), changes.pop("head_bits", None)
    return Asked(chosen_recipe(recipe, bits, head), **{"windows": 8, "window_length": 64, **changes})


def plan_of(directory: Path, recipe: str = "resq", **changes: Any) -> Any:
    machine = changes.pop("machine", ROOM)
    return planned(described(directory), asked(recipe, **changes), rates=RATES, process=GB // 4, machine=machine)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("resq", {}),
        ("resq", {"head_bits": 8}),
        ("resq", {"untie": True}),
        ("resq", {"bits": 3}),
        ("rtn", {"head_bits": 8}),
        ("quik", {}),
        ("quarot", {}),
        ("resq-246", {"bits": 3}),
        ("resq-kv", {}),
        ("resq-paper", {}),
    ],
)
def test_size_and_bits_are_those_of_the_checkpoint(tmp_path: Path, recipe: str, options: dict[str, Any]) -> None:
    directory = make_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("what is planned is what is made. " * 200)
    made = resq.quantize(
        directory, tmp_path / "out", recipe=recipe, calibration=text, windows=8, window_length=64, **options
    )
    plan = plan_of(directory, recipe, **options)
    real, guessed = ledger(made.manifest, 16), plan.size.ledger
    for name in ("weight_bits", "activation_bits", "key_bits", "value_bits", "kv_bytes_per_token"):
        assert getattr(guessed, name) == pytest.approx(getattr(real, name)), name
    assert guessed.source_bytes == real.source_bytes
    # Headers are most of what is unknown in a model this small.
    assert guessed.bytes == pytest.approx(real.bytes, abs=0.03 * real.bytes + 4096)
    first = made.manifest.layers[0]
    online = {
        "query_key": first.key.map,
        "attn_out": first.inputs["o_in"].map,
        "mlp_hidden": first.inputs["down_in"].map,
    }
    for site, entry in online.items():
        assert (site in plan.size.transforms) == (entry is not None)
        assert entry is None or plan.size.transforms[site].startswith(f"{entry.kind} of {entry.size}")
    assert [note for note in plan.notes if "Hadamard" in note] == [
        note for note in made.manifest.notes if "Hadamard" in note
    ]


def test_a_configuration_alone_gives_the_same_plan(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "model", dtype="float32")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(whole / "config.json", bare)
    plans = [plan_of(each) for each in (whole, bare, bare / "config.json")]
    assert plans[1].phases == plans[2].phases
    assert {plan.peak for plan in plans} == {plans[0].peak}
    assert {plan.model.dtype for plan in plans} == {"float32"}
    assert not plans[0].notes
    assert "no weights are at hand: float32" in plans[1].notes[0]
    with pytest.raises(InputError, match="has no weights at hand"):
        rehearsed(plans[1])


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, ["--recipe", "resqq"], "no recipe 'resqq'"),
        ({}, ["--windows", "0"], "--windows is 0"),
        ({}, ["--rounding-windows", "9", "--windows", "8"], "--rounding-windows 9 must lie in 1 … 8"),
        ({}, ["--window-length", "257"], "--window-length 257 must lie in 2 … 256"),
        ({}, ["--windows", "1", "--window-length", "64"], "64 calibration tokens are too few"),
        ({}, ["--activations", "tape"], "--activations 'tape'"),
        ({}, ["--bits", "5"], "--bits 5"),
        ({}, ["--context", "300"], "--context 300"),
        ({"quantization_config": {"quant_method": "awq"}}, [], "already quantized (awq)"),
        ({"model_type": "gpt2"}, [], "gpt2"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, changes: dict[str, Any], options: list[str], words: str) -> None:
    directory = make_checkpoint(tmp_path / "model")
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    done = run("plan", str(directory), *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_tensors_that_do_not_belong_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 180}))
    with pytest.raises(InputError, match=r"its config\.json says"):
        plan_of(directory)


def test_what_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    options: dict[str, Any] = {"windows": 4096, "rounding_windows": 4096, "window_length": 256}
    roomy = plan_of(directory, **options)
    assert roomy.fits
    assert not roomy.advice
    tight = plan_of(directory, **options, machine=replace(ROOM, memory=roomy.peak))
    assert not tight.fits
    _, peak, enough = next(each for each in tight.advice if each[0] == "--activations disk")
    assert enough
    assert peak == plan_of(directory, **options, activations=Place.DISK).peak < roomy.peak
    none = plan_of(directory, **options, machine=replace(ROOM, memory=GB // 4))
    assert none.advice
    assert not any(enough for _, _, enough in none.advice)
    assert not plan_of(directory, machine=replace(ROOM, disk=1000)).fits


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Header]:
    """A model, a file of its statistics, and what that holds."""
    home = tmp_path_factory.mktemp("collected")
    directory, text, file = make_checkpoint(home / "model"), home / "text.txt", home / "stats.safetensors"
    text.write_text("what was collected is not collected again. " * 200)
    calibrate(directory, file, calibration=text, windows=24, window_length=64)
    return directory, file, read_header(file)


def test_a_statistics_file_takes_the_place_of_the_first_pass(collected: tuple[Path, Path, Header]) -> None:
    directory, file, header = collected
    told = json.loads(run("plan", str(directory), "--statistics", str(file), "--recipe", "resq", "--json").stdout)
    assert (told["windows"], told["rounding_windows"], told["window_length"]) == (24, 24, 64)
    assert told["statistics"] is True
    phases = ["tokenizing", "hashing the source", "fitting bases", "embedding and head", "rounding"]
    assert [phase["name"] for phase in told["phases"]] == phases
    kept = 8 * sum(prod(shape) for shape in header.sum_shapes().values())
    assert all(phase["terms"]["moments of the statistics"] == kept for phase in told["phases"][2:])
    without = plan_of(directory, windows=24)
    before = plan_of(directory, windows=24, collected=True)
    assert before.phases[-1].peak == without.phases[-1].peak + kept
    assert before.seconds < without.seconds
    # Nothing looks at text, unless it is given and compared.
    bare = plan_of(directory, "resq-kv", windows=24, collected=True)
    assert "tokenizing" not in {phase.name for phase in bare.phases}
    resumable = "states and maps to resume from"
    assert bare.disk[resumable] < plan_of(directory, "resq-kv", windows=24).disk[resumable]
    compared = plan_of(directory, "resq-kv", windows=24, collected=True, text=1000)
    assert compared.phases[0].name == "tokenizing"


def test_advice_leaves_a_statistics_files_windows_alone(collected: tuple[Path, Path, Header]) -> None:
    options: dict[str, Any] = {
        "windows": 4096,
        "rounding_windows": 4096,
        "window_length": 256,
        "machine": replace(ROOM, memory=GB // 4),
    }
    plans = [plan_of(collected[0], collected=each, **options) for each in (False, True)]
    changes = [{change for change, _, _ in plan.advice} for plan in plans]
    assert any("--windows" in change for change in changes[0])
    assert changes[1]
    assert not any("--windows" in change or "--window-length" in change for change in changes[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--windows", "8"], "--windows is 8, {file} was made with 24; leave --windows out"),
        (["--window-length", "32"], "--window-length is 32, {file} was made with 64"),
        (["--rounding-windows", "25"], "--rounding-windows 25 must lie in 1 … 24"),
        (["--recipe", "gptq"], "recipe gptq fits no basis and needs no --statistics"),
        (["--recipe", "quik"], "but not peaks"),
    ],
)
def test_statistics_are_refused_as_when_quantizing(
    options: list[str], words: str, collected: tuple[Path, Path, Header], tmp_path: Path
) -> None:
    directory, file, _ = collected
    said = words.format(file=file)
    for command in (["plan"], ["quantize", "--out", str(tmp_path / "out")]):
        text = str(file.with_name("text.txt"))
        done = run(*command, str(directory), "--statistics", str(file), "--calibration", text, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr


def test_statistics_of_another_model_are_refused(collected: tuple[Path, Path, Header], tmp_path: Path) -> None:
    directory, _, header = collected
    recipe = chosen_recipe("resq", None, None)
    check_statistics("stats", header, described(directory), recipe)
    check_statistics("stats", header, described(directory / "config.json"), recipe)
    entry = FileEntry(bytes=1, sha256="0" * 64)
    longer = header.model_copy(update={"source": {**header.source, "model.safetensors": entry}})
    with pytest.raises(InputError, match=r"another model: model\.safetensors differs"):
        check_statistics("stats", longer, described(directory), recipe)
    other = make_checkpoint(tmp_path / "other", vocab_size=320)
    with pytest.raises(InputError, match=r"another model: config\.json differs"):
        check_statistics("stats", header, described(other), recipe)


def test_quantizing_from_statistics_is_logged_beside_its_plan(
    collected: tuple[Path, Path, Header], tmp_path: Path
) -> None:
    directory, file, _ = collected
    given = ["--statistics", str(file), "--calibration", str(file.with_name("text.txt")), "--rounding-windows", "4"]
    log = tmp_path / "log.jsonl"
    done = run("quantize", str(directory), *given, "--log", str(log), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(log)
    assert row["plan"]["statistics"] is True
    assert (row["plan"]["windows"], row["plan"]["rounding_windows"]) == (24, 4)
    phases = [phase["phase"] for phase in row["phases"]]
    assert phases == ["tokenizing", "hashing the source", "fitting bases", "embedding and head", "rounding", "all"]


def work(**changes: Any) -> Work:
    config = shape_named("llama-3.1-8b")
    shape = architecture_for(config["model_type"]).shape(config)
    given = {"windows": 128, "rounding_windows": 128, "length": 2048}
    return Work(shape, chosen_recipe(changes.pop("recipe", "resq"), None, None), **{**given, **changes})


def test_memory_does_not_grow_with_depth_and_time_does() -> None:
    shallow, deep = (
        replace(each, shape=replace(each.shape, layers=layers)) for each, layers in ((work(), 32), (work(), 128))
    )
    peaks = [max(holding.machine(cuda=False) for holding in holdings(each, 0)) for each in (shallow, deep)]
    assert peaks[1] < 1.05 * peaks[0]
    took = [seconds(each, RATES, GB, GB)["rounding"] for each in (shallow, deep)]
    assert took[1] == pytest.approx(4 * took[0], rel=0.02)


def test_states_leave_memory_for_disk_and_a_card_for_memory() -> None:
    def peaks(place: Place, *, cuda: bool) -> tuple[int, int]:
        found = holdings(work(place=place, cuda=cuda), 0)
        return max(each.machine(cuda=cuda) for each in found), max(each.card(cuda=cuda) for each in found)

    states = 4 * 128 * 2048 * 4096
    # More where attention's outputs, which lie there too, make the peak.
    assert states <= peaks(Place.DEVICE, cuda=False)[0] - peaks(Place.DISK, cuda=False)[0] <= 2 * states
    assert states <= peaks(Place.DEVICE, cuda=True)[1] - peaks(Place.MEMORY, cuda=True)[1] <= 2 * states
    assert peaks(Place.MEMORY, cuda=True)[0] >= states


def test_a_text_takes_memory_up_to_the_size_from_which_it_is_cut() -> None:
    def peak(**text: int) -> int:
        return next(each for each in holdings(work(**text), 0) if each.phase == "tokenizing").machine(cuda=False)

    assert peak(text=WHOLE) - peak(text=WHOLE // 2) == TOKENIZED * WHOLE // 2
    assert peak(text=WHOLE + 1) == peak(text=100 * WHOLE) < peak(text=WHOLE)
    tokens = peak(documents=0)
    assert peak(documents=GB) == GB + tokens
    assert peak(text=WHOLE, documents=10 * GB) == peak(documents=10 * GB)
    assert peak(text=WHOLE, documents=10**6) == peak(text=WHOLE)


@pytest.mark.parametrize(("windows", "most"), [(0, 0), (1, 1), (8, 1), (9, 2), (24, 2), (32, 3), (64, 4), (128, 5)])
def test_a_tree_holds_one_node_for_each_size_and_the_one_under_way(windows: int, most: int) -> None:
    assert nodes(windows) == most


def test_the_command_says_all_on_one_screen_and_as_json() -> None:
    done = run("plan", "tiny", "--windows", "8", "--rehearse", "--context", "128", "--batch", "4")
    assert done.returncode == 0, done.stderr
    for words in ("fits: memory", "hadamard of 688", "tied, kept tied", "128 × 4 tokens", "rehearsed with layer 2"):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 40
    told = json.loads(run("plan", "tiny", "--windows", "8", "--recipe", "spinquant", "--json").stdout)
    assert told["fits"] is True
    tuning = next(phase for phase in told["phases"] if phase["name"].startswith("learned"))
    assert tuning["seconds"] is None
    assert any("neither its time nor its memory" in note for note in told["notes"])
    assert told["peak_bytes"] == max(phase["peak"] for phase in told["phases"])


def test_a_text_that_is_not_there_is_refused_as_by_quantize(tmp_path: Path) -> None:
    file = str(tmp_path / "typo.txt")
    for command in (["plan", "tiny"], ["quantize", "tiny", "--out", str(tmp_path / "out")]):
        done = run(*command, "--calibration", file)
        assert done.returncode == 2
        assert f"no text at {file}; give a UTF-8 text file" in done.stderr.replace("\n", " ")
    assert run("plan", "tiny", "--calibration", "stdlib").returncode == 0


def test_real_figures_stand_beside_the_plan(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    plan = plan_of(directory)
    with Peak() as peak:
        tell = peak.watched()
        for phase in ("collecting moments", "embedding and head", "rounding"):
            tell(phase, 0, 1)
            tell(phase, 1, 1)
    rows = {row.phase: row for row in logged(plan, peak)}
    assert list(rows) == ["collecting moments", "fitting bases", "embedding and head", "rounding", "all"]
    assert rows["all"].planned_peak == plan.peak
    assert rows["all"].peak == peak.bytes
    assert rows["rounding"].planned_seconds == plan.phases[-1].seconds


SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize(
    ("recipe", "windows", "rounding", "length", "place", "collected"),
    [
        ("resq", 128, 32, 256, "disk", False),
        ("resq+", 24, 24, 256, "memory", False),
        ("rtn", 8, 8, 256, "device", False),
        ("quik", 32, 16, 512, "device", False),
        ("resq-kv", 8, 8, 512, "device", True),
    ],
)
def test_peak_is_within_fifteen_percent_of_the_plan(
    tmp_path: Path, recipe: str, windows: int, rounding: int, length: int, place: str, collected: bool
) -> None:
    directory = make_checkpoint(tmp_path / "model", **SIZES)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {number}. " * 40}) for number in range(400)))
    file = tmp_path / "stats.safetensors" if collected else ""
    if collected:
        calibrate(directory, file, recipe=recipe, calibration=text, windows=windows, window_length=length)
    given = [str(directory), str(tmp_path / "out"), recipe, windows, rounding, length, place, text, file]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, given)], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    whole = rows[-1]
    assert whole["peak"] == pytest.approx(whole["planned_peak"], rel=0.15), rows
