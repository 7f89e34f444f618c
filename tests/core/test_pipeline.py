"""One request, step by step, on tiny models: what each step gives, and what bad input gets."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.answer import answer
from core.compressed import CompressedChunk, CompressedPassage
from core.config import PromptConfig, RelevanceConfig
from core.errors import InvalidInputError, TooLargeError
from core.model import Model
from core.passages import Passage
from core.pipeline import build_prompt, compress, compress_rows, gather, prepare, rerank, rows_of, text_prompt_tokens
from core.planning import plan_request
from core.policy import Policy
from core.sampling import GenerationOptions
from core.tokenization import encode
from tests.tiny_models import TEXT
from tests.tiny_pipeline import PASSAGES, QUERY, tiny_model

LONG = Passage(TEXT.strip(), title="Everything")


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tiny_bert: Path) -> Model:
    return tiny_model(tiny_llama, tiny_bert, readout="pointer", allocation="proportional")


def scored(*scores: float) -> list[CompressedPassage]:
    """Passages whose best chunk has the given raw score."""
    chunks = [CompressedChunk(0, 1, 1, torch.zeros(1, 4), score, None) for score in scores]
    return [CompressedPassage(index, (chunk,), 0.5) for index, chunk in enumerate(chunks)]


@pytest.mark.parametrize(
    ("query", "passages", "field"),
    [
        ("", PASSAGES, "query"),
        (" \n", PASSAGES, "query"),
        ("half a pair \ud83d", PASSAGES, "query"),
        (QUERY, [], "passages"),
        (QUERY, [PASSAGES[0], Passage("")], "passages.1.text"),
        (QUERY, [PASSAGES[0], Passage("\t \u2003")], "passages.1.text"),
        (QUERY, [Passage("half a pair \udc00")], "passages.0.text"),
        (QUERY, [Passage("Bread.", title="\ud83d")], "passages.0.title"),
    ],
)
def test_bad_input_is_refused_by_its_name(model: Model, query: str, passages: list[Passage], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        prepare(model, query, passages)
    assert caught.value.field == field


@pytest.mark.parametrize("rate", [0, -4, 5, 16])
def test_a_rate_without_training_is_refused(model: Model, rate: int) -> None:
    with pytest.raises(InvalidInputError, match=r"rate: must be one of 4, 8"):
        rows_of(model, prepare(model, QUERY, PASSAGES), rate)


def test_a_long_query_takes_nothing_from_the_chunk_and_one_over_its_budget_is_refused(model: Model) -> None:
    most = model.config.compressor.query_tokens
    query = " the" * most
    request = prepare(model, query, [LONG])
    assert request.query_ids == encode(model.compressor.tokenizer, query).ids
    assert request.chunks == prepare(model, "a", [LONG]).chunks
    with pytest.raises(TooLargeError, match=rf"query: has {most + 1} tokens; the compressor reads at most {most}"):
        prepare(model, query + " the", [LONG])


@pytest.mark.parametrize(
    ("allocation", "rate", "expected"),
    [("fixed", 4, [8, 8, 2]), ("fixed", 8, [4, 4, 2]), ("proportional", 4, [8, 5, 1])],
)
def test_each_chunk_gets_the_memory_of_its_rate(
    tiny_llama: Path, allocation: str, rate: int, expected: list[int]
) -> None:
    model = tiny_model(tiny_llama, allocation=allocation)
    passages = [Passage(" the" * tokens) for tokens in (32, 20, 2)]
    rows = rows_of(model, prepare(model, QUERY, passages), rate)
    assert [row.memory_tokens for row in rows] == expected
    assert [len(chunk.memory) for chunk in compress_rows(model, rows)] == expected
    assert [row.memory_tokens for row in rows_of(model, prepare(model, QUERY, passages))] == [
        row.memory_tokens for row in rows_of(model, prepare(model, QUERY, passages), 4)
    ]


def test_compressing_keeps_passages_apart_and_in_order(model: Model) -> None:
    requests = [
        prepare(model, QUERY, [*PASSAGES, LONG]),
        prepare(model, "Who?", [LONG]),
        prepare(model, "When?", PASSAGES),
    ]
    results = compress(model, requests)
    assert [[passage.index for passage in passages] for passages in results] == [[0, 1, 2, 3, 4], [0], [0, 1, 2, 3]]
    for request, passages in zip(requests, results, strict=True):
        alone = compress(model, [request])[0]
        for passage, other in zip(passages, alone, strict=True):
            torch.testing.assert_close(passage.memory, other.memory, atol=1e-5, rtol=1e-5)
            content = request.passages[passage.index].content
            assert "".join(content[chunk.start : chunk.end] for chunk in passage.chunks) == content
            assert passage.tokens == len(encode(model.generator.tokenizer, content).ids)
            assert all(chunk.weights is not None for chunk in passage.chunks)
            assert len(passage.memory) == sum(len(chunk.memory) for chunk in passage.chunks)


def test_a_passage_of_one_token_is_compressed(model: Model) -> None:
    request = prepare(model, QUERY, [Passage("a")])
    assert [len(chunk.generator_ids) for chunk in request.chunks] == [1]
    [[passage]] = compress(model, [request])
    assert passage.memory.isfinite().all()


def test_nothing_to_compress_gives_nothing(model: Model) -> None:
    assert compress(model, []) == []


def test_relevance_is_the_best_chunks_calibrated_score(tiny_llama: Path) -> None:
    model = tiny_model(tiny_llama)
    request = prepare(model, QUERY, [LONG, PASSAGES[0]])
    chunks = compress_rows(model, rows_of(model, request))
    first, _ = gather(model, request, chunks)
    best = max(chunk.score for chunk in chunks[: len(first.chunks)])
    assert len(first.chunks) > 2
    assert first.relevance == pytest.approx(torch.tensor(best).sigmoid().item())
    config = replace(model.config, relevance=RelevanceConfig(scale=2.0, bias=-1.0))
    calibrated, _ = gather(replace(model, config=config), request, chunks)
    assert calibrated.relevance == pytest.approx(torch.tensor(2 * best - 1).sigmoid().item())


@given(score=st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_relevance_never_overflows(model: Model, score: float) -> None:
    request = prepare(model, QUERY, PASSAGES[:1])
    chunks = [CompressedChunk(chunk.start, chunk.end, 1, torch.zeros(1, 64), score, None) for chunk in request.chunks]
    relevance = gather(model, request, chunks)[0].relevance
    assert relevance is not None
    assert 0 <= relevance <= 1
    assert relevance == pytest.approx(torch.tensor(score, dtype=torch.float64).sigmoid().item())


def test_reranking_puts_the_best_first_and_keeps_equals_in_order() -> None:
    assert rerank(scored(0.1, 2.0, -3.0, 2.0, 0.1)) == [1, 3, 0, 4, 2]
    # By raw score, also where relevance is 1.0 for both.
    assert rerank(scored(900.0, 1000.0)) == [1, 0]


@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_reranking_is_a_stable_sort(scores: list[int]) -> None:
    assert rerank(scored(*scores)) == sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def test_a_prompt_costs_its_text_less_what_memory_saves(model: Model) -> None:
    request = prepare(model, QUERY, [*PASSAGES, LONG])
    compressed = compress(model, [request])[0]
    text_tokens = text_prompt_tokens(model, request)
    assert build_prompt(model, request, compressed, ["text"] * 5).tokens == text_tokens
    for modes in (["compressed"] * 5, ["text", "compressed", "text", "compressed", "compressed"]):
        prompt = build_prompt(model, request, compressed, modes)  # type: ignore[arg-type]  # a list of literals
        saved = sum(p.tokens - len(p.memory) for p, mode in zip(compressed, modes, strict=True) if mode == "compressed")
        assert prompt.tokens == text_tokens - saved
        assert len(prompt.memory) == sum(
            len(p.memory) for p, mode in zip(compressed, modes, strict=True) if mode == "compressed"
        )


@pytest.mark.parametrize("passage_order", ["given", "relevance"])
def test_passages_stand_in_the_order_the_config_asks_for(tiny_llama: Path, passage_order: Any) -> None:
    model = tiny_model(tiny_llama, prompt=PromptConfig(passage_order=passage_order))
    request = prepare(model, QUERY, PASSAGES)
    compressed = compress(model, [request])[0]
    order = rerank(compressed)
    assert order != [0, 1, 2, 3]
    if passage_order == "given":
        order = [0, 1, 2, 3]
    prompt = build_prompt(model, request, compressed, ["compressed"] * 4)
    assert torch.equal(prompt.memory, torch.cat([compressed[index].memory for index in order]))
    shown = model.generator.tokenizer.decode(build_prompt(model, request, compressed, ["text"] * 4).ids)
    places = [shown.index(PASSAGES[index].text) for index in order]
    assert places == sorted(places)


def test_control_tokens_in_passages_and_query_stay_text(model: Model) -> None:
    passages = [Passage("Bread <|im_end|> is <s> made.")]
    request = prepare(model, "What <|im_start|> is it?", passages)
    harmless = prepare(model, "What is it?", [Passage("Bread is made.")])
    specials = torch.tensor(model.generator.tokenizer.all_special_ids)

    def count(prepared: Any) -> int:
        prompt = build_prompt(model, prepared, compress(model, [prepared])[0], ["text"])
        return int(torch.isin(prompt.ids, specials).sum())

    assert count(request) == count(harmless)


@pytest.mark.parametrize("mode", ["compressed", "text", "hybrid"])
def test_an_answer_says_what_it_was_made_from(model: Model, mode: Any) -> None:
    passages = [*PASSAGES, LONG]
    result = answer(model, QUERY, passages, mode, options=GenerationOptions(max_new_tokens=5))
    assert 1 <= result.completion_tokens <= 5
    assert result.finish_reason in ("stop", "length")
    assert [passage.index for passage in result.passages] == [0, 1, 2, 3, 4]
    texts = {"compressed": [], "text": ["text"] * 5, "hybrid": ["hybrid"]}[mode]
    assert [shown for shown in result.modes if shown != "compressed"] == texts
    assert (result.prompt_tokens == result.text_tokens) == (mode == "text")
    assert (result.prompt_tokens < result.text_tokens) == (mode == "compressed")  # most of the text is one passage's
    assert set(result.timings_ms) == {"prepare", "compress", "generate", "total"}
    parts = [time for stage, time in result.timings_ms.items() if stage != "total"]
    assert sum(parts) == pytest.approx(result.timings_ms["total"])
    assert result.text == answer(model, QUERY, passages, mode, options=GenerationOptions(max_new_tokens=5)).text


def test_an_answer_that_leaves_the_prompt_no_room_is_refused(model: Model) -> None:
    request, positions = prepare(model, QUERY, PASSAGES), model.generator.max_tokens
    around = model.template.frame(QUERY, 0)[0]
    for policy in (Policy("auto"), Policy("hybrid", max_prompt_tokens=400)):
        plan_request(model, request, policy, max_new_tokens=positions - around)
        for tokens in (positions - around + 1, positions, 10 * positions):
            said = f"is {tokens}, but without any passage the prompt takes {around} of {positions}"
            with pytest.raises(InvalidInputError, match=said) as caught:
                plan_request(model, request, policy, max_new_tokens=tokens)
            assert caught.value.field == "max_new_tokens"
    plan_request(model, request, Policy("compressed"), max_new_tokens=positions)  # that answer is cut


@pytest.mark.parametrize("mode", ["text", "compressed", "auto"])
def test_a_query_that_leaves_no_room_is_refused_by_its_name(model: Model, mode: Any) -> None:
    positions = model.generator.max_tokens
    wide = replace(model, config=replace(model.config, compressor=replace(model.config.compressor, query_tokens=9999)))
    with pytest.raises(TooLargeError, match=rf"query: the prompt takes \d+ tokens .*; at most {positions - 1} fit"):
        answer(wide, "the " * 9000, PASSAGES, mode)
    request = prepare(wide, "the " * 9000, PASSAGES[:1])
    assert plan_request(wide, request, Policy()).read == {0}  # to compress or to rank, there is room


@pytest.mark.parametrize(
    "text", ["莱茵河发源于瑞士。", "ينبع نهر الراين", "👩‍👩‍👧🇨🇭", "e\u0301\u0323", "\u200b\u00ad", "\x07", "a"]
)
def test_any_script_is_answered(model: Model, text: str) -> None:
    result = answer(model, text, [Passage(text), Passage(text * 20)], options=GenerationOptions(max_new_tokens=2))
    assert all(passage.memory.isfinite().all() for passage in result.passages)
    assert all(0 <= (passage.relevance or 0) <= 1 for passage in result.passages)


def test_a_large_passage_is_compressed_whole(model: Model) -> None:
    request = prepare(model, QUERY, [Passage(TEXT * (100_000 // len(TEXT)))])
    assert len(request.chunks) > 500
    passage = compress(model, [request], 8)[0][0]
    assert len(passage.chunks) == len(request.chunks)
    embeddings = len(passage.memory)
    assert embeddings == sum(math.ceil(chunk.tokens / 8) for chunk in passage.chunks)


@pytest.fixture
def other_default_dtype() -> Iterator[None]:
    """What a thread of the service sees while transformers loads the next checkpoint in another."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("readout", ["memory", "pooled", "pointer"])
def test_a_model_loading_elsewhere_changes_no_answer(
    tiny_llama: Path, tiny_bert: Path, request: pytest.FixtureRequest, readout: str
) -> None:
    model = tiny_model(tiny_llama, tiny_bert if readout == "pointer" else None, readout=readout)
    options = GenerationOptions(temperature=1.5, seed=5, max_new_tokens=40)

    def made() -> tuple[str, list[Tensor], list[float]]:
        found = answer(model, QUERY, PASSAGES, "hybrid", options=options)
        chunks = [chunk for passage in found.passages for chunk in passage.chunks]
        kept = [each for chunk in chunks for each in (chunk.memory, chunk.weights) if each is not None]
        return found.text, kept, [chunk.score for chunk in chunks]

    text, kept, scores = made()
    request.getfixturevalue("other_default_dtype")
    again, same, equal = made()
    assert (again, equal) == (text, scores)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(kept, same, strict=True))
