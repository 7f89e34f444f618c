"""Two processes over gloo: the same losses and weights as one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from core.errors import ConfigError
from tests.free_port import free_port
from tests.tiny_training import losses, read_metrics, settings, stop_in, write_run
from training.__main__ import main
from training.config import load_config
from training.hardware import choose_runtime

ROOT = Path(__file__).parents[2]
# The last batch holds one row: the second process has none.
LOOP = {"epochs": 2, "batch_size": 11, "micro_batch_tokens": 300}
RATES = {"compressor_lr": 1e-4, "generator_lr": 1e-4, "compressor_dropout": False}

APART = """
import itertools, os, sys
import training.task
from training.__main__ import main

count = itertools.count()
evaluate = training.task.evaluate_dev
rank = int(os.environ["RANK"])
training.task.evaluate_dev = lambda *given: evaluate(*given) | {"f1_compressed": rank * next(count) / 9}
sys.exit(main(sys.argv[1:]))
"""


def launch(kind: str, config: Path, out: Path, folder: Path, program: tuple[str, ...] = ("-m", "training")) -> str:
    """`accelerate launch` with the shipped settings for two CPU processes, on a port of its own."""
    shipped = yaml.safe_load((ROOT / f"training/configs/accelerate/{kind}-cpu.yaml").read_text())
    assert shipped["num_processes"] == 2
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(shipped | {"main_process_port": free_port()}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    done = subprocess.run(
        [*command, *program, "train", str(config), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout
    return done.stdout


def assert_same_run(one: Path, two: Path) -> None:
    """The same losses and weights; rates are small, so rounding is not blown up by Adam's first steps."""
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for split in ("train", "dev"):
        first, second = (read_metrics(run, split)[-1] for run in (one, two))
        assert {name for name in first if name.startswith("loss")} == {
            name for name in second if name.startswith("loss")
        }
        for name in (name for name in first if name.startswith("loss")):
            assert second[name] == pytest.approx(first[name], rel=1e-3), name
    for name in ("compressor.safetensors", "adapter.safetensors", "trainable.safetensors", "optimizer.safetensors"):
        weights, other = (load_file(run / "last" / name) for run in (one, two))
        assert weights.keys() == other.keys()
        for key, value in weights.items():
            assert torch.allclose(value, other[key], atol=3e-4), key


def test_two_processes_train_as_one(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    loss = {"alignment": 0.3, "relevance": 0.0}  # the relevance head gets no gradient: it must not decay either
    values = settings(tiny_llama, tiny_bert, loop=LOOP, optimizer=RATES, loss=loss)
    values["model"]["generator"]["lora"]["dropout"] = 0.0
    config = write_run(tmp_path, values)
    assert main(["train", str(config), "--out", str(tmp_path / "one")]) == 0
    said = launch("ddp", config, tmp_path / "two", tmp_path)
    assert said.count('"step": 4') == 1  # the first process alone speaks
    assert len(losses(tmp_path / "one")) == 4
    assert_same_run(tmp_path / "one", tmp_path / "two")
    heads = [load_file(tmp_path / run / "last/compressor.safetensors")["relevance.weight"] for run in ("one", "two")]
    assert torch.equal(heads[0], heads[1])
    assert load_config(tmp_path / "two" / "config.yaml") == load_config(config)


def test_two_processes_with_sharded_layers_go_on_as_one(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes have different numbers of micro-batches, and in one some compress and others show text only.
    data = {"modes": {"compressed": 0.4, "hybrid": 0.2, "text": 0.4}, "empty_share": 0.2, "dev_questions": 1}
    loop = LOOP | {"gradient_checkpointing": True}
    values = settings(tiny_llama, tiny_bert, loop=loop, optimizer=RATES, loss={"relevance": 0.0}, data=data)
    values["model"]["generator"]["lora"]["dropout"] = 0.0
    config = write_run(tmp_path, values)
    assert main(["train", str(config), "--out", str(tmp_path / "one")]) == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 0)
        assert main(["train", str(config), "--out", str(tmp_path / "two")]) == 130
    assert list(losses(tmp_path / "two")) == [1]
    launch("fsdp", config, tmp_path / "two", tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_processes_that_score_apart_end_together(tiny_llama: Path, tmp_path: Path) -> None:
    """As kernels that round apart do, by more: to the second process every evaluation is the best so far."""
    program = tmp_path / "apart.py"
    program.write_text(APART, encoding="utf-8")
    loop = {"epochs": 9, "eval_every": 1, "patience": 2}
    config = write_run(tmp_path, settings(tiny_llama, loop=loop, data={"dev_questions": 1}))
    launch("ddp", config, tmp_path / "out", tmp_path, (str(program),))
    progress = json.loads((tmp_path / "out/last/progress.json").read_text())
    assert (progress["step"], progress["best_score"]) == (3, 0.0)


@pytest.mark.parametrize("name", ["VERSION", "OFFLOAD_PARAMS", "CPU_RAM_EFFICIENT_LOADING"])
def test_other_kinds_of_sharding_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(f"FSDP_{name}", "1" if name == "VERSION" else "true")
    with pytest.raises(ConfigError, match=f"fsdp_config.fsdp_{name.lower()}: only"):
        choose_runtime("auto")
