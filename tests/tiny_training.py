"""Tiny training runs for the tests: rows of a made-up world, and settings that train a tiny model in a second."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from core.config import parse_config
from training.batches import TrainExample, make_example
from training.config import TrainConfig
from training.data_format import Row, RowPassage, write_rows
from training.objective import Objective
from training.runtime import AccelerateRuntime
from training.step import schedule, train_step
from training.trainee import build_trainee

PLACES = ("Warsaw", "Germany", "Brazil", "Paris", "Norway", "Vietnam", "Rome", "Chicago")


def make_rows(count: int = 12) -> list[Row]:
    """Questions with one relevant passage and two others, of uneven lengths."""
    rows = []
    for index in range(count):
        place = PLACES[index % 8]
        train = f"The train number {index} is in {place}. " + "It rests. " * (index % 3)
        moon = "The moon moves around the earth." + " Its gravity causes tides." * (index % 4)
        passages = (
            RowPassage(train, relevance=1.0),
            RowPassage("Bread is made of flour, water and salt.", "Bread", relevance=0.0),
            RowPassage(moon, relevance=0.0),
        )
        rows.append(Row(f"r{index}", f"Where is train number {index}?", passages, (place,)))
    return rows


def settings(generator: Path, encoder: Path | None = None, **changes: dict[str, Any]) -> dict[str, Any]:
    """A whole run's settings as YAML holds them; `changes` go group by group on top."""
    compressor: dict[str, Any] = {"chunk_tokens": 32, "query_tokens": 64, "rates": [8, 4], "pointer_window": 4}
    if encoder is None:
        compressor |= {"n_layers": 2}
    else:
        compressor |= {"kind": "encoder", "base_model": str(encoder), "readout": "pointer", "projection_dim": 32}
    values: dict[str, Any] = {
        "model": {
            "compressor": compressor | changes.pop("compressor", {}),
            "generator": {
                "base_model": str(generator),
                "lora": {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
            },
        },
        "data": {"passages": 2, "dev_questions": 3, "answer_tokens": 32},
        "loss": {"relevance": 0.1, "relevance_kind": "bce"},
        "optimizer": {"compressor_lr": 1e-3, "generator_lr": 1e-3, "warmup": 0.1},
        "loop": {
            "batch_size": 4,
            "micro_batch_tokens": 400,
            "row_batch_tokens": 256,
            "epochs": 1,
            "eval_every": 1000,
            "save_every": 1000,
            "log_every": 1,
            "precision": "fp32",
        },
    }
    for group, change in changes.items():
        values[group] = values.get(group, {}) | change
    return values


def make_config(generator: Path, encoder: Path | None = None, **changes: dict[str, Any]) -> TrainConfig:
    """`settings`, validated."""
    return parse_config(TrainConfig, settings(generator, encoder, **changes), "test")


def write_run(folder: Path, values: dict[str, Any], rows: Sequence[Row] | None = None) -> Path:
    """The YAML file of a run in `folder`, with its data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows() if rows is None else rows
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "dev.jsonl", rows[:3])
    values["data"] = {"train": str(folder / "train.jsonl"), "dev": str(folder / "dev.jsonl")} | values["data"]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def make_objective(config: TrainConfig) -> tuple[Objective, list[nn.Parameter]]:
    """The objective of a fresh model, dropout off, with its trainable parameters. Its slots and heads are not zero."""
    model, _, names = build_trainee(config, AccelerateRuntime())
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter, name in names.items():
            if "lora_B" in name or "readout" in name or "relevance" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    objective = Objective(model, config.loss, config.loop.row_batch_tokens)
    objective.eval()
    return objective, list(names)


def gradients(
    objective: Objective, parameters: Sequence[nn.Parameter], examples: Sequence[TrainExample], config: TrainConfig
) -> tuple[list[Tensor | None], dict[str, float]]:
    """The gradient of each parameter after one batch, and the batch's sums."""
    for parameter in parameters:
        parameter.grad = None
    sums = train_step(objective, examples, config, AccelerateRuntime())
    return [parameter.grad for parameter in parameters], sums


def make_examples(objective: Objective, config: TrainConfig, rows: Sequence[Row]) -> list[TrainExample]:
    """One example a row."""
    return [make_example(objective.model, row, config.data, config.loss, f"test/{row.id}") for row in rows]


def read_metrics(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of one split of a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["split"] == split]


def losses(folder: Path) -> dict[int, float]:
    """The training loss after each step."""
    return {line["step"]: line["loss"] for line in read_metrics(folder)}


def stop_in(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """A stop signal arrives in step `first`, counted from 0."""

    def stopping(step: int, steps: int, warmup: float) -> float:
        if step == first:
            signal.raise_signal(signal.SIGTERM)
        return schedule(step, steps, warmup)

    monkeypatch.setattr("training.train.schedule", stopping)
