"""Figures: the same rows give the same bytes, the CSV behind them is safe, and no meaning rests on colour."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from finetrial import palette, plots, report_figures, report_tables
from finetrial.plots.claims import claims_figure
from finetrial.tidy_csv import csv_text
from summary_example import example_summary

METHODS = ["full", "lora"]
SVG = "{http://www.w3.org/2000/svg}"


def search_rows() -> list[dict]:
    common = {
        "method": "full",
        "low": 1e-5,
        "high": 1e-3,
        "startup": False,
        "share": 1.0,
        "optimum": False,
        "outcome": "done",
    }
    return [
        common | {"trial": 0, "learning_rate": 1e-4, "score": 70.0, "startup": True},
        common | {"trial": 1, "learning_rate": 2e-4, "score": 80.0, "optimum": True},
        common | {"trial": 2, "learning_rate": 9e-4, "score": None, "outcome": "diverged"},
    ]


def figures() -> dict[str, report_figures.Chart]:
    groups = report_figures.charts(example_summary())
    return {chart.name: chart for group in groups.values() for chart in group}


def test_the_study_has_its_claims_and_each_task_its_figures_and_none_without_rows() -> None:
    kinds = ("cost", "drift", "scores", "search", "spectrum", "tuning")
    expected = ["claims", *(f"{t}.{k}" for t in ("squad_v2", "sst2") for k in kinds), "sst2.forgetting"]
    assert sorted(figures()) == sorted(expected)


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        chart = figures()["squad_v2.search"]
        plots.save(chart.figure, chart.rows, tmp_path / folder, chart.name)
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert sorted(first) == [f"squad_v2.search.{kind}" for kind in ("csv", "pdf", "png", "svg")]
    assert first == second


def test_files_carry_no_date(tmp_path: Path) -> None:
    plots.save(plots.search_figure(search_rows(), metric="f1", methods=METHODS), search_rows(), tmp_path, "s")
    assert b"CreationDate" not in (tmp_path / "s.pdf").read_bytes()
    assert "<dc:date>" not in (tmp_path / "s.svg").read_text()


def test_a_users_own_style_changes_nothing_and_stays_as_it_was(tmp_path: Path) -> None:
    def drawn(folder: Path) -> bytes:
        plots.save(plots.search_figure(search_rows(), metric="f1", methods=METHODS), [], folder, "s")
        return (folder / "s.svg").read_bytes()

    plain = drawn(tmp_path / "plain")
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.hashsalt": "mine"}):
        assert drawn(tmp_path / "styled") == plain
        assert mpl.rcParams["axes.facecolor"] == "red"


def test_png_has_300_dots_per_inch(tmp_path: Path) -> None:
    plots.save(plots.search_figure(search_rows(), metric="f1", methods=METHODS), [], tmp_path, "s")
    data = (tmp_path / "s.png").read_bytes()
    width = int.from_bytes(data[16:20])  # the IHDR chunk of a PNG begins with the width
    assert width == pytest.approx(palette.WIDTH_INCHES * 300, abs=1)


def test_pyplot_and_its_global_state_are_never_loaded() -> None:
    code = "import sys, finetrial.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_colour_never_carries_a_method_alone() -> None:
    many = [f"m{i}" for i in range(5)]
    looks = [palette.look_of(many, method) for method in many]
    for part in ("color", "marker", "linestyle"):
        assert len({str(look[part]) for look in looks}) == 5, part
    shapes = {marker for _, marker, _ in palette.VERDICT_LOOK.values()}
    assert len(shapes) == 4


def marks(figure: Figure, marker: str) -> list[tuple[float, float]]:
    lines = figure.axes[0].get_lines()
    return [
        (float(x), float(y))
        for one in lines
        if one.get_marker() == marker
        for x, y in zip(*one.get_data(), strict=True)
    ]


def test_a_diverged_trial_is_a_cross_at_the_bottom_and_never_a_score_of_zero() -> None:
    figure = plots.search_figure(search_rows(), metric="f1", methods=METHODS)
    assert marks(figure, "x") == [(9e-4, 0.05)]  # 5 % up the axis, not on its scale
    assert figure.axes[0].get_ylim()[0] > 60  # a zero would have stretched the axis down to it


def test_start_up_trials_are_hollow_guided_ones_filled_and_the_optimum_ringed() -> None:
    lines = plots.search_figure(search_rows(), metric="f1", methods=METHODS).axes[0].get_lines()
    by_score = {
        float(one.get_ydata()[0]): one for one in lines if one.get_markersize() == 6 and one.get_marker() == "o"
    }
    assert by_score[70.0].get_markerfacecolor() == "none"
    assert by_score[80.0].get_markerfacecolor() == palette.BLUE
    rings = [one for one in lines if one.get_markersize() == 13]
    assert [float(ring.get_ydata()[0]) for ring in rings] == [80.0]


def test_a_tuning_curve_is_a_line_with_its_band_and_a_wide_band_does_not_flatten_it() -> None:
    common = {"method": "full", "low": 0.0, "high": None}
    rows = [
        common | {"trials": 1, "expected": 60.0},
        common | {"trials": 2, "expected": 64.0, "low": 59.0},
        common | {"trials": 3, "expected": 66.0},
    ]
    axes = plots.tuning_figure(rows, metric="f1", methods=METHODS).axes[0]
    (line,) = [one for one in axes.get_lines() if one.get_label() == "full"]
    assert list(line.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == [60.0, 64.0, 66.0]
    assert len(axes.collections) == 1
    low, high = axes.get_ylim()
    assert (low, high) == pytest.approx((51.0, 75.0), abs=1.0)  # a span and a half on either side, not 0 to 100


def test_a_tuning_curve_needs_three_random_trials_and_says_which_counted() -> None:
    chart = figures()["squad_v2.tuning"]
    assert "full n = 3 of 9, 1 without a score; lora n = 3 of 9, 1 without a score" in chart.caption
    assert [row["trials"] for row in chart.rows] == [1, 2, 3, 1, 2, 3]
    summary = example_summary()
    few = [
        arm.search.model_copy(
            update={
                "curve": arm.search.curve.model_copy(
                    update={
                        key: getattr(arm.search.curve, key)[:2]
                        for key in ("run_ids", "expected", "low", "high")
                    }
                )
            }
        )
        for arm in summary.arms
        if arm.search.curve
    ]
    arms = tuple(
        arm.model_copy(update={"search": search}) for arm, search in zip(summary.arms, few, strict=True)
    )
    changed = summary.model_copy(update={"arms": arms})
    assert not [
        c.name for group in report_figures.charts(changed).values() for c in group if "tuning" in c.name
    ]
    assert report_tables.optima(changed, changed.tasks[0]).note.endswith(
        "A tuning curve needs 3 trials drawn at random; full has 2 and lora has 2."
    )


def test_it_is_said_where_a_failed_trial_keeps_a_tuning_curve_away() -> None:
    summary = example_summary()
    arms = tuple(
        arm.model_copy(update={"search": arm.search.model_copy(update={"curve": None})}) for arm in summary.arms
    )
    note = report_tables.optima(summary.model_copy(update={"arms": arms}), summary.tasks[0]).note
    assert "lora has one that failed, which no score can stand for." in note


def test_every_replicate_is_a_dot_and_a_failed_one_is_counted_under_its_method() -> None:
    chart = figures()["squad_v2.scores"]
    axes = chart.figure.axes[0]
    dots = [line for line in axes.get_lines() if line.get_markersize() == 5 and line.get_marker() in ("o", "s")]
    assert len(dots) == 9  # five and four: one replicate of `full` is void
    assert [label.get_text() for label in axes.get_xticklabels()] == ["full\n4 of 5 seeds", "lora\n5 seeds"]


def test_every_dot_of_a_run_is_titled_with_its_run_and_settings_and_has_a_larger_target(tmp_path: Path) -> None:
    charts = figures()
    for name, runs in (("sst2.search", 18), ("sst2.scores", 9), ("sst2.forgetting", 9)):
        chart = charts[name]
        svg = plots.save(chart.figure, chart.rows, tmp_path, name)
        assert (tmp_path / f"{name}.svg").read_text() == svg
        drawing = ElementTree.fromstring(svg)
        (targets,) = (group for group in drawing.iter(f"{SVG}g") if group.get("id") == "targets")
        dots = [group for group in drawing.iter(f"{SVG}g") if (group.get("id") or "").startswith("run_")]
        said = [group.findtext(f"{SVG}title") for group in dots]
        assert said == [circle.findtext(f"{SVG}title") for circle in targets]
        drawn = {row["run_id"] for row in chart.rows if row["run_id"] and (row["score"] or "search" in name)}
        assert {title.partition(": ")[0] for title in said} == drawn
        assert len(said) == len(drawn) == runs
        for dot, circle in zip(dots, targets, strict=True):
            (place,) = dot.iter(f"{SVG}use")
            assert (circle.get("cx"), circle.get("cy")) == (place.get("x"), place.get("y"))


def test_a_title_says_what_a_run_used_and_what_came_of_it(tmp_path: Path) -> None:
    charts = figures()
    said = {}
    for name in ("sst2.search", "sst2.scores", "sst2.forgetting"):
        svg = plots.save(charts[name].figure, charts[name].rows, tmp_path, name)
        said[name] = re.findall(r"<title>(.*?)</title>", svg)
    assert (
        "trial.sst2.full.001-0a1b2c3d: learning_rate 4.85e-4, epochs 2, batch_size 16; diverged, no score"
        in said["sst2.search"]
    )
    used = next(title for title in said["sst2.search"] if "sst2.full.003" in title)
    assert "epochs 9" in used  # asked for 1; 9 is what was read back
    replicate = "replicate.sst2.lora.000-4d5e6f70: learning_rate 9.57e-4, epochs 3, batch_size 16, rank 16; "
    row = next(r for r in charts["sst2.scores"].rows if r["run_id"] == "replicate.sst2.lora.000-4d5e6f70")
    assert replicate + f"accuracy {row['score']:.4g}" in said["sst2.scores"]
    assert replicate + f"accuracy {row['score']:.4g}, forgotten 1.2 points" in said["sst2.forgetting"]


def test_the_csv_has_a_column_for_every_setting_apart_from_the_others() -> None:
    trial = next(row for row in figures()["sst2.search"].rows if row["method"] == "lora" and row["trial"] == 1)
    asked = {name: value for name, value in trial.items() if name.startswith("setting.")}
    assert asked == {
        "setting.learning_rate": trial["learning_rate"], "setting.epochs": 2, "setting.batch_size": 16,
        "setting.rank": 8,
    }  # fmt: skip


def test_titles_are_text_and_not_markup(tmp_path: Path) -> None:
    rows = [row | {"run_id": "<b>\"&'", "setting.x": "</title>"} for row in search_rows()]
    svg = plots.save(plots.search_figure(rows, metric="f1", methods=METHODS), rows, tmp_path, "s")
    titles = [each.text for each in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    assert titles[0] == "<b>\"&': x </title>; f1 70"


def test_a_baseline_far_away_is_named_at_the_edge_and_does_not_flatten_the_replicates() -> None:
    near, far = (figures()[f"{task}.scores"].figure.axes[0] for task in ("squad_v2", "sst2"))
    assert near.get_ylim()[0] < 56.7  # no_answer lies close by: a line
    assert far.get_ylim()[0] > 80
    assert "↓ baseline majority: 50.9" in [text.get_text() for text in far.texts]


def test_bars_start_at_zero_and_a_wide_span_is_shown_as_dots_on_a_log_axis() -> None:
    panels = figures()["sst2.cost"].figure.axes
    assert [axes.get_xscale() for axes in panels] == ["linear", "linear", "log", "log"]
    assert [axes.get_xlim()[0] for axes in panels[:2]] == [0, 0]
    assert not any(axes.patches for axes in panels[2:])


def test_cost_that_was_not_measured_is_said_and_not_drawn() -> None:
    row = {"quantity": "peak memory", "unit": "GB", "log": False, "low": None, "high": None, "text": ""}
    rows = [row | {"method": "full", "value": 1.0, "text": "1 GB"}, row | {"method": "lora", "value": None}]
    axes = plots.cost_figure(rows, methods=METHODS).axes[0]
    assert len(axes.patches) == 1
    assert "not measured" in [text.get_text() for text in axes.texts]


def test_the_margin_lies_where_the_contrast_becomes_zero() -> None:
    # difference 0.5 and tested quantity 2.3 = difference + margin x reference: the border is at 0.5 - 2.3
    summary = example_summary()
    claim = summary.claims[2]
    difference, contrast = claim.difference, claim.contrast
    assert difference
    assert contrast
    claim = claim.model_copy(
        update={
            "difference": difference.model_copy(update={"estimate": 0.5}),
            "contrast": contrast.model_copy(update={"estimate": 2.3}),
        }
    )
    chart = report_figures.charts(summary.model_copy(update={"claims": (claim,)}))[None][0]
    assert chart.rows[0]["margin"] == pytest.approx(-1.8)
    assert chart.rows[0]["holds"] == "right"


def test_an_interval_without_bounds_reaches_from_edge_to_edge() -> None:
    summary = example_summary()
    claim = next(claim for claim in summary.claims if claim.kind == "drifts_less" and claim.difference)
    drawn = []
    for low, n in ((-60.0, 5), (None, 5), (None, 1)):
        value = claim.difference.model_copy(update={"low": low, "high": low and 10.0, "n": n})
        one = claim.model_copy(update={"difference": value})
        (row,) = report_figures.charts(summary.model_copy(update={"claims": (one,)}))[None][0].rows
        axes = claims_figure([row]).axes[0]
        arrows = sorted(str(line.get_marker()) for line in axes.lines if line.get_marker() in ("<", ">"))
        across = sum(list(line.get_xdata()) == [0, 1] and line.get_linestyle() != "-" for line in axes.lines)
        drawn.append((row["unbounded"], arrows, across))
    # of one pair there is no interval at all
    assert drawn == [(False, [], 0), (True, ["<", ">"], 1), (False, [], 0)]


def test_names_are_drawn_as_text_and_not_as_formulae(tmp_path: Path) -> None:
    rows = [row | {"method": "$x_{"} for row in search_rows()]
    plots.save(plots.search_figure(rows, metric="$y^{", methods=["$x_{"]), rows, tmp_path, "s")


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd", "'+cmd"),
        ("-cmd", "'-cmd"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\tx", "'\tx"),
        ("\rx", "'\rx"),
        ("-0.5", "-0.5"),
        ("lora", "lora"),
        (-0.5, "-0.5"),
        (1e-05, "1e-05"),
        (True, "true"),
        (None, ""),
    ],
)
def test_csv_cells_cannot_act_as_formulae(cell: object, written: str) -> None:
    read = list(csv.reader(io.StringIO(csv_text([{"first": cell, "second": "x"}]), newline="")))
    assert read == [["first", "second"], [written, "x"]]


def test_the_csv_holds_every_point_with_its_run(tmp_path: Path) -> None:
    chart = figures()["sst2.scores"]
    plots.save(chart.figure, chart.rows, tmp_path, chart.name)
    with (tmp_path / "sst2.scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    replicates = [row for row in rows if row["series"] == "replicate"]
    assert len(replicates) == 10
    assert all(re.fullmatch(r"replicate\.sst2\.\w+\.\d{3}-[0-9a-f]{8}", row["run_id"]) for row in replicates)
    assert [row["score"] for row in replicates].count("") == 1  # the diverged one: empty, not 0
