"""What tests of interrupted jobs share: comparing checkpoints byte by byte, a disk that is soon full."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

MANIFEST, SUMS = "resq.json", "SHA256SUMS.txt"


def checkpoint_bytes(directory: Path) -> dict[str, bytes]:
    """The content of every file by name, without the time of writing: in the manifest, and in its hash. README.md names
    the directory: what is compared has the same name in different places."""
    found = {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    manifest = json.loads(found[MANIFEST])
    del manifest["made_by"]["time"]
    found[MANIFEST] = json.dumps(manifest).encode()
    lines = found[SUMS].splitlines(keepends=True)
    found[SUMS] = b"".join(line for line in lines if not line.endswith(f"  {MANIFEST}\n".encode()))
    assert len(found[SUMS].splitlines()) == len(lines) - 1
    return found


def in_small_tmpfs(place: Path, size: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees, at the directory `place`, an empty disk of this size. Skips where that needs rights that
    are missing."""
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"', str(place)]
    try:
        usable = subprocess.run([*mount, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        usable = False
    if not usable:
        pytest.skip("no private mount of a small tmpfs here (unshare -rm)")
    return subprocess.run([*mount, *command], capture_output=True, text=True, check=False)
