"""export --target jit, and a service that starts from its graphs: the same answers as without them."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.errors import CheckpointError, ConfigError
from core.model import build_model
from service import neuron_smoke
from service.app import create_app
from service.loading import load_model
from service.settings import Settings
from tests.tiny_checkpoints import edit_tensors, sign
from tests.tiny_pipeline import PASSAGES, QUERY
from training.__main__ import main


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with traces to be made of two buckets. Not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    config = Config(
        compressor=CompressorConfig(n_layers=1, chunk_tokens=32, query_tokens=44, rates=(8,), readout="pointer"),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    save_checkpoint(build_model(config, seed=5), folder / "plain")
    arguments = ["export", str(folder / "plain"), str(folder / "v1"), "--target", "jit", "--buckets", "1x96,4x96"]
    assert main(arguments) == 0
    return folder / "v1"


@pytest.fixture(scope="module")
def with_generator(exported: Path) -> Path:
    """The same with graphs of the generator: two answers at one time."""
    folder = exported.parent / "v2"
    arguments = ["export", str(exported.parent / "plain"), str(folder), "--target", "jit", "--buckets", "1x96,4x96"]
    assert main([*arguments, "--generator", "2x512", "--prefill", "1x128,1x512"]) == 0
    return folder


@pytest.fixture(scope="module")
def in_bfloat16(exported: Path) -> Path:
    """The same weights, with graphs of both models in bfloat16."""
    folder = exported.parent / "v3"
    arguments = ["export", str(exported.parent / "plain"), str(folder), "--target", "jit", "--dtype", "bfloat16"]
    shapes = ["--buckets", "1x96", "--generator", "2x512", "--prefill", "1x512"]
    assert main([*arguments, *shapes]) == 0
    return folder


def settings(checkpoint: Path, **values: Any) -> Settings:
    return Settings.model_validate({"checkpoint": checkpoint, "batch_wait_ms": 0, "threads": 1, **values})


def ask(checkpoint: Path, accelerator: str, **values: Any) -> dict[str, Any]:
    passages = [{"text": passage.text, "title": passage.title} for passage in PASSAGES]
    with TestClient(create_app(settings(checkpoint, accelerator=accelerator, **values))) as client:
        reply = client.post("/answer", json={"query": QUERY, "passages": passages, "max_new_tokens": 8})
        assert reply.status_code == 200, reply.text
        return dict(reply.json())


def test_the_service_answers_the_same_from_graphs(exported: Path) -> None:
    eager, jit = ask(exported, "eager"), ask(exported, "jit")
    assert jit["answer"] == eager["answer"]
    assert jit["checkpoint"] == eager["checkpoint"]
    relevances = [[passage["relevance"] for passage in answer["passages"]] for answer in (jit, eager)]
    assert relevances[0] == pytest.approx(relevances[1], abs=1e-5)


def test_the_running_batch_is_on_the_generators_graphs(with_generator: Path) -> None:
    passages = [{"text": passage.text, "title": passage.title} for passage in PASSAGES]
    bodies = [
        {"query": f"{QUERY} {index}", "passages": passages[: 1 + index], "max_new_tokens": 8, "mode": mode}
        for index, mode in enumerate(("compressed", "text", "hybrid", "compressed"))
    ]

    def ask_all(accelerator: str) -> list[str]:
        model = load_model(settings(with_generator, accelerator=accelerator))
        with (
            TestClient(create_app(settings(with_generator, accelerator=accelerator), model)) as client,
            ThreadPoolExecutor(4) as pool,  # more than there are slots
        ):
            replies = list(pool.map(lambda body: client.post("/answer", json=body), bodies))
            assert [reply.status_code for reply in replies] == [200] * 4, replies[0].text
            if accelerator == "jit":
                assert model.generator.max_tokens == 512
                long = bodies[0] | {"query": "Which one? " * 40, "passages": passages * 20, "mode": "text"}
                refused = client.post("/answer", json=long)
                assert refused.status_code == 413
        return [reply.json()["answer"] for reply in replies]

    assert ask_all("jit") == ask_all("eager")


def test_a_start_that_cannot_be_right_is_no_start(exported: Path) -> None:
    with pytest.raises(CheckpointError, match="has no graphs"):
        load_model(settings(exported.parent / "plain", accelerator="jit"))
    with pytest.raises(CheckpointError, match="dtype"):
        load_model(settings(exported, accelerator="jit", dtype="bfloat16"))
    with pytest.raises((CheckpointError, ConfigError), match=r"made for jit|pip\.repos\.neuron\.amazonaws\.com"):
        load_model(settings(exported, accelerator="neuron"))


def test_auto_is_the_format_of_the_graphs(exported: Path, in_bfloat16: Path) -> None:
    for folder, dtype in ((exported, torch.float32), (in_bfloat16, torch.bfloat16)):
        model = load_model(settings(folder, accelerator="jit", dtype="auto"))
        assert {each.dtype for each in (*model.generator.parameters(), *model.compressor.parameters())} == {dtype}
    assert model.generator_graphs is not None
    assert ask(in_bfloat16, "jit", dtype="auto")["usage"]["completion_tokens"] >= 1
    with pytest.raises(CheckpointError, match="dtype"):
        load_model(settings(in_bfloat16, accelerator="jit", dtype="float32"))


def test_the_smoke_script_writes_a_receipt(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "receipt.json"
    command = [str(exported), "--accelerator", "jit", "--passes", "2", "--out", str(out)]
    assert neuron_smoke.main(command) == 0
    receipt = json.loads(out.read_text())
    assert receipt["ok"] is True
    assert receipt["accelerator"] == "jit"
    assert receipt["checkpoint"].startswith("v1@")
    assert set(receipt["milliseconds"]) == {"1x96", "4x96"}
    assert max(receipt["errors"].values()) < 1e-4
    assert receipt["machine"]["versions"]["torch"]
    assert "generator" not in receipt


def test_the_receipt_has_the_generators_graphs_too(with_generator: Path, tmp_path: Path) -> None:
    out = tmp_path / "receipt.json"
    command = [str(with_generator), "--accelerator", "jit", "--passes", "2", "--out", str(out)]
    assert neuron_smoke.main(command) == 0
    generator = json.loads(out.read_text())["generator"]
    assert (
        set(generator["milliseconds"]) == set(generator["errors"]) == {"prefill-1x128", "prefill-1x512", "decode-2x512"}
    )
    assert max(generator["errors"].values()) < 1e-4


def test_the_smoke_script_says_what_failed(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "receipt.json"
    assert neuron_smoke.main([str(exported), "--out", str(out)]) == 1
    receipt = json.loads(out.read_text())
    assert receipt["ok"] is False
    assert "/dev/neuron0" in receipt["error"]


def test_graphs_that_compute_something_else_stop_the_start(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "v1")

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: value * 2 if name.endswith("memory") else value for name, value in tensors.items()}

    edit_tensors(folder / "graphs" / "golden.safetensors", change)
    sign(folder)
    with pytest.raises(CheckpointError, match="is off by"):
        load_model(settings(folder, accelerator="jit"))
