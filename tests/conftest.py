"""Fixtures of the whole suite: tiny random models, made once a session, and the demo's real base models."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from core.base_models import resolve_base_model
from core.errors import BaseModelError
from tests import tiny_models

settings.register_profile("suite", deadline=None)  # a busy machine is no failure
settings.load_profile("suite")
os.environ["SCALEDOWN_DTYPE"] = "float32"  # the same results on every machine; `auto` has tests of its own
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny-models")


@pytest.fixture(scope="session")
def tiny_llama(tiny_folder: Path) -> Path:
    return tiny_models.build_llama(tiny_folder / "llama")


@pytest.fixture(scope="session")
def tiny_teacher(tiny_folder: Path, tiny_llama: Path) -> Path:
    return tiny_models.build_teacher(tiny_folder / "teacher", tiny_llama)


@pytest.fixture(scope="session")
def tiny_mistral(tiny_folder: Path) -> Path:
    return tiny_models.build_mistral(tiny_folder / "mistral")


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_folder: Path) -> Path:
    return tiny_models.build_qwen2(tiny_folder / "qwen2")


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_folder: Path) -> Path:
    return tiny_models.build_qwen3(tiny_folder / "qwen3")


@pytest.fixture(scope="session")
def tiny_modernbert(tiny_folder: Path) -> Path:
    return tiny_models.build_modernbert(tiny_folder / "modernbert")


@pytest.fixture(scope="session")
def tiny_bert(tiny_folder: Path) -> Path:
    return tiny_models.build_bert(tiny_folder / "bert")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, the demo's generator. `make test` has fetched it before pytest starts."""
    return _demo_model("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, the demo's encoder. `make test` has fetched it before pytest starts."""
    return _demo_model("minilm-l6")


def _demo_model(name: str) -> Path:
    try:
        return resolve_base_model(name).path
    except BaseModelError as error:
        pytest.skip(f"{name} cannot be fetched: {error}")
