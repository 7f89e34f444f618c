"""Examples and batches: what is sampled, where answers are found, and that each row comes exactly once an epoch."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.compressed import CompressedChunk, CompressedPassage
from core.config import Mode
from core.model import Model
from core.pipeline import passage_text_ids, prepare, rows_of
from core.readouts import candidates
from core.rows import collate_rows
from tests.tiny_pipeline import tiny_model
from tests.tiny_training import make_rows
from training.batches import (
    BUCKET_BATCHES,
    example_tokens,
    find_hits,
    find_siblings,
    make_example,
    micro_batches,
    plan_epoch,
    prompt_tokens,
    sample_passages,
    teacher_targets,
)
from training.config import DataConfig, LossConfig
from training.data_format import Row, RowPassage
from training.dev import rank_gold
from training.objective import lay_out
from training.questions import to_questions
from training.teacher_logits import TeacherLogits, TokenTargets, shard_path, write_shard

ALIGNED = LossConfig(alignment=1.0)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Model:
    return tiny_model(tiny_llama)


@pytest.fixture(scope="module")
def pointing(tiny_llama: Path, tiny_bert: Path) -> Model:
    return tiny_model(tiny_llama, tiny_bert, readout="pointer", pointer_window=4)


def compressed_passage(score: float) -> CompressedPassage:
    """A passage of one chunk with a raw score."""
    return CompressedPassage(0, (CompressedChunk(0, 1, 1, torch.zeros(1, 1), score, None),), None)


@given(st.lists(st.integers(1, 500), max_size=300), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_index_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(lengths, batch_size, seed, epoch)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in plan)
    assert sum(len(batch) < batch_size for batch in plan) <= 1
    assert plan == plan_epoch(lengths, batch_size, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(100))
    plans = [plan_epoch(lengths, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for index, one in enumerate(plans) for other in plans[:index])


def test_batches_hold_rows_of_like_length() -> None:
    lengths = random.Random(0).choices(range(1000), k=8 * BUCKET_BATCHES * 2)
    batches = [[lengths[index] for index in batch] for batch in plan_epoch(lengths, 8, 0, 0)]
    spreads = [max(batch) - min(batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 50  # 8 at random would lie some 800 apart


def test_relevant_passages_are_kept_and_shuffled() -> None:
    row = make_rows(1)[0]
    places = []
    for seed in range(20):
        chosen, empty = sample_passages(row, DataConfig(passages=2), random.Random(seed))
        assert len(chosen) == 2
        assert not empty
        places.append([passage.relevance for passage in chosen].index(1.0))
    assert set(places) == {0, 1}


def test_a_passage_is_relevant_from_one_half_on_wherever_it_is_asked(model: Model) -> None:
    row = make_rows(1)[0]
    halfway = replace(row.passages[0], relevance=0.5)
    row = replace(row, passages=(*row.passages[1:], halfway))
    for seed in range(6):
        assert halfway in sample_passages(row, DataConfig(passages=1), random.Random(seed))[0]
    assert find_siblings([row, replace(row, id="other")]) == [[1], [0]]
    assert to_questions([row])[0].gold == (False, False, True)
    assert rank_gold([row], [[compressed_passage(score) for score in (0.0, 1.0, 2.0)]]) == [1.0]
    hits = find_hits(model, prepare(model, row.query, row.passages), row.passages, row.answers)
    assert any(hits)


def test_a_gold_passage_with_a_low_score_is_relevant_wherever_it_is_asked(model: Model) -> None:
    row = make_rows(1)[0]
    gold = replace(row.passages[0], relevance=0.2, gold=True)
    others = [RowPassage(f"Warsaw is number {number}.", relevance=3.0, gold=False) for number in range(9)]
    row = replace(row, passages=(*others, gold))
    for seed in range(30):
        assert gold in sample_passages(row, DataConfig(passages=5), random.Random(seed))[0]
        chosen, empty = sample_passages(row, DataConfig(passages=5, empty_share=0.5), random.Random(seed))
        assert (gold in chosen) != empty
    data = DataConfig(passages=0, text_passages=2, modes={"text": 1.0})
    example = make_example(model, row, data, LossConfig(), "k")
    assert gold in example.request.passages
    assert 0.2 in (example.relevance or [])  # what is taught stays the reranker's score
    assert find_siblings([row, replace(row, id="other")]) == [[1], [0]]
    request = prepare(model, row.query, row.passages)
    hits = find_hits(model, request, row.passages, row.answers)
    assert {chunk.passage for chunk, hit in zip(request.chunks, hits, strict=True) if hit} == {9}


def test_rows_without_a_relevant_passage_have_no_siblings() -> None:
    rows = [Row(str(number), "q", (RowPassage("same", relevance=0.0),), ("a",)) for number in range(20_000)]
    assert find_siblings(rows) == [[]] * len(rows)


@pytest.mark.parametrize("mode", ["compressed", "hybrid", "text"])
def test_prompt_tokens_are_those_of_the_prompt(model: Model, mode: Mode) -> None:
    row = make_rows(4)[3]
    data = DataConfig(passages=0, modes={mode: 1.0})
    example = make_example(model, row, data, LossConfig(), "k")
    texts = [len(ids) for ids in passage_text_ids(example.request)]
    # Scores that show the longest passage as text in `hybrid`: the most there can be.
    scores = torch.tensor([float(size == max(texts)) for size in texts])
    memory = [torch.zeros(one.memory_tokens, 1) for one in example.rows]
    prefix, _, _ = lay_out(model, example, memory, scores)
    counted = prompt_tokens(model, example.request, example.rows, mode)
    assert counted == len(prefix) + len(model.template.question_ids(row.query))


def test_text_examples_keep_the_most_relevant_of_their_passages(model: Model) -> None:
    row = make_rows(1)[0]
    for key in map(str, range(6)):
        compressed, text = (
            make_example(model, row, DataConfig(passages=3, text_passages=2, modes={mode: 1.0}), LossConfig(), key)
            for mode in ("compressed", "text")
        )
        assert len(compressed.request.passages) == 3
        assert len(text.request.passages) == 2
        assert sorted(text.relevance or []) == [0.0, 1.0]
        order = list(compressed.request.passages)
        assert [order.index(passage) for passage in text.request.passages] in ([0, 1], [0, 2], [1, 2])


def test_empty_examples_train_relevance_only(model: Model) -> None:
    data = DataConfig(passages=2, empty_share=1.0)
    example = make_example(model, make_rows(1)[0], data, LossConfig(), "key")
    assert example.questions == []
    assert example.relevance == [0.0, 0.0]


def test_an_example_depends_on_its_key_alone(model: Model) -> None:
    data = DataConfig(passages=2, modes={"compressed": 0.5, "text": 0.5})
    row = make_rows(1)[0]
    same = [make_example(model, row, data, LossConfig(), "1/r0") for _ in range(2)]
    assert same[0] == same[1]
    others = [make_example(model, row, data, LossConfig(), f"{key}/r0") for key in range(20)]
    assert {example.mode for example in others} == {"compressed", "text"}
    assert {row.memory_tokens for example in others for row in example.rows} >= {4, 8}  # both rates of 32 tokens


def test_one_unknown_relevance_leaves_the_example_without(model: Model) -> None:
    row = make_rows(1)[0]
    row = replace(row, passages=(row.passages[0], replace(row.passages[1], relevance=None)))
    assert make_example(model, row, DataConfig(), LossConfig(), "key").relevance is None


def test_targets_end_with_the_turn_unless_they_were_cut(model: Model) -> None:
    row = replace(make_rows(1)[0], answers=("Warsaw in the far north",))
    (whole,), (cut,) = (
        make_example(model, row, data, LossConfig(), "key").questions
        for data in (DataConfig(), DataConfig(answer_tokens=3))
    )
    assert whole.answer_ids[-1] == model.template.end_id
    assert cut.answer_ids == whole.answer_ids[:3]


def test_the_teachers_answer_is_the_target(model: Model) -> None:
    row = replace(make_rows(1)[0], teacher_answer="Rome")
    (question,) = make_example(model, row, DataConfig(), LossConfig(), "key").questions
    assert question.answer_ids == model.template.answer_ids("Rome")


def found(model: Model, passages: tuple[RowPassage, ...], answers: list[str]) -> list[str]:
    """The text of every chunk's hit tokens."""
    request = prepare(model, "Where?", passages)
    return [
        "|".join(passages[chunk.passage].content[slice(*chunk.generator_spans[token])] for token in hits)
        for chunk, hits in zip(request.chunks, find_hits(model, request, passages, answers), strict=True)
    ]


def test_hits_are_the_first_tokens_of_an_answer(pointing: Model) -> None:
    passages = (
        RowPassage("She was born in Warsaw. WARSAW is old.", "About", relevance=1.0),
        RowPassage("Warsaw, again", relevance=0.0),
        RowPassage("unjudged Warsaw"),
    )
    first, irrelevant, unjudged = found(pointing, passages, ["Warsaw"])
    assert len(first.split("|")) == 2
    assert all("warsaw".startswith(token.strip().lower()) for token in first.split("|"))
    assert irrelevant == ""
    assert "Warsaw".startswith(unjudged.strip())


def test_hits_are_places_where_a_window_can_begin(pointing: Model) -> None:
    text = "In 1903, 2,718,281 naïve physicists (from Warsaw) won; in 1911 Warsaw's again."
    request = prepare(pointing, "When?", [RowPassage(text)])
    batch = collate_rows(rows_of(pointing, request), pointing.compressor.row_format, 8)
    allowed = candidates(batch)
    hits = find_hits(pointing, request, [RowPassage(text, relevance=1.0)], ["1903", "2,718,281", "Warsaw", "1911"])
    assert sum(map(len, hits)) == 5
    assert all(allowed[row, token] for row, tokens in enumerate(hits) for token in tokens)


def test_yes_and_no_are_no_place_in_a_passage(pointing: Model) -> None:
    passages = (RowPassage("No station was closed; yes, all of them run.", relevance=1.0),)
    assert found(pointing, passages, ["no", "Yes"]) == [""]
    assert found(pointing, passages, ["no", "station"]) != [""]


def test_hits_need_whole_words(pointing: Model) -> None:
    passages = (RowPassage("someone found 1,230 in 12 towns", relevance=1.0),)
    assert found(pointing, passages, ["one", "230 i", "2"]) == [""]
    assert found(pointing, passages, ["12"])[0].strip().startswith("1")
    assert found(pointing, passages, []) == [""]
    assert found(pointing, passages, ["(12"]) == [""]  # no regular expression


def test_without_windows_every_token_of_the_answer_is_right(tiny_llama: Path, tiny_bert: Path) -> None:
    single = tiny_model(tiny_llama, tiny_bert, readout="pointer", pointer_window=1)
    passages = (RowPassage("The river rises in the Swiss Alps today.", relevance=1.0),)
    assert found(single, passages, ["Swiss Alps"])[0].replace("|", "").strip() == "Swiss Alps"


def test_micro_batches_keep_the_budget_and_every_example(model: Model) -> None:
    data = DataConfig(passages=2, modes={"compressed": 0.5, "text": 0.5})
    examples = [make_example(model, row, data, ALIGNED, row.id) for row in make_rows(12)]
    costs = [example_tokens(model, example) for example in examples]
    pieces = micro_batches(model, examples, 2 * max(costs))
    assert sorted(id(example) for piece in pieces for example in piece) == sorted(map(id, examples))
    assert all(sum(example_tokens(model, e) for e in piece) <= 2 * max(costs) for piece in pieces)
    assert all(len({example.mode for example in piece}) == 1 for piece in pieces)
    assert [len(piece) for piece in micro_batches(model, examples, 1)] == [1] * 12


def test_stored_logits_belong_to_exactly_the_target_tokens(tmp_path: Path) -> None:
    ids = torch.tensor([5, 6, 7])
    stored = TokenTargets(ids, torch.tensor([[5, 1], [6, 2], [7, 3]]), torch.tensor([[-0.1, -3.0]] * 3))
    write_shard(shard_path(tmp_path, 0), ["r0"], [stored], "tokenizer")
    logits = TeacherLogits(tmp_path)
    whole, cut = teacher_targets(logits, "r0", [5, 6, 7]), teacher_targets(logits, "r0", [5, 6])
    assert whole is not None
    assert cut is not None
    assert whole.top_ids.tolist() == [[5, 1], [6, 2], [7, 3]]
    assert cut.top_ids.tolist() == [[5, 1], [6, 2]]
    assert teacher_targets(logits, "r0", [5, 9, 7]) is None
    assert teacher_targets(logits, "r0", [5, 6, 7, 8]) is None
    assert teacher_targets(logits, "r1", [5, 6, 7]) is None


def test_a_row_without_passages_to_leave_out_is_never_empty() -> None:
    row = Row("r", "q", (RowPassage("only", relevance=1.0),), ("a",))
    chosen, empty = sample_passages(row, DataConfig(empty_share=1.0), random.Random(0))
    assert (len(chosen), empty) == (1, False)
