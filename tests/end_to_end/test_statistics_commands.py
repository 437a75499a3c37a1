"""Statistics on the command line: shards of many machines, merged, and quantized from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Done, run

SMALL = ("--windows", 20, "--window-length", 32)


def one_line(done: Done, *words: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


def test_shards_become_a_checkpoint(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, shards = checkpoint(), [tmp_path / f"stats-{number}.safetensors" for number in (1, 2, 3)]
    for number, file in enumerate(shards, start=1):
        done = run("calibrate", source, "--calibration", text, *SMALL, "--shard", f"{number}/3", "--out", file)
        assert done.returncode == 0, done.stderr
        assert f"of windows {8 * number - 7} … {min(8 * number, 20)} of 20; missing: " in done.stdout
    part, whole, out = tmp_path / "part", tmp_path / "stats.safetensors", tmp_path / "packed"
    told = json.loads(run("merge", shards[1], shards[0], "--out", part, "--json").stdout)
    assert told == {"statistics": str(part), "windows": [1, 16], "of": 20, "missing": [[17, 20]]}
    one_line(
        run("quantize", source, "--statistics", part, "--calibration", text, "--out", out), "windows 17 … 20 of 20"
    )
    one_line(run("merge", shards[2], shards[0], "--out", whole), "windows 9 … 16 are missing between")
    assert (
        "windows 1 … 20 of 20, the whole. Next: resq quantize" in run("merge", part, shards[2], "--out", whole).stdout
    )

    again = ("--calibration", text, "--rounding-windows", 4)
    done = run("quantize", source, "--statistics", whole, *again, "--bits", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert run("quantize", source, *SMALL, *again, "--bits", 3, "--out", tmp_path / "plain").returncode == 0
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes(), file.name


def test_bad_input_gets_one_line(checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = checkpoint(), tmp_path / "stats.safetensors"
    given = ("calibrate", source, "--calibration", text, *SMALL, "--out", out)
    one_line(run(*given, "--shard", "third"), "'third'", "3/16")
    one_line(run(*given, "--shard", "0/3"), "0/3")
    one_line(run(*given, "--shard", "1/4"), "at most 3 shards")
    one_line(run(*given, "--recipe", "rseq"), "did you mean resq?")
    one_line(run(*given, "--recipe", "gptq"), "gptq fits no basis")
    one_line(run("merge", text, "--out", out), "calibration.txt")
    one_line(run("merge", tmp_path / "no.safetensors", "--out", out), "no.safetensors", "resq calibrate")
    one_line(run("quantize", source, "--statistics", text, "--out", tmp_path / "packed"), "calibration.txt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["calibration.txt", source.name]
