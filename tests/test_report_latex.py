"""The tables for LaTeX compile as they are, with booktabs and nothing else, whatever they say.

Skipped where pdflatex or booktabs is not installed.
"""

from __future__ import annotations

import shutil
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from finetrial import report
from summary_example import example_summary


def has_latex() -> bool:
    if not shutil.which("pdflatex") or not shutil.which("kpsewhich"):
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode == 0


needs_latex = pytest.mark.skipif(not has_latex(), reason="no pdflatex with booktabs")


def compiled(body: str, folder: Path) -> tuple[int, str]:
    """pdflatex's exit code and log for a document of that body."""
    (folder / "all.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + body + "\n\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
    log = (folder / "all.log").read_text(encoding="utf-8", errors="replace")
    return done.returncode, log


def assert_compiles(body: str, folder: Path) -> None:
    code, log = compiled(body, folder)
    assert code == 0, log[-2000:]
    assert (folder / "all.pdf").stat().st_size > 1000
    assert "Missing character" not in log


def tables(sources: Sequence[Path]) -> str:
    return "\n".join(f"\\noindent\\input{{{path.as_posix()}}}\\par" for path in sources)


@needs_latex
def test_every_table_of_a_report_compiles(tmp_path: Path) -> None:
    report.write(example_summary(), tmp_path)
    sources = sorted((tmp_path / "report" / "tables").glob("*.tex"))
    assert len(sources) == 15
    assert_compiles(tables(sources), tmp_path)


@needs_latex
def test_tables_whose_words_are_markup_compile(tmp_path: Path) -> None:
    summary = example_summary()
    said = '[x] *a* | 50 % of \\foo_bar{} & #1 $ ^ ~ " < > -- ‖Δ₀‖ é λ → 中'
    claim = summary.claims[0].model_copy(update={"task": said, "claim": said, "reason": said})
    report.write(summary.model_copy(update={"claims": (claim,)}), tmp_path)
    assert_compiles(tables([tmp_path / "report" / "tables" / "verdicts.tex"]), tmp_path)


@needs_latex
def test_every_character_compiles_alone_and_at_a_row_s_begin(tmp_path: Path) -> None:
    characters = [*string.printable.strip(), *report.LATEX_SPECIAL, "é", "中", "\u200b"]
    rows = "\n".join(f"{report.escape_latex(c)} & {report.escape_latex(c * 3)} \\\\" for c in characters)
    assert_compiles("\\begin{tabular}{ll}\n" + rows.replace("\\\\", "\\\\\n", 1) + "\n\\end{tabular}", tmp_path)


@needs_latex
def test_what_does_not_compile_would_be_found(tmp_path: Path) -> None:
    code, log = compiled("\\begin{tabular}{l} a_b \\\\ \\end{tabular}", tmp_path)
    assert code != 0
    assert "Missing $" in log


@given(some.text())
def test_any_text_becomes_one_line_of_ascii(text: str) -> None:
    escaped = report.escape_latex(text)
    assert escaped.isascii()
    assert len(escaped.splitlines()) <= 1
