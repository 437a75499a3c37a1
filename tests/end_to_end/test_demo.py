"""The first minute: the embedded model, the demonstration, the list of recipes, completion, help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import run
from tests.end_to_end.test_compare import alive, killed
from typer.main import get_command

import resq
from resq import compare as comparing
from resq import demo, embedded
from resq.cli import RECIPE_NAMES, app
from resq.errors import InputError
from resq.models.source import Source
from resq.ptq.recipes import RECIPES


def test_the_embedded_model_is_small_16_bit_and_has_its_tokenizer() -> None:
    source = Source.open("tiny")
    assert source.path == embedded.model_directory()
    assert 2e6 < source.parameters() < 5e6
    assert source.dtype == "bfloat16"
    assert sum(file.stat().st_size for file in source.path.iterdir()) < 10e6


def test_without_source_and_calibration_the_embedded_ones_are_taken(tmp_path: Path) -> None:
    out = tmp_path / "packed"
    done = run("quantize", "--out", out, "--windows", 8, "--window-length", 64, "--recipe", "resq-kv")
    assert done.returncode == 0, done.stderr
    manifest = resq.load(out).manifest
    assert manifest.source.name == "tiny"
    assert manifest.calibration is not None
    assert manifest.calibration.origin == "stdlib"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in card


def test_other_models_need_a_calibration_text(tmp_path: Path, checkpoint) -> None:
    done = run("quantize", checkpoint(), "--out", tmp_path / "packed")
    assert done.returncode == 2
    assert "--calibration" in done.stderr
    assert "stdlib" in done.stderr


def test_the_demonstration_measures_what_it_wrote(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = demo.run(tmp_path, demo.plan(("rtn", "resq"), (3,)), progress=lambda *step: seen.append(step))
    base, rtn, ours = found.rows
    assert (base.recipe, rtn.recipe, ours.recipe) == ("16-bit", "rtn", "resq")
    assert ("cases", 2, 2) in seen
    assert seen[-1][0] == "speed: prefill"
    assert found.between(ours, rtn).high < 0
    assert "3 bit: resq is better than rtn" in demo.conclusion(found)
    assert "".join(demo.continuation(found.checkpoint(ours.case)))


@pytest.mark.slow
def test_the_whole_demonstration_ranks_the_recipes(tmp_path: Path) -> None:
    out = tmp_path / "kept"
    done = run("demo", "--out", out)
    assert done.returncode == 0, done.stderr
    for name in ("16-bit", *RECIPES, "tokens/s", demo.PROMPT.strip()):
        assert name in done.stdout
    assert "3 bit: resq is better than quarot" in done.stdout
    cases = {path.name for path in (out / "cases").iterdir()}
    assert cases == {"16-bit", *(f"{name}-{bits}bit" for name in RECIPES for bits in (4, 3))}
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(out) not in line)
    refused = run("demo", "--out", out)
    assert refused.returncode == 2
    assert "exists already" in refused.stderr


@pytest.mark.parametrize("after", [4.0, 15.0])
def test_an_interrupted_demonstration_leaves_nothing_and_no_process(after: float, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "resq", "demo", "--out", str(tmp_path / "kept")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    # multiprocessing's own resource tracker goes when it sees that the parent has gone.
    for _ in range(100):
        if not alive(process.pid):
            return
        time.sleep(0.1)
    pytest.fail("a process of the group is still running")


def test_a_case_that_failed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "make_case", killed)
    with pytest.raises(InputError, match="rtn-4bit of the demonstration failed: its process was killed"):
        demo.run(tmp_path, demo.plan(("rtn",), (4,)))


def test_a_place_that_failed_is_removed_and_one_that_is_taken_refused(tmp_path: Path) -> None:
    def fail() -> None:
        with demo.workplace(tmp_path / "out") as work:
            (work / "file").write_text("", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with demo.workplace(tmp_path / "out") as work:
        (work / "file").write_text("", encoding="utf-8")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(InputError, match="exists already"):
        demo.workplace(tmp_path / "out").__enter__()


def test_eval_takes_the_shortest_context_and_a_source_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("import os\n" * 300, encoding="utf-8")
    row = json.loads(run("eval", "tiny", "--text", tmp_path / "text", "--json").stdout)["rows"][0]
    assert row["window_length"] == 256
    assert "run resq quantize on it first" in run("generate", "tiny", "import").stderr
    forgotten = run("quantize", "--calibration", tmp_path / "text", "--out", tmp_path / "out")
    assert forgotten.returncode == 2
    assert "no source was given" in forgotten.stderr


def test_the_recipes_the_command_line_names_are_all_there_are() -> None:
    assert tuple(RECIPES) == RECIPE_NAMES
    listed = json.loads(run("recipes", "--json").stdout)["recipes"]
    assert [row["name"] for row in listed] == list(RECIPES)
    assert all(row["about"] for row in listed)
    shown = run("recipes").stdout
    assert all(f" {name} " in shown for name in RECIPES)


@pytest.mark.parametrize(("typed", "offered"), [("resq quantize --recipe qua", "quarot"), ("resq insp", "inspect")])
def test_the_shell_completes_commands_and_recipes(typed: str, offered: str) -> None:
    words = typed.split()
    environment = {
        "PATH": "/usr/bin:/bin",
        "_RESQ_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [str(Path(sys.executable).with_name("resq"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert offered in done.stdout.split(), done.stderr


def test_every_command_explains_every_argument_and_prints_json() -> None:
    group = get_command(app)
    assert "Exit codes" in run("--help").stdout
    commands = group.commands  # pyright: ignore[reportAttributeAccessIssue]
    for name, command in commands.items():
        assert command.help, name
        assert all(getattr(parameter, "help", None) for parameter in command.params), name
        assert any("--json" in parameter.opts for parameter in command.params), name


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["quantise"], "quantize"),
        (["quantize", "tiny", "--out", "x", "--recipe", "quarott"], "quarot"),
        (["eval", "tiny", "--text", "{here}/wiki.txt"], "{here}/wiki.text"),
        (["generate", "{here}/lama-resq", "x"], "{here}/llama-resq"),
        (["inspect", "tinyy", "--jsn"], "--json"),
        (["inspect", "tinny"], "did you mean tiny?"),
        (["quantize", "tiny", "--out", "x", "--recipe", "RESQ"], "did you mean resq?"),
        (["eval", "tiny", "--text", "stdlb"], "did you mean stdlib?"),
    ],
)
def test_a_typo_gets_the_nearest_valid_value(arguments: list[str], near: str, tmp_path: Path) -> None:
    (tmp_path / "wiki.text").write_text("", encoding="utf-8")
    (tmp_path / "llama-resq").mkdir()
    done = run(*(word.format(here=tmp_path) for word in arguments))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert near.format(here=tmp_path) in done.stderr.replace("\n", "")
