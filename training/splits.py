"""Deduplication, caps and a split whose sides share no question and no positive."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from training.answer_match import words
from training.data_format import RowPassage
from training.examples import Example


def unit_hash(seed: int, text: str) -> float:
    """A number in [0, 1) that depends on nothing but `seed` and `text`."""
    digest = hashlib.sha256(f"{seed}\0{text}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:7]) / 2**56


def deduplicate(examples: Iterable[Example]) -> list[Example]:
    """The first of every group of examples that ask the same (by words) of the same positives."""
    kept: dict[tuple[str, tuple[str, ...]], Example] = {}
    for example in examples:
        positives = tuple(sorted(words(passage.text) for passage in example.positives))
        kept.setdefault((words(example.query), positives), example)
    return list(kept.values())


def cap(examples: Sequence[Example], *, per_passage: int | None, limit: int | None, seed: int) -> list[Example]:
    """At most `per_passage` examples of one first positive and at most `limit` in all, drawn by `seed`, order kept."""
    drawn = sorted(examples, key=lambda example: unit_hash(seed, example.id))
    if per_passage is not None:
        seen: Counter[str] = Counter()
        kept = []
        for example in drawn:
            first = words(example.positives[0].text) if example.positives else example.id
            seen[first] += 1
            if seen[first] <= per_passage:
                kept.append(example)
        drawn = kept
    chosen = {example.id for example in drawn[:limit]}
    return [example for example in examples if example.id in chosen]


def exclusive_keys(example: Example) -> set[tuple[str, str]]:
    """What two sides never share: the question and every positive, word for word."""
    return {("question", words(example.query)), *(("passage", words(passage.text)) for passage in example.positives)}


def positive_words(examples: Iterable[Example]) -> set[str]:
    """The words of all positives, for `bar_passages`."""
    return {words(passage.text) for example in examples for passage in example.positives}


def bar_passages(example: Example, barred: Set[str]) -> Example:
    """`example` without the passages that came with it, other than positives, whose words are among `barred`."""

    def kept(passages: Iterable[RowPassage]) -> tuple[RowPassage, ...]:
        return tuple(passage for passage in passages if words(passage.text) not in barred)

    return replace(example, negatives=kept(example.negatives), unjudged=kept(example.unjudged))


def group_examples(examples: Sequence[Example]) -> list[int]:
    """A group number for each example: one group shares a question or a positive, directly or through others."""
    parent = list(range(len(examples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    owner: dict[tuple[str, str], int] = {}
    for index, example in enumerate(examples):
        for key in exclusive_keys(example):
            first = root(owner.setdefault(key, index))
            parent[max(first, root(index))] = min(first, root(index))
    return [root(index) for index in range(len(examples))]


def split_examples(examples: Sequence[Example], dev_share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """`(train, dev)`: whole groups of `group_examples` go to dev with probability `dev_share`, drawn by `seed`."""
    train: list[Example] = []
    dev: list[Example] = []
    for example, group in zip(examples, group_examples(examples), strict=True):
        # Not the number that `cap` draws by: it kept the lowest ones, which would all be in dev.
        in_dev = unit_hash(seed, f"split\0{examples[group].id}") < dev_share
        (dev if in_dev else train).append(example)
    return train, dev


def drop_held_out(examples: Iterable[Example], held_out: Iterable[Example]) -> list[Example]:
    """`examples` without those that share a positive or, word for word, a question with `held_out`."""
    taken = {key for example in held_out for key in exclusive_keys(example)}
    return [example for example in examples if taken.isdisjoint(exclusive_keys(example))]
