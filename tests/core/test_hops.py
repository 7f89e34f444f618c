"""The second hop: what is read again and for what, what counts of both readings, and what it is good for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.answer import answer
from core.checkpoint import load_checkpoint
from core.hops import second_hop
from core.model import Model
from core.passages import Passage
from core.pipeline import compress, prepare, rerank, rows_of
from core.planning import plan_request
from core.policy import Policy, TokenCosts
from core.rows import ChunkRow
from core.sampling import GenerationOptions
from core.tokenization import encode
from tests.tiny_models import TEXT
from tests.tiny_pipeline import PASSAGES, QUERY, tiny_model

LONG = Passage(TEXT.strip())
DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
BRIDGE = (
    "How many people live in the town where the poet Lena Aalto was born?",
    (
        Passage("The poet Lena Aalto was born in Raahe and wrote in Finnish."),
        Passage("Raahe is a town on the coast where 24,000 people live."),
        Passage("Porvoo is a town in the south where 51,000 people live."),
    ),
)


@pytest.fixture(scope="module", params=["n_layers", "encoder"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_bert: Path) -> Model:
    return tiny_model(tiny_llama, tiny_bert if request.param == "encoder" else None, readout="pointer")


def both(
    model: Model, passages: tuple[Passage, ...] = PASSAGES
) -> tuple[list[ChunkRow], dict[int, ChunkRow], ChunkRow]:
    """The rows of both hops, and the best row of the first."""
    request = prepare(model, QUERY, passages)
    rows, compressed = rows_of(model, request), compress(model, [request])[0]
    chunks = [chunk for passage in compressed for chunk in passage.chunks]
    best = max(range(len(rows)), key=lambda i: chunks[i].score)
    return rows, second_hop(model, rows, chunks), rows[best]


def test_the_most_relevant_passage_joins_the_query_for_the_others(model: Model) -> None:
    rows, again, best = both(model)
    query, joint = rows[0].query_ids, encode(model.compressor.tokenizer, "\n").ids
    assert list(again) == [i for i, row in enumerate(rows) if row.chunk.passage != best.chunk.passage]
    for i, second in again.items():
        assert (second.chunk, second.memory_tokens) == (rows[i].chunk, rows[i].memory_tokens)
        assert second.query_ids[: len(query) + len(joint)] == query + joint
        joined = second.query_ids[len(query) + len(joint) :]
        wanted = best.chunk.compressor_ids
        assert joined[: len(wanted)] == wanted[: len(joined)] != []
        assert len(second.query_ids) <= model.config.compressor.query_tokens


def test_a_long_passage_joins_as_far_as_the_query_has_room(model: Model) -> None:
    _, again, _ = both(model, (LONG, LONG))
    assert {len(row.query_ids) for row in again.values()} == {model.config.compressor.query_tokens}


def test_nothing_is_read_again_where_there_is_nothing_to_read(model: Model) -> None:
    assert both(model, PASSAGES[:1])[1] == {}
    request = prepare(model, " the" * model.config.compressor.query_tokens, PASSAGES)
    one, two = (compress(model, [request], hops=hops)[0] for hops in (1, 2))
    assert [passage.score for passage in one] == [passage.score for passage in two]


def test_the_passage_that_joined_stays_as_it_was_and_first(model: Model) -> None:
    _, _, best = both(model)
    request = prepare(model, QUERY, PASSAGES)
    one, two = (compress(model, [request], hops=hops)[0] for hops in (1, 2))
    lead = rerank(one)[0]
    assert lead == best.chunk.passage == rerank(two)[0]
    for before, after in zip(one, two, strict=True):
        if before.index == lead:
            torch.testing.assert_close(after.memory, before.memory)
            assert after.score >= before.score - 1e-5
        else:
            assert after.score != before.score


def test_requests_side_by_side_are_as_alone(model: Model) -> None:
    requests = [prepare(model, query, PASSAGES[:count]) for query, count in ((QUERY, 4), ("Who?", 1), ("Bread", 3))]
    together = compress(model, requests, max_batch_tokens=150, hops=2)
    for request, got in zip(requests, together, strict=True):
        alone = compress(model, [request], hops=2)[0]
        assert [passage.score for passage in got] == pytest.approx([passage.score for passage in alone], abs=1e-4)
        for ours, theirs in zip(got, alone, strict=True):
            torch.testing.assert_close(ours.memory, theirs.memory, atol=1e-4, rtol=1e-4)


def test_what_is_not_to_be_read_stays_unread(model: Model) -> None:
    request = prepare(model, QUERY, PASSAGES)
    compressed = compress(model, [request], read=[{0, 2}], hops=2)[0]
    assert [passage.relevance is not None for passage in compressed] == [True, False, True, False]
    pair = prepare(model, QUERY, [PASSAGES[0], PASSAGES[2]])
    expected = [passage.score for passage in compress(model, [pair], hops=2)[0]]
    assert [compressed[i].score for i in (0, 2)] == pytest.approx(expected, abs=1e-4)


def test_auto_counts_what_is_read_twice(tiny_llama: Path) -> None:
    """Where compressing costs half of what it saves, it pays once, and twice it does not."""
    model = tiny_model(tiny_llama)
    request = prepare(model, QUERY, (LONG, LONG))
    free = plan_request(model, request, Policy("auto"))
    assert free.read == {0, 1}
    row = rows_of(model, request)[0]
    saved = len(row.chunk.generator_ids) - row.memory_tokens
    priced = TokenCosts(compressor_s=saved / (2 * model.compressor.row_format.length(row)), prefill_s=1.0)
    model = replace(model, costs=priced)
    assert plan_request(model, request, Policy("auto")).read == {0, 1}
    assert plan_request(model, request, Policy("auto", hops=2)).read == set()


@pytest.mark.parametrize("mode", ["compressed", "hybrid"])
def test_the_demo_follows_one_passage_to_another(smollm2: Path, minilm: Path, mode: str) -> None:
    """Real weights: where the poet was born stands in one passage, and how many live there in another."""
    model = load_checkpoint(DEMO, verify=False)
    options = GenerationOptions(max_new_tokens=8)
    one, two = (answer(model, *BRIDGE, Policy(mode, hops=hops), 8, options) for hops in (1, 2))  # type: ignore[arg-type]  # a parameter is a str
    assert (one.text, two.text) == ("51,000", "24,000")
    assert (rerank(one.passages), rerank(two.passages)) == ([0, 2, 1], [0, 1, 2])
