"""Sizing: costs are found again in measurements made of them, plans add up, and the simulation does what queues do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from service.settings import Settings
from service.sizing.__main__ import main
from service.sizing.calculator import PRICES, plan
from service.sizing.commands import compare_engine, percentile, sized
from service.sizing.costs import Costs, Sizes
from service.sizing.fitting import BUILT_IN, fit, least_squares, read_result
from service.sizing.simulation import Limits, Traffic, simulate_closed, simulate_open

SIZES = Sizes(passages=10, passage_tokens=128, query_tokens=16, new_tokens=32)
LIMITS = Limits.of(Settings())
PRICE = PRICES["m7i.large"]
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "sizing.md"
TRUE = Costs(
    source="a test",
    machine="none",
    device="cpu",
    model="none",
    prepare=1e-6,
    compress=(0.002, 4e-5),
    prefill=(3e-4, 1e-7),
    step=(0.02, 0.001, 2e-6),
    chunk_tokens=128,
    query_tokens=64,
    rate=16,
    hybrid_top=1,
    max_tokens=8192,
    overhead_tokens=46,
    weights_bytes=100,
    runtime_bytes=50,
    kv_bytes=2,
)


def benchmark_of(costs: Costs) -> dict[str, Any]:
    """The benchmark's JSON, had it measured exactly these costs."""
    cases = []
    for passages in (5, 10, 20):
        for batch in (1, 8):
            sizes, variants = replace(SIZES, passages=passages), {}
            for mode in ("text", "compressed", "hybrid"):
                prompt = costs.prompt_tokens(sizes, mode)
                context = prompt + sizes.new_tokens / 2
                stages = {
                    "prepare": batch * costs.prepare_s(sizes),
                    "compress": costs.compress_s(batch * passages * costs.row_tokens(sizes)),
                    "prefill": costs.prefill_s([prompt] * batch),
                    "decode": (sizes.new_tokens - 1) * costs.step_s(batch, batch * context),
                }
                if mode == "text":
                    del stages["compress"]
                peak = costs.memory_bytes(batch, prompt + sizes.new_tokens)
                spreads = {name: {"median": seconds} for name, seconds in stages.items()}
                variants[mode] = {"prompt_tokens": prompt, "peak_bytes": peak, "stages_s": spreads}
            case = {"passages": passages, "batch": batch, "passage_tokens": 128, "query_tokens": 16, "new_tokens": 32}
            cases.append({**case, "variants": variants})
    model = {"checkpoint": "c", "generator": "g", "generator_parameters": 20, "compressor_parameters": 5, "rate": 16}
    model |= {"dtype": "float32", "chunk_tokens": 128, "query_tokens": 64, "hybrid_top": 1, "kv_bytes_per_token": 2}
    model |= {"max_tokens": 8192}
    machine = {"processor": "p", "cores": 2, "threads": 2, "device": costs.device}
    return {"command": "engine", "machine": machine, "model": model, "cases": cases}


def only(*modes: str) -> dict[str, Any]:
    """The same, with fewer variants."""
    result = benchmark_of(TRUE)
    for case in result["cases"]:
        case["variants"] = {mode: figures for mode, figures in case["variants"].items() if mode in modes}
    return result


def test_costs_are_found_again() -> None:
    found = fit(benchmark_of(TRUE), "a test")
    for name in ("prepare", "compress", "prefill", "step", "overhead_tokens"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    for name in ("weights_bytes", "runtime_bytes", "kv_bytes", "chunk_tokens", "rate", "max_tokens"):
        assert getattr(found, name) == getattr(TRUE, name)


def test_no_cost_is_below_nothing() -> None:
    # The line through these points falls with the second column: the best that does not is the first alone.
    assert least_squares([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], [1.0, 0.9, 0.8]) == pytest.approx([0.887, 0.0], abs=0.01)


@pytest.mark.parametrize(
    "broken",
    [
        {"command": "load"},
        {"command": "engine", "cases": [{}]},
        {"cases": []},
        {name: content for name, content in benchmark_of(TRUE).items() if name != "machine"},
        only("compressed"),
        only("compressed", "hybrid"),
        benchmark_of(TRUE) | {"model": benchmark_of(TRUE)["model"] | {"dtype": "int8"}},
    ],
)
def test_another_json_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="measured:"):
        fit(broken, "a test")


def test_prompts_are_as_long_as_measured() -> None:
    result = read_result(BUILT_IN)
    costs = fit(result, "built in")
    for case in result["cases"]:
        sizes = Sizes(case["passages"], case["passage_tokens"], case["query_tokens"], case["new_tokens"])
        for mode in ("text", "compressed", "hybrid"):
            assert costs.prompt_tokens(sizes, mode) == case["variants"][mode]["prompt_tokens"]


def test_a_plan_adds_up() -> None:
    found = plan(TRUE, Traffic(SIZES, "compressed"), LIMITS, rate=100, busy=0.7, price=PRICE)
    assert found.capacity == pytest.approx(1 / sum(found.stages_s.values()))
    assert found.utilisation <= 0.7
    assert 100 / ((found.replicas - 1) * found.capacity) > 0.7
    assert found.cost_per_million == pytest.approx(found.replicas * PRICE.per_hour / 3600 / 100 * 1e6)
    assert found.memory_bytes == 150 + 2 * 16 * (found.prompt_tokens + 32)
    text = plan(TRUE, Traffic(SIZES, "text", ranked=False), LIMITS, 100, 0.7, PRICE)
    assert text.stages_s["compress"] == 0
    assert text.prompt_tokens - found.prompt_tokens == 10 * (128 - 8)
    assert text.replicas > found.replicas


def test_slots_and_memory_bound_what_runs_together() -> None:
    tight = replace(LIMITS, kv_tokens=1000)
    assert plan(TRUE, Traffic(SIZES, "compressed"), tight, 1, 0.7, PRICE).sequences == 1000 // (192 + 32)
    assert plan(TRUE, Traffic(SIZES, "text"), tight, 1, 0.7, PRICE).sequences == 1


def test_a_request_that_meets_nobody_takes_the_sum_of_its_stages() -> None:
    traffic = Traffic(SIZES, "compressed")
    simulated = simulate_closed(TRUE, traffic, replace(LIMITS, wait_s=0), clients=1, requests=3)
    alone = plan(TRUE, traffic, LIMITS, 1, 0.7, PRICE).alone_s
    assert simulated.latencies == pytest.approx([alone] * 3, rel=0.02)
    assert simulated.seconds == pytest.approx(3 * alone, rel=0.02)


def test_saturated_throughput_is_the_calculators() -> None:
    traffic = Traffic(SIZES, "compressed")
    simulated = simulate_closed(TRUE, traffic, LIMITS, clients=32, requests=600)
    capacity = plan(TRUE, traffic, LIMITS, 1, 0.7, PRICE).capacity
    assert simulated.answers_per_s == pytest.approx(capacity, rel=0.05)
    assert simulated.busy / simulated.seconds > 0.99


def test_waiting_grows_with_load() -> None:
    traffic = Traffic(SIZES, "compressed")
    capacity = plan(TRUE, traffic, LIMITS, 1, 0.7, PRICE).capacity
    medians = []
    for share in (0.1, 0.5, 0.9):
        simulated = simulate_open(TRUE, traffic, LIMITS, share * capacity, replicas=1, seconds=800 / capacity)
        medians.append(percentile(simulated.latencies, 0.5))
        assert simulated.answers_per_s == pytest.approx(share * capacity, rel=0.15)
    assert medians == sorted(medians)
    assert medians[2] > 1.5 * medians[0]
    again = simulate_open(TRUE, traffic, LIMITS, capacity / 2, 1, 100 / capacity, seed=3)
    assert again == simulate_open(TRUE, traffic, LIMITS, capacity / 2, 1, 100 / capacity, seed=3)


def test_ten_thousand_requests_a_second() -> None:
    found, simulated = sized(TRUE, Traffic(SIZES, "compressed"), LIMITS, 10_000, 0.7, None, PRICE)
    assert found.replicas == plan(TRUE, Traffic(SIZES, "compressed"), LIMITS, 10_000, 0.7, PRICE).replicas
    # A few replicas stand for all; each also needs a moment to finish after its last arrival.
    assert simulated.answers_per_s * found.replicas == pytest.approx(10_000, rel=0.05)
    assert percentile(simulated.latencies, 0.95) < 5 * found.alone_s


def test_percentiles_are_those_of_a_replica_that_has_run_for_long() -> None:
    costs, traffic = fit(read_result(BUILT_IN), "built in"), Traffic(SIZES, "compressed")
    found, simulated = sized(costs, traffic, LIMITS, 10_000, 0.7, None, PRICE)
    rate = 10_000 / found.replicas
    assert len(simulated.latencies) == len(simulated.first_tokens) == pytest.approx(10_000, rel=0.03)
    assert simulated.warm_up == pytest.approx(2000, rel=0.1)
    long = simulate_open(costs, traffic, LIMITS, rate, replicas=1, seconds=30_000 / rate, seed=9)
    early = simulate_open(costs, traffic, LIMITS, rate * 16, replicas=16, seconds=120 / rate)
    true, short = percentile(long.latencies, 0.95), percentile(early.latencies, 0.95)
    assert percentile(simulated.latencies, 0.95) == pytest.approx(true, rel=0.05)
    assert short < 0.9 * true  # those who come to an empty service are not those whom the plan is for


def test_a_latency_goal_costs_replicas_or_cannot_be_met() -> None:
    traffic = Traffic(replace(SIZES, new_tokens=8), "compressed")
    easy, simulated = sized(TRUE, traffic, LIMITS, 500, 0.8, None, PRICE)
    goal = 0.7 * percentile(simulated.latencies, 0.95)
    hard, met = sized(TRUE, traffic, LIMITS, 500, 0.8, goal, PRICE)
    assert hard.replicas > easy.replicas
    assert percentile(met.latencies, 0.95) <= goal
    fewer = plan(TRUE, traffic, LIMITS, 500, 500 / (0.85 * hard.replicas * hard.capacity), PRICE)
    assert fewer.replicas < 0.9 * hard.replicas
    _, missed = sized(TRUE, traffic, LIMITS, 500, fewer.utilisation, None, PRICE)
    assert percentile(missed.latencies, 0.95) > goal
    with pytest.raises(ConfigError, match=r"latency: .* for a request that meets nobody"):
        sized(TRUE, traffic, LIMITS, 50, 0.7, easy.alone_s / 2, PRICE)


def test_the_simulation_repeats_the_measured_runs() -> None:
    """The built-in table's own runs: batches that were measured from end to end."""
    result = read_result(BUILT_IN)
    compared = compare_engine(result, fit(result, "built in"), LIMITS)
    assert len(compared) == 9
    assert all(abs(each.error) < 0.12 for each in compared), compared


def test_prices_are_of_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Costs of one processor say nothing of another."""
    for name, price in PRICES.items():
        assert f"| `{name}` | {price.per_hour} |" in DOCUMENT.read_text()
        if price.device != "cpu":
            assert main(["plan", f"--instance={name}"]) == 2
            assert f"instance: {name} computes on {price.device}" in capsys.readouterr().err
    measured = tmp_path / "engine.json"
    measured.write_text(json.dumps(benchmark_of(replace(TRUE, device="NVIDIA L4"))))
    given = ["plan", f"--measured={measured}", "--mode=text", "--new-tokens=4"]
    assert main([*given, "--instance=g6.xlarge"]) == 0
    assert f"0.8048 USD/hour ({PRICES['g6.xlarge'].source})" in capsys.readouterr().out
    assert main(given) == 2  # nor does a GPU's run say what a CPU takes


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--rate", "50", "--price", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "AMD EPYC" in shown
    assert "compressed over text: 1200 prompt tokens saved an answer" in shown
    load = {"command": "load", "settings": {"passages": [10], "passage_tokens": 128, "mode": "compressed"}, "loads": []}
    load["settings"] |= {"requests": 64}  # type: ignore[operator]  # a dict of mixed values
    costs = fit(read_result(BUILT_IN), "built in")
    rate = simulate_closed(costs, Traffic(replace(SIZES, new_tokens=20), "compressed"), LIMITS, 4, 64)
    entry = {"label": "closed, 4 clients", "answers": 64, "failed": 0, "refused": 0}
    entry |= {"answers_per_s": rate.answers_per_s, "tokens_per_s": 20 * rate.answers_per_s}
    median = percentile(rate.latencies, 0.5)
    path = tmp_path / "load.json"
    for factor, code in ((1.0, 0), (2.0, 1)):
        found = {**load, "loads": [{**entry, "latency_s": {"p50": factor * median}}]}
        path.write_text(json.dumps(found))
        assert main(["check", "--load", str(path)]) == code
        assert "closed, 4 clients" in capsys.readouterr().out
    path.write_text("[]")
    assert main(["check", "--load", str(path)]) == 2
    assert main(["plan", "--latency", "0.1"]) == 2
    assert "latency:" in capsys.readouterr().err


def test_what_only_compression_can_do_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = tmp_path / "engine.json"
    measured.write_text(json.dumps(benchmark_of(TRUE)))
    given = ["plan", f"--measured={measured}", "--rate=1"]
    traffics = (Traffic(SIZES, "compressed"), Traffic(SIZES, "text", ranked=False))
    alone = [plan(TRUE, traffic, LIMITS, 1, 0.7, PRICE).alone_s for traffic in traffics]
    goal = sum(alone) / 2
    assert main([*given, f"--latency={goal}", "--busy=0.1"]) == 0
    shown = capsys.readouterr().out
    assert "compressed: " in shown
    assert f"text is no way to do it: latency: text takes {alone[1]:.2f} s" in shown
    assert main([*given, "--passages=100"]) == 0  # prompts of 13 thousand tokens, more than the generator reads
    shown = capsys.readouterr().out
    assert "text is no way to do it: passages: prompt and answer in text mode have 13," in shown
    assert "times fewer replicas" not in shown
    assert main([*given, "--passages=100", "--mode=text"]) == 2
    assert "and the generator reads 8,192" in capsys.readouterr().err
