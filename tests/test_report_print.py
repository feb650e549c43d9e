"""The page on paper: Chromium prints all of it, what is folded away too, and cuts nothing off.

The PDF's text is read with a few lines of our own, which know what Chromium writes and no other PDF.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest

from browser import ask, needs_browser, run
from finetrial import report
from summary_example import example_summary

pytestmark = needs_browser
PAPER_WIDTH = 688  # in CSS pixels: A4 between margins of 14 mm


def pages_and_text(pdf: bytes) -> tuple[int, str]:
    """How many pages a PDF of Chromium's has, and its text without spaces, a line for every run of glyphs."""
    objects = {int(n): body for n, body in re.findall(rb"\n(\d+) 0 obj\n(.*?)\nendobj", pdf, flags=re.DOTALL)}

    def stream(body: bytes) -> str:
        data = body.partition(b"stream\n")[2].rpartition(b"\nendstream")[0]
        return (zlib.decompress(data) if b"/FlateDecode" in body else data).decode("latin-1")

    letters: dict[tuple[str, int], str] = {}
    for number, body in objects.items():
        if found := re.search(rb"/ToUnicode (\d+) 0 R", body):
            table = stream(objects[int(found[1])])
            for glyph, letter in re.findall(r"^<(\w+)> <(\w{4})>$", table, flags=re.MULTILINE):
                letters[f"F{number}", int(glyph, 16)] = chr(int(letter, 16))
            for first, last, letter in re.findall(r"^<(\w+)> <(\w+)> <(\w{4})>$", table, flags=re.MULTILINE):
                for step, glyph in enumerate(range(int(first, 16), int(last, 16) + 1)):
                    letters[f"F{number}", glyph] = chr(int(letter, 16) + step)
    text, font = "", ""
    for body in objects.values():
        if b"stream\n" not in body or b"/Subtype /Image" in body:
            continue
        for name, glyphs, end in re.findall(
            r"/(F\d+) [\d.]+ Tf|<(\w+)> Tj|(^ET)", stream(body), flags=re.MULTILINE
        ):
            font = name or font
            text += "\n" if end else ""
            text += "".join(letters.get((font, int(g, 16)), "?") for g in re.findall("....", glyphs))
    return len(re.findall(rb"/Type /Page\n", pdf)), re.sub("[ \u00a0]", "", text)


def printed(html: str, folder: Path) -> tuple[int, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "page.html").write_text(html, encoding="utf-8")
    pdf = folder / "page.pdf"
    run(folder / "page.html", folder / "profile", f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    return pages_and_text(pdf.read_bytes())


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report.write(example_summary(), tmp_path_factory.mktemp("home")).read_text(encoding="utf-8")


@pytest.mark.parametrize("scripts", [True, False])
def test_all_of_it_is_printed_what_is_folded_away_too(html: str, tmp_path: Path, scripts: bool) -> None:
    if not scripts:
        html = re.sub("<script>.*?</script>", "", html, flags=re.DOTALL)
    pages, text = printed(html, tmp_path)
    assert pages > 5
    assert "Whateachmethodcosts" in text
    for folded in re.findall(r"<details>(.*?)</details>", html, flags=re.DOTALL):
        for name in re.findall(r'<th scope="row">([a-z]+ trial_\d+)</th>', folded):
            assert name.replace(" ", "") in text
        for run_id in re.findall("<dd><code>(.*?)</code>", folded):
            assert run_id in text


def test_what_is_folded_away_would_be_missed(html: str, tmp_path: Path) -> None:
    bare = re.sub("<script>.*?</script>", "", html, flags=re.DOTALL).replace("details::details-content", "x")
    _, text = printed(bare, tmp_path)
    assert "Everytrialonsst2" in text
    assert "fulltrial_0" not in text


def test_a_table_that_goes_on_says_its_columns_again(html: str, tmp_path: Path) -> None:
    start = html.index(">Every trial on sst2<")
    row, body = re.search(r'<tr>\s*<th scope="row".*?</tr>', html[start:], re.DOTALL), html
    assert row
    body = html[:start] + html[start:].replace(row[0], row[0] * 120, 1)
    before, after = (printed(page, tmp_path / name) for page, name in ((html, "short"), (body, "long")))
    more = after[0] - before[0]
    assert more >= 2
    assert after[1].count("accuracy,validation") >= before[1].count("accuracy,validation") + more - 1


CUT = """
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  const page = document.documentElement;
  const past = [...document.querySelectorAll("main *")].filter(
    (e) => !e.closest("svg, .hidden") && e.getBoundingClientRect().right > page.clientWidth + 1);
  const whole = [...document.querySelectorAll("figure, tr")].map((e) => getComputedStyle(e).breakInside);
  return {past: past.map((e) => e.outerHTML.slice(0, 100)), whole: [...new Set(whole)]};"""


def on_paper(html: str) -> str:
    """The page with its style for paper on a screen as wide as paper, so that it can be measured."""
    return html.replace("@media print", "@media all").replace("@media screen", "@media not all")


@pytest.mark.parametrize(("style", "cut"), [("", False), (".scroll td { white-space: pre !important }", True)])
def test_no_table_is_cut_off_and_no_row_or_figure_split(
    html: str, tmp_path: Path, style: str, cut: bool
) -> None:
    page = on_paper(html).replace("</style>", style + "</style>")
    (found,) = ask(page, CUT, tmp_path, widths=[PAPER_WIDTH])
    assert bool(found["past"]) == cut, found["past"]
    assert found["whole"] == ["avoid"]
