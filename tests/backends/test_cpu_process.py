"""What the CPU backend does to its process: no memory but the cache's grows, and a forked child computes too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Freed memory goes back to the system at once, so that what stays is held by somebody.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_a_process(code: str, **environment: str) -> Any:
    """What a fresh Python prints as JSON; tests.conftest puts another build of the kernels in place if one is named."""
    done = subprocess.run(
        [sys.executable, "-c", "import tests.conftest\n" + code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


DECODE = """
import gc, json
import torch
from resq.backends.cpu import CPU, native
from resq.measure.shapes import shape_named
from resq.measure.synthetic import synthetic
from resq.ptq.recipes import RECIPES

def anonymous():
    gc.collect()
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

model = synthetic(shape_named("tiny"), RECIPES["resq"], CPU)
seen = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    cache, token = model.cache(), torch.tensor([[7]])
    model(torch.arange(100)[None], cache)
    for step in range(241):
        if step in (40, 240):
            seen.append((anonymous(), native.module().scratch_bytes(), sum(each.nbytes() for each in cache)))
        model(token, cache)
print(json.dumps(seen))
"""


def test_decoding_holds_no_more_memory_but_the_caches() -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc/self/status to count anonymous memory")
    seen = in_a_process(DECODE, **ALLOCATOR)
    for (first, scratch, stored), (last, later, now) in (seen[:2], seen[2:]):
        assert later == scratch
        assert now > stored
        # 200 steps of 2 layers of 9 operators: 100 bytes lost in each would be 360 KB. The cache's room grows by
        # halves, and what is stored moves to new memory then: up to twice its bytes.
        assert last - first <= 2 * now + 128 * 1024, seen


FORK = """
import json, multiprocessing, os
import torch
from resq.backends.cpu import CPU, native
from resq.numerics.affine import quantize
from resq.numerics.bands import Bands
from resq.numerics.formats import ActivationFormat
from resq.numerics.linear import PackedLinear

torch.set_num_threads(2)
bands = Bands.of((4, 224), (8, 32))
generator = torch.Generator().manual_seed(0)
integers = torch.randint(-8, 8, (1000, 256), generator=generator)
linear = PackedLinear.from_integers(integers, torch.rand(1000, 2, generator=generator), bands)
weight = CPU.prepack(linear, ActivationFormat(bands=bands))
x = torch.randn(20, 256, generator=generator)

def product():
    return CPU.linear(CPU.gather_quantize(x, ActivationFormat(bands=bands)), weight)

def same(_):
    return product().numpy().tobytes() == want

# Nothing of torch's own that uses its threads: its OpenMP does not survive a fork.
want = product().numpy().tobytes()
results = []
for child in range(3):
    pid = os.fork()
    if pid == 0:
        right = all(same(0) for _ in range(20))
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if same(0) else 1)
        _, status = os.waitpid(grandchild, 0)
        os._exit(0 if right and status == 0 else 1)
    between = same(0)
    _, status = os.waitpid(pid, 0)
    results.append((between, status))
with multiprocessing.get_context("fork").Pool(2) as pool:
    results.append((pool.map(same, range(4)) == [True] * 4, 0))
print(json.dumps(results))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_what_its_parent_does() -> None:
    assert in_a_process(FORK) == [[True, 0]] * 4
