"""Fixtures of the tests of core."""

import shutil
from pathlib import Path

import pytest

from core.checkpoint import load_checkpoint, save_checkpoint
from core.model import build_model
from tests.tiny_checkpoints import LORA, make_config, random_adapter


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_bert: Path) -> Path:
    """A checkpoint with everything that one can have: an encoder and an adapter. Not to be changed."""
    model = build_model(make_config(tiny_llama, tiny_bert, LORA))
    folder = tmp_path_factory.mktemp("saved") / "v1"
    save_checkpoint(model, folder, adapter=random_adapter(model), training={"steps": 7})
    return folder


@pytest.fixture(scope="session")
def merged(saved: Path) -> Path:
    """A checkpoint with all of its generator in it. Not to be changed."""
    folder = saved.with_name("merged")
    model = load_checkpoint(saved)
    save_checkpoint(model, folder, adapter=random_adapter(model), merge=True)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "v1")
