"""`explain`: the words that memory embeddings came from, over HTTP and by hand-made attention."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.compressed import CompressedChunk
from core.config import CompressorConfig, Config, GeneratorConfig
from core.model import Model, build_model
from core.passages import Passage
from core.pipeline import PreparedRequest, gather, prepare
from core.readouts import PointerReadout
from service.cli.__main__ import main
from service.evidence import passages_evidence
from service.response_schemas import EvidenceSpan
from tests.service.calls import PASSAGES, QUERY, answer, events
from tests.service.conftest import Serve

FIELDS = [{"title": "", "text": p} if isinstance(p, str) else {"title": "", **p} for p in PASSAGES]


@pytest.fixture(scope="module")
def pointer_model(tiny_llama: Path) -> Model:
    """A pointer that has made up its mind: random, but its softmax is sharp."""
    compressor = CompressorConfig(n_layers=2, chunk_tokens=64, rates=(8,), readout="pointer", pointer_window=2)
    model = build_model(Config(compressor=compressor, generator=GeneratorConfig(base_model=str(tiny_llama))), seed=7)
    assert isinstance(model.compressor.readout, PointerReadout)
    with torch.no_grad():
        model.compressor.readout.query.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def pointing(serve: Serve, pointer_model: Model) -> Iterator[httpx.Client]:
    with serve(pointer_model) as client:
        yield client


def compress(client: httpx.Client, **values: Any) -> list[dict[str, Any]]:
    response = client.post("/compress", json={"query": QUERY, "passages": PASSAGES, **values})
    assert response.status_code == 200, response.text
    return list(response.json()["passages"])


def check_spans(fields: dict[str, str], spans: list[dict[str, Any]]) -> None:
    """Spans lie inside their field, hold words, do not meet, and share at most the whole attention."""
    taken: set[tuple[str, int]] = set()
    for span in spans:
        words = fields[span["field"]][span["start"] : span["end"]]
        assert 0 <= span["start"] < span["end"] <= len(fields[span["field"]])
        assert words == words.strip()
        places = {(span["field"], place) for place in range(span["start"], span["end"])}
        assert not taken & places
        taken |= places
    weights = [span["weight"] for span in spans]
    assert weights == sorted(weights, reverse=True)
    assert all(0.05 <= weight <= 1 for weight in weights)
    assert sum(weights) <= 1


def test_every_embedding_says_where_it_came_from(pointing: httpx.Client) -> None:
    passages = compress(pointing, explain=True)
    for passage, fields in zip(passages, FIELDS, strict=True):
        assert len(passage["evidence"]) == passage["memory_tokens"]
        for spans in passage["evidence"]:
            check_spans(fields, spans)
    spans = [span for passage in passages for embedding in passage["evidence"] for span in embedding]
    assert len({(span["start"], span["end"]) for span in spans}) > 5  # they do point at different places
    assert {span["field"] for span in passages[1]["evidence"][0]} <= {"title", "text"}


def test_answer_and_stream_give_the_same_evidence(pointing: httpx.Client) -> None:
    evidence = [passage["evidence"] for passage in compress(pointing, explain=True)]
    whole = answer(pointing, explain=True)
    assert [passage["evidence"] for passage in whole["passages"]] == evidence
    body = {"query": QUERY, "passages": PASSAGES, "max_new_tokens": 8, "explain": True, "stream": True}
    got = events(pointing.post("/answer", json=body).text)
    assert got[0] == ("passages", {"passages": whole["passages"], "checkpoint": "untrained"})
    assert got[-1][1]["passages"] == whole["passages"]
    asked = {"model": "scaledown", "messages": [{"role": "user", "content": QUERY}], "documents": PASSAGES}
    chat = pointing.post("/v1/chat/completions", json={**asked, "max_tokens": 8, "explain": True}).json()
    assert chat["scaledown"]["passages"] == whole["passages"]


@pytest.mark.parametrize("command", ["answer", "compress"])
def test_the_command_shows_the_words(command: str, pointing: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    text = FIELDS[0]["text"]
    (passage,) = compress(pointing, passages=[text], explain=True)
    span = next(span for spans in passage["evidence"] for span in spans)
    asked = [command, QUERY, text, "--url", str(pointing.base_url)]
    assert main([*asked, "--explain"]) == 0
    assert f"{text[span['start'] : span['end']]} ({span['weight']:.0%})" in "".join(capsys.readouterr())
    assert main(asked) == 0
    assert "read from" not in "".join(capsys.readouterr())


def test_no_evidence_where_no_embedding_was_read_from_attention(client: httpx.Client, pointing: httpx.Client) -> None:
    assert {p["evidence"] is None for p in answer(pointing)["passages"]} == {True}  # nobody asked
    assert {p["evidence"] is None for p in answer(pointing, explain=True, mode="text")["passages"]} == {True}
    hybrid = answer(pointing, explain=True, mode="hybrid")["passages"]
    assert sorted((p["mode"], p["evidence"] is None) for p in hybrid) == [
        ("compressed", False),
        ("compressed", False),
        ("hybrid", False),
    ]
    assert {p["evidence"] is None for p in compress(client, explain=True)} == {True}  # the memory readout


def test_embeddings_given_back_have_no_evidence(pointing: httpx.Client) -> None:
    stored = compress(pointing, store=True)
    inline = {"embeddings": stored[0]["embeddings"], "text": FIELDS[0]["text"]}
    passages = [inline, {"embedding_id": stored[1]["embedding_id"]}, PASSAGES[2]]
    got = answer(pointing, passages=passages, explain=True)["passages"]
    assert [passage["evidence"] is None for passage in got] == [True, True, False]


def evidence_by_hand(model: Model, passage: Passage, weights: Tensor) -> list[list[EvidenceSpan]]:
    """Evidence of one passage whose attention over all its tokens, (l, tokens), is given; chunks as they fall."""
    request = prepare(model, QUERY, [passage])
    done, first = [], 0
    for chunk in request.chunks:
        count = len(chunk.generator_ids)
        part = weights[:, first : first + count]
        done.append(CompressedChunk(chunk.start, chunk.end, count, torch.zeros(len(part), 1), 0.0, part))
        first += count
    evidence = passages_evidence(request, gather(model, request, done))[0]
    assert evidence is not None
    return evidence


def token_spans(model: Model, passage: Passage) -> tuple[PreparedRequest, list[tuple[int, int]]]:
    request = prepare(model, QUERY, [passage])
    return request, [span for chunk in request.chunks for span in chunk.generator_spans]


def test_spans_are_the_words_pointed_at(pointer_model: Model) -> None:
    passage = Passage("She was born in Warsaw in 1867. 👩‍👩‍👧 Warsaw!", title="Marie Curie")
    _, spans = token_spans(pointer_model, passage)
    weights = torch.zeros(2, len(spans))
    content = passage.content
    first, second = content.index("Warsaw"), content.rindex("Warsaw")
    for token, (start, end) in enumerate(spans):
        if start <= content.index("Curie") + 4 and end > content.index("Curie"):
            weights[0, token] = 1
        if (start < first + 6 and end > first) or (start < second + 6 and end > second):
            weights[1, token] = 1
    weights /= weights.sum(1, keepdim=True)
    title, text = evidence_by_hand(pointer_model, passage, weights)
    assert [(span.field, passage.title[span.start : span.end]) for span in title] == [("title", "Curie")]
    assert title[0].weight == pytest.approx(1, abs=2e-4)
    assert [(span.field, passage.text[span.start : span.end]) for span in text] == [("text", "Warsaw")] * 2
    assert sum(span.weight for span in text) == pytest.approx(1, abs=4e-4)


def test_faint_attention_is_left_out(pointer_model: Model) -> None:
    passage = Passage("The river Rhine rises in the Swiss Alps and flows north to the sea.")
    _, spans = token_spans(pointer_model, passage)
    weights = torch.full((1, len(spans)), 0.01)
    weights[0, 3] = 1 - 0.01 * (len(spans) - 1)
    (found,) = evidence_by_hand(pointer_model, passage, weights)
    assert [span.weight for span in found] == [pytest.approx(float(weights[0, 3]), abs=2e-4)]


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=80).filter(lambda text: bool(text.strip()))


@given(text=TEXTS, title=st.text(st.characters(codec="utf-8"), max_size=20), seed=st.integers(0, 1000))
def test_any_text_keeps_its_spans_inside(pointer_model: Model, text: str, title: str, seed: int) -> None:
    passage = Passage(text, title)
    _, spans = token_spans(pointer_model, passage)
    random = torch.Generator().manual_seed(seed)
    weights = (torch.randn(3, len(spans), generator=random) * 2).softmax(-1)
    fields = {"title": title, "text": text}
    for embedding in evidence_by_hand(pointer_model, passage, weights):
        check_spans(fields, [span.model_dump() for span in embedding])
