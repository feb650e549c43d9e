"""A headless Chromium for tests of the report's page: what it shows, prints, says to its console, and answers.

Not a driver: it loads pages from disk and ends. A question is JavaScript that runs in a copy of the page, in a
frame as wide as wanted, without the page's content security policy, which would refuse it.
"""

from __future__ import annotations

import html as markup
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("FINETRIAL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium: install it or set FINETRIAL_CHROMIUM")

POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Each frame tells its answer to the page around it, which shows all of them as JSON once they are complete.
FRAMES = """<!doctype html><meta charset="utf-8"><title>frames</title><pre id="told"></pre>
<script>const answers = {{}};
addEventListener("message", (event) => {{
  answers[event.data[0]] = event.data[1];
  if (Object.keys(answers).length === {count}) told.textContent = JSON.stringify(answers);
}});</script>{frames}"""
FRAME = '<iframe src="{number}.html" style="width:{width}px;height:900px;border:0"></iframe>'
ASK = """<script>addEventListener("load", async () => {{
  const answer = await (async () => {{ {question} }})();
  parent.postMessage([{number}, answer], "*");
}});</script></body>"""


def run(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium with a profile of its own, until the page has loaded and its timers have run."""
    assert BROWSER
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000",
        "--window-size=1400,1000", f"--user-data-dir={profile}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


def browse(page: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """The page's DOM after loading, and what the browser wrote to its console."""
    done = run(page, profile, "--dump-dom", *options)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def ask(
    html: str,
    question: str,
    folder: Path,
    *,
    widths: Sequence[int] = (1280,),
    scripts: str = "",
    dark: bool = False,
) -> list[Any]:
    """What the question's `return` gives in the page, once per width; `scripts` come before it in the page."""
    folder.mkdir(parents=True, exist_ok=True)
    opened, policies = POLICY.subn("", html)
    assert policies == 1
    frames = ""
    for number, width in enumerate(widths):
        asked = ASK.format(number=number, question=question)
        told = opened.replace("</body>", scripts + asked)
        (folder / f"{number}.html").write_text(told, encoding="utf-8")
        frames += FRAME.format(number=number, width=width)
    around = folder / "frames.html"
    around.write_text(FRAMES.format(count=len(widths), frames=frames), encoding="utf-8")
    dom, console = browse(
        around, folder / "profile", f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    )
    found = re.search(r'<pre id="told">(.+?)</pre>', dom, flags=re.DOTALL)
    assert found, f"no answer; the console says {console}"
    answers = json.loads(markup.unescape(found[1]))
    return [answers[str(number)] for number in range(len(widths))]
