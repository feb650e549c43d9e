"""The page in a real browser: no console error, no request, no overflow, sorting, titles, accessibility.

Skipped where no Chromium is installed. A check that cannot fail is no check, so each is also shown a page
that breaks its rule.
"""

from __future__ import annotations

import html as markup
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from browser import ask, browse, needs_browser
from finetrial import report
from summary_example import example_summary

pytestmark = needs_browser

MEASURE = """
  const page = document.documentElement;
  const past = (e) => e.getBoundingClientRect().right > page.clientWidth + 1;
  const wide = [...document.querySelectorAll("body *")].filter((e) => past(e) && !e.closest(
    ".scroll, .hidden, .skip, svg"));
  return {width: page.clientWidth, content: page.scrollWidth, outside: wide.length,
    resources: performance.getEntriesByType("resource").length};"""


def measure(html: str, width: int, folder: Path) -> dict[str, int]:
    """The page in a frame that wide: its width, its content's, elements that stick out, resources loaded."""
    return ask(html, MEASURE, folder, widths=[width])[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(example_summary(), tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def html(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_it_opens_without_console_errors_and_its_script_runs(page: Path, tmp_path: Path) -> None:
    dom, console = browse(page, tmp_path)
    assert "What each method costs" in dom
    assert '<button type="button">Training time</button>' in dom
    assert console == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("</body>", '<img src="https://example.invalid/pixel.png" alt=""></body>'),
        ('"use strict";', '"use strict"; '),  # not the script that the page allows
    ],
)
def test_anything_else_would_be_refused_and_seen(html: str, tmp_path: Path, old: str, new: str) -> None:
    broken = tmp_path / "broken.html"
    assert old in html
    broken.write_text(html.replace(old, new), encoding="utf-8")
    dom, console = browse(broken, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)
    assert ("<button" in dom) == (old == "</body>")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_nothing_is_requested(html: str, tmp_path: Path, width: int) -> None:
    found = measure(html, width, tmp_path)
    assert abs(found["width"] - width) <= 20  # less a scroll bar
    assert found["content"] <= found["width"]
    assert found["outside"] == 0
    assert found["resources"] == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_an_overflow_would_be_found(html: str, tmp_path: Path, width: int) -> None:
    wide = '<div style="width:2000px">wide</div></body>'
    found = measure(html.replace("</body>", wide), width, tmp_path)
    assert found["content"] > found["width"]
    assert found["outside"] == 1


def test_long_names_do_not_push_the_page_wide_on_a_phone(tmp_path: Path) -> None:
    summary = example_summary()
    name = "an-organisation-with-a-long-name/" + "a-model-with-a-very-long-name" * 4
    claim = summary.claims[0].model_copy(update={"reason": "x" * 120, "claim": "y" * 90})
    changed = {"model": name, "study": "s" * 64, "claims": (claim, *summary.claims[1:])}
    page = report.write(summary.model_copy(update=changed), tmp_path / "home")
    found = measure(page.read_text(encoding="utf-8"), 390, tmp_path / "probe")
    assert found["content"] <= found["width"]
    assert found["outside"] == 0


def test_with_scripts_off_it_is_all_there_and_has_nothing_to_press(html: str, tmp_path: Path) -> None:
    """In a frame that is not allowed scripts, looked into from outside."""
    around = tmp_path / "around.html"
    frame = (
        f'<iframe id="frame" sandbox="allow-same-origin" width="1280" srcdoc="{markup.escape(html)}"></iframe>'
    )
    around.write_text(f"""<!doctype html><meta charset="utf-8"><pre id="told"></pre>{frame}
      <script>frame.onload = () => {{
        const page = frame.contentDocument;
        told.textContent = [page.querySelectorAll("button").length, page.querySelectorAll("table").length,
          page.querySelector("main").innerText.includes("Training time"),
          page.documentElement.scrollWidth <= page.documentElement.clientWidth].join(" ");
      }};</script>""")
    dom, _ = browse(around, tmp_path / "profile")
    tables = len(re.findall(r"<table\b", html))
    assert f'<pre id="told">0 {tables} true true</pre>' in dom


# ---- sorting ------------------------------------------------------------------------------------------------

SORT = """
  const table = [...document.querySelectorAll("table")].find((t) => t.caption.textContent === "TABLE");
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.textContent === "COLUMN");
  const told = [];
  for (let press = 0; press < 4; press++) {
    const cells = [...table.tBodies[0].rows].map((row) => row.cells[column].textContent.trim());
    told.push([heads.map((head) => head.getAttribute("aria-sort")).join(""), cells]);
    heads[column].querySelector("button").click();
  }
  return told;"""


def pressed(html: str, folder: Path, table: str, column: str) -> list[tuple[str, list[str]]]:
    """A column's cells at first and after one, two and three presses, with what is said of the order."""
    question = SORT.replace("TABLE", table).replace("COLUMN", column)
    return [(order, cells) for order, cells in ask(html, question, folder)[0]]


def test_numbers_sort_up_then_down_then_as_they_were(html: str, tmp_path: Path) -> None:
    first, up, down, again = pressed(html, tmp_path, "Verdicts", "Difference (95 % interval)")
    numbers = [
        "−44\u00a0% (−49 to −40)", "−2.5 points (−3.5 to −1.4)", "−1.3 points (−1.6 to −1.1)",
        "−0.8 points (−1.2 to −0.4)", "+13\u00a0% (+9 to +18)",
    ]  # fmt: skip
    assert first[0] == again[0] == ""  # the state is said on the column that is sorted, and on no other
    assert first[1] == again[1] != numbers
    assert up == ("ascending", numbers)
    assert down == ("descending", numbers[::-1])


def test_units_count_and_equal_rows_keep_their_order(html: str, tmp_path: Path) -> None:
    _, up, down, _ = pressed(html, tmp_path, "What each method costs", "Peak memory")
    assert up[1] == ["710 MB (0.57×)"] * 2 + ["1.24 GB (reference)"] * 2
    assert down[1] == up[1][::-1]
    _, up, down, _ = pressed(html, tmp_path / "text", "What each method costs", "Method")
    assert up[1] == ["full", "full", "lora", "lora"]
    assert down[1] == up[1][::-1]


def test_missing_values_come_last_both_ways(html: str, tmp_path: Path) -> None:
    _, up, down, _ = pressed(html, tmp_path, "Every trial on squad_v2", "f1, validation")
    missing = ["– (no score)"] * 2
    assert up[1][-2:] == down[1][-2:] == missing
    scores = [float(cell) for cell in up[1][:-2]]
    assert scores == sorted(scores)
    assert [float(cell) for cell in down[1][:-2]] == scores[::-1]


# ---- titles of dots ------------------------------------------------------------------------------------------

# What a pointer would be shown at the middle of every dot, and beside it, each with the dot's own title.
HOVER = """
  const titleAt = (x, y) => {
    for (let e = document.elementFromPoint(x, y); e; e = e.parentElement) {
      const title = e.querySelector(":scope > title");
      if (title) return title.textContent;
    }
    return "";
  };
  return [...document.querySelectorAll(".chart g:has(> title)")].map((dot) => {
    dot.scrollIntoView({block: "center"});
    const box = dot.querySelector("use").getBoundingClientRect();
    const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
    return [dot.querySelector("title").textContent, titleAt(x, y), titleAt(x, y + box.height / 2 + 3)];
  });"""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_pointer_on_a_dot_or_beside_it_is_shown_a_run(html: str, tmp_path: Path, width: int) -> None:
    found = ask(html, HOVER, tmp_path, widths=[width])[0]
    assert len(found) == 2 * (18 + 9) + 9
    run = re.compile(
        r"(trial|replicate)\.\w+\.\w+\.\d{3}-[0-9a-f]{8}: learning_rate .+; (accuracy|f1|diverged|out)"
    )
    assert all(run.match(own) for own, _, _ in found)
    covered = [own for own, at, _ in found if at != own]
    assert len(covered) <= 2, covered  # by another dot
    assert all(run.match(beside) for _, _, beside in found)


# ---- accessibility -------------------------------------------------------------------------------------------

CHECK = """
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  const found = await axe.run(document, {resultTypes: ["violations", "passes"]});
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return {dark, passes: found.passes.length, violations: found.violations.map((each) =>
    [each.id, each.impact, each.nodes.length, each.nodes[0].html.slice(0, 200)])};"""


def accessibility(
    html: str, folder: Path, *, dark: bool = False, widths: tuple[int, ...] = (1280, 390)
) -> list[Any]:
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    return ask(html, CHECK, folder, widths=widths, scripts=f"<script>{axe}</script>", dark=dark)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_on_a_desktop_and_on_a_phone(html: str, tmp_path: Path, dark: bool) -> None:
    for found in accessibility(html, tmp_path, dark=dark):
        assert found["dark"] == dark
        assert found["violations"] == []
        assert found["passes"] > 20


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_would_find_what_is_hard_to_read_or_has_no_name(html: str, tmp_path: Path, dark: bool) -> None:
    faint = ".note { color: #bbb; } @media (prefers-color-scheme: dark) { .note { color: #333; } } </style>"
    broken = html.replace("</style>", faint).replace("</body>", "<button></button></body>")
    (found,) = accessibility(broken, tmp_path, dark=dark, widths=(1280,))
    assert {(name, impact) for name, impact, *_ in found["violations"]} >= {
        ("color-contrast", "serious"), ("button-name", "critical"),
    }  # fmt: skip
