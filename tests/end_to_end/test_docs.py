"""The documents: every recipe is described, and what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resq.ptq.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [*(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING")), *ROOT.glob("docs/*.md")]


def prose(document: Path) -> str:
    """A document without its code: blocks in fences, indented or between single back-ticks."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<=\n\n) {4}.*?(?=\n\n|\Z)", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives a document's headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_recipe_has_its_equations() -> None:
    headings = re.findall(r"^## +(.+)$", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not RECIPES.keys() - set(headings)


def links() -> list[tuple[Path, str]]:
    """Every document with each of its links that stays inside the repository."""
    found = [(document, link) for document in DOCUMENTS for link in re.findall(r"\]\(([^)\s]+)\)", prose(document))]
    return [(document, link) for document, link in found if not link.startswith(("https://", "http://"))]


def test_links_lead_somewhere() -> None:
    linked = links()
    assert {ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "docs/methods.md"} <= {
        document for document, _ in linked
    }
    for document, link in linked:
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name} links to {link}, which is not there"
        assert target.is_relative_to(ROOT), f"{document.name} links to {link}, which is outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{document.name} links to {link}, but no heading has that name"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_formulas_between_dollars_are_not_changed_by_markdown(document: Path) -> None:
    """Markdown takes the backslash of `\\,` and `\\{` before a formula in a line is set; blocks of math keep it."""
    formulas = re.findall(r"\$([^$\n]+)\$", prose(document))
    assert [formula for formula in formulas if re.search(r"\\[^A-Za-z]", formula)] == []
