"""`report`: what was measured, for people: one Markdown file and one HTML file that needs nothing beside it.

Both are written from the same sections. Measures and averages nothing, but for the differences of before and after.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from training.arguments import check_file, check_out_folder
from training.intervals import Bootstrap, Interval
from training.plots import plot_passages, plot_rates, plot_stages, plot_tokens, plot_training, setting_label, to_svg
from training.rendering import Section, Table, render_html, render_markdown, render_table

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  # again from the numbers of an evaluation
  python -m training report --result evaluations/demo/result.json --out reports/demo
  # with the curves of the training run and against an earlier evaluation
  python -m training report --result evaluations/best/result.json --metrics runs/best/metrics.jsonl \\
      --before evaluations/first/result.json --out reports/best
"""
Summary = Mapping[str, Any]
Entry = Mapping[str, Any]

ANSWERS_NOTE = (
    "Percent, with 95 % bootstrap intervals over questions. Survival: answers that repeat every number, date and name "
    "of a gold answer that stands in a passage."
)
AGAINST_NOTE = (
    "Percent of what text mode reaches on the same questions (paired bootstrap). Survival here counts only questions "
    "that text mode gets right."
)
COST_NOTE = (
    "Means. Seconds are those of a batch divided by its questions; GFLOP (two a multiply-and-add, counted, not "
    "estimated) and memory are of single answers to some of the questions."
)
RANKING_NOTE = (
    "Percent. Equal scores count as ranked worst first. Where negatives were mined with BM25, they are the ones that "
    "BM25 itself gets wrong, which weighs against it."
)
NO_ANSWER_NOTE = (
    "AUC, percent: best score of each question against its best score with only its irrelevant passages. Threshold and "
    "calibration are fitted on half of the questions; accuracy and error are of the other half."
)


def write_report(
    summary: Summary | None, folder: Path, *, before: Summary | None = None, metrics: Sequence[Entry] = ()
) -> list[Path]:
    """Write result.json, report.md, report.html and plots/*.svg to `folder`; the paths of the first three.

    `metrics` are the trainer's lines. Raises ConfigError where `before` was measured on other questions.
    """
    sections = _training_sections(metrics)
    if summary is not None:
        sections = [*_result_sections(summary), *sections]
        if before is not None:
            sections.insert(1, before_after(before, summary))
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for section in sections:
        if section.svg:
            (plots / f"{section.slug}.svg").write_text(section.svg, encoding="utf-8")
    files = {"report.md": render_markdown(sections), "report.html": render_html(sections)}
    if summary is not None:
        files["result.json"] = json.dumps(summary, indent=2) + "\n"
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def settings_table(summary: Summary) -> str:
    """The comparison of all settings as a Markdown table."""
    return render_table(_answers(summary["settings"]))


def _result_sections(summary: Summary) -> list[Section]:
    settings = summary["settings"]
    first = [entry for entry in settings if entry["passages"] == _main_passages(settings)]
    sections = [
        Section("Run", _run_table(summary["run"])),
        Section("Answers", _answers(settings), ANSWERS_NOTE),
        Section("Against text", _against_text(settings), AGAINST_NOTE),
        Section("Cost of an answer", _costs(settings), COST_NOTE),
        Section("Ranking", _ranking(summary["ranking"]), RANKING_NOTE),
        Section("No answer", _no_answer(summary["no_answer"]), NO_ANSWER_NOTE),
    ]
    if any(entry["rate"] for entry in settings):
        sections.append(Section("Accuracy against rate", note=_at(first), svg=to_svg(plot_rates(first))))
    if len({entry["prompt_tokens"] for entry in first}) > 1:
        sections.append(
            Section("Accuracy against prompt tokens", note=_tokens_note(first), svg=to_svg(plot_tokens(first)))
        )
    if len({entry["passages"] for entry in settings}) > 1:
        sections.append(Section("Accuracy against number of passages", svg=to_svg(plot_passages(settings))))
    if settings:
        seconds = plot_stages(settings, "seconds", "seconds an answer", 1.0)
        sections.append(Section("Time by stage", svg=to_svg(seconds)))
    if any(entry["flops"] for entry in settings):
        flops = plot_stages(settings, "flops", "GFLOP an answer", 1e9)
        sections.append(Section("Operations by stage", svg=to_svg(flops)))
    return [section for section in sections if section.svg or (section.table and section.table.rows)]


def _main_passages(settings: Sequence[Entry]) -> int:
    """The number of passages with the most settings, the highest of equals."""
    counts = [int(entry["passages"]) for entry in settings]
    return max(counts, key=lambda count: (counts.count(count), count), default=0)


def _at(settings: Sequence[Entry]) -> str:
    return f"At {settings[0]['passages']} passages." if settings else ""


def _tokens_note(settings: Sequence[Entry]) -> str:
    """What the marks mean, where budgets were run."""
    budgets = any(entry.get("budget") for entry in settings)
    adaptive = " Under a budget, relevance decides what is dropped, compressed or shown as text." if budgets else ""
    return f"{_at(settings)} Template and question count.{adaptive}"


def _training_sections(metrics: Sequence[Entry]) -> list[Section]:
    return [Section("Training", svg=to_svg(plot_training(metrics)))] if metrics else []


def _run_table(run: Mapping[str, Any]) -> Table:
    flat = {key: value for key, value in run.items() if not isinstance(value, Mapping)}
    for mapping in (value for value in run.values() if isinstance(value, Mapping)):
        flat |= mapping
    return Table(("what", "value"), [(key.replace("_", " "), str(value)) for key, value in flat.items()])


def _answers(settings: Sequence[Entry]) -> Table:
    names = ("em", "f1", "substring", "rouge_l", "survival", "judge")
    header = ("setting", "questions", "EM", "token F1", "substring", "ROUGE-L", "survival", "judge")
    rows = [(entry["name"], str(entry["questions"]), *(_percent(entry[name]) for name in names)) for entry in settings]
    return Table(header, rows)


def _against_text(settings: Sequence[Entry]) -> Table:
    header = ("setting", "F1 kept", "EM kept", "substring kept", "survival where text is right", "prompt tokens kept")
    rows = []
    for entry in settings:
        kept = entry["retention"]
        values = (kept["f1"], kept["em"], kept["substring"], entry["survival_where_text_right"])
        if any(value is not None for value in values):
            rows.append((entry["name"], *map(_percent, values), _percent(entry["prompt_tokens_share"])))
    return Table(header, rows)


def _costs(settings: Sequence[Entry]) -> Table:
    header = (
        "setting",
        "prompt tokens",
        "new tokens",
        "seconds",
        "compress",
        "prefill",
        "decode",
        "GFLOP",
        "peak memory, MB",
    )
    rows = []
    for entry in settings:
        seconds, flops, peak = entry["seconds"], entry["flops"], entry["peak_memory"]
        rows.append(
            (
                entry["name"],
                f"{entry['prompt_tokens']:.1f}",
                f"{entry['completion_tokens']:.1f}",
                f"{sum(seconds.values()):.3f}",
                *(f"{seconds.get(stage, 0.0):.3f}" for stage in ("compress", "prefill", "decode")),
                f"{sum(flops.values()) / 1e9:.1f}" if flops else "",
                f"{peak / 1e6:.0f}" if peak else "",
            )
        )
    return Table(header, rows)


def _ranking(entries: Sequence[Entry]) -> Table:
    rows = [
        (
            *(str(entry[name]) for name in ("ranker", "passages", "questions")),
            *(_percent(entry[name]) for name in ("ndcg@10", "mrr", "gold_first")),
        )
        for entry in entries
    ]
    return Table(("ranker", "passages", "questions", "nDCG@10", "MRR", "gold first"), rows)


def _no_answer(entries: Sequence[Entry]) -> Table:
    header = ("ranker", "passages", "AUC", "threshold", "balanced accuracy", "calibration error")
    rows = []
    for entry in entries:
        fitted = entry["calibration"] or {}
        names = ("threshold", "balanced_accuracy", "calibration_error")
        numbers = (f"{fitted[name]:.3f}" if fitted else "" for name in names)
        rows.append((entry["ranker"], str(entry["passages"]), _percent(entry["auc"]), *numbers))
    return Table(header, rows)


def before_after(before: Summary, after: Summary) -> Section:
    """Token F1 of the settings both have, on the questions both have. Raises ConfigError where they share none."""
    earlier = {_setting_key(entry): entry for entry in before["settings"]}
    rows = []
    for entry in after["settings"]:
        old = earlier.get(_setting_key(entry))
        common = sorted(entry["f1_by_question"].keys() & old["f1_by_question"].keys()) if old else []
        if old and common:
            late = [entry["f1_by_question"][name] for name in common]
            early = [old["f1_by_question"][name] for name in common]
            cells = (sum(early) / len(common), sum(late) / len(common))
            change = _signed(Bootstrap().difference(late, early))
            rows.append((entry["name"], str(len(common)), *(f"{100 * value:.1f}" for value in cells), change))
    if not rows:
        raise ConfigError("before and after share no setting with the same questions")
    note = f"Token F1, %: {before['run'].get('checkpoint')} before, {after['run'].get('checkpoint')} after."
    return Section("Before and after", Table(("setting", "questions", "before", "after", "change"), rows), note)


def _setting_key(entry: Entry) -> tuple[str, int]:
    return setting_label(entry), entry["passages"]


def _percent(interval: Entry | None) -> str:
    """`55.3 [53.0, 57.6]`, or nothing where it was not measured."""
    if interval is None:
        return ""
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _signed(interval: Interval) -> str:
    return f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--result", type=Path, help="result.json of an evaluation")
    parser.add_argument("--before", type=Path, help="result.json of an earlier one on the same questions, to compare")
    parser.add_argument("--metrics", type=Path, help="the trainer's metrics.jsonl, for loss curves")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")


def run(args: argparse.Namespace) -> None:
    """Write the report. Raises ConfigError."""
    if args.result is None and (args.metrics is None or args.before is not None):
        raise ConfigError("give --result, --metrics or both; --before needs --result")
    for option, path in (("--result", args.result), ("--before", args.before), ("--metrics", args.metrics)):
        if path is not None:
            check_file(path, option)
    check_out_folder(args.out, "--out")
    summary = None if args.result is None else read_summary(args.result)
    before = None if args.before is None else read_summary(args.before)
    metrics = [] if args.metrics is None else read_metrics(args.metrics)
    for path in write_report(summary, args.out, before=before, metrics=metrics):
        log.info("wrote %s", path)


def read_summary(path: Path) -> dict[str, Any]:
    """A result.json. Raises ConfigError where it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        values = None
    kinds = {"run": dict, "settings": list, "ranking": list, "no_answer": list}
    if not isinstance(values, dict) or not all(isinstance(values.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError(f"{path}: not the result.json of an evaluation")
    return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a trainer's metrics file; lines that a kill cut short are left out. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    parsed = [values for line in lines if line and (values := _parse_metrics(line))]
    if not parsed:
        raise ConfigError(f"{path}: holds no metrics of a training run")
    return parsed


def _parse_metrics(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(values, dict) and isinstance(values.get("step"), int) and "split" in values
    return values if fits else None
