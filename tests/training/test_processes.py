"""Two processes over gloo: the same losses and weights as one process with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny_training import losses, read_metrics, settings, write_run
from training.__main__ import main
from training.config import load_config

ROOT = Path(__file__).parents[2]
# The last batch holds one row: the second process has none.
LOOP = {"epochs": 2, "batch_size": 11, "micro_batch_tokens": 300}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(config: Path, out: Path, folder: Path) -> str:
    """`accelerate launch` with the shipped settings for two CPU processes, on a port of its own."""
    shipped = yaml.safe_load((ROOT / "training/configs/accelerate/ddp-cpu.yaml").read_text())
    assert shipped["num_processes"] == 2
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(shipped | {"main_process_port": free_port()}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    done = subprocess.run(
        [*command, "-m", "training", "train", str(config), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_as_one(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    # SGD-like epsilon would hide nothing: the rates are small, so rounding is not blown up by Adam's first steps.
    rates = {"compressor_lr": 1e-4, "generator_lr": 1e-4, "compressor_dropout": False}
    loss = {"alignment": 0.3, "relevance": 0.0}  # the relevance head gets no gradient: it must not decay either
    values = settings(tiny_llama, tiny_bert, loop=LOOP, optimizer=rates, loss=loss)
    values["model"]["generator"]["lora"]["dropout"] = 0.0
    config = write_run(tmp_path, values)
    assert main(["train", str(config), "--out", str(tmp_path / "one")]) == 0
    said = launch(config, tmp_path / "two", tmp_path)
    assert said.count('"step": 4') == 1  # the first process alone speaks
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    assert len(one) == 4
    for split in ("train", "dev"):
        first, second = (read_metrics(tmp_path / run, split)[-1] for run in ("one", "two"))
        assert second["loss_alignment"] == pytest.approx(first["loss_alignment"], rel=1e-3)
    for name in ("compressor.safetensors", "adapter.safetensors"):
        weights = [load_file(tmp_path / run / "last" / name) for run in ("one", "two")]
        for key, value in weights[0].items():
            assert torch.allclose(value, weights[1][key], atol=3e-4), key
    heads = [load_file(tmp_path / run / "last/compressor.safetensors")["relevance.weight"] for run in ("one", "two")]
    assert torch.equal(heads[0], heads[1])
    assert load_config(tmp_path / "two" / "config.yaml") == load_config(config)
