"""No code for one machine can run on another: AVX and AMX instructions stay inside the kernels' own local functions.

A function of the standard library that is a template, or inline, is compiled into every file that uses it and the
linker keeps one copy for all. If a kernel file used one, the copy kept could be the one with AVX-512 instructions, and
code that runs on every machine would call it. So no kernel file may define code under a name that others can link to,
but its table of functions, and no other file may hold such instructions.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from resq.backends.cpu import native

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "resq" / "backends" / "cpu" / "csrc"
# Flags that decide which instructions a kernel file may use, as in CMakeLists.txt.
AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vnni", "-mavx512vbmi")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
KERNELS: dict[str, tuple[str, ...]] = {
    "avx2": AVX2,
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx512": AVX512,
    "amx": (*AVX512, "-mamx-tile", "-mamx-int8"),
}
# Beyond baseline x86-64: VEX and EVEX encodings, mask registers, BMI, AMX. Baseline mnemonics in v are verr, verw and
# those of virtual machines.
BEYOND = re.compile(
    r"v(?!err\b|erw\b|m(?:call|launch|resume|xoff|xon|ptrld|ptrst|clear|read|write|run|load|save|mcall|func)\b)[a-z]\w+"
    r"|k(?:mov|or|ortest|and|andn|xor|xnor|add|not|test|shiftl|shiftr|unpck)[bwdq]+"
    r"|andn|bextr|blsi|blsr|blsmsk|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx"
    r"|tile(?:loadd|loaddt1|stored|zero|release)|tdp\w+|ldtilecfg|sttilecfg"
)

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has several instruction sets here"),
    pytest.mark.skipif(not (shutil.which("objdump") and shutil.which("nm")), reason="needs objdump and nm"),
]


def said(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def instructions(file: Path) -> Iterator[tuple[int, str]]:
    """(address, mnemonic) of the file's code, section by section."""
    for line in said("objdump", "-d", "--no-show-raw-insn", file).splitlines():
        address, colon, rest = line.partition(":\t")
        if colon and rest:
            words = rest.split()
            # A prefix stands before its instruction.
            prefixes = ("rep", "repz", "repnz", "lock", "data16", "bnd", "notrack", "cs", "ds", "{evex}", "{vex}")
            while len(words) > 1 and words[0] in prefixes:
                words = words[1:]
            yield int(address, 16), words[0]


def beyond_baseline(file: Path) -> list[tuple[int, str]]:
    return [(address, name) for address, name in instructions(file) if BEYOND.fullmatch(name)]


def shared_names(file: Path, *, dynamic: bool = False) -> list[tuple[int, int, str]]:
    """(address, size, name) of the code under a name that other files can link to: weak, global or unique."""
    found = []
    for line in said("nm", "--demangle", "--print-size", *(["-D"] if dynamic else []), file).splitlines():
        match line.split(maxsplit=3):
            case [address, size, "T" | "W" | "u" | "i", name]:
                found.append((int(address, 16), int(size, 16), name))
    return found


def compiled(source: Path, to: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    arguments = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-w", "-I", SOURCES, *flags, "-c", source, "-o", to)
    said(compiler, *arguments)
    return to


def test_no_function_that_others_can_link_to_holds_instructions_beyond_the_baseline() -> None:
    """In the module as it is installed. Its local names are stripped; those of templates are not."""
    module = Path(native.module().__file__)
    found = beyond_baseline(module)
    assert len(found) > 10_000, "the kernels are in there, and are seen"
    shared = shared_names(module, dynamic=True)
    assert any(name.startswith("PyInit__native") for _, _, name in shared)
    for start, size, name in shared:
        inside = [each for each in found if start <= each[0] < start + size]
        assert not inside, (name, inside[:3])


def built_objects() -> dict[str, Path]:
    """The newest build's object files by source; skips where there is none or the sources are newer."""
    folders = [folder for folder in ROOT.glob("build/native-*/CMakeFiles/_native.dir") if folder.is_dir()]
    objects = {file.name.removesuffix(".cpp.o"): file for folder in folders for file in folder.rglob("*.cpp.o")}
    newest = max(file.stat().st_mtime for file in SOURCES.iterdir())
    if not objects or min(file.stat().st_mtime for file in objects.values()) < newest:
        pytest.skip("no object files of a build from these sources in build/")
    return objects


def check_object(name: str, file: Path) -> None:
    if name in KERNELS:
        assert shared_names(file) == [], name
        assert beyond_baseline(file), name
    else:
        assert beyond_baseline(file)[:3] == [], name


def test_the_builds_own_objects_keep_their_instructions_to_themselves() -> None:
    objects = built_objects()
    assert set(objects) >= set(KERNELS) | {"scalar", "binding", "operators", "isa", "pool", "pack"}
    for name, file in objects.items():
        check_object(name, file)


@pytest.mark.slow
def test_no_kernel_file_uses_a_template_or_inline_function_of_others(tmp_path: Path) -> None:
    """Without optimisation every such use shows, even those that the real build inlines."""
    described = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for name, flags in KERNELS.items():
        assert all(flag in described for flag in flags)
        check_object(name, compiled(SOURCES / f"{name}.cpp", tmp_path / f"{name}.o", "-O0", *flags))


@pytest.mark.slow
def test_what_is_not_a_kernel_runs_on_every_machine(tmp_path: Path) -> None:
    others = {file.stem for file in SOURCES.glob("*.cpp")} - set(KERNELS) - {"binding"}  # that one needs nanobind
    assert others == {"scalar", "operators", "isa", "pool", "pack"}
    for name in sorted(others):
        check_object(name, compiled(SOURCES / f"{name}.cpp", tmp_path / f"{name}.o", "-O2"))


def test_a_template_of_the_standard_library_in_a_kernel_would_show(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text(
        "#include <vector>\n"
        "namespace { void grow(std::vector<float>& v) { for (float x = 0; x < 9; x++) v.push_back(x * x); } }\n"
        "struct Table { void (*grow)(std::vector<float>&); };\n"
        "extern const Table table; const Table table = {grow};\n"
    )
    file = compiled(source, tmp_path / "kernel.o", "-O0", *AVX2)
    assert any("vector" in name for _, _, name in shared_names(file))
    with pytest.raises(AssertionError):
        check_object("avx2", file)
    with pytest.raises(AssertionError):
        check_object("pool", file)
    check_object("pool", compiled(source, tmp_path / "plain.o", "-O3"))
