"""Where a run runs: the benchmark of the loop, and Trainium's runtime where torch_xla is and where it is not."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from tests.tiny_training import losses, settings, write_run
from training.__main__ import main
from training.config import Precision, load_config
from training.hardware import choose_runtime
from training.metrics_log import MetricsLog
from training.objective import Objective
from training.run_state import Progress
from training.runtime import AccelerateRuntime, M
from training.task import question_task
from training.train import keep_best
from training.trainee import build_trainee

HAS_XLA = importlib.util.find_spec("torch_xla") is not None


def test_the_benchmark_prints_rates_from_one_run(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, settings(tiny_llama, tiny_bert, loop={"epochs": 2}))
    capsys.readouterr()
    assert main(["benchmark", str(config), "--steps", "3"]) == 0
    figures, sentence = capsys.readouterr().out.splitlines()[-2:]
    measured = json.loads(figures)
    assert measured["steps"] == 3
    assert 0 <= measured["padding_share"] < 1
    assert 0 < measured["loop_tokens_per_s"] <= measured["loop_positions_per_s"]
    assert 0 < measured["share_of_bare"] < 3
    for rate in (measured["loop_positions_per_s"], measured["bare_positions_per_s"]):
        assert f"{rate:.0f} positions/s" in sentence
    percent = re.search(r"([\d.]+)% \(goal 80%\)", sentence)
    assert percent is not None
    # both are rounded from one figure, to four digits and to three
    assert float(percent[1]) == pytest.approx(100 * measured["share_of_bare"], abs=0.06)
    assert not (tmp_path / "last").exists()


def test_auto_is_bfloat16_where_the_hardware_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = AccelerateRuntime()
    for native in (torch.bfloat16, torch.float32):
        monkeypatch.setattr("training.runtime.best_dtype", lambda device, native=native: native)
        expectations: dict[Precision, torch.dtype] = {"auto": native, "bf16": torch.bfloat16, "fp32": torch.float32}
        for precision, expected in expectations.items():
            with runtime.autocast(precision):
                assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == expected


class CopyingRuntime(AccelerateRuntime):
    """Evaluates a copy on the CPU, whatever device it trains on: as on Trainium."""

    def for_evaluation(self, module: M) -> M:
        return copy.deepcopy(module).to("cpu")


def test_a_copy_on_the_cpu_is_evaluated_in_the_cpus_precision(tiny_llama: Path, tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, settings(tiny_llama, loop={"precision": "bf16"})))
    assert config.model.generator.lora is not None
    assert config.model.generator.lora.dropout > 0  # such layers leave it to autocast to bring types together
    runtime, progress = CopyingRuntime(), Progress()
    objective = Objective(build_trainee(config, runtime)[0], config.loss, 256)
    runtime.device = torch.device("xla")
    with MetricsLog(tmp_path, enabled=False) as log:
        keep_best(objective, question_task(config), config, tmp_path, progress, log, runtime)
    assert progress.best_score is not None
    assert (tmp_path / "best").exists()


@pytest.mark.skipif(HAS_XLA, reason="torch_xla is installed here")
def test_trainium_is_refused_where_torch_xla_is_missing(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="torch_xla is not installed"):
        choose_runtime("trainium")
    config = write_run(tmp_path, settings(tiny_llama))
    assert main(["train", str(config), "--out", str(tmp_path / "out"), "--device", "trainium"]) == 1
    assert "torch_xla is not installed" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_XLA, reason="torch_xla lives in an environment of its own (PJRT_DEVICE=CPU)")
def test_an_xla_device_trains_like_the_cpu(tiny_llama: Path, tmp_path: Path) -> None:
    rates = {"compressor_lr": 1e-4, "generator_lr": 1e-4, "compressor_dropout": False}
    values = settings(tiny_llama, loop={"max_steps": 2}, optimizer=rates)
    values["model"]["generator"]["lora"]["dropout"] = 0.0
    config = write_run(tmp_path, values)
    assert choose_runtime("trainium").device != torch.device("cpu")
    assert main(["train", str(config), "--out", str(tmp_path / "cpu")]) == 0
    assert main(["train", str(config), "--out", str(tmp_path / "xla"), "--device", "trainium"]) == 0
    assert losses(tmp_path / "xla") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
