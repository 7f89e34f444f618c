"""What the settings make of a checkpoint: its number format, and int8."""

from pathlib import Path

import pytest
import torch

from core.compute_dtype import best_dtype
from core.errors import CheckpointError, ConfigError
from core.passages import Passage
from core.pipeline import compress, prepare
from core.quantization import TOLERANCE
from service.loading import load_model
from tests.service.calls import QUERY, answer
from tests.service.conftest import Serve, make_settings


@pytest.mark.parametrize("name", ["auto", "float32", "bfloat16"])
def test_a_checkpoint_computes_in_what_is_asked_for(root: Path, name: str) -> None:
    model = load_model(make_settings(checkpoint=root / "first", dtype=name))
    expected = best_dtype(torch.device("cpu")) if name == "auto" else getattr(torch, name)
    assert {each.dtype for each in (*model.generator.parameters(), *model.compressor.parameters())} == {expected}


def test_a_service_says_what_it_computes_in(serve: Serve, root: Path) -> None:
    model = load_model(make_settings(checkpoint=root / "first", dtype="bfloat16"))
    with serve(model) as client:
        assert {card["dtype"] for card in client.get("/v1/models").json()["data"]} == {"bfloat16"}
        assert answer(client, mode="auto")["usage"]["completion_tokens"] >= 1


def test_int8_is_checked_against_the_golden_example_and_answers(serve: Serve, root: Path) -> None:
    pytest.importorskip("torchao", reason="the extra `int8` is not installed (CI does)")
    exact = load_model(make_settings(checkpoint=root / "first"))
    model = load_model(make_settings(checkpoint=root / "first", quantize="int8"))
    request = prepare(model, QUERY, [Passage("Iron melts at 1538 degrees.")])
    memory, expected = (compress(each, [request])[0][0].memory for each in (model, exact))
    assert not torch.equal(memory, expected)
    assert (memory - expected).norm() < TOLERANCE * expected.norm()
    with serve(model) as client:
        assert {card["dtype"] for card in client.get("/v1/models").json()["data"]} == {"int8"}
        assert answer(client, mode="hybrid")["usage"]["completion_tokens"] >= 1


def test_int8_that_is_too_far_off_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="the extra `int8` is not installed (CI does)")
    monkeypatch.setattr("core.quantization.TOLERANCE", 1e-6)
    with pytest.raises(CheckpointError, match="golden example"):
        load_model(make_settings(checkpoint=root / "first", quantize="int8"))


def test_int8_and_compiled_graphs_exclude_each_other(root: Path) -> None:
    settings = make_settings(checkpoint=root / "first", quantize="int8", accelerator="jit")
    with pytest.raises(ConfigError, match="quantize: the graphs of accelerator jit"):
        load_model(settings)


def test_links_in_a_circle_hold_no_graphs(tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        load_model(make_settings(checkpoint=circle, accelerator="jit", dtype="auto"))


@pytest.mark.parametrize(
    ("device", "built", "gpus", "message"),
    [
        ("cuda", False, 0, "this torch has no CUDA"),
        ("cuda:1", True, 0, "torch finds no GPU"),
        ("cuda:2", True, 2, "the last GPU here is cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, built: bool, gpus: int, message: str
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=f"^device: {device} .*{message}.*--device cpu"):
        load_model(make_settings(checkpoint=tmp_path / "missing", device=device))
