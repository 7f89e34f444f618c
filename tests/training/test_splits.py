"""Duplicates, caps, what is held out, and two sides that share nothing."""

from hypothesis import given
from hypothesis import strategies as st

from training.data_format import RowPassage
from training.examples import Example
from training.splits import cap, deduplicate, drop_held_out, split_examples


def example(index: int, *texts: str, query: str = "") -> Example:
    return Example(str(index), query or f"question {index}?", ("a",), tuple(RowPassage(text) for text in texts))


@given(
    st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(0, 12), max_size=3)), max_size=30),
    st.floats(0, 0.9),
    st.integers(0, 9),
)
def test_a_split_never_puts_a_passage_or_a_question_on_both_sides(
    links: list[tuple[int, list[int]]], share: float, seed: int
) -> None:
    examples = [
        example(index, *(f"passage {text}" for text in texts), query=f"question {question}?")
        for index, (question, texts) in enumerate(links)
    ]
    train, dev = split_examples(examples, share, seed)
    assert sorted([*train, *dev], key=lambda e: int(e.id)) == examples
    sides = [{passage.text for e in side for passage in e.positives} for side in (train, dev)]
    assert not sides[0] & sides[1]
    assert not {e.query for e in train} & {e.query for e in dev}


def test_duplicates_are_told_by_words_not_by_spelling() -> None:
    kept = deduplicate([example(1, "A b.", query="Who?"), example(2, "a B", query="who"), example(3, "c", query="who")])
    assert [e.id for e in kept] == ["1", "3"]


def test_caps_hold_for_each_passage_and_for_all_and_keep_the_order() -> None:
    examples = [example(index, f"passage {index % 3}") for index in range(30)]
    capped = cap(examples, per_passage=4, limit=10, seed=5)
    assert len(capped) == 10
    assert [int(e.id) for e in capped] == sorted(int(e.id) for e in capped)
    for text in range(3):
        assert sum(e.positives[0].text == f"passage {text}" for e in capped) <= 4
    assert cap(examples, per_passage=4, limit=10, seed=6) != capped


def test_a_limit_leaves_the_split_its_share() -> None:
    examples = [example(index, f"passage {index}") for index in range(2000)]
    for limits in ({"per_passage": None, "limit": 400}, {"per_passage": 1, "limit": 400}):
        train, dev = split_examples(cap(examples, **limits, seed=3), 0.2, seed=3)
        assert len(train) + len(dev) == 400
        assert 40 < len(dev) < 120
    many = [example(index, f"passage {index % 40}") for index in range(400)]
    train, dev = split_examples(cap(many, per_passage=2, limit=None, seed=3), 0.5, seed=3)
    assert len(train) + len(dev) == 80
    assert 10 < len(dev) < 70


def test_held_out_questions_count_whatever_their_passages() -> None:
    examples = [example(1, "x", query="Who is it?"), example(2, "y"), example(3, "Z!")]
    kept = drop_held_out(examples, [example(9, "other", query="who is it"), example(8, "z")])
    assert [e.id for e in kept] == ["2"]
