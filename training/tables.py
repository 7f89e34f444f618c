"""The report's tables, from a summary's entries.

Measures and averages nothing, but for the differences of before and after.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import ConfigError
from training.intervals import Bootstrap, Interval
from training.plots import setting_label
from training.rendering import Section, Table

Summary = Mapping[str, Any]
Entry = Mapping[str, Any]

ANSWERS_NOTE = (
    "Percent, with 95 % bootstrap intervals over questions. Survival: answers that repeat every number, date and name "
    "of a gold answer that stands in a passage."
)
JUDGES_NOTE = "Percent: 1 correct, 0.5 partly, 0 wrong. Verdicts that could not be read are not in the mean."
AGAINST_NOTE = (
    "Percent of what text mode reaches on the same questions (paired bootstrap). Survival here counts only questions "
    "that text mode gets right."
)
COST_NOTE = (
    "Means. Seconds are those of a batch divided by its questions; GFLOP (two a multiply-and-add, counted, not "
    "estimated) and memory are of single answers to some of the questions. Where a prompt has its passages in order "
    "of relevance, text mode pays for the compressor too, which puts them in order."
)
RANKING_NOTE = (
    "Percent. Equal scores count as ranked worst first. Where negatives were mined with BM25, they are the ones that "
    "BM25 itself gets wrong, which weighs against it."
)
NO_ANSWER_NOTE = (
    "AUC, percent: best score of each question against its best score without its gold passages, both of as many "
    "passages (best of): as many irrelevant ones, drawn at random, make way as there are gold ones, so 50 is chance. "
    "Threshold and calibration are fitted on half of the questions; accuracy and error are of the other half."
)


def table_sections(summary: Summary) -> list[Section]:
    """A section for each table, empty ones too."""
    settings = summary["settings"]
    return [
        Section("Run", _run(summary["run"])),
        Section("Answers", answers_table(settings), ANSWERS_NOTE),
        Section("Judges", _judges(settings), JUDGES_NOTE),
        Section("Against text", _against_text(settings), AGAINST_NOTE),
        Section("Cost of an answer", _costs(settings), COST_NOTE),
        Section("Ranking", _ranking(summary["ranking"]), RANKING_NOTE),
        Section("No answer", _no_answer(summary["no_answer"]), NO_ANSWER_NOTE),
    ]


def _run(run: Mapping[str, Any]) -> Table:
    flat = {key: value for key, value in run.items() if not isinstance(value, Mapping)}
    for mapping in (value for value in run.values() if isinstance(value, Mapping)):
        flat |= mapping
    cells = {key: len(value) if isinstance(value, list) else value for key, value in flat.items()}
    return Table(("what", "value"), [(key.replace("_", " "), str(cell)) for key, cell in cells.items()])


def answers_table(settings: Sequence[Entry]) -> Table:
    """The comparison of all settings."""
    names = ("em", "f1", "substring", "rouge_l", "survival")
    header = ("setting", "questions", "EM", "token F1", "substring", "ROUGE-L", "survival")
    rows = [(entry["name"], str(entry["questions"]), *(_percent(entry[name]) for name in names)) for entry in settings]
    return Table(header, rows)


def _judges(settings: Sequence[Entry]) -> Table:
    rows = [
        (entry["name"], judge, str(verdicts["read"]), str(verdicts["unreadable"]), _percent(verdicts["score"]))
        for entry in settings
        for judge, verdicts in entry.get("judges", {}).items()
    ]
    return Table(("setting", "judge", "verdicts", "unreadable", "score"), rows)


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
    header = ("ranker", "passages", "best of", "AUC", "threshold", "balanced accuracy", "calibration error")
    rows = []
    for entry in entries:
        fitted = entry["calibration"] or {}
        names = ("threshold", "balanced_accuracy", "calibration_error")
        numbers = (f"{fitted[name]:.3f}" if fitted else "" for name in names)
        head = (entry["ranker"], str(entry["passages"]), f"{entry['best_of']:.1f}")
        rows.append((*head, _percent(entry["auc"]), *numbers))
    return Table(header, rows)


def before_after(before: Summary, after: Summary) -> Section:
    """Token F1 of the settings both have, on the questions both have.

    Raises ConfigError where they share none, or were measured on other data.
    """
    if before["run"].get("data_sha256") != after["run"].get("data_sha256"):
        names = (before["run"].get("data"), after["run"].get("data"))
        raise ConfigError(
            "before: was measured on other data ({}, not {}); evaluate both on the same file".format(*names)
        )
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
