"""The benchmark's arithmetic on numbers made by hand, and that what it compares is comparable."""

import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.base_models import BaseModel
from core.config import CompressorConfig, Config, GeneratorConfig
from core.costs import Stages, flop_stages
from core.errors import ConfigError, EngineError, TooLargeError
from core.generator import load_generator
from core.model import Model, build_model
from core.packed_linear import can_pack, pack_network
from core.pipeline import prepare, rows_of
from core.rows import collate_rows
from core.tokenization import encode
from service.benchmark.engine import COMPRESSING, Case, Measured, plan_cases, run_case, summarise
from service.benchmark.load import require_loopback
from service.benchmark.questions import exact_text, make_questions
from service.benchmark.scaling import run_curve
from service.benchmark.shapes import compressor_flops, generator_flops, linear_weights
from service.benchmark.statistics import fit_slope, paired_ratios, percentiles, spread
from service.benchmark.tables import table
from service.benchmark.variants import VARIANTS, Work, without_end

SMALL = Case(passages=3, batch=2, passage_tokens=40, query_tokens=8, new_tokens=6)


def no_clock() -> Stages:
    return Stages(lambda: 0.0)


def test_ratios_are_taken_within_each_repeat() -> None:
    # The machine was four times slower in the second repeat, and the ratio is 2 all the same.
    assert asdict(paired_ratios([2.0, 8.0, 2.2], [1.0, 4.0, 1.0])) == {"median": 2.0, "low": 2.0, "high": 2.2}
    assert asdict(spread([3.0, 1.0, 2.0, 10.0])) == {"median": 2.5, "low": 1.0, "high": 10.0}


def test_percentiles_interpolate() -> None:
    waits = percentiles([float(value) for value in range(101)])
    assert (waits.p50, waits.p95, waits.p99) == (50.0, 95.0, 99.0)
    assert percentiles([7.0]).p99 == 7.0
    assert percentiles([0.0, 1.0]).p95 == 0.95


@given(st.integers(1, 4), st.floats(0.1, 10), st.floats(0.1, 10))
def test_slopes_find_the_line_and_the_power(power: int, factor: float, fixed: float) -> None:
    sizes = [1, 2, 5, 10, 20, 50]
    line = fit_slope(sizes, [fixed + factor * size for size in sizes])
    assert (line.per_unit, line.fixed) == pytest.approx((factor, fixed))
    assert fit_slope(sizes, [factor * size**power for size in sizes]).exponent == pytest.approx(power)


def test_a_slope_needs_two_sizes_and_is_not_fitted_to_zeros() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        fit_slope([3], [1.0])
    assert fit_slope([1, 2], [0.0, 0.0]).exponent is None


def test_a_case_is_summed_up_in_figures_and_ratios() -> None:
    text = Measured([700, 600], {"prefill": 900.0, "decode": 100.0}, 4000, 3000, [{"prefill": 6.0, "decode": 2.0}])
    fast = Measured([90], {"compress": 150.0, "prefill": 100.0}, 2000, 500, [{"compress": 1.0, "decode": 1.0}])
    entry = summarise(Case(10, 4), {"text": text, "compressed": fast}, {"text": 800, "compressed": 160})
    figures = entry["variants"]["compressed"]
    assert figures["answers_per_s"]["median"] == 2.0
    assert figures["first_token_s"]["median"] == 1.0
    assert figures["stages_s"]["compress"]["median"] == 1.0
    assert figures["flops_total"] == 250.0
    ratios = entry["ratios"]["compressed"]["over_text"]
    assert ratios["answers_per_s"]["median"] == 4.0
    assert ratios["first_token"]["median"] == 6.0
    assert (ratios["flops"], ratios["flops_by_shapes"], ratios["peak_bytes"]) == (4.0, 5.0, 2.0)
    assert "over_text" not in entry["ratios"]["text"]


def test_cases_are_each_size_at_each_batch_and_the_papers_setup() -> None:
    cases = plan_cases([5, 10], 8, SMALL, paper=True)
    assert [(case.passages, case.batch) for case in cases] == [(5, 1), (5, 8), (10, 1), (10, 8), (10, 1)]
    assert {case.passage_tokens for case in cases[:-1]} == {SMALL.passage_tokens}
    assert (cases[-1].query_tokens, cases[-1].passage_tokens, cases[-1].new_tokens) == (128, 128, 32)
    assert len(plan_cases([5], 1, SMALL, paper=False)) == 1


def test_passages_differ_in_length_by_a_share(model: Model) -> None:
    tokenizer = model.generator.tokenizer
    varied = make_questions(tokenizer, 2, passages=20, passage_tokens=40, query_tokens=8, vary=0.5)
    lengths = [len(encode(tokenizer, passage.text).ids) for question in varied for passage in question.passages]
    assert 20 <= min(lengths) < 30
    assert 50 < max(lengths) <= 60
    assert {len(encode(tokenizer, question.query).ids) for question in varied} == {8}


def test_a_variant_that_fails_is_left_out_of_its_case(model: Model) -> None:
    runs = 0

    def fails_late(*arguments: Any) -> Work:
        nonlocal runs
        runs += 1
        if runs == 2:
            raise EngineError("the generator makes no progress")
        return VARIANTS["text"](*arguments)

    notes: list[str] = []
    compared = {**VARIANTS, "late": fails_late}
    wide = replace(SMALL, new_tokens=2, passages=2)
    entry = run_case(model, wide, 2, notes.append, compared)
    assert set(entry["variants"]) == set(VARIANTS)
    assert f"{wide.label}: late is left out: the generator makes no progress" in notes
    entry = run_case(model, replace(wide, new_tokens=8192), 1, notes.append)
    assert entry["variants"] == {}
    assert sum("8192 new tokens are over" in note for note in notes) == len(VARIANTS)


def test_a_table_is_aligned() -> None:
    assert table(("name", "n"), [("a", "10"), ("long name", "9")]).splitlines() == [
        "name        n",
        "---------  --",
        "a          10",
        "long name   9",
    ]


@given(tokens=st.integers(1, 150), seed=st.integers(0, 1000))
def test_texts_have_exactly_the_tokens_that_are_asked_for(model: Model, tokens: int, seed: int) -> None:
    tokenizer = model.generator.tokenizer
    text = exact_text(tokenizer, tokens, random.Random(seed))
    assert len(encode(tokenizer, text).ids) == tokens
    assert text == exact_text(tokenizer, tokens, random.Random(seed))
    assert text.strip()


def test_no_two_questions_share_a_passage(model: Model) -> None:
    questions = make_questions(model.generator.tokenizer, 4, passages=5, passage_tokens=40, query_tokens=12)
    texts = [passage.text for question in questions for passage in question.passages]
    assert len(set(texts)) == 20
    assert len({question.query for question in questions}) == 4


def test_every_variant_writes_all_tokens_and_plain_generate_writes_the_same_as_our_engine(model: Model) -> None:
    endless, ends = without_end(model), model.generator.eos_ids
    questions = make_questions(
        model.generator.tokenizer, SMALL.batch, passages=3, passage_tokens=40, query_tokens=8, seed=3
    )
    work = {name: run(endless, questions, SMALL.new_tokens, no_clock()) for name, run in VARIANTS.items()}
    for name, done in work.items():
        assert [len(tokens) for tokens in done.written] == [SMALL.new_tokens] * SMALL.batch, name
    assert work["transformers"] == work["text"]
    prompts = {name: done.prompt_tokens[0] for name, done in work.items()}
    assert prompts["compressed"] < prompts["hybrid"] < prompts["text"]
    assert model.generator.eos_ids == ends != frozenset()
    assert endless.generator.model is model.generator.model


def test_an_end_of_turn_does_not_end_a_measured_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = make_questions(model.generator.tokenizer, 1, passages=1, passage_tokens=20, query_tokens=8)
    first = VARIANTS["text"](without_end(model), questions, 1, no_clock()).written[0][0]
    monkeypatch.setattr(model.generator, "eos_ids", frozenset({first}))
    monkeypatch.setattr(model.generator.model.generation_config, "eos_token_id", first)
    for run in (VARIANTS["text"], VARIANTS["transformers"]):
        written = run(without_end(model), questions, 5, no_clock()).written[0]
        assert (written[0], len(written)) == (first, 5)
    assert model.generator.model.generation_config.eos_token_id == first


@pytest.mark.parametrize("name", ["text", "compressed", "hybrid"])
def test_operations_counted_are_those_that_the_shapes_allow(model: Model, name: str) -> None:
    questions = make_questions(model.generator.tokenizer, 1, passages=3, passage_tokens=40, query_tokens=8)
    with flop_stages() as stages, torch.inference_mode():
        work = VARIANTS[name](without_end(model), questions, 5, stages)
    expected = generator_flops(model, work.prompt_tokens[0], 5)
    if name in COMPRESSING:
        expected += compressor_flops(model, prepare(model, questions[0].query, questions[0].passages))
    # The shapes count a query once for each of its chunks; a batch that reads it once does with less.
    assert 0.85 * expected <= stages.total <= expected


@pytest.mark.parametrize("readout", ["pointer", "memory"])
def test_operations_of_an_encoder_are_those_that_the_shapes_allow(
    tiny_llama: Path, tiny_bert: Path, readout: Literal["pointer", "memory"]
) -> None:
    compressor = CompressorConfig(kind="encoder", base_model=str(tiny_bert), readout=readout, chunk_tokens=64)
    model = build_model(Config(compressor=compressor, generator=GeneratorConfig(base_model=str(tiny_llama))))
    (question,) = make_questions(model.generator.tokenizer, 1, passages=3, passage_tokens=40, query_tokens=8)
    request = prepare(model, question.query, question.passages)
    with flop_stages() as stages, torch.inference_mode():
        stages.enter("compress")
        for row in rows_of(model, request):  # each by itself: a batch pads them
            batch = collate_rows([row], model.compressor.row_format, model.config.compressor.max_memory_tokens)
            model.compressor(batch, model.generator.embed)
    assert stages.total == pytest.approx(compressor_flops(model, request), rel=0.02)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU does not multiply bfloat16")
def test_packed_layers_are_of_the_same_shape(tiny_llama: Path) -> None:
    plain, packed = (load_generator(BaseModel("tiny", tiny_llama, "0"), dtype=torch.bfloat16) for _ in range(2))
    pack_network(packed.model)
    assert linear_weights(packed.model) == linear_weights(plain.model) > 0


def test_a_curve_ends_where_the_model_has_no_positions_left(model: Model) -> None:
    notes: list[str] = []
    base = Case(passages=2, batch=1, passage_tokens=32, query_tokens=8, new_tokens=2)
    curve = run_curve(model, "passages", [400, 1, 2], base, "text", 2, notes.append)
    assert curve["sizes"] == [point["size"] for point in curve["points"]] == [1, 2]
    assert any("400 x 32" in note and "is left out" in note for note in notes)
    assert set(curve["slopes"]) >= {"compress, s", "prefill, s", "decode, s", "all, s", "memory, bytes"}


@pytest.mark.parametrize("name", ["transformers", "text"])
def test_a_prompt_without_room_for_the_whole_answer_is_refused(model: Model, name: str) -> None:
    questions = make_questions(model.generator.tokenizer, 1, passages=1, passage_tokens=20, query_tokens=8)
    with pytest.raises(TooLargeError):
        VARIANTS[name](without_end(model), questions, 8192, no_clock())


@pytest.mark.parametrize("url", ["http://example.org:8000", "http://10.0.0.1", "http://127.0.0.1.example.org", ""])
def test_a_load_stays_on_this_machine(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        require_loopback(url)


@pytest.mark.parametrize("url", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:80"])
def test_a_service_on_this_machine_can_be_loaded(url: str) -> None:
    require_loopback(url)
