"""Hard negatives: ranked by a retriever, never a positive, never with an answer in them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from core.errors import BaseModelError, ConfigError
from training.answer_match import answer_words, contains, words
from training.assemble import AssemblyConfig, assemble_rows, find_positives
from training.data_format import RowPassage
from training.dense import make_retriever
from training.examples import Example
from training.negatives import (
    BM25Retriever,
    Collection,
    Scores,
    best_negatives,
    first_answering,
    random_negatives,
    ranked,
    without_passages,
)

TEXTS = [
    "The river Rhine rises in the Swiss Alps.",
    "The Rhine is a river that flows to the sea.",
    "Bread is made of flour and water.",
    "Marie Curie was born in Warsaw.",
    "A river in Poland flows through Warsaw.",
    "The moon moves around the earth.",
]
PASSAGES = [RowPassage(text) for text in TEXTS]
RHINE = Example("1", "Where does the river Rhine rise?", ("Swiss Alps",), positives=(PASSAGES[0],))


class FixedRetriever:
    """Gives every query the same scores."""

    def __init__(self, scores: Sequence[float]) -> None:
        self._scores = np.array(scores, dtype=np.float32)

    def scores(self, queries: Sequence[str]) -> Iterator[Scores]:
        for _ in queries:
            yield self._scores


def test_an_answer_is_found_as_whole_words_whatever_their_case_accents_and_punctuation() -> None:
    assert contains(words("He was born in Zürich, in 1,116."), answer_words(["zurich"]))
    assert contains(words("rose to 1,116 feet."), answer_words(["1,116 Feet"]))
    assert not contains(words("someone else"), answer_words(["one"]))
    assert not contains(words("anything"), answer_words(["?", " "]))


def test_bm25_prefers_passages_with_the_words_of_the_question() -> None:
    retriever = BM25Retriever(TEXTS)
    rhine, bread, nothing = retriever.scores(["river Rhine", "flour", "zebra the of"])
    assert list(ranked(rhine))[:2] == [1, 0]
    assert list(ranked(bread)) == [2]
    assert list(ranked(nothing)) == []


def test_bm25_of_texts_without_words_matches_nothing() -> None:
    assert list(ranked(next(BM25Retriever(["?", "..."]).scores(["river"])))) == []


@given(st.lists(st.sampled_from([-np.inf, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=300))
def test_ranking_lazily_is_ranking(values: list[float]) -> None:
    scores = np.array(values, dtype=np.float32)
    order = list(ranked(scores))
    assert sorted(order) == np.flatnonzero(scores > -np.inf).tolist()
    assert all(scores[a] >= scores[b] for a, b in pairwise(order))


def test_negatives_are_the_best_scored_without_positives_and_answers() -> None:
    collection = Collection([*PASSAGES, RowPassage("The Swiss Alps have a river too.")])
    scores = next(BM25Retriever(collection.texts).scores([RHINE.query]))
    assert best_negatives(RHINE, scores, collection, 2) == [1, 4]
    assert 6 in best_negatives(RHINE, scores, collection, 3, drop_answers=False)


def test_given_negatives_come_first_and_alone_without_mining() -> None:
    collection = Collection(PASSAGES)
    example = Example("1", RHINE.query, ("Swiss Alps",), (PASSAGES[0],), negatives=(PASSAGES[5], PASSAGES[2]))
    scores = np.array([9, 8, 1, 7, 6, 2], dtype=np.float32)
    assert best_negatives(example, scores, collection, 4) == [5, 2, 1, 3]
    assert best_negatives(example, scores, collection, 4, mine=False) == [5, 2]


@pytest.mark.parametrize("title", ["", "Rhine"])
def test_a_copy_of_a_text_under_another_title_is_no_negative(title: str) -> None:
    copies = [RowPassage(TEXTS[0].upper(), title="The Rhine"), RowPassage(TEXTS[2], title="Bread")]
    collection = Collection([*PASSAGES, *copies])
    example = Example("1", RHINE.query, ("Basel",), (RowPassage(TEXTS[0], title=title),), negatives=(copies[1],))
    scores = np.arange(len(collection.passages), dtype=np.float32)
    assert best_negatives(example, scores, collection, 9) == [7, 5, 4, 3, 1]
    assert best_negatives(replace(example, unjudged=(PASSAGES[5],)), scores, collection, 9) == [7, 4, 3, 1]
    drawn = random_negatives(example, collection, 9, [7], np.random.default_rng(0))
    assert sorted(drawn) == [1, 3, 4, 5]
    (row,) = assemble_rows([example], collection, FixedRetriever(scores.tolist()), AssemblyConfig(), Counter())
    assert len(row.passages) == len({words(passage.text) for passage in row.passages}) == 6


def test_random_negatives_are_none_of_the_others() -> None:
    collection = Collection(PASSAGES)
    drawn = random_negatives(RHINE, collection, 10, [1, 2], np.random.default_rng(0))
    assert sorted(drawn) == [3, 4, 5]


def test_the_first_passage_with_an_answer_within_the_depth_is_the_positive() -> None:
    collection = Collection(PASSAGES)
    scores = np.array([1, 6, 5, 4, 3, 2], dtype=np.float32)
    assert first_answering(RHINE, scores, collection, 6) == 0
    assert first_answering(RHINE, scores, collection, 5) is None


def test_an_open_question_gets_its_positive_by_distant_supervision_or_is_left_unjudged() -> None:
    collection = Collection(PASSAGES)
    example = Example("1", RHINE.query, ("Warsaw",))
    retriever = FixedRetriever([6, 5, 4, 3, 2, 1])
    config = AssemblyConfig(passages=3, random_negatives=0)
    counter: Counter[str] = Counter()
    found = find_positives([RHINE, example], collection, retriever)
    assert found[0] == RHINE
    (row,) = assemble_rows(found[1:], collection, retriever, config, counter)
    assert {p.text: p.relevance for p in row.passages} == {TEXTS[3]: 1.0, TEXTS[0]: 0.0, TEXTS[1]: 0.0}
    unjudged = AssemblyConfig(passages=3, without_positives="unjudged")
    (row,) = assemble_rows([example], collection, retriever, unjudged, counter)
    assert {p.text: p.relevance for p in row.passages} == dict.fromkeys(TEXTS[:3])
    skipped = AssemblyConfig(passages=3, without_positives="skip")
    assert list(assemble_rows([example], collection, retriever, skipped, counter)) == []
    assert counter == {"no positive passage found": 1}


def test_yes_and_no_make_no_passage_a_positive_and_bar_none_from_being_a_negative() -> None:
    passages = [RowPassage("There is no ferry over the Rhine."), RowPassage("The Danube is longer than the Rhine.")]
    collection, retriever = Collection(passages), FixedRetriever([2, 1])
    example = Example("1", "Is the Rhine longer than the Danube?", ("No.",))
    dropped: Counter[str] = Counter()
    found = find_positives([example], collection, retriever)
    assert found == [example]
    assert list(assemble_rows(found, collection, retriever, AssemblyConfig(), dropped)) == []
    assert dropped == {"no positive passage found": 1}
    judged = replace(example, positives=(passages[1],))
    (row,) = assemble_rows([judged], collection, retriever, AssemblyConfig(random_negatives=0), dropped)
    assert {p.text: p.relevance for p in row.passages} == {passages[0].text: 0.0, passages[1].text: 1.0}
    drawn = random_negatives(judged, collection, 1, [], np.random.default_rng(0))
    assert drawn == [0]


def test_a_part_of_a_collection_keeps_its_scores() -> None:
    part, retriever = without_passages(
        Collection(PASSAGES), FixedRetriever([6, 5, 4, 3, 2, 1]), {words(TEXTS[1].upper()), words(TEXTS[4])}
    )
    assert part.texts == (TEXTS[0], TEXTS[2], TEXTS[3], TEXTS[5])
    assert next(retriever.scores(["any"])).tolist() == [6, 4, 3, 1]


def test_a_dense_retriever_finds_the_text_itself(tiny_bert: Path) -> None:
    retriever = make_retriever(f"dense:{tiny_bert}", TEXTS)
    for index, scores in enumerate(retriever.scores(TEXTS)):
        assert scores.shape == (len(TEXTS),)
        assert scores.argmax() == index
        assert scores[index] == pytest.approx(1.0, abs=1e-5)  # a cosine with itself


def test_splade_scores_are_dot_products_of_its_vocabulary_weights(tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(tiny_bert)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path)

    def weights(text: str) -> torch.Tensor:
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        pooled: torch.Tensor = logits.relu().log1p().amax(0)
        return pooled

    (scores,) = make_retriever(f"splade:{tmp_path}", TEXTS).scores(["river"])
    expected = [float(weights(text) @ weights("river")) for text in TEXTS]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_an_unknown_retriever_or_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tfidf' is not bm25"):
        make_retriever("tfidf", TEXTS)
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        make_retriever(f"dense:{tmp_path}", TEXTS)
