"""Records of an evaluation to its summary: averages with confidence intervals, as plain JSON values. Knows no models.

Ratios against text (retention, share of prompt tokens) are paired: both modes on the same questions.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from training.calibration import measure_no_answer
from training.intervals import Bootstrap, Interval
from training.metrics import gold_first, ndcg, reciprocal_rank
from training.results import AnswerRecord, CostRecord, JudgementRecord, RankingRecord, Record, Setting

Summary = dict[str, Any]
ByQuestion = Mapping[str, AnswerRecord]
ANSWER_METRICS = ("em", "f1", "substring", "rouge_l")


def summarise(
    run: Mapping[str, Any], records: Sequence[Record], bootstrap: Bootstrap, baseline: Sequence[Record] = ()
) -> Summary:
    """The summary of one run.

    `baseline` may hold the records of another checkpoint on the same questions; its text mode, at the same number of
    passages, is then what retention is measured against, in place of this run's own.
    """
    answers = _by_setting(record for record in records if isinstance(record, AnswerRecord))
    texts = _by_setting(record for record in baseline if isinstance(record, AnswerRecord)) or answers
    costs = _by_setting(record for record in records if isinstance(record, CostRecord))
    judgements = [record for record in records if isinstance(record, JudgementRecord)]
    settings = []
    for setting in sorted(answers, key=_display_order):
        text = texts.get(Setting("text", None, setting.passages), {})
        settings.append(
            _describe(setting)
            | _answer_quality(answers[setting], bootstrap)
            | {"judges": _judges([record for record in judgements if record.setting == setting], bootstrap)}
            | _against_text(setting, answers[setting], text, bootstrap)
            | _cost(answers[setting], costs.get(setting, {}))
        )
    rankings = [record for record in records if isinstance(record, RankingRecord)]
    return {"run": dict(run), "settings": settings, **_rankings(rankings, bootstrap)}


def _display_order(setting: Setting) -> tuple[int, int, int]:
    """Few passages first; text, hybrid, compressed, auto; low rates and small budgets first."""
    modes = ("text", "hybrid", "compressed", "auto")
    return setting.passages, modes.index(setting.mode), setting.rate or setting.budget or 0


def _by_setting(records: Any) -> dict[Setting, dict[str, Any]]:
    """{setting: {question id: record}}."""
    grouped: dict[Setting, dict[str, Any]] = defaultdict(dict)
    for record in records:
        grouped[record.setting][record.question] = record
    return dict(grouped)


def _describe(setting: Setting) -> Summary:
    return dataclasses.asdict(setting) | {"name": setting.name}


def _answer_quality(answers: ByQuestion, bootstrap: Bootstrap) -> Summary:
    """Every answer metric, and F1 by question so that two summaries can be compared pairwise."""
    rows = list(answers.values())
    survived = [record.survival for record in rows if record.survival is not None]
    return {
        "questions": len(rows),
        **{name: _plain(bootstrap.mean([getattr(record, name) for record in rows])) for name in ANSWER_METRICS},
        "survival": _plain(bootstrap.mean(survived)) if survived else None,
        "f1_by_question": {name: round(record.f1, 4) for name, record in sorted(answers.items())},
    }


def _judges(judgements: Sequence[JudgementRecord], bootstrap: Bootstrap) -> Summary:
    """By the judge's name: how many of its verdicts on a setting could be read and how many not, and their mean."""
    verdicts: dict[str, list[float | None]] = defaultdict(list)
    for record in judgements:
        verdicts[record.judge].append(record.score)
    judges = {}
    for judge, scores in sorted(verdicts.items()):
        read = [score for score in scores if score is not None]
        mean = _plain(bootstrap.mean(read)) if read else None
        judges[judge] = {"read": len(read), "unreadable": len(scores) - len(read), "score": mean}
    return judges


def _against_text(setting: Setting, answers: ByQuestion, text: ByQuestion, bootstrap: Bootstrap) -> Summary:
    """Retention of each metric, survival where text is right, share of prompt tokens; None where text is missing."""
    pairs = [(answers[name], text[name]) for name in sorted(answers.keys() & text.keys())]
    retention = {
        name: _plain(bootstrap.ratio([getattr(a, name) for a, _ in pairs], [getattr(t, name) for _, t in pairs]))
        for name in ANSWER_METRICS
    }
    kept = [a.survival for a, t in pairs if t.substring == 1 and t.survival == 1 and a.survival is not None]
    share = bootstrap.ratio([a.prompt_tokens for a, _ in pairs], [t.prompt_tokens for _, t in pairs])
    return {
        "retention": retention,
        "survival_where_text_right": _plain(bootstrap.mean(kept)) if kept else None,
        "prompt_tokens_share": _plain(share),
    }


def _cost(answers: ByQuestion, costs: Mapping[str, CostRecord]) -> Summary:
    """Means over questions: tokens, seconds by stage, operations by stage; the highest peak of memory in bytes."""
    rows, measured = list(answers.values()), list(costs.values())
    return {
        "prompt_tokens": _mean([record.prompt_tokens for record in rows]),
        "completion_tokens": _mean([record.completion_tokens for record in rows]),
        "seconds": _mean_by_stage([record.seconds for record in rows]),
        "flops": _mean_by_stage([record.flops for record in measured]),
        "flops_questions": len(measured),
        "peak_memory": max((record.peak_memory for record in measured), default=None),
    }


def _rankings(rankings: Sequence[RankingRecord], bootstrap: Bootstrap) -> Summary:
    """Ranking metrics over questions that have both gold and other passages, and no-answer detection."""
    grouped: dict[tuple[int, str], list[RankingRecord]] = defaultdict(list)
    for record in rankings:
        if any(record.gold) and not all(record.gold):
            grouped[record.passages, record.ranker].append(record)
    ranking, no_answer = [], []
    for (passages, ranker), records in sorted(grouped.items()):
        head = {"ranker": ranker, "passages": passages, "questions": len(records)}
        metrics = {"ndcg@10": ndcg, "mrr": reciprocal_rank, "gold_first": gold_first}
        ranking.append(
            head
            | {
                name: _plain(bootstrap.mean([metric(record.scores, record.gold) for record in records]))
                for name, metric in metrics.items()
            }
        )
        if not ranker.endswith(" hops"):  # over two hops no passage is scored alone, as what is measured here assumes
            measured = measure_no_answer([(record.scores, record.gold) for record in records], bootstrap)
            no_answer.append(head | dataclasses.asdict(measured))
    return {"ranking": ranking, "no_answer": no_answer}


def _plain(interval: Interval | None) -> Summary | None:
    return None if interval is None else dataclasses.asdict(interval)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_by_stage(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Stages in the order they ran; a stage that a row lacks counts as 0 there."""
    stages = dict.fromkeys(stage for row in rows for stage in row)
    return {stage: sum(row.get(stage, 0.0) for row in rows) / len(rows) for stage in stages}
