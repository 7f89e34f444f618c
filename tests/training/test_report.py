"""Reports from summaries made by hand: tables, plots, before and after, the trainer's curves."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from core.errors import ConfigError
from training.__main__ import main
from training.intervals import Bootstrap
from training.plots import plot_passages, plot_rates, plot_stages, plot_training, to_svg
from training.rendering import Section, Table, render_html, render_markdown, render_table
from training.report import read_metrics, settings_table, write_report
from training.results import AnswerRecord, CostRecord, JudgementRecord, RankingRecord, Record, Setting
from training.summary import summarise
from training.tables import before_after

SETTINGS = [
    setting
    for passages in (1, 5)
    for setting in (
        Setting("text", None, passages),
        Setting("hybrid", 8, passages),
        Setting("compressed", 4, passages),
        Setting("compressed", 8, passages),
    )
]
METRICS = [
    {"step": 10, "split": "train", "loss": 5.0, "loss_answer": 4.0, "pointer": 0.1},
    {"step": 20, "split": "train", "loss": 9.0},
    {"step": 20, "split": "dev", "loss_answer": 3.0, "f1_text": 0.4, "f1_compressed": 0.3, "gold_first": 0.5},
    {"step": 20, "split": "train", "loss": 4.0},  # done again after a kill: this one counts
]


def make_records(f1: float, questions: int = 4) -> list[Record]:
    """Every setting answers every question equally well; the gold passage is ranked first in all but one."""
    records: list[Record] = []
    for number in range(questions):
        for setting in SETTINGS:
            answer = f"<b>answer|{number}</b>"
            values = (f1, f1, f1, f1, 1.0)
            seconds = {"compress": 0.1, "prefill": 0.2, "decode": 0.3}
            records.append(AnswerRecord(f"q{number}", setting, answer, *values, 100, 5, seconds))
        scores = [2.0, 1.0, 1.0] if number else [0.0, 1.0, 1.0]
        records.append(RankingRecord(f"q{number}", "compressor x8", 3, [True, False, False], scores))
    records += [CostRecord("q0", setting, {"compress": 10**9, "prefill": 2 * 10**9}, 5 * 10**8) for setting in SETTINGS]
    return records


def make_summary(f1: float, checkpoint: str = "one") -> dict[str, Any]:
    run = {"checkpoint": checkpoint, "data": "<dev>", "environment": {"threads": 2}}
    return summarise(run, make_records(f1), Bootstrap(resamples=20))


def test_report_holds_every_table_and_plot(tmp_path: Path) -> None:
    paths = write_report(make_summary(0.5), tmp_path, before=make_summary(0.4, "zero"), metrics=METRICS)
    assert sorted(path.name for path in paths) == ["report.html", "report.md", "result.json"]
    text = (tmp_path / "report.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        *("Run", "Before and after", "Answers", "Against text", "Cost of an answer", "Ranking", "No answer"),
        *("Accuracy against rate", "Accuracy against number of passages", "Time by stage", "Operations by stage"),
        "Training",
    ]
    assert "| compressed x8, 5 passages | 4         | 50.0 [50.0, 50.0] |" in text
    assert "| compressor x8 | 3        | 4         |" in text
    assert "+10.0 [+10.0, +10.0]" in text
    assert re.search(r"compressed x8, 5 passages +\| 100\.0 +\| 5\.0 +\| 0\.600 ", text)
    assert re.search(r"\| 3\.0 +\| 500 ", text)  # GFLOP and MB
    for link in re.findall(r"\]\((plots/.*?)\)", text):
        assert (tmp_path / link).read_text().rstrip().endswith("</svg>")
    assert json.loads((tmp_path / "result.json").read_text()) == make_summary(0.5)


def test_html_stands_alone_and_escapes_what_it_shows(tmp_path: Path) -> None:
    write_report(make_summary(0.5), tmp_path, metrics=METRICS)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;dev&gt;" in page
    assert "<dev>" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5
    for source in sources:
        prefix, data = source.split(",")
        assert prefix == "data:image/svg+xml;base64"
        assert base64.b64decode(data).startswith(b"<?xml")


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(make_summary(0.5), tmp_path / name, metrics=METRICS)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 3 + 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_ranking_and_no_answer_figures_by_hand() -> None:
    summary = make_summary(0.5)
    (ranking,), (no_answer,) = summary["ranking"], summary["no_answer"]
    assert ranking["gold_first"]["value"] == 3 / 4
    assert ranking["mrr"]["value"] == pytest.approx((3 + 1 / 3) / 4)
    # the best of two, with gold: 1, 2, 2, 2; without: 1, 1, 1, 1. The one 1 ties with all four.
    assert no_answer["best_of"] == 2
    assert no_answer["auc"]["value"] == pytest.approx((3 * 4 + 4 / 2) / 16)


def test_the_judges_table_counts_what_could_not_be_read(tmp_path: Path) -> None:
    records = make_records(0.5)
    scores = zip(("q0", "q1", "q2", "q3"), (1.0, 0.5, None, 0.0), strict=True)
    records += [JudgementRecord(name, SETTINGS[0], score, "a-judge") for name, score in scores]
    write_report(summarise({}, records, Bootstrap(resamples=20)), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"\| text, 1 passage \| a-judge \| 3 +\| 1 +\| 50\.0 \[", text)


def test_before_and_after_must_be_of_the_same_data() -> None:
    before, after = make_summary(0.5), make_summary(0.5)
    before["run"]["data_sha256"], after["run"]["data_sha256"] = "a", "b"
    with pytest.raises(ConfigError, match="measured on other data"):
        before_after(before, after)


def test_no_answer_figures_of_another_measure_are_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    summary = make_summary(0.5)
    del summary["no_answer"][0]["best_of"]
    (tmp_path / "result.json").write_text(json.dumps(summary))
    arguments = ["report", "--result", str(tmp_path / "result.json"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "## No answer" not in (tmp_path / "out" / "report.md").read_text()
    assert "repeat its `evaluate`" in caplog.text


def test_before_after_pairs_questions(tmp_path: Path) -> None:
    before, after = make_summary(0.5), make_summary(0.5)
    for entry in after["settings"]:
        entry["f1_by_question"] = {"q0": 1.0, "q9": 0.0}  # one question in common
    table = before_after(before, after).table
    assert table is not None
    assert table.rows[0] == ("text, 1 passage", "1", "50.0", "100.0", "+50.0 [+50.0, +50.0]")
    after["settings"][0]["f1_by_question"] = {}
    assert len((before_after(before, after).table or Table(())).rows) == len(SETTINGS) - 1
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for entry in after["settings"]:
        entry["f1_by_question"] = {"other": 1.0}
    for path, summary in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(summary))
    out = str(tmp_path / "out")
    assert main(["report", "--before", str(paths[0]), "--result", str(paths[1]), "--out", out]) == 1


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, result, out = tmp_path / "metrics.jsonl", tmp_path / "result.json", tmp_path / "out"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in METRICS) + '{"step": 30, "spl')
    result.write_text(json.dumps(make_summary(0.5)))
    assert main(["report", "--metrics", str(metrics), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["plots", "report.html", "report.md"]
    assert main(["report", "--result", str(result), "--before", str(result), "--out", str(out)]) == 0
    assert "Before and after" in (out / "report.md").read_text()
    for bad in (["--before", str(result)], [], ["--result", str(metrics)], ["--metrics", str(result)]):
        assert main(["report", *bad, "--out", str(out)]) == 1
        assert capsys.readouterr().err.startswith("error: ")


def test_metrics_that_a_kill_cut_short_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train", "loss": 2.0}\n{"step": 2, "sp{"step": 2, "split": "train"}\n[1]\n')
    assert read_metrics(path) == [{"step": 1, "split": "train", "loss": 2.0}]


def test_plots_show_what_they_are_given() -> None:
    settings = make_summary(0.5)["settings"]
    losses, scores = plot_training(METRICS).axes
    lines = {
        str(line.get_label()): np.asarray(line.get_ydata()).tolist()
        for axes in (losses, scores)
        for line in axes.get_lines()
    }
    assert lines["loss, train"] == [5.0, 4.0]
    assert lines["f1_compressed, dev"] == [30.0]
    assert set(lines) == {
        *("loss, train", "loss_answer, train", "loss_answer, dev", "pointer, train"),
        *("f1_text, dev", "f1_compressed, dev", "gold_first, dev"),
    }
    rates = plot_rates([entry for entry in settings if entry["passages"] == 5]).axes[0]
    assert [tick.get_text() for tick in rates.get_xticklabels()] == ["x4", "x8"]
    assert rates.get_legend_handles_labels()[1] == ["text", "compressed", "hybrid"]
    passages = plot_passages(settings).axes[0]
    assert passages.get_legend_handles_labels()[1] == ["text", "hybrid x8", "compressed x4", "compressed x8"]
    assert list(passages.get_xticks()) == [1, 5]
    stages = plot_stages(settings, "seconds", "s", 1.0).axes[0]
    bars = [patch for patch in stages.patches if isinstance(patch, Rectangle)]
    assert len(bars) == 3 * len(settings)
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(0.6)


def test_a_run_of_text_alone_has_a_report(tmp_path: Path) -> None:
    text = [
        record for record in make_records(0.5) if isinstance(record, AnswerRecord) and record.setting.mode == "text"
    ]
    summary = summarise({"checkpoint": "one"}, text, Bootstrap(resamples=20))
    write_report(summary, tmp_path)
    assert "Accuracy against rate" not in (tmp_path / "report.md").read_text()
    assert settings_table(summary).count("\n") == 3


@given(st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_any_cells_give_a_well_formed_table(rows: list[tuple[str, str]]) -> None:
    lines = render_table(Table(("a", "b"), rows)).split("\n")
    assert len(lines) == 2 + len(rows)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)
    page = render_html([Section("A title", Table(("a", "b"), rows))])
    assert page.count("<td>") == 2 * len(rows)
    assert "## A title" in render_markdown([Section("A title", Table(("a", "b"), rows))])


def test_svg_has_no_time_stamp() -> None:
    assert "dc:date" not in to_svg(plot_training(METRICS))
