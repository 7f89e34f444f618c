"""Rows to training examples, and examples to batches. Pure functions of seed and position: resuming repeats nothing.

Knows tokenizers and chunks; runs no model.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from core.config import Mode
from core.model import Model
from core.pipeline import PreparedRequest, passage_text_ids, prepare, rows_of
from core.rows import ChunkRow
from training.answer_match import is_span, places_pattern
from training.config import DataConfig, LossConfig
from training.data_format import Row, RowPassage
from training.teacher_logits import TeacherLogits, TokenTargets

BUCKET_BATCHES = 32  # batches sorted by length together: enough to pad little, few enough to keep them random


@dataclass(frozen=True, slots=True)
class Question:
    """What the generator is to answer.

    answer_ids  target tokens with the end of turn
    teacher     what the teacher held likely at each target token; None where nothing is stored for it
    """

    query: str
    answer_ids: list[int]
    teacher: TokenTargets | None = None


@dataclass(frozen=True, slots=True)
class TrainExample:
    """One row, sampled and tokenised for one step.

    questions  all that the generator answers: the row's own and, as text, others on the same passages; none: it does
               not see this example
    relevance  one target a passage; None where the row does not say
    hits       for each chunk, the generator tokens (indices in the chunk) at which a pointer is right
    """

    request: PreparedRequest
    rows: list[ChunkRow]
    mode: Mode
    questions: list[Question]
    relevance: list[float] | None
    hits: list[list[int]]


def plan_epoch(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each batch of an epoch: shuffled, then bucketed by length, then the batches shuffled.

    Depends on its arguments alone. Every index stands in one batch; only the last of a bucket can be short.
    """
    rng = random.Random(f"{seed}/{epoch}/plan")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size * BUCKET_BATCHES):
        bucket = sorted(order[start : start + batch_size * BUCKET_BATCHES], key=lambda index: lengths[index])
        batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
    rng.shuffle(batches)
    return batches


def row_length(row: Row, passages: int) -> int:
    """A cheap stand-in for the cost of a row: characters of the passages it will have, on average."""
    total = sum(len(passage.content) for passage in row.passages)
    kept = min(passages or len(row.passages), len(row.passages))
    return len(row.query) + total * kept // len(row.passages)


def make_example(
    model: Model,
    row: Row,
    data: DataConfig,
    loss: LossConfig,
    key: str,
    logits: TeacherLogits | None = None,
    siblings: Sequence[Row] = (),
) -> TrainExample:
    """Sample passages, mode and rate with randomness that `key` determines, and tokenise.

    `siblings`: other rows with the same relevant passages; some share a text prompt with this (`data.text_questions`).
    """
    rng = random.Random(key)
    passages, empty = sample_passages(row, data, rng)
    mode = rng.choices(list(data.modes), weights=list(data.modes.values()))[0]
    if mode == "text" and data.text_passages is not None:
        passages = most_relevant(passages, data.text_passages)
    rate = rng.choice(model.config.compressor.rates)
    request = prepare(model, row.query, passages)
    known = [passage.relevance for passage in passages if passage.relevance is not None]
    answers = [*row.answers, *([row.teacher_answer] if row.teacher_answer else [])]
    asked = [row] if loss.needs_generator and not empty else []
    if asked and mode == "text":
        asked += rng.sample(siblings, min(data.text_questions - 1, len(siblings)))
    return TrainExample(
        request=request,
        rows=rows_of(model, request, rate),
        mode=mode,
        questions=[make_question(model, each, data, logits) for each in asked],
        relevance=known if len(known) == len(passages) else None,
        hits=find_hits(model, request, passages, answers) if loss.alignment > 0 else [],
    )


def make_question(model: Model, row: Row, data: DataConfig, logits: TeacherLogits | None) -> Question:
    """The question of `row`, its target answer, and the teacher's logits where there are any."""
    answer_ids = target_ids(model, row, data.answer_tokens)
    teacher = teacher_targets(logits, row.id, answer_ids) if logits is not None and answer_ids else None
    return Question(row.query, answer_ids, teacher)


def find_siblings(rows: Sequence[Row]) -> list[list[int]]:
    """For each row, the others that have exactly the same relevant passages; none for a row without any."""
    keys = [frozenset(p.content for p in row.passages if p.relevant) for row in rows]
    same: dict[frozenset[str], list[int]] = {}
    for index, key in enumerate(keys):
        same.setdefault(key, []).append(index)
    return [[other for other in same[key] if other != index] if key else [] for index, key in enumerate(keys)]


def target_ids(model: Model, row: Row, most: int) -> list[int]:
    """The target answer's tokens, cut to `most`; the end of turn stays only where nothing was cut."""
    return model.template.answer_ids(row.target)[:most]


def teacher_targets(logits: TeacherLogits, row_id: str, answer_ids: Sequence[int]) -> TokenTargets | None:
    """The teacher's logits at exactly these target tokens; None where there are none or they are of another answer."""
    if row_id not in logits:
        return None
    targets, count = logits[row_id], len(answer_ids)
    if targets.answer_ids[:count].tolist() != list(answer_ids):
        return None
    return TokenTargets(targets.answer_ids[:count], targets.top_ids[:count], targets.top_logprobs[:count])


def sample_passages(row: Row, data: DataConfig, rng: random.Random) -> tuple[list[RowPassage], bool]:
    """Choose an example's passages: relevant ones first, then others, in shuffled order.

    The second value says that the relevant ones were left out on purpose (`data.empty_share`).
    """
    relevant = [passage for passage in row.passages if passage.relevant]
    others = [passage for passage in row.passages if not passage.relevant]
    empty = bool(relevant and others) and rng.random() < data.empty_share
    wanted = data.passages or len(row.passages)
    rng.shuffle(relevant)
    rng.shuffle(others)
    chosen = ([] if empty else relevant[:wanted]) + others
    chosen = chosen[:wanted]
    rng.shuffle(chosen)
    return chosen, empty


def most_relevant(passages: Sequence[RowPassage], count: int) -> list[RowPassage]:
    """The `count` passages of highest relevance, relevant ones before all, in the order they stand in.

    Of equal ones the first.
    """
    best = [(not passage.relevant, -(passage.relevance or 0)) for passage in passages]
    by_relevance = sorted(range(len(passages)), key=best.__getitem__)
    return [passages[index] for index in sorted(by_relevance[:count])]


def find_hits(
    model: Model, request: PreparedRequest, passages: Sequence[RowPassage], answers: Sequence[str]
) -> list[list[int]]:
    """For each chunk, where a pointer finds an answer: weak labels, an answer string found in the passage is enough.

    With windows (`pointer_window` > 1) a pointer is right at an answer's first token, or at the first that the same
    token of the compressor covers (`readouts.candidates`); without, at any of the answer's tokens.
    Passages known not to be relevant have no right place, and no passage has one for yes or no.
    """
    spans = {span for answer in answers if (span := answer.strip()) and is_span(span)}
    pattern = places_pattern(spans)
    windowed = model.config.compressor.pointer_window > 1
    spans_of: dict[int, list[tuple[int, int]]] = {}
    for index, passage in enumerate(passages):
        irrelevant = passage.judged and not passage.relevant
        spans_of[index] = [] if irrelevant or not spans else [m.span() for m in pattern.finditer(passage.content)]
    hits = []
    for chunk in request.chunks:
        found: set[int] = set()
        for start, end in spans_of[chunk.passage]:
            tokens = [i for i, (a, b) in enumerate(chunk.generator_spans) if a < end and b > start]
            if windowed:
                tokens = [chunk.compressor_index.index(chunk.compressor_index[token]) for token in tokens[:1]]
            found.update(tokens)
        hits.append(sorted(found))
    return hits


def prompt_tokens(model: Model, request: PreparedRequest, rows: Sequence[ChunkRow], mode: Mode) -> int:
    """Positions of the generator's prompt; in `hybrid` the most there can be: scores decide what is shown as text."""
    return background_tokens(model, request, rows, mode) + len(model.template.question_ids(request.query))


def background_tokens(model: Model, request: PreparedRequest, rows: Sequence[ChunkRow], mode: Mode) -> int:
    """Those of `prompt_tokens` before the question."""
    texts = sorted(map(len, passage_text_ids(request)), reverse=True)
    shown = {"compressed": 0, "hybrid": model.config.prompt.hybrid_top, "text": len(texts)}[mode]
    memory = 0 if mode == "text" else sum(row.memory_tokens for row in rows)
    frame = model.template.frame(request.query, len(texts))[-1] - len(model.template.question_ids(request.query))
    return frame + memory + sum(texts[:shown])


def question_tokens(model: Model, question: Question) -> int:
    """Positions from where the passages end to the end of the answer."""
    return len(model.template.question_ids(question.query)) + len(question.answer_ids)


def example_tokens(model: Model, example: TrainExample) -> int:
    """Positions an example costs, compressor rows and generator prompt together, before padding."""
    rows = sum(model.compressor.row_format.length(row) for row in example.rows)
    if not example.questions:
        return rows
    background = background_tokens(model, example.request, example.rows, example.mode)
    return rows + background + sum(question_tokens(model, question) for question in example.questions)


def micro_batches(model: Model, examples: Sequence[TrainExample], max_tokens: int) -> list[list[TrainExample]]:
    """Split a batch into pieces of at most `max_tokens` positions (one example at least), like modes together."""
    pieces: list[list[TrainExample]] = []
    used = 0
    costs = [example_tokens(model, example) for example in examples]
    for index in sorted(range(len(examples)), key=lambda index: (examples[index].mode, costs[index])):
        example, cost = examples[index], costs[index]
        if not pieces or used + cost > max_tokens or pieces[-1][0].mode != example.mode:
            pieces.append([])
            used = 0
        pieces[-1].append(example)
        used += cost
    return pieces
