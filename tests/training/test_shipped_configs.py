"""Every shipped config: it is headed by its command, says what the paper says, and runs (shortened, tiny models)."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny_training import losses, settings, write_run
from training.__main__ import COMMANDS, main
from training.config import TrainConfig, load_config
from training.runtime import AccelerateRuntime
from training.trainee import build_trainee

FOLDER = Path(__file__).parents[2] / "training" / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PAPER = [name for name in CONFIGS if name.startswith("paper-")]
SHORT = [
    "model.compressor.chunk_tokens=32",
    "model.compressor.query_tokens=64",
    "model.compressor.rates=[8,4]",
    "data.dev_questions=2",
    "loop.batch_size=4",
    "loop.max_steps=2",
    "loop.log_every=1",
]


def commands_of(name: str) -> list[list[str]]:
    """The commands in the head of a config, `accelerate launch` and its settings left out."""
    head = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\n#\n")[0]
    lines = [line.removeprefix("# ") for line in head.splitlines()]
    return [shlex.split(line.partition("-m training ")[2]) for line in lines]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_headed_by_the_command_that_runs_it(name: str) -> None:
    commands = commands_of(name)
    assert commands
    for command, config, *rest in commands:
        assert command in COMMANDS
        assert config == f"training/configs/{name}.yaml"
        assert "--out" in rest
        load_config(FOLDER / f"{name}.yaml", [word for word in rest if "=" in word])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_runs(name: str, tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    write_run(tmp_path, settings(tiny_llama))
    texts = [{"text": f"The train number {number} is in Rome. " + "It rests there. " * number} for number in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    shipped = load_config(FOLDER / f"{name}.yaml")
    bases = [f"model.generator.base_model={tiny_llama}"]
    if shipped.model.compressor.kind == "encoder":
        bases += [f"model.compressor.base_model={tiny_bert}", "model.compressor.projection_dim=32"]
    else:
        bases += ["model.compressor.n_layers=2"]
    run = tmp_path
    start: list[str] = []
    for number, (command, *_) in enumerate(commands_of(name)):
        data = "texts" if command == "pretrain" else "train"
        files = [f"data.train={tmp_path}/{data}.jsonl", f"data.dev={tmp_path}/{data}.jsonl"]
        run = tmp_path / f"run{number}"
        arguments = [command, str(FOLDER / f"{name}.yaml"), "--out", str(run), *SHORT, *bases, *files, *start]
        assert main(arguments) == 0
        assert list(losses(run)) == [1, 2]
        start = [f"start={run}/best"]
    resolved = load_config(run / "config.yaml")
    assert resolved.optimizer == shipped.optimizer
    assert resolved.loss == shipped.loss
    build_trainee(resolved, AccelerateRuntime())


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_hold_the_papers_numbers(name: str) -> None:
    config: TrainConfig = load_config(FOLDER / f"{name}.yaml")
    compressor, lora, optimizer = config.model.compressor, config.model.generator.lora, config.optimizer
    assert lora is not None
    assert (lora.r, lora.alpha, lora.dropout, len(lora.target_modules or ())) == (16, 32, 0.1, 7)
    assert optimizer.generator_lr == 1e-4
    assert optimizer.compressor_lr == (5e-5 if compressor.kind == "n_layers" else 1e-4)
    assert optimizer.compressor_lora is None
    assert (optimizer.warmup, optimizer.weight_decay, optimizer.clip_norm) == (0.05, 0.1, 1.0)
    assert (config.loop.batch_size, config.loop.epochs, config.loop.max_steps) == (128, 1, None)
    assert (config.data.passages, config.data.answer_tokens) == (5, 128)
    assert config.loss.relevance == 0.05 * config.data.passages  # the paper sums over passages, here it is a mean
    assert (config.loss.answer, config.loss.relevance_kind, config.loss.kl) == (1.0, "mse", 0.0)
    assert (compressor.chunk_tokens, compressor.rates, compressor.memory_tokens(128, 16)) == (128, (16,), 8)
    assert (compressor.readout, compressor.order, compressor.projection_dim) == ("memory", "query_first", 8096)
    layers = re.fullmatch(r"paper-.*-n(\d+)", name)
    assert compressor.kind == ("n_layers" if layers else "encoder")
    assert layers is None or compressor.n_layers == int(layers[1])
