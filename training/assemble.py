"""From examples to rows: positives, hard and random negatives, shuffled. Knows no files."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from core.config import STRICT
from training.data_format import Row, RowPassage
from training.examples import Example
from training.negatives import Collection, Retriever, Scores, best_negatives, first_answering, random_negatives, ranked
from training.splits import unit_hash

DISTANT_DEPTH = 100


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AssemblyConfig:
    """How the passages of a row are chosen.

    passages               how many a row has; fewer where there are not enough
    random_negatives       how many of the negatives are drawn at random instead of by score
    mine                   take negatives from the collection; false: only those that came with the example
    drop_answer_passages   no negative may contain an answer
    match_titles           where a passage of a row has no title, all of it lose theirs: a title alone would tell what
                           answers from what does not
    without_positives      examples that came with no passages at all: `distant` makes the best retrieved passage with
                           an answer the positive (DPR), `unjudged` takes the best retrieved ones as they are, for a
                           teacher to answer and score (OSCAR sec. 4), `skip` leaves the example out
    seed                   of the random negatives and of the order of passages
    """

    passages: Annotated[int, Field(ge=1)] = 10
    random_negatives: Annotated[int, Field(ge=0)] = 1
    mine: bool = True
    drop_answer_passages: bool = True
    match_titles: bool = True
    without_positives: Literal["distant", "unjudged", "skip"] = "distant"
    seed: int = 0


def assemble_rows(
    examples: Sequence[Example],
    collection: Collection,
    retriever: Retriever,
    config: AssemblyConfig,
    dropped: Counter[str],
) -> Iterator[Row]:
    """One row an example, in order; `dropped` counts the examples that give none, by reason.

    `find_positives` comes first where `without_positives` is `distant`.
    """
    all_scores = retriever.scores([example.query for example in examples])
    progress = tqdm(examples, desc="negatives", unit="row", disable=None)
    for example, scores in zip(progress, all_scores, strict=True):
        rng = np.random.default_rng(int(unit_hash(config.seed, example.id) * 2**53))
        passages = _passages(example, scores, collection, config, rng)
        if not passages:
            dropped["no positive passage found"] += 1
            continue
        order = rng.permutation(len(passages))
        shuffled = tuple(passages[index] for index in order)
        yield Row(example.id, example.query, shuffled, example.answers, example.teacher_answer)


def find_positives(examples: Sequence[Example], collection: Collection, retriever: Retriever) -> list[Example]:
    """`examples`, those without passages with the best retrieved one that contains an answer as their positive.

    Done before a split, which keeps what is positive on one side away from the other.
    """
    found = list(examples)
    bare = [index for index, example in enumerate(examples) if not (example.positives or example.unjudged)]
    all_scores = retriever.scores([examples[index].query for index in bare])
    for index, scores in zip(tqdm(bare, desc="positives", unit="row", disable=None), all_scores, strict=True):
        best = first_answering(examples[index], scores, collection, DISTANT_DEPTH)
        if best is not None:
            positive = replace(collection.passages[best], relevance=1.0, gold=None)
            found[index] = replace(examples[index], positives=(positive,))
    return found


def _passages(
    example: Example, scores: Scores, collection: Collection, config: AssemblyConfig, rng: np.random.Generator
) -> list[RowPassage]:
    """The passages of one row in no particular order; none where the example has to be dropped."""
    if not example.positives:
        if example.unjudged:
            return list(example.unjudged[: config.passages])
        if config.without_positives == "unjudged":
            best = islice(ranked(scores), config.passages)
            return [replace(collection.passages[index], relevance=None, gold=None) for index in best]
        return []
    positives = list({passage.content: passage for passage in example.positives}.values())
    kept = [_judged(passage, 1.0) for passage in positives[: config.passages]]
    kept += example.unjudged[: config.passages - len(kept)]
    room = config.passages - len(kept)
    drawn = min(room, config.random_negatives) if config.mine else 0
    hard = best_negatives(
        example, scores, collection, room - drawn, mine=config.mine, drop_answers=config.drop_answer_passages
    )
    random = random_negatives(example, collection, room - len(hard), hard, rng) if config.mine else []
    given = {passage.content: _judged(passage, 0.0) for passage in example.negatives}
    mined = [collection.passages[index] for index in (*hard, *random)]  # some answer another question
    row = kept + [given.get(passage.content, replace(passage, relevance=0.0, gold=None)) for passage in mined]
    if config.match_titles and not all(passage.title for passage in row):
        row = [replace(passage, title="") for passage in row]
    return row


def _judged(passage: RowPassage, relevance: float) -> RowPassage:
    """`passage` with its own relevance, or this one where it has none."""
    return passage if passage.relevance is not None else replace(passage, relevance=relevance)
