"""The report: a summary written as one HTML page, Markdown, LaTeX tables and figure files.

Computes nothing: numbers come from `analysis/summary.json` (`analyse.py`), their wording from
`report_text.py`, tables from `report_tables.py`, `report_measures.py`, `report_effects.py` and
`report_checks.py`, figures from `report_figures.py`. This file escapes, fills the templates and writes the
files, each of them atomically.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetrial import files, palette
from finetrial import report_checks as checks
from finetrial import report_effects as effects
from finetrial import report_measures as measures
from finetrial import report_tables as tables
from finetrial import report_text as text
from finetrial.report_sorting import sort_key
from finetrial.report_tables import Badge, Table
from finetrial.summary import Summary, TaskSummary

WRITTEN = (".csv", ".pdf", ".png", ".svg", ".tex")
# What a table cell may not hold raw, by format.
MARKDOWN_SPECIAL = re.compile(r"([\\`*|\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",  # a dash in LaTeX's first fonts
    "[": "{[}",  # at a row's begin it would be an option of the line break
    "]": "{]}",
    "*": "{*}",
    "−": "$-$",
    "×": r"$\times$",
    "–": "--",
    "∓": r"$\mp$",
    "‖": r"$\Vert$",
    "Δ": r"$\Delta$",
    "₀": r"$_0$",
    "“": "``",
    "”": "''",
    "✓": "",
    "✗": "",
    "…": r"\ldots{}",
    "\u00a0": "~",
    **{power: f"$^{digit}$" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}


def write(summary: Summary, home: Path) -> Path:
    """Write `home/report/`: index.html, report.md, tables/*.tex, figures/*.{svg,pdf,png,csv}.

    Gives the path of index.html, which is written last: if it is there, the rest is.
    """
    from finetrial import (  # matplotlib takes most of a second; the terminal's rows need none
        plots,
        report_figures,
    )

    folder = home / "report"
    charts: dict[str | None, list[dict[str, Any]]] = {}
    for group, found in report_figures.charts(summary).items():
        charts[group] = []
        for chart in found:
            svg = plots.save(chart.figure, chart.rows, folder / "figures", chart.name)
            charts[group].append({"chart": chart, "svg": Markup(inline_svg(svg, chart.name))})
    _drop_others(folder / "figures", [each["chart"].name for group in charts.values() for each in group])
    view = _view(summary, charts)
    shown = [
        view["verdicts"],
        view["cost"],
        *view["beside"],
        *view["ledger"],
        *(table for item in view["tasks"] for table in (item["scores"], *item["measures"])),
    ]
    named = {report_figures.file_name(table.key): table for table in shown}
    for name, table in named.items():
        latex = _latex().get_template("table.tex.j2").render(table=table)
        files.write_text(folder / "tables" / f"{name}.tex", latex)
    _drop_others(folder / "tables", named)
    files.write_text(folder / "report.md", _markdown().get_template("report.md.j2").render(view))
    index = folder / "index.html"
    page = _html().get_template("index.html.j2")
    files.write_text(index, page.render(view, sort_key=sort_key, **_script()))
    return index


def _drop_others(folder: Path, names: Collection[str]) -> None:
    """Delete what an earlier report has written into a folder and this one does not have."""
    for path in sorted(folder.glob("*")):
        if path.suffix in WRITTEN and path.stem not in names and path.is_file():
            path.unlink()


def _script() -> dict[str, Markup]:
    """The page's script and its hash: the page lets this one run and no other (CSP, `script-src`)."""
    source, _, _ = _loader().get_source(_html(), "page.js")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return {"script": Markup(source), "script_hash": Markup(f"sha256-{digest}")}


def verdict_rows(summary: Summary) -> list[tuple[str, str, str, str, str]]:
    """For the terminal, in ASCII: task, claim, difference (95 % interval), seeds, verdict."""
    return [
        (
            claim.task,
            claim.claim,
            text.plain(text.difference(claim, text.claim_decimals(summary, claim))).replace(" to ", " .. "),
            text.seeds(claim),
            text.short_verdict(claim),
        )
        for claim in summary.claims
    ]


def cost_rows(summary: Summary) -> list[tuple[str, ...]]:
    """For the terminal, in ASCII: the column titles, then one row per arm; nothing if there are no arms."""
    table = tables.costs(summary)
    titles = tuple(column.title.lower() for column in table.columns)
    return [titles, *(tuple(text.plain(str(cell)) for cell in row) for row in table.rows)] if table.rows else []


def _view(summary: Summary, charts: dict[str | None, list[dict[str, Any]]]) -> dict[str, Any]:
    """Everything that the page and the Markdown show, in the order in which they show it."""
    first = charts[None][0] if charts[None] else next((group[0] for group in charts.values() if group), None)
    return {
        "summary": summary,
        "paragraph": text.paragraph(summary),
        "verdicts": tables.verdicts(summary),
        "cost": tables.costs(summary),
        "first": first,
        "tasks": [
            {
                "task": task,
                "rows": _rows(summary, task),
                "scores": tables.scores(summary, task),
                "charts": [drawn for drawn in charts[task.name] if drawn is not first],
                "search": tables.optima(summary, task),
                "search_rows": _search_rows(summary, task.name),
                "measures": [
                    table
                    for table in (
                        measures.drift(summary, task),
                        measures.forgetting(summary, task),
                        measures.spectrum(summary, task),
                        measures.own(summary, task),
                    )
                    if table.rows
                ],
                "details": [
                    measures.drift_layers(summary, task),
                    measures.spectrum_matrices(summary, task),
                    tables.trials(summary, task),
                    tables.replicates(summary, task),
                ],
            }
            for task in summary.tasks
        ],
        "claims": checks.claim_details(summary),
        "beside": [table for table in effects.tables_of(summary) if table.rows],
        "ledger": [checks.ledger(summary, task.name) for task in summary.tasks],
        "failures": checks.failures(summary),
        "controls": checks.controls(summary),
        "environment": checks.environment(summary),
        "citation": citation(summary),
    }


def _rows(summary: Summary, task: TaskSummary) -> str:
    """How many rows each split has, and on how many of train's replicates are trained."""
    there, most = text.mapping_text(task.split_rows), task.split_rows.get("train", 0)
    used = {min(row.train_rows or most, most) for row in summary.ledger if row.task == task.name}
    if used <= {most}:
        return there
    return f"{there} (replicates are trained on {' or '.join(f'{count:,}' for count in sorted(used))})"


def _search_rows(summary: Summary, task: str) -> str:
    """How many rows and trials each method searched with, in words."""
    parts = [
        f"{arm.method}: {text.counted(len(arm.search.trials), 'trial')}, "
        + ("all training rows" if arm.search.rows is None else f"{arm.search.rows:,} training rows each")
        for arm in text.arms_of(summary, task)
    ]
    return "; ".join(parts)


def citation(summary: Summary) -> str:
    """How to cite the study: plain text that names everything needed to find it again."""
    revision = f", {summary.model_gguf_file}" if summary.model_gguf_file else ""
    revision += f", revision {summary.model_revision}" if summary.model_revision else ""
    return (
        f"{summary.study}: a fine-tuning study of {summary.model}{revision}. finetrial "
        f"{summary.meta.finetrial_version}, study hash {summary.study_hash}, {summary.meta.created_at[:10]}."
    )


# ---- escaping, once per format ---------------------------------------------------------------------------


def escape_markdown(value: object) -> str:
    """Text for GitHub's Markdown, in a table cell or a paragraph: no markup, no HTML, one line."""
    if isinstance(value, Markup):
        return str(value)
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKDOWN_SPECIAL.sub(r"\\\1", line)


def escape_latex(value: object) -> str:
    """Text for any LaTeX engine, one line of ASCII; letters that it may have no form for are told by number.

    A badge is its word alone: reasons are too long for a printed cell.
    """
    if isinstance(value, Markup):
        return str(value)
    line = " ".join((value.word if isinstance(value, Badge) else str(value)).split())
    return "".join(LATEX_SPECIAL.get(c, c if c.isascii() else f"{{[}}U+{ord(c):04X}{{]}}") for c in line)


def _loader() -> PackageLoader:
    return PackageLoader("finetrial", "templates")


def _html() -> Environment:
    environment = Environment(
        loader=_loader(), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["slug"] = _slug
    environment.tests["badge"] = lambda value: isinstance(value, Badge)
    return environment


def _escaped_by(escape: Callable[[object], str], **delimiters: Any) -> Environment:
    """An environment whose every output goes through `escape`: HTML's own escaping would be wrong there."""
    return Environment(
        loader=_loader(),
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        **delimiters,
    )


def _markdown() -> Environment:
    return _escaped_by(escape_markdown)


def _latex() -> Environment:
    environment = _escaped_by(
        escape_latex,
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    environment.filters["alignment"] = _alignment
    return environment


def _alignment(table: Table) -> Markup:
    return Markup("".join("r" if column.numeric else "l" for column in table.columns))


def _slug(name: object) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", str(name)).strip("-").lower() or "item"


def inline_svg(svg: str, name: str) -> str:
    """A figure's SVG for the page: no addresses, ids only where needed, in the page's size and colours."""
    svg = svg[svg.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r"<style[^>]*>.*?</style>"):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    svg = f'{head} aria-hidden="true" focusable="false">{body}'
    prefix = _slug(name)
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    ids = re.compile(r' id="([^"]*)"')
    svg = ids.sub(lambda found: f' id="{prefix}-{found[1]}"' if found[1] in wanted else "", svg)
    svg = re.sub(r'\b(?:xlink:)?href="#', f'href="#{prefix}-', svg).replace("url(#", f"url(#{prefix}-")
    shades = {
        palette.INK: "--ink",
        palette.MUTED: "--muted",
        palette.GRID: "--line",
        palette.PAPER: "--card",
        palette.BLUE: "--blue",
    }
    for shade, variable in shades.items():
        svg = svg.replace(f": {shade}", f": var({variable})")
    return re.sub(r"\n\s*", "\n", svg)
