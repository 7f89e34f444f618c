"""The loop through its command: it learns, ends early, and goes on after any kill as if nothing had happened."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_training import losses, make_rows, read_metrics, settings, write_run
from training.__main__ import main
from training.dev import evaluate_dev
from training.losses import answer_loss
from training.step import schedule

STEPS = 45
LONG = {"epochs": 15, "batch_size": 4, "save_every": 5, "eval_every": 30}  # 12 rows


def train(config: Path, out: Path, *overrides: str) -> int:
    return main(["train", str(config), "--out", str(out), *overrides])


def finish(config: Path, out: Path, *overrides: str) -> None:
    """Train to the end; where that fails, the assertion says what the run said."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        status = train(config, out, *overrides)
    assert status == 0, said.getvalue()[-3000:]


@pytest.fixture(scope="module")
def long_run(tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with dropout that nothing interrupted, and its settings."""
    folder = tmp_path_factory.mktemp("long")
    config = write_run(folder, settings(tiny_llama, tiny_bert, loop=LONG))
    finish(config, folder / "out")
    return config, folder / "out"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    long_run: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    config, whole = long_run
    out = tmp_path / "out"
    command = [sys.executable, "-m", "training", "train", str(config), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_bytes().splitlines()) > 8:
                process.send_signal(number)
                break
            time.sleep(0.005)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGTERM else -number), errors.decode()
    stopped = json.loads((out / "last" / "progress.json").read_text())["step"]
    logged = max(line["step"] for line in read_metrics(out))
    assert 5 <= stopped < STEPS
    assert stopped == logged if number == signal.SIGTERM else logged - stopped <= 5
    message = f"stopped at step {stopped} of {STEPS}; repeat the command to go on"
    assert (message in said.decode()) == (number == signal.SIGTERM)
    assert ("stopping after this step" in errors.decode()) == (number == signal.SIGTERM)
    finish(config, out)
    assert losses(out) == losses(whole)  # the same numbers, not nearly the same
    for name in ("compressor.safetensors", "adapter.safetensors", "optimizer.safetensors"):
        one, other = load_file(out / "last" / name), load_file(whole / "last" / name)
        assert all(torch.equal(one[key], other[key]) for key in one | other)
    assert read_metrics(out, "dev") == read_metrics(whole, "dev")


def test_a_finished_run_is_left_as_it_is(long_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, whole = long_run
    before = (whole / "last" / "progress.json").stat().st_mtime_ns
    capsys.readouterr()
    assert train(config, whole) == 0
    assert (whole / "last" / "progress.json").stat().st_mtime_ns == before
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    said = capsys.readouterr().out
    assert "stopped at" not in said
    assert f"nothing to do: {whole} is over at step {STEPS} of {STEPS} (loop.epochs " in said


def test_the_loss_goes_down(long_run: tuple[Path, Path]) -> None:
    values = list(losses(long_run[1]).values())
    assert sum(values[-9:]) < 0.95 * sum(values[:9])  # three epochs each


@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_a_handful_of_examples_is_learned_by_heart(
    tiny_mistral: Path, tiny_bert: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = tiny_bert if kind == "encoder" else None
    loop = {"epochs": 60, "batch_size": 4, "eval_every": 60, "micro_batch_tokens": 4000, "row_batch_tokens": 4000}
    optimizer = {"generator_lr": 3e-3, "weight_decay": 0.0, "compressor_dropout": False}
    values = settings(tiny_mistral, encoder, loop=loop, optimizer=optimizer, loss={"relevance": 0.0})
    # The head too: a random one is too flat to be sure of any token.
    modules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
    values["model"]["generator"]["lora"] = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": modules}
    values["data"]["passages"] = 0
    config = write_run(tmp_path, values, make_rows(4))
    assert train(config, tmp_path / "out") == 0
    assert read_metrics(tmp_path / "out", "dev")[-1]["f1_compressed"] == 1.0
    assert "answers on dev" in capsys.readouterr().err
    # From 6.5. How far exactly after this many steps differs by a factor of two between kinds of CPU.
    assert losses(tmp_path / "out")[60] < 0.5


def test_it_stops_when_dev_gets_no_better(tiny_llama: Path, tmp_path: Path) -> None:
    # Next to no learning rate: nothing gets better after the first evaluation.
    loop = {"epochs": 20, "eval_every": 2, "patience": 2}
    rates = {"compressor_lr": 1e-12, "generator_lr": 1e-12, "weight_decay": 0.0}
    config = write_run(tmp_path, settings(tiny_llama, loop=loop, optimizer=rates))
    for _ in range(2):  # repeated, it does nothing more
        assert train(config, tmp_path / "out") == 0
        assert len(losses(tmp_path / "out")) == 6
    progress = json.loads((tmp_path / "out" / "last" / "progress.json").read_text())
    assert (progress["step"], progress["evaluations_since_best"]) == (6, 2)
    assert train(config, tmp_path / "out", "loop.patience=3") == 0
    assert len(losses(tmp_path / "out")) == 8


def test_best_and_last_hold_what_the_service_needs(long_run: tuple[Path, Path]) -> None:
    for name in ("best", "last"):
        folder = long_run[1] / name
        assert json.loads((folder / "config.json").read_text())["trained"] is True
        assert json.loads((folder / "summary.json").read_text())["steps"] <= STEPS
        assert {"slots", "relevance.weight"} <= load_file(folder / "compressor.safetensors").keys()
        assert all(key.startswith("base_model.model.") for key in load_file(folder / "adapter.safetensors"))
    lines = read_metrics(long_run[1])
    assert all(0 <= line["padding_share"] < 1 and line["tokens_per_s"] > 0 for line in lines)


def test_a_run_can_start_from_another(long_run: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = long_run
    arguments = [f"start={whole / 'best'}", "loop.max_steps=1"]
    finish(config, tmp_path / "out", *arguments)
    assert losses(tmp_path / "out")[1] < 0.95 * losses(whole)[1]
    summary = json.loads((tmp_path / "out" / "last" / "summary.json").read_text())
    assert summary["start"] == f"{whole.name}/best"  # and not where that lies on this machine


def test_the_adapter_can_come_from_a_run_of_its_own(long_run: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = long_run
    still = ["loop.max_steps=1", "optimizer.compressor_lr=1e-12", "optimizer.generator_lr=1e-12"]
    finish(config, tmp_path / "base", *still)
    finish(config, tmp_path / "out", *still, f"start_adapter={whole / 'last'}")
    for name, source in (("compressor.safetensors", tmp_path / "base"), ("adapter.safetensors", whole)):
        one, other = load_file(tmp_path / "out" / "last" / name), load_file(source / "last" / name)
        assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one | other)


def test_an_adapter_that_is_not_there_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, settings(tiny_llama))
    assert train(config, tmp_path / "out", f"start_adapter={tmp_path}") == 1
    assert f"start_adapter: {tmp_path} has no adapter" in capsys.readouterr().err


def test_bad_rows_are_counted_and_skipped_or_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, settings(tiny_llama, loop={"max_steps": 1}))
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "r0", "query": "again"}\n{broken\n')
    assert train(config, tmp_path / "out") == 0
    assert "12 of 14 rows kept" in capsys.readouterr().out
    assert train(config, tmp_path / "refused", "data.on_bad_row=refuse") == 1
    assert "line 13" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "limit"), [("text", 130), ("hybrid", 130), ("compressed", 106)])
def test_long_prompts_are_skipped_and_counted(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, limit: int
) -> None:
    data = {"modes": {mode: 1.0}, "prompt_tokens": limit}
    config = write_run(tmp_path, settings(tiny_llama, data=data))
    assert train(config, tmp_path / "out") == 0
    skipped = json.loads((tmp_path / "out" / "last" / "progress.json").read_text())["skipped"]
    assert 0 < skipped < 12
    assert (
        f"of 12 examples looked at cannot be read, or not in data.prompt_tokens {limit}; such"
        in capsys.readouterr().out
    )
    assert sum(line["skipped"] for line in read_metrics(tmp_path / "out")) == skipped


@pytest.mark.parametrize("changes", [{}, {"empty_share": 0.5}])
def test_a_run_all_of_whose_examples_would_be_skipped_is_refused_before_it_begins(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, float]
) -> None:
    config = write_run(tmp_path, settings(tiny_llama, data={"prompt_tokens": 10} | changes))
    assert train(config, tmp_path / "out") == 1
    assert (
        "of 12 examples looked at cannot be read, or not in data.prompt_tokens 10; give more" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert train(config, tmp_path / "ranking", "loss.answer=0", "loop.max_steps=1") == 0  # reads no prompt
    assert "looked at" not in capsys.readouterr().out


def break_steps(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int], bool]) -> None:
    """The answer's loss, and so the gradient, is no number in every call, counted from 0, that `broken` names."""
    calls = itertools.count()
    monkeypatch.setattr(
        "training.objective.answer_loss", lambda *given: answer_loss(*given) * (nan if broken(next(calls)) else 1.0)
    )


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out_and_counted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path, settings(tiny_llama, loop={"micro_batch_tokens": 9999}))
    break_steps(monkeypatch, lambda call: call == 1)
    assert train(config, tmp_path / "out") == 0
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out/last/compressor.safetensors").values())
    assert [line["not_finite"] for line in read_metrics(tmp_path / "out")] == [0, 1, 0]
    assert [line["step"] for line in read_metrics(tmp_path / "out") if "loss" in line] == [1, 3]
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", (tmp_path / "out/metrics.jsonl").read_text()))


@pytest.mark.parametrize(("first", "steps"), [(0, 9), (2, 30)])
def test_a_run_whose_gradients_are_not_finite_any_more_ends(
    first: int,
    steps: int,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loop = {"epochs": 10, "max_steps": steps, "micro_batch_tokens": 9999}
    config = write_run(tmp_path, settings(tiny_llama, loop=loop))
    break_steps(monkeypatch, lambda call: call >= first)
    assert train(config, tmp_path / "out") == 1
    assert f"not finite in {min(20, steps)} steps in a row" in capsys.readouterr().err
    assert not (tmp_path / "out/best").exists()


def test_evaluating_does_not_count_as_training_time(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0  # a clock on which a step takes a second, and an evaluation a thousand

    def tick() -> float:
        nonlocal now
        now += 1
        return now

    def evaluate_slowly(*given: Any) -> dict[str, float]:
        nonlocal now
        now += 1000
        return evaluate_dev(*given)

    monkeypatch.setattr("training.train.time", SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr("training.task.evaluate_dev", evaluate_slowly)
    config = write_run(tmp_path, settings(tiny_llama, loop={"eval_every": 1}))
    assert train(config, tmp_path / "out") == 0
    assert all(line["tokens_per_s"] > 100 for line in read_metrics(tmp_path / "out"))


def test_a_signal_while_dev_is_evaluated_ends_the_run_with_that_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate_stopped(*given: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return evaluate_dev(*given)

    monkeypatch.setattr("training.task.evaluate_dev", evaluate_stopped)
    config = write_run(tmp_path, settings(tiny_llama, loop={"eval_every": 2}))
    assert train(config, tmp_path / "out") == 130
    progress = json.loads((tmp_path / "out" / "last" / "progress.json").read_text())
    assert (progress["step"], progress["evaluations_since_best"]) == (2, 0)


def test_the_rate_rises_and_falls_in_straight_lines() -> None:
    factors = [schedule(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == pytest.approx([(100 - step) / 95 for step in range(5, 100)])
    assert schedule(0, 1, 0.05) == 1.0
