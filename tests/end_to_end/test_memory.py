"""Anonymous memory while quantizing: one layer at a time, however deep the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import make_checkpoint

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
# Freed tensors go back to the system at once: the peak is of live memory, not of the allocator's habits.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
# The peak of RssAnon, sampled: mapped files of the source are not counted, and rusage's peak would count them.
PROBE = """
import json, sys, threading, time
import torch
torch.set_num_threads(1)
import transformers, resq.api
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
resq.api.quantize(sys.argv[1], sys.argv[2], calibration=[sys.argv[3]], windows=16, window_length=128)
stop = True; thread.join()
print(json.dumps(peak))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth(text: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc/self/status to count anonymous memory")
    peaks, environment = {}, {**os.environ, **ALLOCATOR}
    for layers in (4, 8):
        source = make_checkpoint(tmp_path / f"deep-{layers}", num_hidden_layers=layers, head_dim=64, **WIDE)
        command = [sys.executable, "-c", PROBE, source, tmp_path / f"out-{layers}", text]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr
        peaks[layers] = json.loads(done.stdout)
    layer = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408)
    assert peaks[8] - peaks[4] < layer, peaks
