"""Kernels compiled for a card that is not here, as they would be launched there, and what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resq.backends.triton.device import INTERPRETING, TARGETS, targeting
from resq.backends.triton.launch import Launch, caught

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# What is counted in the machine code: tensor-core products, dot products on bytes, local memory, asynchronous copies.
INSTRUCTIONS = ("IGMMA", "IMMA", "HGMMA", "HMMA", "IDP", "LDL", "STL", "LDGSTS", "UTMALDG")


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target. registers a thread; stack: bytes of local memory a thread; spills: bytes stored and
    loaded again because registers ran out; loop_spills: accesses of local memory within loops that hold tensor-core
    products; shared: bytes a program; instructions: how many of each of `INSTRUCTIONS`; constants: what it was
    specialized on."""

    kernel: str
    capability: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    loop_spills: int
    shared: int
    warps: int
    instructions: dict[str, int] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignments, as Triton's own launcher finds them in the arguments."""
    kernel = launch.kernel
    signature, constants, attributes = {}, dict(launch.constants), {}
    values = dict(zip((name for name in kernel.arg_names if name not in constants), launch.arguments, strict=True))
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = values[name]
        if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile one launch. Raises what Triton raises when it cannot."""
    signature, constants, attributes = _signature(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    made: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        usage = _output(tools / "cuobjdump", "-res-usage", file)
        code = _output(tools / "nvdisasm", "-c", file)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    counts = Counter(match for match in re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", code))
    stores, loads = _spills(made.asm["ptx"], capability)
    return Compiled(
        launch.kernel.fn.__name__,
        capability,
        found["REG"],
        found["STACK"],
        stores,
        loads,
        _loop_spills(code),
        made.metadata.shared,
        launch.options["num_warps"],
        dict(counts),
        {name: value for name, value in launch.constants.items() if isinstance(value, int | str | float | tuple)},
    )


def _loop_spills(code: str) -> int:
    """Accesses of local memory between a label and a jump back to it, where tensor cores work in between."""
    lines, labels, found = code.splitlines(), {}, set()
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = number
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
        if jump and jump[1] in labels:
            body = range(labels[jump[1]], number + 1)
            if any(re.search(r"\b\w*MMA\b", lines[i]) for i in body):
                found |= {i for i in body if re.search(r"\b(LDL|STL)\b", lines[i])}
    return len(found)


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _spills(ptx: str, capability: int) -> tuple[int, int]:
    """Bytes of spill stores and loads that ptxas tells of."""
    arch, said = f"sm_{capability}{'a' if capability >= 90 else ''}", ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        # Triton brings two; which one takes its PTX depends on Triton's version.
        for tool in (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell):
            command = [tool.path, "-v", f"--gpu-name={arch}", str(file), "-o", f"{file}.o"]
            done = subprocess.run(command, capture_output=True, text=True)
            said = done.stderr
            if done.returncode == 0:
                pairs = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
                return sum(int(stores) for stores, _ in pairs), sum(int(loads) for _, loads in pairs)
    raise RuntimeError(f"ptxas does not take Triton's PTX for {arch}: {said.strip()}")


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Inside, kernels are compiled for sm_<capability> when they are launched, and nothing runs: tensors may be
    anything of the right shape. Equal ones once. Raises RuntimeError in the interpreter."""
    if INTERPRETING:
        raise RuntimeError("kernels were defined for Triton's interpreter; unset TRITON_INTERPRET")
    made: dict[str, Compiled] = {}

    def catch(launch: Launch) -> None:
        key = repr((launch.kernel.fn.__name__, _signature(launch), launch.options))
        if key not in made:
            made[key] = compiled(launch, capability)
            results.append(made[key])

    results: list[Compiled] = []
    with targeting(TARGETS[capability]), caught(catch):
        yield results
