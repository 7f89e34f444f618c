"""Labelling with real tiny models: answers, logits, relevance."""

import errno
import os
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertForSequenceClassification

from core.base_models import resolve_base_model
from core.config import PromptConfig
from core.errors import BaseModelError
from core.generator import Generator, load_generator
from core.prompts import Block, PromptTemplate
from core.tokenization import encode
from tests.tiny_labelling import ROWS, CountingTeacher, label, row
from training.__main__ import main
from training.cross_encoder import CrossEncoder
from training.data_format import Row, RowPassage, read_rows, write_rows
from training.data_quality import DataError, ReadPolicy
from training.journal import Journal
from training.labelling import LabelConfig, label_rows
from training.teacher_logits import TeacherLogits, tokenizer_fingerprint
from training.teachers import LocalTeacher


@pytest.fixture(scope="module")
def generator(tiny_teacher: Path) -> Generator:
    return load_generator(resolve_base_model(str(tiny_teacher)))


@pytest.fixture(scope="module")
def reranker(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reranker(tiny_bert, tmp_path_factory.mktemp("reranker"), labels=1)


def build_reranker(bert: Path, folder: Path, labels: int) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(bert, num_labels=labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


def text_prompt(generator: Generator, row: Row, system: str = PromptConfig().system) -> torch.Tensor:
    """The generator's own prompt of a row with every passage as text, (T,) int64."""
    template = PromptTemplate(generator.tokenizer, PromptConfig(system=system))
    blocks = [Block(text_ids=encode(generator.tokenizer, passage.content).ids) for passage in row.passages]
    return template.build(row.query, blocks).ids


def test_a_local_teacher_reads_the_passages_as_text_and_answers_greedily(
    generator: Generator, tiny_teacher: Path
) -> None:
    teacher = LocalTeacher(generator, PromptConfig(system="Say it."), max_new_tokens=24)
    together = teacher.answer(ROWS[:3])
    assert [teacher.answer([row])[0] for row in ROWS[:3]] == together
    user = (
        "Background:\n[1] Rivers\nThe river number 1 rises in the Alps.\n[2] Bread is made of flour.\n"
        "Question: Where does river 1 rise?"
    )
    messages = [{"role": "system", "content": "Say it."}, {"role": "user", "content": user}]
    shown = generator.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = text_prompt(generator, ROWS[1], system="Say it.")
    assert generator.tokenizer.decode(prompt_ids) == shown
    ids = prompt_ids.unsqueeze(0)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_teacher)  # its own types refuse `generate`
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=list(generator.eos_ids))
    text = str(generator.tokenizer.decode(expected[0, ids.shape[1] : -1], skip_special_tokens=True))
    assert together[1].text == text.strip() != ""


def test_stored_logits_are_the_teachers_own(generator: Generator, tiny_llama: Path, tmp_path: Path) -> None:
    labelled = label(tmp_path, CountingTeacher(generator, top_k=5))
    stored = TeacherLogits(tmp_path / "logits")
    assert len(stored) == len(ROWS)
    assert "r0" in stored
    targets = stored["r3"]
    assert labelled[3].teacher_answer
    assert str(generator.tokenizer.decode(targets.answer_ids[:-1])).strip() == labelled[3].teacher_answer
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)  # its own types refuse `generate`
    prompt_ids = text_prompt(generator, ROWS[3])
    with torch.inference_mode():
        logits = model(torch.cat([prompt_ids, targets.answer_ids[:-1]])[None]).logits[0, len(prompt_ids) - 1 :]
    top = logits.log_softmax(-1).topk(5)
    assert torch.equal(targets.top_ids, top.indices)
    torch.testing.assert_close(targets.top_logprobs, top.values, atol=5e-3, rtol=0)  # float16 on disk


def answered(rows: Sequence[Row]) -> set[str]:
    return {row.id for row in rows if row.teacher_answer is not None}


def test_an_answer_that_is_cut_is_not_learned(
    generator: Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = label(tmp_path / "whole", CountingTeacher(generator))
    cut = label(tmp_path / "cut", CountingTeacher(generator, top_k=3, max_new_tokens=3))
    kept = answered(cut)
    assert 0 < len(kept) < len(answered(whole)) == len(ROWS)
    for gold, full, found in zip(ROWS, whole, cut, strict=True):
        assert found == (full if found.id in kept else gold)
    stored = TeacherLogits(tmp_path / "cut" / "logits")
    assert {row.id for row in ROWS if row.id in stored} == kept
    assert f"{len(ROWS) - len(kept)} rows keep the answers they came with: the teacher's answer was cut" in caplog.text


def test_an_answer_without_a_gold_one_is_left_out_on_demand(
    generator: Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = label(tmp_path / "free", CountingTeacher(generator))
    rows = [row(index, answers=("no", free[index].teacher_answer)) if index % 2 else row(index) for index in range(7)]
    labelled = label(tmp_path / "strict", CountingTeacher(generator, top_k=3), rows, must_contain_gold=True)
    assert answered(labelled) == {"r1", "r3", "r5"}
    assert [row.target for row in labelled[::2]] == ["the Alps"] * 4
    stored = TeacherLogits(tmp_path / "strict" / "logits")
    assert {row.id for row in rows if row.id in stored} == {"r1", "r3", "r5"}
    assert "4 rows keep the answers they came with: the teacher's answer contains no gold answer" in caplog.text


def test_a_full_disk_is_told_and_work_goes_on_once_there_is_room(
    reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, ROWS)
    arguments = ["label", "--data", str(data), "--reranker", str(reranker), "--device", "cpu", "--out", str(out)]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(arguments) == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert not out.exists()
    assert main(arguments) == 0
    assert [row.id for row in read_rows(out)[0]] == [row.id for row in ROWS]


def test_the_command_labels_scores_and_leaves_no_journal(
    tiny_teacher: Path, reranker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, logits = tmp_path / "rows.jsonl.gz", tmp_path / "labelled.jsonl", tmp_path / "logits"
    write_rows(data, ROWS)
    arguments = ["label", "--data", str(data), "--teacher", str(tiny_teacher), "--device", "cpu"]
    arguments += ["--reranker", str(reranker), "--score", "probability", "--logits", str(logits), "--top-k", "2"]
    assert main([*arguments, "--out", str(out)]) == 0
    rows, _ = read_rows(out)
    assert [row.id for row in rows] == [row.id for row in ROWS]
    assert all(row.teacher_answer for row in rows)
    assert all(0 < (passage.relevance or 0) < 1 for row in rows for passage in row.passages)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    assert TeacherLogits(logits).tokenizer == tokenizer_fingerprint(tokenizer.get_vocab())
    assert not out.with_name("labelled.jsonl.journal").exists()
    assert main([*arguments, "--out", str(out)]) == 1
    assert "already exists and is complete" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "other.jsonl")]) == 1
    assert "already holds logits of another run" in capsys.readouterr().err


def test_without_a_teacher_gold_answers_stay_and_relevance_is_scored(reranker: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, [*ROWS[:2], row(8, answers=())])
    assert main(["label", "--data", str(data), "--reranker", str(reranker), "--device", "cpu", "--out", str(out)]) == 0
    rows, _ = read_rows(out)
    assert [(row.id, row.target) for row in rows] == [("r0", "the Alps"), ("r1", "the Alps")]
    scores = CrossEncoder(str(reranker)).scores([(row.query, p.content) for row in ROWS[:2] for p in row.passages])
    assert [p.relevance for row in rows for p in row.passages] == pytest.approx(scores, abs=1e-5)


def test_a_gold_passage_gets_the_bonus_on_its_logit_and_no_other_does(reranker: Path, tmp_path: Path) -> None:
    data, plain, raised = tmp_path / "rows.jsonl", tmp_path / "plain.jsonl", tmp_path / "raised.jsonl"
    gold = RowPassage("The Rhine rises in the Alps.", relevance=1.0)
    others = (RowPassage("Bread is baked.", relevance=0.0), RowPassage("Nobody knows of this one."))
    write_rows(data, [row(0, passages=(gold, *others))])
    command = ["label", "--data", str(data), "--reranker", str(reranker), "--device", "cpu"]
    assert main([*command, "--out", str(plain)]) == 0
    assert main([*command, "--gold-bonus", "2.5", "--out", str(raised)]) == 0
    before, after = ([p.relevance or 0.0 for p in read_rows(path)[0][0].passages] for path in (plain, raised))
    assert np.subtract(after, before) == pytest.approx([2.5, 0.0, 0.0], abs=1e-5)


class Diverged:
    """Not a model: its second score is no number."""

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [nan if index == 1 else 1.0 for index in range(len(pairs))]

    def reads(self, query: str) -> bool:
        return True


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_a_score_that_is_no_number_is_never_written(score: Literal["logit", "probability"], tmp_path: Path) -> None:
    config = LabelConfig(reranker=["diverged"], score=score)
    with Journal(tmp_path / "journal", {}) as journal:
        with pytest.raises(DataError, match=r"row 'r0', passages\[1\]: the reranker's score is nan"):
            label_rows(ROWS, config, None, Diverged(), journal)
        assert not journal.rows


def test_what_was_gold_stays_so_however_it_is_scored(reranker: Path, tmp_path: Path) -> None:
    data, once, twice = tmp_path / "rows.jsonl", tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    passages = (RowPassage("In the Alps.", relevance=1.0), RowPassage("Bread.", relevance=0.0), RowPassage("Unknown."))
    write_rows(data, [row(0, passages=passages)])
    command = ["label", "--reranker", str(reranker), "--device", "cpu"]
    assert main([*command, "--data", str(data), "--out", str(once)]) == 0
    assert main([*command, "--data", str(once), "--out", str(twice)]) == 0
    first, second = read_rows(once)[0][0], read_rows(twice)[0][0]
    assert [passage.gold for passage in first.passages] == [True, False, None]
    assert [passage.relevant for passage in second.passages][:2] == [True, False]


def test_a_teachers_answer_is_kept_unless_it_is_to_be_made_again(generator: Generator, tmp_path: Path) -> None:
    teacher = CountingTeacher(generator)
    rows = [row(0, teacher_answer="kept"), row(1)]
    with Journal(tmp_path / "journal", {}) as journal:
        first, second = label_rows(rows, LabelConfig(teacher="t"), teacher, None, journal)
    assert first.teacher_answer == "kept"
    assert second.teacher_answer not in (None, "")
    assert teacher.asked == ["r1"]
    with Journal(tmp_path / "again", {}) as journal:
        relabelled = label_rows(rows, LabelConfig(teacher="t", relabel=True), teacher, None, journal)
    assert relabelled[0].teacher_answer != "kept"


def test_a_prompt_without_room_for_an_answer_keeps_its_gold_answer(
    generator: Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "max_tokens", 300)
    rows = [row(0), row(1, passages=(RowPassage("word " * 400),))]
    with Journal(tmp_path / "journal", {}) as journal:
        labelled = label_rows(rows, LabelConfig(teacher="t"), CountingTeacher(generator), None, journal)
    assert labelled[0].teacher_answer
    assert (labelled[1].teacher_answer, labelled[1].target) == (None, "the Alps")
    assert "1 rows keep the answers they came with: the prompt leaves no room" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to label"),
        (["--teacher", "t", "--gold-bonus", "2"], "--gold-bonus: is added to a reranker's score"),
        (["--endpoint", "http://x/v1", "--reranker", "r"], "also name the model"),
        (["--endpoint", "http://x/v1", "--teacher", "t", "--logits", "l"], "use a local teacher"),
        (["--endpoint", "localhost:9/v1", "--teacher", "t"], "--endpoint: must be a URL such as http://"),
        (["--endpoint", "http:///v1", "--teacher", "t"], "--endpoint: must be a URL such as http://"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", *arguments, "--data", "rows.jsonl", "--out", str(tmp_path / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err


def test_a_cross_encoder_scores_each_pair_by_itself(reranker: Path, tiny_bert: Path, tmp_path: Path) -> None:
    pairs = [("where", "the sea"), ("where does it rise", "in the Alps " * 30), ("who", "Marie Curie")]
    scores = CrossEncoder(str(reranker), batch=2).scores(pairs)
    for pair, score in zip(pairs, scores, strict=True):
        assert CrossEncoder(str(reranker)).scores([pair]) == pytest.approx([score], abs=1e-5)
    two = build_reranker(tiny_bert, tmp_path / "two", labels=2)
    model = BertForSequenceClassification.from_pretrained(two).eval()
    with torch.inference_mode():
        logits = model(**AutoTokenizer.from_pretrained(two)(*pairs[0], return_tensors="pt")).logits[0]
    assert CrossEncoder(str(two)).scores(pairs[:1]) == pytest.approx([float(logits[1] - logits[0])], abs=1e-5)
    with pytest.raises(BaseModelError, match="3 labels"):
        CrossEncoder(str(build_reranker(tiny_bert, tmp_path / "three", labels=3)))


def test_a_cross_encoder_reads_a_query_that_leaves_room_for_a_passage(reranker: Path) -> None:
    cross_encoder = CrossEncoder(str(reranker), max_tokens=16)
    lengths = [number for number in range(1, 20) if cross_encoder.reads("the " * number)]
    assert lengths == list(range(1, 13))  # and [CLS], two [SEP], one token of the passage
    whole, cut = cross_encoder.scores([("the " * 12, "sea"), ("the " * 12, "sea and land " * 9)])
    assert cut == pytest.approx(whole, abs=1e-5)
    with pytest.raises(Exception, match="Truncation error"):
        cross_encoder.scores([("the " * 13, "sea")])


def test_rows_without_any_answer_are_read_for_labelling(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [row(0, answers=())])
    rows, _ = read_rows(tmp_path / "rows.jsonl", ReadPolicy(need_answer=False))
    assert rows == [row(0, answers=())]
