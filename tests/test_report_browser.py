"""The page in a real browser: no console error, no request, no overflow on a desktop or on a phone.

Skipped where no Chromium is installed. A check that cannot fail is no check, so each is also shown a page
that breaks its rule.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from finetrial import report
from summary_example import example_summary

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("FINETRIAL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: install it or set FINETRIAL_CHROMIUM")

# The page under test runs in a frame of the wanted width and tells its measures to the page around it.
PROBE = """<script>addEventListener("load", () => {
  const page = document.documentElement;
  const past = (e) => e.getBoundingClientRect().right > page.clientWidth + 1;
  const wide = [...document.querySelectorAll("body *")].filter((e) => past(e) && !e.closest(
    ".scroll, .hidden, .skip, .cards thead, svg"));
  parent.postMessage([page.clientWidth, page.scrollWidth, wide.length,
    performance.getEntriesByType("resource").length].join(" "), "*");
});</script></body>"""
FRAME = """<!doctype html><title>frame</title><pre id="told">nothing</pre>
<script>addEventListener("message", (event) => {{ told.textContent = event.data; }});</script>
<iframe src="probed.html" style="width:{width}px;height:900px;border:0"></iframe>"""


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM after loading, and what the browser wrote to its console."""
    assert BROWSER
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000",
        "--window-size=1400,1000", f"--user-data-dir={profile}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measure(html: str, width: int, folder: Path) -> dict[str, int]:
    """The page in a frame that wide: its width, its content's, elements that stick out, resources loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = html.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    assert opened != html
    (folder / "probed.html").write_text(opened.replace("</body>", PROBE), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    dom, _ = browse(folder / "frame.html", folder / "profile")
    told = re.search(r'<pre id="told">(\d+) (\d+) (\d+) (\d+)</pre>', dom)
    assert told, "the page sent no measures"
    return dict(zip(("width", "content", "outside", "resources"), map(int, told.groups()), strict=True))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(example_summary(), tmp_path_factory.mktemp("home"))


def test_it_opens_without_console_errors(page: Path, tmp_path: Path) -> None:
    dom, console = browse(page, tmp_path)
    assert "What each method costs" in dom
    assert console == []


def test_anything_from_outside_would_be_refused_and_seen(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    picture = '<img src="https://example.invalid/pixel.png" alt=""></body>'
    broken.write_text(page.read_text(encoding="utf-8").replace("</body>", picture), encoding="utf-8")
    _, console = browse(broken, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_nothing_is_requested(page: Path, tmp_path: Path, width: int) -> None:
    found = measure(page.read_text(encoding="utf-8"), width, tmp_path)
    assert abs(found["width"] - width) <= 20  # less a scroll bar
    assert found["content"] <= found["width"]
    assert found["outside"] == 0
    assert found["resources"] == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_an_overflow_would_be_found(page: Path, tmp_path: Path, width: int) -> None:
    wide = '<div style="width:2000px">wide</div></body>'
    found = measure(page.read_text(encoding="utf-8").replace("</body>", wide), width, tmp_path)
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
