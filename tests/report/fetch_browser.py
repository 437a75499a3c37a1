"""Put a headless browser into a directory where no package manager gives one: `python fetch_browser.py build/browser`.

It comes from npm, with the libraries and a font that a bare machine lacks, and needs nothing but glibc (Linux, x86-64).
The tests find it in build/browser, or where CHROME says.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@sparticuz/chromium@147.0.0"
SHA512 = "4ZKeAQQa8up2mt675qSitztLdbQrlf8BKdC5naeap+5Mv1OV1OlJdPoU+EJC/p5sQUJUQmN4r+q5+EhaaOUHpQ=="
# node comes with npm; Python's standard library has no Brotli.
UNPACK = """
const fs = require('fs'), [from, to] = process.argv.slice(1);
fs.writeFileSync(to, require('zlib').brotliDecompressSync(fs.readFileSync(from)));
"""
LAUNCHER = """#!/bin/sh
LD_LIBRARY_PATH="{place}/lib" FONTCONFIG_FILE="{place}/fonts.conf" exec "{place}/chromium" "$@"
"""
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{place}/fonts</dir><cachedir>{place}/cache</cachedir></fontconfig>
"""


def unpack(source: Path, target: Path) -> Path:
    subprocess.run(["node", "-e", UNPACK, str(source), str(target)], check=True)
    return target


def fetch(place: Path) -> Path:
    """The launcher, which takes Chromium's own arguments."""
    place = place.resolve()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run(["npm", "pack", PACKAGE, "--silent", "--pack-destination", folder], check=True, cwd=folder)
        (archive,) = work.glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != SHA512:
            raise SystemExit(f"{PACKAGE} has sha512 {found}, expected {SHA512}")
        with tarfile.open(archive) as files:
            files.extractall(work, filter="data")
        held = work / "package" / "bin"
        unpack(held / "chromium.br", place / "chromium").chmod(0o755)
        for name in ("al2023", "fonts"):
            with tarfile.open(unpack(held / f"{name}.tar.br", work / f"{name}.tar")) as files:
                files.extractall(place, filter="data")
    (place / "fonts.conf").write_text(FONTS.format(place=place), encoding="utf-8")
    launcher = place / "chrome"
    launcher.write_text(LAUNCHER.format(place=place), encoding="utf-8")
    launcher.chmod(0o755)
    return launcher


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
