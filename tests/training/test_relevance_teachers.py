"""Rerankers as teachers of relevance: alone on real tiny models, and together on scores made by hand."""

import itertools
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from core.checkpoint import load_checkpoint, save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.model import build_model
from core.passages import Passage
from core.pipeline import compress, prepare
from tests.tiny_labelling import ROWS, row
from training.__main__ import main
from training.data_format import Row, RowPassage, read_rows, write_rows
from training.data_quality import DataError
from training.journal import Journal
from training.questions import Question
from training.rankers import EmbeddingRanker
from training.relevance_teachers import (
    CompressorTeacher,
    EmbeddingTeacher,
    Ensemble,
    fit_combination,
    make_relevance_teacher,
)

PAIRS = [
    ("where does it rise", "The river rises in the Alps."),
    ("what is bread", "Bread is made of flour."),
    ("where does it rise", "Bread is made of flour. " * 40),
    ("what is bread", "The river rises in the Alps."),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(
        compressor=CompressorConfig(n_layers=1, chunk_tokens=64), generator=GeneratorConfig(base_model=str(tiny_llama))
    )
    folder = tmp_path_factory.mktemp("teacher") / "checkpoint"
    save_checkpoint(build_model(config), folder)
    return folder


def test_an_embedding_model_scores_pairs_as_it_ranks(tiny_bert: Path) -> None:
    scores = EmbeddingTeacher(str(tiny_bert)).scores(PAIRS)
    ranker = EmbeddingRanker(str(tiny_bert))
    for query, indices in ((PAIRS[0][0], (0, 2)), (PAIRS[1][0], (1, 3))):
        passages = tuple(Passage(PAIRS[index][1]) for index in indices)
        (record,) = ranker.rank(Question("q", query, ("x",), passages, (True, False)), [2])
        assert [scores[index] for index in indices] == pytest.approx(record.scores, abs=1e-6)


def test_an_embedding_model_is_where_it_is_asked_for(tiny_bert: Path) -> None:
    teacher = make_relevance_teacher(f"dense:{tiny_bert}", "meta")  # a device without memory, so without scores
    with pytest.raises(RuntimeError, match="meta tensor"):
        teacher.scores(PAIRS)


def test_a_checkpoint_scores_pairs_as_it_compresses(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    alone = [
        compress(model, [prepare(model, query, [Passage(text)])])[0][0].score  # chunks of a long one: the best of them
        for query, text in PAIRS
    ]
    assert CompressorTeacher(checkpoint).scores(PAIRS) == pytest.approx(alone, abs=1e-5)


class ByHand:
    """Not a model: scores from a table, by passage."""

    def __init__(self, table: dict[str, float]) -> None:
        self._table = table
        self.most_at_once = 0

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self.most_at_once = max(self.most_at_once, len(pairs))
        return [self._table[passage] for _, passage in pairs]

    def reads(self, query: str) -> bool:
        return True


def by_hand(count: int) -> tuple[list[Row], ByHand, ByHand]:
    """Rows whose gold passage two teachers half know each, each with noise of its own."""
    source = random.Random(0)
    rows, first, second = [], {}, {}
    for number in range(count):
        texts = [f"passage {number} {place}" for place in range(4)]
        gold = source.randrange(4)
        for place, text in enumerate(texts):
            first[text] = source.gauss(2.0 if place == gold else 0.0, 1.0)
            second[text] = source.gauss(0.2 if place == gold else 0.0, 0.1) + 3.0 * (number % 5)  # by question
        passages = tuple(RowPassage(text, relevance=float(place == gold)) for place, text in enumerate(texts))
        rows.append(Row(f"r{number}", f"question {number}", passages, ("x",)))
    return rows, ByHand(first), ByHand(second)


def gold_first(rows: Sequence[Row], teacher: ByHand | Ensemble) -> float:
    right = 0
    for one in rows:
        scores = teacher.scores([(one.query, passage.content) for passage in one.passages])
        right += one.passages[scores.index(max(scores))].relevant
    return right / len(rows)


def test_together_they_are_right_more_often_than_each_alone(caplog: pytest.LogCaptureFixture) -> None:
    rows, first, second = by_hand(600)
    with caplog.at_level(logging.INFO):
        combination = fit_combination([first, second], rows[:300])
    ensemble = Ensemble([first, second], combination)
    assert "gold passage first of 300 rows" in caplog.text
    assert first.most_at_once == 16 * 4  # blocks of rows, not all of them
    held_out = rows[300:]
    assert gold_first(held_out, ensemble) > 0.05 + max(gold_first(held_out, first), gold_first(held_out, second))
    # Both are as telling, on scales ten times apart.
    assert 5 < combination.weights[1] / combination.weights[0] < 20


def test_nothing_is_combined_without_gold_passages() -> None:
    rows, first, second = by_hand(3)
    unknown = [Row(one.id, one.query, tuple(RowPassage(p.text) for p in one.passages), ("x",)) for one in rows]
    with pytest.raises(DataError, match="a gold and another passage"):
        fit_combination([first, second], unknown)


def test_the_command_labels_with_several_rerankers(
    checkpoint: Path, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, dev, out = tmp_path / "rows.jsonl", tmp_path / "dev.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, ROWS)
    write_rows(dev, [row(index) for index in range(20, 30)])
    arguments = ["label", "--data", str(data), "--device", "cpu", "--score", "probability", "--out", str(out)]
    rerankers = ["--reranker", f"checkpoint:{checkpoint}", f"dense:{tiny_bert}", "--fit-data", str(dev)]
    with caplog.at_level(logging.INFO):
        assert main([*arguments, *rerankers]) == 0
    assert "gold passage first of 10 rows" in caplog.text
    labelled = read_rows(out)[0]
    assert [one.id for one in labelled] == [one.id for one in ROWS]
    scores = [passage.relevance for one in labelled for passage in one.passages]
    assert all(score is not None and 0 < score < 1 for score in scores)
    assert len(set(scores)) > len(ROWS)


def test_a_row_whose_query_a_reranker_cannot_read_has_no_relevance(
    checkpoint: Path, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, [replace(one, query=f"{one.query} " * (100 if one.id == "r3" else 1)) for one in ROWS])
    rerankers = ["--reranker", f"checkpoint:{checkpoint}", f"dense:{tiny_bert}"]
    assert main(["label", "--data", str(data), "--device", "cpu", "--out", str(out), *rerankers]) == 0
    assert "row 'r3': its query is too long for the reranker" in caplog.text
    for one in read_rows(out)[0]:
        assert [passage.gold for passage in one.passages] == [True, False]
        assert all((passage.relevance is None) == (one.id == "r3") for passage in one.passages)


def test_rerankers_are_combined_once_however_often_the_work_is_stopped(
    checkpoint: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, whole, parts = (tmp_path / f"{name}.jsonl" for name in ("rows", "whole", "parts"))
    write_rows(data, ROWS)
    command = ["label", "--data", str(data), "--device", "cpu", "--block", "2", "--gold-bonus", "1"]
    command += ["--reranker", f"checkpoint:{checkpoint}", f"dense:{tiny_bert}", "--out"]
    assert main([*command, str(whole)]) == 0
    add, blocks = Journal.add, itertools.count()

    def killed(journal: Journal, rows: Sequence[Row]) -> None:
        if next(blocks) == 1:
            raise KeyboardInterrupt
        add(journal, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed)
        assert main([*command, str(parts)]) == 130
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert main([*command, str(parts)]) == 0
    assert "2 of 7 rows are already labelled" in caplog.text
    assert "gold passage first of" not in caplog.text
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reranker", "dense:"], "--reranker dense:: names no model"),
        (["--reranker", "dense:no-such-folder"], "no-such-folder: cannot be loaded"),
        (["--reranker", "checkpoint:no-such-folder"], "is no folder"),
        (["--reranker", "dense:minilm-l6", "--fit-data", "rows.jsonl"], "--fit-data: is for several rerankers"),
        (["--reranker", "a", "b", "--fit-data", "nothing.jsonl"], "--fit-data"),
    ],
)
def test_wrong_rerankers_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    assert main(["label", "--data", "rows.jsonl", "--device", "cpu", "--out", "out.jsonl", *arguments]) == 1
    assert message in capsys.readouterr().err
