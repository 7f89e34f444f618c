"""The Neuron SDK: what is said where it is missing or a placeholder, and what it is asked for. Against a double."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from core.accelerators import NeuronAccelerator
from core.accelerators.base import CompileSpec
from core.accelerators.neuron import INDEX, load_sdk
from core.errors import ConfigError
from tests.neuron_double import NeuronDouble


class Doubled(torch.nn.Module):
    """A graph of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * self.weight,)


def write_package(folder: Path, code: str) -> None:
    (folder / "torch_neuronx").mkdir()
    (folder / "torch_neuronx" / "__init__.py").write_text(code)


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose torch_neuronx is the one that is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_neuronx", raising=False)
    return tmp_path


def test_a_missing_sdk_names_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_neuronx", None)
    with pytest.raises(ConfigError, match="torch_neuronx cannot be imported") as error:
        NeuronAccelerator().versions()
    assert INDEX in error.value.message


def test_pypis_placeholder_is_told_from_the_sdk(importable: Path) -> None:
    """What PyPI's torch-neuronx 1.0 does on import, word for word."""
    message = "WRONG PACKAGE. Please install the package from Neuron Repository - pip.repos.neuron.amazonaws.com"
    write_package(importable, f"raise ImportError({message!r})\n")
    with pytest.raises(ConfigError, match="PyPI's placeholder") as error:
        load_sdk()
    assert f"--extra-index-url {INDEX}" in error.value.message


def test_a_package_without_the_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_neuronx", ModuleType("torch_neuronx"))
    with pytest.raises(ConfigError, match="has no trace"):
        load_sdk()


def test_the_requirements_pin_what_the_message_names() -> None:
    text = (Path(__file__).parent.parent.parent / "requirements" / "neuron-sdk.txt").read_text()
    assert f"--extra-index-url {INDEX}" in text
    assert f"torch-neuronx=={NeuronDouble.__version__}" in text


def test_the_sdk_is_asked_for_graphs_without_weights_for_a_target() -> None:
    double = NeuronDouble()
    accelerator = NeuronAccelerator(sdk=double)
    examples = (torch.ones(4),)
    graph = accelerator.compile(Doubled(), examples, CompileSpec("trn1", ("--optlevel", "1")))
    assert double.compiled == [
        ["--target", "trn1", "--model-type", "transformer", "--auto-cast", "none", "--optlevel", "1"]
    ]
    assert graph(torch.ones(4))[0].tolist() == [0.0] * 4  # no weights in it
    graph.replace_weights({"weight": torch.tensor([3.0])})
    assert graph(torch.ones(4))[0].tolist() == [3.0] * 4
    assert double.moved == [0]
    with pytest.raises(ConfigError, match="must be one of inf2, trn1"):
        accelerator.compile(Doubled(), examples, CompileSpec("h100"))
    assert len(double.compiled) == 1


def test_a_saved_graph_comes_back_and_another_file_is_refused(tmp_path: Path) -> None:
    accelerator = NeuronAccelerator(sdk=NeuronDouble(), core=1)
    path = tmp_path / "1x4.neff.pt"
    accelerator.compile(Doubled(), (torch.ones(4),), CompileSpec("inf2")).save(path)
    loaded = accelerator.load(path)
    loaded.replace_weights({"weight": torch.tensor([5.0])})
    assert loaded(torch.ones(4))[0].tolist() == [5.0] * 4
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="cannot be loaded onto a NeuronCore"):
        accelerator.load(path)
