"""Memory embeddings leave the service and come back: bit for bit in float32, bounded, checked."""

import contextlib
import hashlib
import itertools
import math
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from core.errors import InputError
from service.embedding_store import EmbeddingStore, StoredPassage
from service.embeddings_codec import Dtype, Encoding, decode_embeddings, encode_embeddings
from service.metrics import Metrics
from tests.service.calls import PASSAGES, QUERY, answer, error
from tests.service.conftest import Serve

SHAPES = st.tuples(st.integers(1, 5), st.just(4))
FLOATS = arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(array=FLOATS, encoding=st.sampled_from(["base64", "json"]))
def test_float32_is_exact(array: np.ndarray[Any, np.dtype[np.float32]], encoding: Encoding) -> None:
    memory = torch.from_numpy(array)
    data = encode_embeddings(memory, "float32", encoding)
    assert torch.equal(decode_embeddings(data, "float32", array.shape, 4, 5, "e"), memory)


def test_float16_is_near_and_half_the_size() -> None:
    memory = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    exact, lossy = encode_embeddings(memory, "float32", "base64"), encode_embeddings(memory, "float16", "base64")
    assert len(lossy) < 0.51 * len(exact)
    decoded = decode_embeddings(lossy, "float16", (8, 64), 64, 8, "e")
    assert (decoded - memory).abs().max() < 2**-11 * memory.abs().max()


@given(
    data=st.binary(max_size=80).map(lambda raw: raw.decode("latin-1"))
    | st.lists(st.lists(st.floats(), max_size=5), max_size=3),
    dtype=st.sampled_from(["float32", "float16"]),
    shape=st.lists(st.integers(0, 2**40), max_size=3),
)
def test_what_is_not_embeddings_is_refused(data: Any, dtype: Dtype, shape: list[int]) -> None:
    with contextlib.suppress(InputError):
        memory = decode_embeddings(data, dtype, shape, 4, 8, "e")
        assert list(memory.shape) == shape
        assert memory.isfinite().all()


@pytest.mark.parametrize(
    ("held_in", "number", "fits"),
    [(torch.bfloat16, 3.4e38, 3.3e38), (torch.float16, 65520.0, 65504.0), (torch.float32, 3.5e38, 3.4e38)],
)
def test_a_number_that_the_generator_cannot_hold_is_refused(held_in: torch.dtype, number: float, fits: float) -> None:
    decode_embeddings([[1.0, fits]], "float32", (1, 2), 2, 8, "e", held_in)
    with pytest.raises(InputError, match=r"e\.data") as caught:
        decode_embeddings([[1.0, -number]], "float32", (1, 2), 2, 8, "e", held_in)
    assert str(held_in).removeprefix("torch.") in caught.value.message


def compress(client: httpx.Client, **values: Any) -> dict[str, Any]:
    response = client.post("/compress", json={"query": QUERY, "passages": PASSAGES, **values})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_compress_says_what_became_of_each_chunk(client: httpx.Client) -> None:
    got = compress(client, rate=8)
    for passage, sent in zip(got["passages"], PASSAGES, strict=True):
        content = (
            sent if isinstance(sent, str) else f"{sent['title']}\n{sent['text']}" if "title" in sent else sent["text"]
        )
        spans = [(chunk["start"], chunk["end"]) for chunk in passage["chunks"]]
        assert spans[0][0] == 0
        assert spans[-1][1] == len(content)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
        assert passage["tokens"] == sum(chunk["tokens"] for chunk in passage["chunks"])
        assert passage["memory_tokens"] == sum(chunk["memory_tokens"] for chunk in passage["chunks"])
        assert passage["embeddings"]["shape"] == [passage["memory_tokens"], 64]
        assert passage["rate"] == pytest.approx(passage["tokens"] / passage["memory_tokens"], abs=1e-3)
        assert passage["embedding_id"] is None
    assert got["usage"]["text_tokens"] == sum(passage["tokens"] for passage in got["passages"])
    assert got["usage"]["memory_tokens"] == sum(passage["memory_tokens"] for passage in got["passages"])


def plain(got: dict[str, Any]) -> dict[str, Any]:
    """An answer without what depends on whether the compressor had to run."""
    return {**got, "timings_ms": None, "plan": {**got["plan"], "rate": None}}


@pytest.mark.parametrize("encoding", ["base64", "json"])
def test_embeddings_answer_like_the_passages_they_came_from(client: httpx.Client, encoding: str) -> None:
    direct = answer(client)
    given = [
        {"id": passage["id"], "embeddings": passage["embeddings"]}
        for passage in compress(client, encoding=encoding)["passages"]
    ]
    again = answer(client, passages=given)
    assert plain(again) == plain(direct)


def test_as_json_there_may_be_as_many_numbers_out_as_in(client: httpx.Client) -> None:
    chunk = "moon " * 60
    most = 250_000 // math.prod(compress(client, passages=[chunk])["passages"][0]["embeddings"]["shape"])
    got = compress(client, passages=[chunk * (most // 190)] * 190, encoding="json")["passages"]
    assert sum(math.prod(each["embeddings"]["shape"]) for each in got) > 200_000
    given = [{"embeddings": each["embeddings"]} for each in got]
    assert answer(client, passages=given, max_new_tokens=1)["usage"]["prompt_tokens"] > 200_000 / 64
    body = {"query": QUERY, "passages": [chunk * (most // 190 + 2)] * 190}
    refused = client.post("/compress", json={**body, "encoding": "json"})
    assert refused.status_code == 413
    assert (error(refused)["field"], error(refused)["limit"]) == ("encoding", 250_000)
    assert error(refused)["message"].endswith("as json: ask for base64")
    assert client.post("/compress", json=body).status_code == 200


def test_embeddings_by_reference_bring_their_text_for_hybrid(client: httpx.Client) -> None:
    stored = [
        {"id": passage["id"], "embedding_id": passage["embedding_id"]}
        for passage in compress(client, store=True)["passages"]
    ]
    for mode in ("compressed", "hybrid", "text"):
        direct, again = answer(client, mode=mode), answer(client, mode=mode, passages=stored)
        assert plain(again) == plain(direct)
        assert (direct["plan"]["rate"], again["plan"]["rate"]) == (16, None)  # nothing was left to compress


def test_embeddings_and_text_mix(client: httpx.Client) -> None:
    embeddings = compress(client)["passages"][0]["embeddings"]
    mixed = [{"embeddings": embeddings}, *PASSAGES[1:]]
    direct, again = answer(client), answer(client, passages=mixed)
    assert again["answer"] == direct["answer"]
    assert again["usage"] == direct["usage"]


def test_embeddings_without_text_stay_compressed(client: httpx.Client) -> None:
    embeddings = compress(client)["passages"][0]["embeddings"]
    body = {"query": QUERY, "passages": [{"embeddings": embeddings}], "mode": "text"}
    refusal = error(client.post("/answer", json=body))
    assert refusal["field"] == "passages.0.text"
    assert answer(client, passages=[{"embeddings": embeddings}], mode="hybrid")["passages"][0]["mode"] == "compressed"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"shape": [1, 64]}, "data"),
        ({"shape": [3, 63]}, "shape"),
        ({"shape": [0, 64]}, "shape"),
        ({"shape": [10**9, 64]}, "shape"),
        ({"shape": [64]}, "shape"),
        ({"dtype": "float16"}, "data"),
        ({"dtype": "float64"}, "dtype"),
        ({"encoding": "json"}, None),
        ({"encoding": "hex"}, "encoding"),
        ({"data": "AAAA"}, "data"),
        ({"data": 5}, "data"),
        ({"data": [[0.0] * 64]}, None),
        ({"checkpoint": "other@0123456789ab"}, "checkpoint"),
        ({"score": "high"}, "score"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 131_000}, "tokens"),
        ({"pickle": "x"}, "pickle"),
        ({"query_sha256": "abc"}, "query_sha256"),
    ],
    ids=str,
)
def test_wrong_embeddings_are_refused(client: httpx.Client, change: dict[str, Any], field: str | None) -> None:
    embeddings = {**compress(client)["passages"][0]["embeddings"], **change}
    response = client.post("/answer", json={"query": QUERY, "passages": [{"embeddings": embeddings}]})
    assert response.status_code == (413 if change == {"shape": [10**9, 64]} else 422)
    expected = "passages.0.embeddings" + (f".{field}" if field else "")
    assert error(response)["field"] == expected


def test_tokens_are_no_more_than_the_embeddings_can_stand_for(client: httpx.Client) -> None:
    embeddings = compress(client, rate=16)["passages"][0]["embeddings"]
    most = 16 * embeddings["shape"][0]
    assert answer(client, passages=[{"embeddings": {**embeddings, "tokens": most}}])["usage"]["tokens_saved"] > 0
    body = {"query": QUERY, "passages": [{"embeddings": {**embeddings, "tokens": most + 1}}]}
    refused = client.post("/answer", json=body)
    assert refused.status_code == 422
    assert f"is over the limit of {most} for" in error(refused)["message"]


def test_embeddings_count_as_what_they_take_of_the_prompt(serve: Serve) -> None:
    with serve(max_request_tokens=100) as client:
        rows = {"encoding": "base64", "dtype": "float32", "score": 0.0, "tokens": 1, "checkpoint": "untrained"}
        text = PASSAGES[0]
        for count, extra in ((101, {}), (1, {"text": text})):  # or as what their text takes
            data = encode_embeddings(torch.zeros(count, 64), "float32", "base64")
            passage = {"embeddings": {**rows, "shape": [count, 64], "data": data}, **extra}
            refused = client.post("/answer", json={"query": QUERY, "passages": [passage]})
            assert refused.status_code == 413
            assert (error(refused)["field"], error(refused)["limit"]) == ("passages", 100)


def test_embeddings_answer_no_other_query(client: httpx.Client) -> None:
    made = compress(client, store=True)["passages"][0]
    assert made["embeddings"]["query_sha256"] == hashlib.sha256(QUERY.encode()).hexdigest()
    body = {"query": "What is bread made of?", "max_new_tokens": 2}
    for passage, field in (
        ({"embeddings": made["embeddings"]}, "passages.1.embeddings.query_sha256"),
        ({"embedding_id": made["embedding_id"]}, "passages.1.embedding_id"),
    ):
        response = client.post("/answer", json={**body, "passages": ["Bread.", passage]})
        assert response.status_code == 422
        assert error(response)["field"] == field
        assert error(response)["message"].endswith("for another query: compress the passage again for this one")
    unsaid = {name: value for name, value in made["embeddings"].items() if name != "query_sha256"}
    assert client.post("/answer", json={**body, "passages": [{"embeddings": unsaid}]}).status_code == 200


def test_numbers_that_are_not_finite_are_refused(client: httpx.Client) -> None:
    embeddings = compress(client)["passages"][1]["embeddings"]
    memory = torch.full(embeddings["shape"], float("nan"))
    embeddings["data"] = encode_embeddings(memory, "float32", "base64")
    response = client.post("/answer", json={"query": QUERY, "passages": [{"embeddings": embeddings}]})
    assert error(response)["field"] == "passages.0.embeddings.data"


def entry(rows: int) -> StoredPassage:
    return StoredPassage(torch.zeros(rows, 1024), 0.0, 1, "", "", "v", None)


def test_the_store_forgets_what_was_used_longest_ago() -> None:
    store = EmbeddingStore(3 * entry(1).size, Metrics())
    first, second, third = (store.put(entry(1)) for _ in range(3))
    assert first is not None
    assert second is not None
    assert store.get(first) is not None
    assert store.put(entry(1)) is not None
    assert store.get(first) is not None
    assert store.get(second) is None
    assert third is not None
    assert store.size <= 3 * entry(1).size


def test_the_store_refuses_what_is_larger_than_itself() -> None:
    store = EmbeddingStore(entry(1).size, Metrics())
    assert store.put(entry(2)) is None
    assert store.size == 0
