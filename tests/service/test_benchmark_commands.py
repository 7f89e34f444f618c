"""`python -m service.benchmark`: smoke runs on tiny random models. What they measure here means nothing."""

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.errors import EngineError
from core.model import Model, build_model
from service.benchmark.__main__ import main
from service.benchmark.direct import answer_directly
from service.benchmark.engine import Case, run_case
from service.benchmark.load import MAX_RETRY_SECONDS, Outcome, closed_loop, connect, open_loop, summarise
from service.benchmark.server import running_service
from service.settings import Settings
from tests.service.conftest import Serve

BODY: dict[str, Any] = {
    "query": "Who discovered polonium?",
    "passages": ["Marie Curie discovered polonium and radium. " * 5, "Bread is made of flour and water."],
    "mode": "compressed",
    "max_new_tokens": 8,
}
FRAME = {"command", "machine", "versions", "model", "settings"}
SPREAD = {"median", "low", "high"}


def run(command: str, checkpoint: Path, output: Path, *more: str) -> dict[str, Any]:
    sizes = ("--quick", "--passage-tokens", "32", "--threads", "1")
    assert main([command, *sizes, "--checkpoint", str(checkpoint), "--output", str(output), *more]) == 0
    result: dict[str, Any] = json.loads((output / f"{command}.json").read_text())
    assert set(result) > FRAME
    return result


def test_engine_compares_all_variants(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("engine", root / "first", tmp_path, "--passages", "3", "--dtype", "bfloat16")
    assert [(case["passages"], case["batch"]) for case in result["cases"]] == [(3, 1), (3, 2)]
    assert result["model"]["dtype"] == "bfloat16"
    for case in result["cases"]:
        assert set(case["variants"]) == {"transformers", "text", "compressed", "hybrid"}
        for name, figures in case["variants"].items():
            for key in ("seconds", "first_token_s", "answers_per_s"):
                assert set(figures[key]) == SPREAD
            assert figures["peak_bytes"] > 0
            assert set(figures["stages_s"]) >= {"prepare", "prefill", "decode"}
            assert figures["flops_total"] == sum(figures["flops"].values()) > 0
            for base, ratios in case["ratios"][name].items():
                assert base in {"over_text", "over_transformers"}
                assert set(ratios) == {"answers_per_s", "first_token", "flops", "flops_by_shapes", "peak_bytes"}
        assert case["ratios"]["compressed"]["over_text"]["flops"] > 1
        assert case["ratios"]["transformers"]["over_text"]["flops"] == 1
    shown = capsys.readouterr().out
    for text in ("arXiv 2504.07109", "2.2 to 3.3", "processor", "torch", "bfloat16", "3 x 32, batch 2", "peak MiB"):
        assert text in shown
    for name in ("engine", "engine-stages"):
        assert (tmp_path / f"{name}.svg").read_text().endswith("</svg>\n")


def test_engine_compares_some_variants_over_passages_of_many_lengths(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--passages", "6", "--variants", "text", "compressed", "--vary", "0.8")
    for case in run("engine", root / "first", tmp_path, *more)["cases"]:
        assert set(case["variants"]) == {"text", "compressed"}
        assert case["vary"] == 0.8
        ratios = case["ratios"]["compressed"]["over_text"]
        # Batches keep padding low, so that little more is done than the shapes ask for.
        assert ratios["flops"] > 0.85 * ratios["flops_by_shapes"]
    assert "6 x 32 ± 80%, batch 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["engine", "--vary", "1"])


def test_what_was_measured_outlives_what_stops_the_rest(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_first(model: Model, case: Case, *more: Any) -> dict[str, Any]:
        if case.batch > 1:
            raise EngineError("the machine is gone")
        return run_case(model, case, *more)

    monkeypatch.setattr("service.benchmark.commands.run_case", run_first)
    arguments = ["engine", "--quick", "--passages", "2", "--passage-tokens", "32", "--variants", "text"]
    assert main([*arguments, "--checkpoint", str(root / "first"), "--output", str(tmp_path)]) == 2
    assert "the machine is gone" in capsys.readouterr().err
    (case,) = json.loads((tmp_path / "engine.json").read_text())["cases"]
    assert set(case["variants"]) == {"text"}


def test_scaling_fits_each_stage(root: Path, tmp_path: Path) -> None:
    result = run("scaling", root / "first", tmp_path)
    assert {curve["over"]: curve["sizes"] for curve in result["curves"]} == {
        "passages": [1, 2],
        "passage tokens": [32, 64],
        "concurrency": [1, 2],
        "cached chunks": [100, 1000],
    }
    for curve in result["curves"]:
        assert all(set(slope) == {"per_unit", "fixed", "exponent"} for slope in curve["slopes"].values())
        assert all({"peak_bytes", "seconds", "stages_s"} < set(point) for point in curve["points"])
    assert (tmp_path / "scaling.svg").exists()


def test_load_starts_a_service_and_compares_it_with_the_engine(root: Path, tmp_path: Path) -> None:
    closed, opened = run("load", root / "first", tmp_path, "--key", "a secret")["loads"]
    assert "a secret" not in (tmp_path / "load.json").read_text()
    assert closed["answers"] == opened["answers"] == 4
    assert set(closed["throughput_over_direct"]) == SPREAD
    assert opened["throughput_over_direct"] is None
    for entry in (closed, opened):
        assert set(entry["latency_s"]) == set(entry["first_token_s"]) == {"p50", "p95", "p99"}
        assert entry["first_token_s"]["p99"] <= entry["latency_s"]["p99"]
        assert (entry["refused"], entry["failed"], entry["errors"], entry["cached_chunks"]) == (0, 0, {}, 0)


def test_what_a_service_had_cached_is_told(
    root: Path, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(embedding_cache_bytes=2**20) as client:
        _, opened = run("load", root / "first", tmp_path, "--url", str(client.base_url))["loads"]
    assert opened["cached_chunks"] > 0  # the closed loop sent them before
    assert "SCALEDOWN_EMBEDDING_CACHE_BYTES=0" in capsys.readouterr().out


def test_the_service_it_starts_is_as_the_command_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start(command: list[str], env: dict[str, str], **_: object) -> None:
        raise Started(env)

    monkeypatch.setenv("SCALEDOWN_MAX_REQUESTS", "3")
    monkeypatch.setattr(subprocess, "Popen", start)
    settings = Settings(checkpoint=Path("mine"), quantize="int8", threads=2)
    with pytest.raises(Started) as started, running_service(settings):
        pass
    environment = started.value.args[0]
    assert environment["SCALEDOWN_QUANTIZE"] == "int8"
    assert (environment["SCALEDOWN_CHECKPOINT"], environment["SCALEDOWN_THREADS"]) == ("mine", "2")
    assert environment["SCALEDOWN_EMBEDDING_CACHE_BYTES"] == environment["SCALEDOWN_DOCUMENT_CACHE_BYTES"] == "0"
    assert "SCALEDOWN_MAX_REQUESTS" not in environment


def test_without_matplotlib_there_are_figures_but_no_plots(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "service.benchmark.plots", None)
    run("engine", root / "first", tmp_path, "--passages", "1")
    assert "matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.svg"))


def test_wrong_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--url", "http://example.org"]) == 2
    assert "url: must be a service on this machine" in capsys.readouterr().err
    assert main(["engine", "--checkpoint", str(tmp_path)]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    assert main(["engine", "--device", "abacus"]) == 2
    assert "device:" in capsys.readouterr().err


def test_the_engine_alone_writes_the_service_answers(client: httpx.Client, model: Model) -> None:
    bodies = [{**BODY, "query": f"{BODY['query']} {number}", "max_new_tokens": 4 + number} for number in range(5)]
    _, written = answer_directly(model, bodies, clients=2, max_sequences=16, batch_tokens=512)
    for body, tokens in zip(bodies, written, strict=True):
        served = client.post("/answer", json=body).json()
        assert served["usage"]["completion_tokens"] == len(tokens)
        text = model.generator.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        assert served["answer"] == text.rstrip("\ufffd")


def test_a_closed_loop_counts_refusals_and_asks_again(serve: Serve) -> None:
    async def load(url: str) -> Outcome:
        async with connect(url) as connection:
            return await closed_loop(connection, [BODY] * 3, clients=3)

    with serve(max_requests=1) as client:
        outcome = asyncio.run(load(str(client.base_url)))
    assert (len(outcome.latencies), outcome.failed) == (3, 0)
    assert outcome.refused > 0
    assert max(outcome.latencies) >= MAX_RETRY_SECONDS  # the wait of who was refused is in it
    assert outcome.completion_tokens <= 3 * BODY["max_new_tokens"]


def test_an_open_loop_loses_what_is_refused_and_names_errors(serve: Serve) -> None:
    async def load(url: str) -> Outcome:
        async with connect(url) as connection:
            return await open_loop(connection, [BODY] * 8 + [{**BODY, "max_new_tokens": 10_000}], rate=1e6)

    with serve(max_requests=1) as client:
        outcome = asyncio.run(load(str(client.base_url)))
    assert len(outcome.latencies) + outcome.refused + outcome.failed == 9
    assert outcome.errors == {"status 413": 1}
    entry = summarise("open", [outcome, outcome])
    assert (entry["answers"], entry["failed"]) == (2 * len(outcome.latencies), 2)


def test_a_service_that_is_not_there_is_counted() -> None:
    async def load() -> Outcome:
        async with connect("http://127.0.0.1:9") as connection:  # the discard port: nothing listens there
            return await closed_loop(connection, [BODY] * 3, clients=2)

    outcome = asyncio.run(load())
    assert outcome.errors == {"ConnectError": 3}
    assert summarise("none", [outcome])["latency_s"] is None


def test_cache_compares_known_chunks_with_unknown(
    root: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(
        compressor=CompressorConfig(n_layers=2, chunk_tokens=64, order="document_first"),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    save_checkpoint(build_model(config), tmp_path / "documents")
    (case,) = run("cache", tmp_path / "documents", tmp_path, "--passages", "3")["cases"]
    assert case["cache_bytes"] > 0
    assert set(case["seconds"]) == {"uncached", "cold", "warm", "query_once", "query_each"}
    for ratio in ("warm_over_cold", "warm_over_uncached", "cold_over_uncached", "query_once_over_each"):
        assert set(case["ratios"][ratio]) == SPREAD
    assert "cold/warm" in capsys.readouterr().out
    assert main(["cache", "--quick", "--checkpoint", str(root / "first"), "--output", str(tmp_path)]) == 2
    assert "document_first" in capsys.readouterr().err
