"""What is kept between requests: equal rows are computed once, chunks are read once, and answers stay what they are."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.byte_lru import ByteLRU
from core.compressed import CompressedChunk
from core.config import CompressorConfig, Config, GeneratorConfig
from core.model import Model, build_model
from core.passages import Passage
from core.pipeline import compress, compress_rows, prepare, rows_of
from service import lane as lane_module
from service.caches.embeddings import SharedRows
from service.generation.torch_engine import TorchEngine
from service.jobs import Compressed, Failed, Finished, Job, JobEvent
from service.lane import Lane
from service.metrics import Metrics
from tests.service.calls import QUERY
from tests.service.calls import answer as ask
from tests.service.conftest import Serve, make_settings
from tests.service.test_checkpoints import change, serve_checkpoint
from tests.tiny_models import TEXT

MEBIBYTE = 2**20
# No two chunks alike, and one passage of several chunks.
PASSAGES: list[Any] = [
    " ".join(TEXT.split()[:120]),
    {"title": "Bread", "text": TEXT.splitlines()[5]},
    TEXT.splitlines()[6],
]
TEXTS = ("Bread is made of flour.", "The moon moves around the earth.", "Glass is made by melting sand.")


@pytest.fixture(scope="module")
def document_first(tiny_llama: Path) -> Model:
    config = Config(
        compressor=CompressorConfig(
            n_layers=2, chunk_tokens=64, rates=(16, 8), order="document_first", readout="pointer"
        ),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    return build_model(config, seed=7)


def answer(client: httpx.Client, **values: Any) -> dict[str, Any]:
    return ask(client, **{"passages": PASSAGES, **values})


def usage(got: dict[str, Any]) -> tuple[int, int]:
    return got["usage"]["cached_chunks"], got["usage"]["cached_documents"]


def plain(got: dict[str, Any]) -> dict[str, Any]:
    """A response without what says how it came about."""
    hidden = {"cached_chunks": 0, "cached_documents": 0}
    return {**got, "timings_ms": None, "usage": {**got["usage"], **hidden}}


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"scaledown_{name} "))


def assert_like(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["answer"] == expected["answer"]
    relevance = [[passage["relevance"] for passage in each["passages"]] for each in (got, expected)]
    assert relevance[0] == pytest.approx(relevance[1], abs=1e-5)


def test_an_equal_request_is_not_computed_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(embedding_cache_bytes=MEBIBYTE) as client:
        first = answer(client, explain=True)
        assert usage(first) == (0, 0)
        computed: list[int] = []

        def counted(model: Model, rows: Any) -> list[CompressedChunk]:
            computed.append(len(rows))
            return compress_rows(model, rows)

        monkeypatch.setattr(lane_module, "compress_rows", counted)
        again = answer(client, explain=True)
        chunks = again["usage"]["cached_chunks"]
        assert chunks > len(PASSAGES)
        assert plain(again) == plain(first)
        ranked = client.post("/rerank", json={"query": QUERY, "passages": PASSAGES[::-1]}).json()
        assert usage(ranked) == (chunks, 0)
        assert {2 - each["index"]: each["relevance"] for each in ranked["results"]} == {
            each["index"]: each["relevance"] for each in first["passages"]
        }
        compressed = client.post("/compress", json={"query": QUERY, "passages": PASSAGES}).json()
        assert usage(compressed) == (chunks, 0)
        assert computed == []
        assert usage(answer(client, query="Who?")) == (0, 0)
        assert usage(answer(client, rate=8)) == (0, 0)
        assert usage(answer(client, passages=[*PASSAGES[1:], "Something new."])) == (2, 0)
        assert metric(client, 'cache_lookups_total{cache="embedding",result="hit"}') == 3 * chunks + 2
        assert metric(client, 'cache_lookups_total{cache="embedding",result="miss"}') > chunks
        assert 0 < metric(client, 'cache_bytes{cache="embedding"}') <= MEBIBYTE


def test_the_limit_holds_and_what_leaves_is_counted(serve: Serve) -> None:
    limit = 8000
    with serve(embedding_cache_bytes=limit) as client:
        for number in range(4):
            answer(client, query=f"Question {number}?")
            assert 0 < metric(client, 'cache_bytes{cache="embedding"}') <= limit
        assert metric(client, 'cache_evictions_total{cache="embedding"}') > 0


def test_a_version_is_never_served_what_another_made(root: Path) -> None:
    with serve_checkpoint(root / "first", embedding_cache_bytes=MEBIBYTE, keep_checkpoints=1) as client:
        first = answer(client)
        change(client, "activate", "second")
        second = answer(client)
        assert usage(second) == (0, 0)
        assert [p["relevance"] for p in second["passages"]] != [p["relevance"] for p in first["passages"]]
        change(client, "rollback")
        again = answer(client)
        assert usage(again)[0] > 0
        assert plain(again) == plain(first)


def test_what_an_unloaded_version_kept_is_freed(root: Path) -> None:
    with serve_checkpoint(root / "first", embedding_cache_bytes=MEBIBYTE, keep_checkpoints=0) as client:
        answer(client)
        assert metric(client, 'cache_bytes{cache="embedding"}') > 0
        change(client, "activate", "second")
        assert client.post("/rerank", json={"query": "Who?", "passages": ["Bread."]}).status_code == 200
        one_row = metric(client, 'cache_bytes{cache="embedding"}')
        answer(client, query="Who?", passages=["Bread."])
        assert metric(client, 'cache_bytes{cache="embedding"}') == one_row < 2000


def test_known_chunks_answer_as_unknown_ones(serve: Serve, document_first: Model) -> None:
    queries = [QUERY, "What is bread made of?", "How long does the moon take, and around what does it move?"]
    with serve(document_first, document_cache_bytes=0) as client:
        expected = [answer(client, query=query) for query in queries]
        assert {usage(each) for each in expected} == {(0, 0)}
        assert client.get("/readyz").json()["document_cache"] == "off: document_cache_bytes is 0"
    with serve(document_first) as client:
        got = [answer(client, query=query) for query in queries]
        chunks = usage(got[1])[1]
        assert [usage(each) for each in got] == [(0, 0), (0, chunks), (0, chunks)]
        assert chunks > len(PASSAGES)
        for one, other in zip(got, expected, strict=True):
            assert_like(one, other)
        assert client.get("/readyz").json()["document_cache"] == "on"
        assert metric(client, 'cache_lookups_total{cache="document",result="hit"}') == 2 * chunks
        assert metric(client, 'cache_lookups_total{cache="document",result="miss"}') == chunks
        assert metric(client, 'cache_bytes{cache="document"}') > 0


class Run:
    """A lane that is driven by hand, and what its jobs were told. `computed` holds the rows of each batch."""

    def __init__(self, model: Model, limit: int) -> None:
        self.model = model
        values, metrics = make_settings(batch_tokens=128), Metrics()
        self.memory: ByteLRU[tuple[int, bytes], CompressedChunk] = ByteLRU(limit)
        engine = TorchEngine(model, values, metrics)
        self.lane = Lane(model, values, metrics, engine, SharedRows(self.memory))
        self.told: dict[Job, list[JobEvent]] = {}

    def add(self, query: str, texts: list[str], hops: int = 1) -> Job:
        request = prepare(self.model, query, [Passage(text) for text in texts])
        rows = rows_of(self.model, request)
        told: list[JobEvent] = []
        job = Job(None, request, rows, list(range(len(rows))), [None] * len(rows), None, told.append, hops)
        self.told[job] = told
        self.lane.add(job)
        return job

    def finish(self) -> None:
        for _ in range(100):
            if not self.lane.jobs:
                return
            self.lane.advance()
        raise AssertionError("the lane never comes to an end")

    def assert_right(self, job: Job) -> None:
        compressed, finished = self.told[job]
        assert isinstance(compressed, Compressed)
        assert isinstance(finished, Finished)
        (lone,) = compress(self.model, [job.request], max_batch_tokens=1, hops=job.hops)
        chunks, expected = ([c for p in each for c in p.chunks] for each in (compressed.passages, lone))
        for chunk, alone in zip(chunks, expected, strict=True):
            assert chunk.score == pytest.approx(alone.score, abs=1e-5)
            torch.testing.assert_close(chunk.memory, alone.memory, atol=1e-5, rtol=1e-5)
            assert (chunk.start, chunk.end, chunk.tokens) == (alone.start, alone.end, alone.tokens)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The chunks that lanes have had computed, one entry a row."""
    rows_seen: list[tuple[int, ...]] = []

    def counted(model: Model, rows: Any) -> list[CompressedChunk]:
        rows_seen.extend(tuple(row.query_ids + row.chunk.compressor_ids) for row in rows)
        return compress_rows(model, rows)

    monkeypatch.setattr(lane_module, "compress_rows", counted)
    return rows_seen


NOTHING_KEPT = 1  # bytes: equal rows in flight still share their work


def test_equal_rows_in_flight_are_computed_once(model: Model, computed: list[tuple[int, ...]]) -> None:
    run = Run(model, NOTHING_KEPT)
    jobs = [run.add("Who?", list(TEXTS)), run.add("Who?", [TEXTS[1], TEXTS[1]]), run.add("When?", [TEXTS[1]])]
    run.finish()
    assert len(computed) == len(set(computed)) == len(TEXTS) + 1
    assert len(run.memory) == 0
    for job in jobs:
        run.assert_right(job)
    off = Run(model, 0)
    for _ in range(2):
        off.add("Who?", [TEXTS[0]])
    off.finish()
    assert len(computed) == len(TEXTS) + 3


def test_a_row_outlives_the_request_that_asked_for_it_first(model: Model, computed: list[tuple[int, ...]]) -> None:
    run = Run(model, NOTHING_KEPT)
    leaving, staying = run.add("Who?", list(TEXTS)), run.add("Who?", [TEXTS[2], TEXTS[0]])
    run.lane.cancel(leaving)
    run.finish()
    assert run.told[leaving] == []
    run.assert_right(staying)
    assert len(computed) == 2


def test_a_request_that_fails_takes_no_other_with_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run, broken = Run(model, NOTHING_KEPT), threading.Event()

    def breaks_once(model: Model, rows: Any) -> list[CompressedChunk]:
        if not broken.is_set():
            broken.set()
            raise RuntimeError("once")
        return compress_rows(model, rows)

    monkeypatch.setattr(lane_module, "compress_rows", breaks_once)
    first, second = run.add("Who?", [TEXTS[0]]), run.add("Who?", [TEXTS[0]])
    run.finish()
    assert [type(event) for event in run.told[first]] == [Failed]
    run.assert_right(second)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.sampled_from(["Who?", "When?"]),
            st.lists(st.sampled_from(TEXTS), min_size=1),
            st.sampled_from([1, 2]),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("advance")),
    ),
    max_size=14,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, limit=st.sampled_from([NOTHING_KEPT, 6000, MEBIBYTE]))
def test_whatever_comes_and_goes_each_gets_its_own(model: Model, actions: list[Any], limit: int) -> None:
    run, cancelled = Run(model, limit), set()
    for kind, *values in actions:
        jobs = list(run.told)
        if kind == "add":
            run.add(*values)
        elif kind == "advance":
            run.lane.advance()
        elif jobs and not jobs[values[0] % len(jobs)].done:
            job = jobs[values[0] % len(jobs)]
            run.lane.cancel(job)
            cancelled.add(job)
    run.finish()
    for job in run.told:
        if job not in cancelled:
            run.assert_right(job)
    assert run.memory.bytes <= limit
