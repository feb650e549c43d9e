"""The report says what the summary says: in order, escaped, with every gap named, the same in all formats."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from finetrial import report
from finetrial import report_text as text
from finetrial.summary import Summary
from summary_example import example_summary

VOID = {"meta", "link", "br", "path", "img", "input", "hr"}


class Page(HTMLParser):
    """What a test asks of a page: its elements in order, their attributes, and the text."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.words))


def written(summary: Summary, folder: Path) -> str:
    return report.write(summary, folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    report.write(example_summary(), folder)
    return folder


@pytest.fixture(scope="module")
def html(home: Path) -> str:
    return (home / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose every free text tries to be markup."""
    summary = example_summary()
    claim = summary.claims[0].model_copy(
        update={"claim": "a | b <img src=x onerror=alert(1)>", "reason": "50 % of \\foo_bar & `x` #1 {y}"}
    )
    folder = tmp_path_factory.mktemp("hostile")
    changed = {
        "study": "<script>alert(1)</script>",
        "model": "R&D/<b>model</b>",
        "claims": (claim,),
        "fairness_notes": ("</style><script>x</script>",),
    }
    report.write(summary.model_copy(update=changed), folder)
    return folder / "report"


@pytest.mark.parametrize(
    ("used", "said"),
    [((4350, 4350), ""), ((400, None), " (replicates are trained on 400 or 4,350)"),
     ((400, 400), " (replicates are trained on 400)"), ((4350, 20_000), "")],
)  # fmt: skip
def test_the_rows_that_replicates_are_trained_on_are_said_where_they_are_fewer(
    tmp_path: Path, used: tuple[int | None, ...], said: str
) -> None:
    summary = example_summary()
    mine, others = summary.ledger[:2], summary.ledger[2:]
    ledger = [row.model_copy(update={"train_rows": rows}) for row, rows in zip(mine, used, strict=True)]
    page = written(summary.model_copy(update={"ledger": (*ledger, *others)}), tmp_path)
    assert f"Rows: train 4,350, validation 400, test 872{said}." in page


def test_it_writes_every_file_and_leaves_no_scratch_behind(home: Path) -> None:
    folder = home / "report"
    assert (folder / "report.md").exists()
    tables = sorted(path.name for path in (folder / "tables").iterdir())
    assert tables == [
        "across.tex", "at-equal-score.tex", "cost.tex", "drift.squad_v2.tex", "drift.sst2.tex", "effects.tex",
        "examples.tex", "forgetting.sst2.tex", "ledger.squad_v2.tex", "ledger.sst2.tex", "scores.squad_v2.tex",
        "scores.sst2.tex", "spectrum.squad_v2.tex", "spectrum.sst2.tex", "verdicts.tex",
    ]  # fmt: skip
    assert len(list((folder / "figures").iterdir())) == 14 * 4
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_what_an_earlier_report_had_and_this_one_has_not_goes_and_other_files_stay(tmp_path: Path) -> None:
    summary = example_summary()
    folder = report.write(summary, tmp_path).parent
    before = {path.name for path in folder.rglob("*") if path.is_file()}
    (folder / "figures" / "my-notes.txt").write_text("mine")
    fewer = {
        "tasks": summary.tasks[:1],
        "arms": tuple(a for a in summary.arms if a.task == summary.tasks[0].name),
    }
    report.write(summary.model_copy(update=fewer), tmp_path)
    after = {path.name for path in folder.rglob("*") if path.is_file()}
    gone = before - after
    assert gone
    assert all(summary.tasks[1].name in name for name in gone)
    assert "my-notes.txt" in after


def test_the_same_summary_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    report.write(example_summary(), tmp_path)
    first = {path.relative_to(home): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert first == again


def test_the_first_screen_is_title_paragraph_verdicts_cost_figure_in_that_order(html: str) -> None:
    marks = [
        "<h1>",
        'class="lead"',
        'id="verdicts"',
        'id="cost"',
        'id="figure-claims"',
        "<nav",
        'id="task-squad-v2"',
    ]
    places = [html.index(mark) for mark in marks]
    assert places == sorted(places)


def test_the_page_is_well_formed_and_its_headings_do_not_skip_a_level(html: str) -> None:
    page = Page(html)
    assert page.unbalanced == []
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_it_is_one_file_without_any_address(html: str) -> None:
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"iframe", "object", "embed", "img"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "figures/", "data:,")), (tag, name, value)
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_the_only_script_is_the_page_s_own_allowed_by_its_hash(html: str, hostile: Path) -> None:
    for source in (html, (hostile / "index.html").read_text(encoding="utf-8")):
        (script,) = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        page = Page(source)
        assert [tag for tag, _ in page.elements].count("script") == 1
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        policy = next(
            a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
        )
        assert f"default-src 'none'; script-src 'sha256-{digest}'; " in (policy or "")
        assert "button" not in {tag for tag, _ in page.elements}  # without scripts there is nothing to press


def test_cells_that_are_not_plain_numbers_say_what_they_are_sorted_by(html: str) -> None:
    cells = re.findall(r'<td[^>]*?(?: data-sort="([^"]*)")?>(.*?)</td>', html)
    keys = {re.sub("<.*?>", "", shown): key for key, shown in cells}
    assert keys["1.24 GB (reference)"] == "1240000000"
    assert keys["−2.5 points (−3.5 to −1.4)"] == "-2.5"
    assert keys["147 k (1/153)"] == "147000"
    assert keys["lora within 3% of full"] == ""  # no key: sorted by its text
    assert ' data-sort=""><span class="absent">– (no score)</span>' in html


def test_links_lead_to_something_that_is_there(html: str, home: Path) -> None:
    page = Page(html)
    ids = {attributes.get("id") for _, attributes in page.elements}
    for _, attributes in page.elements:
        link = attributes.get("href")
        if link and link.startswith("#"):
            assert link[1:] in ids
        elif link and link.startswith("figures/"):
            assert (home / "report" / link).exists()


def test_it_is_small(html: str) -> None:
    assert len(html.encode()) < 1_500_000


def test_every_figure_is_described_and_captioned_with_n(html: str) -> None:
    charts = [a for _, a in Page(html).elements if a.get("class") == "chart"]
    assert len(charts) == 14
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 30 for chart in charts)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html, flags=re.DOTALL)
    # scores and cost of each task; forgetting of one
    assert sum("95 % t-interval" in caption for caption in captions) == 5
    assert sum("or for drift by Fieller" in caption for caption in captions) == 1  # claims
    assert all("n = " in caption or "number of seeds" in caption for caption in captions)


def test_figures_follow_the_page_in_dark_and_light(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    drawings = "".join(re.findall(r'<div class="chart".*?</svg>', html, flags=re.DOTALL))
    assert "var(--ink)" in drawings
    assert "#1f2329" not in drawings  # an ink that would vanish on a dark card


@pytest.mark.parametrize("word", ["supported", "refuted", "inconclusive", "not assessable"])
def test_every_verdict_is_shown_by_icon_and_word(html: str, word: str) -> None:
    badge = re.search(rf'<span class="badge {word.replace(" ", "_")}">(.*?)</span>', html, flags=re.DOTALL)
    assert badge
    assert "<svg" in badge[1]
    assert word in badge[1]


def test_markup_in_names_is_shown_and_not_obeyed(hostile: Path) -> None:
    html = (hostile / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {tag for tag, _ in page.elements} & {"img", "b"}
    assert page.unbalanced == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "R&amp;D/&lt;b&gt;model&lt;/b&gt;" in html
    assert "<script>alert(1)</script>" in page.text


def test_markup_in_names_does_not_break_markdown(hostile: Path) -> None:
    markdown = (hostile / "report.md").read_text(encoding="utf-8")
    assert "<" not in re.sub(r"`[^`\n]*`", "", markdown.replace(r"\`", ""))  # code spans show it as it is
    assert r"a \| b &lt;img" in markdown
    assert r"\\foo_bar &amp; \`x\`" in markdown


def test_markup_in_names_does_not_break_latex(hostile: Path) -> None:
    latex = (hostile / "tables" / "verdicts.tex").read_text(encoding="utf-8")
    assert r"a \textbar{} b \textless{}img src=x" in latex
    assert report.escape_latex("50 % of \\foo_bar & #1 {y}^~$") == (
        r"50 \% of \textbackslash{}foo\_bar \& \#1 \{y\}\textasciicircum{}\textasciitilde{}\$"
    )


def test_latex_tables_are_booktabs_with_as_many_cells_as_columns(home: Path) -> None:
    for path in (home / "report" / "tables").iterdir():
        latex = path.read_text(encoding="utf-8")
        found = re.search(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", latex, flags=re.DOTALL)
        assert found
        assert all(rule in found[2] for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        rows = [line for line in found[2].splitlines() if line.endswith(r"\\")]
        assert len(rows) > 1
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(found[1])}, path.name
        assert latex.isascii(), path.name  # so that any LaTeX engine takes it


def test_markdown_tables_are_rectangular_and_the_verdicts_come_first(home: Path) -> None:
    lines = (home / "report" / "report.md").read_text(encoding="utf-8").splitlines()
    tables: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    tables = [table for table in tables if table]
    assert tables[0][0] == "| Task | Claim | Difference (95 % interval) | Seeds | Verdict |"
    for table in tables:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table}) == 1, table[0]
        assert re.fullmatch(r"[|:\- ]+", table[1])
        assert len(table) > 2


def test_markdown_and_page_say_the_same_numbers(html: str, home: Path) -> None:
    page, markdown = Page(html).text, (home / "report" / "report.md").read_text(encoding="utf-8")
    for shown in (
        "−2.5 points (−3.5 to −1.4)",
        "1.24 GB (reference)",
        "147 k (1/153)",
        "gradient norm is not finite",
    ):
        assert shown in page
        assert shown in markdown


def test_terminal_rows_are_ascii_with_known_content() -> None:
    rows = report.verdict_rows(example_summary())
    assert rows[1] == (
        "squad_v2",
        "lora drifts 20% less than full",
        "-44 % (-49 .. -40)",
        "4 of 5",
        "supported",
    )
    assert rows[2] == (
        "sst2", "lora within 3% of full", "-2.5 points (-3.5 .. -1.4)", "4 of 5",
        "inconclusive: 9 seeds for 80 % power",
    )  # fmt: skip
    assert rows[0][4].startswith("not assessable: full beats")
    costs = report.cost_rows(example_summary())
    assert costs[0] == ("task", "method", "peak memory", "training time", "trainable parameters", "saved size")
    assert costs[2][2:] == ("710 MB (0.57x)", "60 s (0.63x)", "147 k (1/153)", "612 kB (1/147)")
    assert all(cell.isascii() for row in [*rows, *costs] for cell in row)


def test_an_unfinished_study_is_called_unfinished_at_once(tmp_path: Path) -> None:
    summary = example_summary().model_copy(update={"complete": False})
    assert text.paragraph(summary).startswith("This study is not finished")
    assert "unfinished study" in Page(written(summary, tmp_path)).text


# ---- gaps and faults are shown ----------------------------------------------------------------------


def test_what_was_not_measured_is_a_dash_with_its_reason_and_never_a_zero(tmp_path: Path) -> None:
    summary = example_summary()
    bare = {
        "cost": None, "drift": None, "saved_bytes": None, "trainable_parameters": None, "test": {}, "failed": 5,
        "replicates": (),
    }  # fmt: skip
    arms = (summary.arms[0].model_copy(update=bare), *summary.arms[1:])
    claim = summary.claims[0].model_copy(
        update={
            "difference": None,
            "contrast": None,
            "contrast_bound": None,
            "p_t": None,
            "pairs": (),
            "missing": (0,),
        }
    )
    html = written(summary.model_copy(update={"arms": arms, "claims": (claim, *summary.claims[1:])}), tmp_path)
    said = Page(html).text
    for gap in ("– (not measured)", "– (no valid replicate)", "– (no pair of valid seeds)", "– (not tested)"):
        assert gap in said, gap
    row = re.search(r"squad_v2\s+full(.*?)squad_v2\s+lora", said)
    assert row
    assert not re.search(r"\b0(\.0)?\b", row[1])


@pytest.mark.parametrize("arms_left", [0, 1])
def test_a_study_that_has_hardly_begun_still_has_a_report(tmp_path: Path, arms_left: int) -> None:
    summary = example_summary()
    empty = {
        "replicates": (), "test": {}, "drift": None, "cost": None, "trainable_parameters": None,
        "saved_bytes": None,
        "search": summary.arms[0].search.model_copy(update={"trials": (), "best": None, "best_score": None}),
    }  # fmt: skip
    arms = tuple(arm.model_copy(update=empty) for arm in summary.arms[:arms_left])
    changed = {
        "arms": arms,
        "claims": (),
        "ledger": (),
        "failures": (),
        "fairness_notes": (),
        "complete": False,
    }
    said = Page(written(summary.model_copy(update=changed), tmp_path)).text
    assert "No run failed." in said
    assert "declares no claims" in said
    assert report.verdict_rows(summary.model_copy(update=changed)) == []
    if not arms_left:
        assert report.cost_rows(summary.model_copy(update=changed)) == []


def test_a_setting_that_was_not_used_as_asked_and_an_optimum_on_the_edge_are_flagged(html: str) -> None:
    said = Page(html).text
    assert re.search(r"used 9 asked 1", said)
    assert "at the high end" in said


def test_unequal_budgets_and_a_moving_control_are_flagged(tmp_path: Path) -> None:
    summary = example_summary()
    ledger = (summary.ledger[0].model_copy(update={"trials_planned": 12}), *summary.ledger[1:])
    moved = summary.tasks[0].controls[0].model_copy(update={"drift": (0.0, -0.002, 0.001)})
    task = summary.tasks[0].model_copy(update={"controls": (moved,)})
    changed = {"ledger": ledger, "tasks": (task, summary.tasks[1])}
    said = Page(written(summary.model_copy(update=changed), tmp_path)).text
    assert re.search(r"trials planned 12 9 differs", said)
    assert re.search(r"−2e-3 not zero", said)


def test_counts_of_groups_are_not_shown_as_scores(tmp_path: Path) -> None:
    summary = example_summary()
    baselines = {name: {**base, "has_ans_rows": 301.0} for name, base in summary.tasks[0].baselines.items()}
    task = summary.tasks[0].model_copy(update={"baselines": baselines})
    said = Page(written(summary.model_copy(update={"tasks": (task, summary.tasks[1])}), tmp_path)).text
    assert "Groups of the test split: has_ans_rows 301." in said
    assert "301.0" not in said


def test_effect_sizes_examples_and_all_tasks_stand_below_the_claims_in_detail(html: str) -> None:
    said = Page(html).text
    marks = ["The claims in detail", "Effect sizes", "By test example", "Across tasks", "The runs behind"]
    places = [said.rindex(mark) for mark in marks]
    assert places == sorted(places)
    for shown in (
        "4 of 5 (diverged: 1)",
        "0.600 (not bounded)",
        "– (forgetting may be 0)",
        "−0.80 (−2.10 to +0.60)",
        "– (the score is no mean over examples)",
        "22.5 / 46.5",
        "0.979 (0.972 to 0.986)",
        "nothing is inferred over tasks",
    ):
        assert shown in said, shown


def test_a_study_of_one_task_has_no_table_across_tasks_and_one_without_claims_no_effects(
    tmp_path: Path,
) -> None:
    changed = example_summary().model_copy(update={"across": (), "claims": ()})
    said = Page(written(changed, tmp_path)).text
    assert "Across tasks" not in said
    assert "Effect sizes" not in said
    assert "By test example" not in said


def test_failures_are_listed_by_kind_with_their_reason(html: str) -> None:
    said = Page(html).text
    section = said[said.index("Failures by kind") :]
    assert section.index("diverged") < section.index("out of memory") < section.index("Controls")
    assert "does not fit at micro-batch 1" in section


def test_the_citation_names_what_is_needed_to_find_the_study_again() -> None:
    assert report.citation(example_summary()) == (
        "squad-and-sst2-minilm: a fine-tuning study of sentence-transformers/all-MiniLM-L6-v2, revision "
        "c9745ed1d9f207416be6d2e6f8de32d1f16199bf. finetrial 0.1.0, study hash 3f9c21aa7be04d11, 2026-11-01."
    )
