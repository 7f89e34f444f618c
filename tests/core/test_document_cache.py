"""Chunks that were read before: the same memory embeddings and scores as without a cache, whatever is mixed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, PretrainedConfig, Qwen2Config

from core.byte_lru import ByteLRU
from core.compressed import CompressedChunk
from core.compressors import NLayersCompressor
from core.config import CompressorConfig, Config, GeneratorConfig
from core.document_cache import DocumentCache, caches_documents
from core.model import Model, build_model
from core.passages import Passage
from core.pipeline import compress_rows, prepare, rows_of
from core.rows import ChunkRow
from core.tokenization import load_tokenizer
from tests.tiny_models import TEXT
from tests.tiny_pipeline import PASSAGES, QUERY, tiny_model

READOUTS = ["memory", "pooled", "pointer"]
LINES = tuple(Passage(line) for line in TEXT.strip().splitlines())
QUERIES = (QUERY, "Who?", "What is the capital of France, and how many people live in the city? " * 3)
# Rows of the property tests: (query, passage, rate), drawn by index.
PICKS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, len(LINES) + len(PASSAGES) - 1), st.sampled_from([4, 8])),
    min_size=1,
    max_size=6,
)


def rows_for(model: Model, picks: Sequence[tuple[int, int, int]]) -> list[ChunkRow]:
    passages = (*PASSAGES, *LINES)
    return [
        row
        for query, passage, rate in picks
        for row in rows_of(model, prepare(model, QUERIES[query], [passages[passage]]), rate)
    ]


def compressor_of(model: Model) -> NLayersCompressor:
    assert isinstance(model.compressor, NLayersCompressor)
    return model.compressor


def with_documents(model: Model, limit: int = 2**30, namespace: str = "a") -> Model:
    """`model` with a cache; the shared tiny models themselves are never changed."""
    return replace(model, documents=DocumentCache(namespace, compressor_of(model), ByteLRU(limit)))


def assert_same(
    got: Sequence[CompressedChunk], expected: Sequence[CompressedChunk], atol: float = 1e-5, rtol: float = 1e-5
) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.memory, other.memory, atol=atol, rtol=rtol)
        assert one.score == pytest.approx(other.score, abs=atol)
        assert replace(one, memory=other.memory, score=0, weights=None, cached=None) == replace(
            other, score=0, weights=None
        )
        if one.weights is not None and other.weights is not None:
            torch.testing.assert_close(one.weights, other.weights, atol=atol, rtol=rtol)
        assert (one.weights is None) == (other.weights is None)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_qwen3"])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=PICKS, batch=PICKS)
def test_cached_is_uncached(
    request: pytest.FixtureRequest, base: str, readout: str, before: list[Any], batch: list[Any]
) -> None:
    plain = tiny_model(
        request.getfixturevalue(base), order="document_first", readout=readout, allocation="proportional"
    )
    model = with_documents(plain)
    first, second = rows_for(model, before), rows_for(model, batch)
    assert_same(compress_rows(model, first), compress_rows(plain, first))
    known = {tuple(row.chunk.compressor_ids) for row in first}
    compressed = compress_rows(model, second)
    assert [chunk.cached == "document" for chunk in compressed] == [
        tuple(row.chunk.compressor_ids) in known for row in second
    ]
    assert_same(compressed, compress_rows(plain, second))


def test_cold_rows_are_bit_equal(tiny_llama: Path) -> None:
    plain = tiny_model(tiny_llama, order="document_first", readout="pointer")
    rows = rows_for(plain, [(0, 0, 4), (1, 1, 8), (2, 5, 4)])
    for got, expected in zip(compress_rows(with_documents(plain), rows), compress_rows(plain, rows), strict=True):
        assert torch.equal(got.memory, expected.memory)
        assert got.score == expected.score


@pytest.mark.parametrize("readout", READOUTS)
def test_in_bfloat16(tiny_llama: Path, readout: Any) -> None:
    config = Config(
        compressor=CompressorConfig(
            n_layers=2, chunk_tokens=32, rates=(4, 8), readout=readout, order="document_first", allocation="fixed"
        ),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    plain = build_model(config, dtype=torch.bfloat16)
    model = with_documents(plain)
    compress_rows(model, rows_for(model, [(1, 0, 4), (1, 4, 4), (1, 7, 4)]))
    rows = rows_for(model, [(0, 0, 4), (2, 4, 8), (0, 5, 4), (1, 7, 4)])
    compressed = compress_rows(model, rows)
    assert {chunk.cached for chunk in compressed} == {"document", None}
    assert {chunk.memory.dtype for chunk in compressed} == {torch.bfloat16}
    # Rounding to 8 bits at every step: as far apart as two batches of unlike padding are.
    scale = float(torch.cat([chunk.memory for chunk in compressed]).abs().max())
    assert_same(compressed, compress_rows(plain, rows), atol=0.03 * max(1.0, scale), rtol=0)


@pytest.mark.parametrize(
    "base_config",
    [
        MistralConfig(sliding_window=8),
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ],
    ids=["mistral", "qwen2"],
)
def test_sliding_windows_reach_as_far_as_without_a_cache(tiny_llama: Path, base_config: PretrainedConfig) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokenizer = load_tokenizer(tiny_llama)
    base_config.update({**sizes, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "initializer_range": 0.1})
    settings = CompressorConfig(n_layers=2, chunk_tokens=32, rates=(4, 8), order="document_first")
    base = tiny_model(tiny_llama, order="document_first")
    torch.manual_seed(4)
    compressor = NLayersCompressor(settings, base_config, tokenizer, 64).eval()
    compressor.initialise_slots(torch.Generator().manual_seed(0))
    plain = replace(base, compressor=compressor)
    model = with_documents(plain)
    compress_rows(model, rows_for(model, [(1, 0, 4), (1, 9, 4)]))
    rows = rows_for(model, [(0, 0, 4), (2, 9, 8), (2, 5, 4)])
    assert_same(compress_rows(model, rows), compress_rows(plain, rows))


def test_a_chunk_known_once_serves_every_query_and_rate(tiny_llama: Path) -> None:
    plain = tiny_model(tiny_llama, order="document_first")
    model = with_documents(plain)
    assert model.documents is not None
    (first,) = compress_rows(model, rows_for(model, [(0, 2, 4)]))
    assert first.cached is None
    rows = rows_for(model, [(0, 2, 4), (1, 2, 8), (2, 2, 4)])
    assert [chunk.cached for chunk in compress_rows(model, rows)] == ["document"] * 3
    assert len(model.documents.memory) == 1
    assert_same(compress_rows(model, rows), compress_rows(plain, rows))


def test_versions_share_a_limit_but_no_entries(tiny_llama: Path, tiny_qwen3: Path) -> None:
    one = with_documents(tiny_model(tiny_llama, order="document_first"))
    assert one.documents is not None
    other = tiny_model(tiny_qwen3, order="document_first")
    cache = DocumentCache("b", compressor_of(other), one.documents.memory)
    other = replace(other, documents=cache)
    for model in (one, other):
        (chunk,) = compress_rows(model, rows_for(model, [(0, 0, 4)])[:1])
        assert chunk.cached is None
    assert len(cache.memory) == 2
    one.documents.close()
    assert len(cache.memory) == 1
    (chunk,) = compress_rows(other, rows_for(other, [(1, 0, 4)])[:1])
    assert chunk.cached == "document"


@pytest.mark.parametrize("limit", [0, 1, 40_000])
def test_a_limit_that_holds_few_chunks_or_none_only_costs_time(tiny_llama: Path, limit: int) -> None:
    plain = tiny_model(tiny_llama, order="document_first", readout="pointer")
    model = with_documents(plain, limit)
    assert model.documents is not None
    for query in range(3):
        rows = rows_for(model, [(query, passage, 4) for passage in range(8)])
        assert_same(compress_rows(model, rows), compress_rows(plain, rows))
        assert model.documents.memory.bytes <= limit
    assert (model.documents.memory.counts.evictions > 0) == (limit == 40_000)


def test_what_is_counted_is_what_is_held(tiny_llama: Path) -> None:
    for readout in READOUTS:
        model = with_documents(tiny_model(tiny_llama, order="document_first", readout=readout))
        assert model.documents is not None
        rows = rows_for(model, [(0, passage, 4) for passage in range(6)])
        compress_rows(model, rows)
        prefixes = [prefix for row in rows if (prefix := model.documents.get(row)) is not None]
        assert len(prefixes) == len(rows)
        assert model.documents.memory.bytes == sum(prefix.nbytes for prefix in prefixes)
        assert all(prefix.keys_values.untyped_storage().nbytes() == prefix.keys_values.nbytes for prefix in prefixes), (
            "a view would keep its whole batch in memory"
        )


def test_only_a_causal_compressor_that_reads_the_chunk_first_has_documents() -> None:
    kinds: dict[str, dict[str, str]] = {"n_layers": {}, "encoder": {"base_model": "any"}}
    for kind, extra in kinds.items():
        for order in ("query_first", "document_first"):
            values: dict[str, Any] = {"kind": kind, "order": order, **extra}
            config = Config(compressor=CompressorConfig(**values))
            assert caches_documents(config) == (kind == "n_layers" and order == "document_first")


@pytest.mark.parametrize("readout", READOUTS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=PICKS)
def test_a_query_read_once_for_all_its_chunks_changes_nothing(tiny_qwen3: Path, readout: str, batch: list[Any]) -> None:
    model = tiny_model(tiny_qwen3, readout=readout, allocation="proportional")
    rows = rows_for(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.compressor, "least_saving", 0.0)
        shared = compress_rows(model, rows)
        patch.setattr(model.compressor, "least_saving", 2.0)
        assert_same(shared, compress_rows(model, rows))
