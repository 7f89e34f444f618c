"""`report`: what was measured, for people: one Markdown file and one HTML file that needs nothing beside it.

Both are written from the same sections. Measures and averages nothing; tables are in `tables.py`, plots in `plots.py`.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from training.arguments import check_file, check_out_folder
from training.plots import plot_passages, plot_rates, plot_stages, plot_tokens, plot_training, to_svg
from training.rendering import Section, render_html, render_markdown, render_table
from training.tables import Entry, Summary, answers_table, before_after, table_sections

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  # again from the numbers of an evaluation
  python -m training report --result evaluations/demo/result.json --out reports/demo
  # with the curves of the training run and against an earlier evaluation
  python -m training report --result evaluations/best/result.json --metrics runs/best/metrics.jsonl \\
      --before evaluations/first/result.json --out reports/best
"""


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
    return render_table(answers_table(summary["settings"]))


def _result_sections(summary: Summary) -> list[Section]:
    settings = summary["settings"]
    first = [entry for entry in settings if entry["passages"] == _main_passages(settings)]
    sections = table_sections(summary)
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
    """A result.json. Raises ConfigError where it is none.

    No-answer figures of earlier versions are left out: they took the best of unequally many passages.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        values = None
    kinds = {"run": dict, "settings": list, "ranking": list, "no_answer": list}
    if not isinstance(values, dict) or not all(isinstance(values.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError(f"{path}: not the result.json of an evaluation")
    comparable = [entry for entry in values["no_answer"] if "best_of" in entry]
    if len(comparable) < len(values["no_answer"]):
        log.warning("%s: its no-answer figures are of an earlier version and left out; repeat its `evaluate`", path)
    return values | {"no_answer": comparable}


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
