"""The page: it says what the rows say, escapes what came from outside, stands alone, and computes nothing twice."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.conftest import run
from tests.report.conftest import UNFRIENDLY

from resq.cases import ROW, Row
from resq.errors import InputError
from resq.measure.diagnose.snr import Snr
from resq.ptq.recipes import recipe_named
from resq.report.report import SWEEP, Written, report
from resq.report.signal import snr_by_layer


def rows(directory: Path) -> list[Row]:
    return [ROW.validate_json(line) for line in (directory / "rows.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """State: the tags of a page, with the text of each heading and caption."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def values(self, *names: str) -> list[str]:
        return [str(value) for _, each in self.tags for key, value in each.items() if key in names]


def test_the_page_begins_with_what_the_rows_say(written: Written) -> None:
    base, *others = rows(written.html.parent)
    assert base.perplexity is not None
    four = [row for row in others if row.bits == 4]
    best = min(four, key=lambda row: row.perplexity or 0)
    assert best.delta is not None
    assert f"With a low band of 4 bit, {best.recipe} loses least of the 2 recipes" in written.verdict
    assert f"{best.delta.mean:+.4f}".replace("-", "−") in written.verdict
    assert "bootstrap over 12 windows" in written.verdict
    for text in (written.html.read_text(), written.markdown.read_text()):
        assert all(f"{row.perplexity:.3f}" in text for row in (base, *others))
        assert text.index(f"{best.delta.mean:+.4f}".replace("-", "−")) < text.index(f"{base.perplexity:.3f}")


def test_every_diagnostic_is_there_and_nothing_else_is_written(written: Written) -> None:
    figures = {str(each["id"]).removeprefix("figure-") for each in Page(written.html.read_text()).all("figure")}
    places = ("attn-in", "o-in", "mlp-in", "down-in", "key", "value")
    assert {f"snr-{place}" for place in places} <= figures
    assert {"loss", "size", "positions", "bases", "spectrum", "massive", "histogram-key"} <= figures
    assert {"attribution-0", "layers-0", "attribution-1", "layers-1"} <= figures
    assert "ranks" not in figures
    assert "No ranks were swept" in written.markdown.read_text()
    new = {path.name for path in written.html.parent.iterdir()} - {"compare.json", "rows.jsonl", "cases", ".lock"}
    assert new == {"report.html", "report.md", "diagnostics"}


def test_what_came_from_outside_is_shown_and_never_run(written: Written) -> None:
    html, markdown = written.html.read_text(), written.markdown.read_text()
    assert json.loads((written.html.parent / "compare.json").read_text())["source"]["name"].endswith(UNFRIENDLY)
    assert "<img" not in html
    assert "&lt;img src=x onerror=alert(1)&gt; $a_b$ |*_`" in html
    assert not re.search(r"(?<!\\)<", markdown)
    assert r"\<img src=x onerror=alert(1)\> \$a\_b\$ \|\*\_\`" in markdown
    assert not Page(html).all("script")


def test_the_page_stands_alone(written: Written) -> None:
    html, page = written.html.read_text(), Page(written.html.read_text())
    named = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("href", "src", "xlink:href")
    ]
    assert all(value is not None and value.startswith(("#", "data:")) for value in named)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert len(html.encode()) < 3_000_000


def test_the_page_can_be_read_without_eyes(written: Written) -> None:
    page = Page(written.html.read_text())
    assert page.all("html")[0]["lang"] == "en"
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert len(page.all("svg")) == len(page.all("figure")) == len(page.all("figcaption")) > 15
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table")) == len(page.all("figure")) + 1
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = {
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "xlink:href")
    }
    targets |= {f"#{value}" for _, each in page.tags for key, value in each.items() if key == "aria-labelledby"}
    assert {value[1:] for value in targets if value and value.startswith("#")} <= set(ids)


def test_figures_take_their_colours_from_the_page(written: Written) -> None:
    html = written.html.read_text()
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert not [color for drawing in drawings for color in re.findall(r"(?<=[: \"])#[0-9a-f]{6}\b", drawing)]
    assert all("var(--series-0)" in drawing or "var(--series-1)" in drawing for drawing in drawings)


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_have_contrast_in_both_schemes(written: Written) -> None:
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", written.html.read_text(), re.DOTALL)
    ]
    assert len(schemes) == 2
    for colors in schemes:
        for ground in ("paper", "panel"):
            # WCAG 2: 4.5 for text, 3 for what a figure needs.
            assert min(contrast(colors[text], colors[ground]) for text in ("ink", "soft", "link")) >= 4.5
            series = [value for name, value in colors.items() if name.startswith("series-")]
            assert len(series) == 8
            assert min(contrast(value, colors[ground]) for value in series) >= 3


def test_diagnostics_are_computed_once(reported: Path) -> None:
    phases: list[str] = []

    def told(phase: str, done: int, total: int) -> None:
        phases.append(phase)

    first = report(reported).html.read_text()
    report(reported, progress=told)
    assert set(phases) == {"drawing"}
    assert (reported / "report.html").read_text() == first
    file = reported / "diagnostics" / "snr.json"
    kept = json.loads(file.read_text())
    file.write_text(file.read_text()[:-40])  # half of a file is no file
    report(reported, progress=told)
    assert json.loads(file.read_text()) == kept
    assert "measuring SNR" in phases


def test_what_cannot_be_measured_any_more_says_why(copy: Path) -> None:
    plan = json.loads((copy / "compare.json").read_text())
    plan["plan"]["calibration"] = [str(copy / "gone")]
    (copy / "compare.json").write_text(json.dumps(plan))
    shutil.rmtree(copy / "cases" / "rtn-4bit" / "checkpoint")
    shutil.rmtree(copy / "cases" / "resq-4bit" / "checkpoint")
    html = report(copy).html.read_text()
    assert f"no text at {copy / 'gone'}" in html
    assert "No packed checkpoint was kept" in html
    figures = {str(each["id"]) for each in Page(html).all("figure")}
    assert {"figure-loss", "figure-positions", "figure-massive"} <= figures  # those need no calibration
    assert "figure-bases" not in figures


def test_another_source_is_not_taken_for_the_one_compared(copy: Path) -> None:
    plan = json.loads((copy / "compare.json").read_text())
    plan["plan"]["source"] = "tiny"
    (copy / "compare.json").write_text(json.dumps(plan))
    assert "tiny is not what was compared" in report(copy).html.read_text()


def test_the_sweep_that_the_page_asks_for_can_be_run() -> None:
    recipes = [recipe_named(name) for name in SWEEP]
    assert [recipe.name for recipe in recipes] == list(SWEEP)
    assert len({recipe.precision for recipe in recipes}) == len(SWEEP)


def test_ranks_are_drawn_where_they_were_swept(reported: Path) -> None:
    found = rows(reported)
    swept = []
    for row in found:
        if row.recipe == "resq":
            recipe = json.loads(json.dumps(row.key["recipe"]).replace("1/8", "1/4"))
            swept.append(
                ROW.dump_python(
                    ROW.validate_python(
                        {**ROW.dump_python(row), "recipe": "resq-rank-1-4", "key": {**row.key, "recipe": recipe}}
                    ),
                    mode="json",
                )
            )
    with open(reported / "rows.jsonl", "a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in swept)
    html = report(reported).html.read_text()
    assert "figure-ranks" in html
    assert re.search(r"from 12\.5% of the coordinates in 8 bit to 25\.0% takes perplexity from [\d.]+ to [\d.]+", html)


def test_lines_that_would_cover_each_other_are_drawn_once() -> None:
    rows = [
        Snr(name, layer, "key", db + layer)
        for name, db in [("a" * 20, 20.0), ("b" * 20, 20.05), ("c" * 20, 20.08), ("far", 25.0)]
        for layer in range(3)
    ]
    figure = snr_by_layer(rows, "key", "4 bit")
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", figure.svg)
    assert f"{'a' * 20} and 2 more" in labels
    assert "far" in labels
    assert figure.finding == f"far has the highest mean, 26.0 dB; {'a' * 20} the lowest, 21.0 dB."
    assert [row[0] for row in figure.table.rows] == ["a" * 20, "b" * 20, "c" * 20, "far"]


def test_long_names_are_cut_in_drawings_and_whole_in_tables() -> None:
    name = "a-recipe-of-my-own-with-a-name-that-goes-on-and-on-and-does-not-end-soon"
    figure = snr_by_layer([Snr(name, layer, "key", 20.0) for layer in range(3)], "key", "4 bit")
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", figure.svg)
    (label,) = [label for label in labels if label.startswith("a-recipe")]
    assert len(label) < 50
    assert label.endswith("…")
    assert figure.table.rows[0][0] == name


def test_the_command_writes_both_files_and_opens_nothing_unasked(
    reported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    out = reported / "elsewhere.html"
    done = run("report", reported, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["html"] == str(out)
    assert out.is_file()
    assert out.with_suffix(".md").is_file()
    assert not opened
    assert run("report", reported, "--out", out, "--open").returncode == 0
    assert opened == [out.resolve().as_uri()]


def test_what_is_no_comparison_is_refused(copy: Path, tmp_path: Path) -> None:
    done = run("report", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "no compare.json; give a directory that resq compare wrote" in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(InputError, match=r"no \.html file"):
        report(copy, copy / "page.txt")
    lines = (copy / "rows.jsonl").read_text().splitlines()
    (copy / "rows.jsonl").write_text("\n".join([*lines, lines[-1].replace('"case": "', '"case": "../../')]) + "\n")
    with pytest.raises(InputError, match="no name of a folder"):
        report(copy)
    (copy / "rows.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(InputError, match="no finished case beside 16 bit"):
        report(copy)
    (copy / "compare.json").write_text('{"plan": {}}')
    with pytest.raises(InputError, match="not written by this resq's compare"):
        report(copy)
