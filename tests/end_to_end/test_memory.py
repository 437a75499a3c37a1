"""Memory while quantizing: one layer at a time, however deep the model, and within a limit the model does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_checkpoint

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Float32 bytes of a layer's matrices.
LAYER = 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 704)
# Freed tensors go back to the system at once: the peak is of live memory, not of the allocator's habits.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
# Anonymous memory is sampled: mapped files of the source are not counted, and rusage's peak would count them. A first
# job, on a tiny model, brings in all modules.
PROBE = """
import json, resource, sys, threading, time
threading.stack_size(1 << 20)  # a limit on data counts every stack in full
import torch
torch.set_num_threads(1)
import resq.api
from safetensors.torch import load_file
from pathlib import Path
from typing import Any
source, first, text, out, what, allowed = sys.argv[1:7]
given = {"calibration": [text], "windows": 9, "activations": "disk"}
resq.api.quantize(first, out + "-first", window_length=32, **given)
def bytes_of(entry):
    for line in open("/proc/self/status"):
        if line.startswith(entry):
            return int(line.split()[1]) * 1024
peak, stop, base = 0, False, bytes_of("RssAnon")
def watch():
    global peak
    while not stop:
        peak = max(peak, bytes_of("RssAnon"))
        time.sleep(0.002)
if int(allowed):
    limit = bytes_of("VmData") + int(allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
else:
    thread = threading.Thread(target=watch)
    thread.start()
try:
    if what == "load":
        kept = [{name: tensor.to(torch.float32) for name, tensor in load_file(file).items()}
                for file in Path(source).glob("*.safetensors")]
    else:
        resq.api.quantize(source, out, window_length=64, **given)
finally:
    stop = True
print(json.dumps([base, peak]))
"""


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A tiny model."""
    return make_checkpoint(tmp_path / "first", num_hidden_layers=1)


def probe(
    source: Path, first: Path, text: Path, what: str = "quantize", allowed: int = 0
) -> subprocess.CompletedProcess[str]:
    """Quantize or load in a process of its own that may have `allowed` bytes of data more than it begins with, 0 for
    no limit."""
    out = source.parent / f"{source.name}-{what}"
    command = [sys.executable, "-c", PROBE, source, first, text, out, what, allowed]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **ALLOCATOR},
    )


def deep(place: Path, layers: int) -> Path:
    """A model of so many layers, in files of a few layers each."""
    return make_checkpoint(place, num_hidden_layers=layers, head_dim=16, max_shard_size="6MB", **WIDE)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc/self/status to count memory")
def test_peak_memory_does_not_grow_with_depth(text: Path, tmp_path: Path, first: Path) -> None:
    above = {}
    for layers in (8, 32):
        done = probe(deep(tmp_path / f"deep-{layers}", layers), first, text)
        assert done.returncode == 0, done.stderr
        base, peak = json.loads(done.stdout)
        above[layers] = peak - base
    assert above[8] > LAYER
    # What depth adds are heads' maps and the moments they are fitted on: [16, 16] here.
    assert above[32] < 1.1 * above[8], above


ALLOWED = 52 << 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts private mappings in RLIMIT_DATA")
def test_a_model_of_four_times_the_allowed_memory_is_quantized(text: Path, tmp_path: Path, first: Path) -> None:
    """Allowed is what the process may have above its modules and what a tiny model left; private mappings of the source
    count, the spilled states, in a shared mapping, do not."""
    layers = -(-4 * ALLOWED // LAYER)
    source = deep(tmp_path / "large", layers)
    done = probe(source, first, text, "load", ALLOWED)
    assert done.returncode != 0
    assert "allocate" in done.stderr, done.stderr
    done = probe(source, first, text, "quantize", ALLOWED)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "large-quantize" / "resq.json").is_file()
