"""What the settings make of a checkpoint: its number format."""

from pathlib import Path

import pytest
import torch

from core.compute_dtype import best_dtype
from service.loading import load_model
from tests.service.calls import answer
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
