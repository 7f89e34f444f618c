"""Evaluations of a tiny random checkpoint for the tests."""

import json
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig, LoraConfig
from core.generator import adapter_shapes
from core.model import build_model
from training.__main__ import main
from training.data_format import Row, RowPassage
from training.results import AnswerRecord, Setting

TOPICS = ["river Rhine", "Marie Curie", "bread", "moon", "computer", "whale", "coffee", "glass"]


def make_rows(count: int = 4) -> list[Row]:
    """Questions with one gold passage, in a place that changes, and four others."""
    rows = []
    for number in range(count):
        passages = [
            RowPassage(f"This is about {topic}: it was seen {1900 + index} times. " * (1 + index % 3), topic, None, 0.0)
            for index, topic in enumerate(TOPICS[:4])
        ]
        gold = RowPassage(f"The {TOPICS[4 + number % 4]} was found in {1960 + number}.", "", None, 1.0)
        passages.insert(number % 5, gold)
        rows.append(
            Row(f"q{number}", f"When was the {TOPICS[4 + number % 4]} found?", tuple(passages), (f"{1960 + number}",))
        )
    return rows


def make_checkpoint(folder: Path, generator: Path) -> Path:
    """An untrained n_layers compressor on the generator, with a LoRA of random weights, saved to the new `folder`."""
    lora = LoraConfig(r=2, alpha=4, target_modules=("q_proj",))
    config = Config(
        compressor=CompressorConfig(n_layers=2, chunk_tokens=32, query_tokens=64, rates=(4, 8)),
        generator=GeneratorConfig(base_model=str(generator), lora=lora),
    )
    model = build_model(config)
    source = torch.Generator().manual_seed(0)
    adapter = {
        name: 0.1 * torch.randn(shape, generator=source)
        for name, shape in adapter_shapes(model.generator.model, lora).items()
    }
    save_checkpoint(model, folder, adapter=adapter)
    return folder


def run_evaluate(checkpoint: Path, data: Path, out: Path, *more: str) -> int:
    """The exit status of `evaluate` with few questions at a time and short answers."""
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--max-new-tokens", "4"]
    return main(["evaluate", *arguments, "--resamples", "20", "--batch-size", "2", "--cost-questions", "1", *more])


def read_json(path: Path) -> dict[str, Any]:
    """A file of one JSON object."""
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def made_answer(
    question: str, setting: Setting, text: str, f1: float, *, substring: float = 0.0, survival: float | None = None
) -> AnswerRecord:
    """A record with the figures that a test is about."""
    return AnswerRecord(question, setting, text, f1, f1, substring, f1, survival, 10, 2, {"decode": 0.1})
