"""AWS Neuron (Inf2, Trn1) through torch_neuronx: the one file that imports it, when it is used and not before.

Not run on Neuron hardware: tested against a double that keeps the documented contract (tests/neuron_double.py), and
its graphs through XLA on the CPU (tests/xla). Written for SDK 2.31, the last one with torch_neuronx.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.accelerators.base import Compiled, CompileSpec, Tensors
from core.errors import ConfigError

INDEX = "https://pip.repos.neuron.amazonaws.com"
INSTALL = f"pip install --extra-index-url {INDEX} -r requirements/neuron-sdk.txt"
TARGETS = ("inf2", "trn1", "trn1n", "trn2")
# Numbers as the checkpoint has them (the compiler's own default, said aloud), and its settings for transformers.
COMPILER_ARGS = ("--model-type", "transformer", "--auto-cast", "none")


def load_sdk() -> Any:
    """torch_neuronx. Raises ConfigError that says what is wrong: it is missing, or PyPI's placeholder of that name."""
    try:
        sdk = importlib.import_module("torch_neuronx")
    except ImportError as error:
        if "WRONG PACKAGE" in str(error):
            raise ConfigError(
                "neuron: the torch-neuronx installed here is PyPI's placeholder, not AWS's SDK. Uninstall it, then: "
                f"{INSTALL}"
            ) from None
        raise ConfigError(f"neuron: torch_neuronx cannot be imported ({error}). From AWS's index: {INSTALL}") from None
    missing = [name for name in ("trace", "replace_weights", "move_trace_to_device") if not hasattr(sdk, name)]
    if missing:
        raise ConfigError(f"neuron: torch_neuronx has no {missing[0]}, so it is not AWS's SDK. {INSTALL}")
    return sdk


class NeuronGraph:
    """A compiled graph; its weights are beside it, not in it (`inline_weights_to_neff=False`)."""

    def __init__(self, sdk: Any, traced: Any, core: int) -> None:
        self._sdk = sdk
        self._traced = traced
        self._core = core

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Tensors:
        """CPU tensors in, CPU tensors out; the SDK refuses other shapes and types."""
        return tuple(self._traced(*inputs))

    def replace_weights(self, state: Mapping[str, Tensor]) -> None:
        """Give the graph these weights and put them on the core: left on the host, they would be copied every call."""
        self._sdk.replace_weights(self._traced, dict(state))
        self._sdk.move_trace_to_device(self._traced, self._core)

    def save(self, path: Path) -> None:
        """As a TorchScript file around the NEFF, the only form that the SDK has.

        It may carry the weights it was compiled with; what is loaded gets the checkpoint's before it is run.
        """
        with _without_deprecations():
            torch.jit.save(self._traced, str(path))


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """PyTorch after 2.9 would have torch.export; the SDK, which ends with 2.9, has TorchScript files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.(save|load)`", DeprecationWarning)
        yield


class NeuronAccelerator:
    """Compiles with neuronx-cc on any machine that has the SDK; runs on a NeuronCore.

    sdk     stands in for torch_neuronx in tests; None: the real one, imported when it is needed
    core    which of the cores that this process sees (NEURON_RT_VISIBLE_CORES)
    """

    name = "neuron"
    suffix: str | None = ".neff.pt"

    def __init__(self, sdk: Any = None, core: int = 0) -> None:
        self._given = sdk
        self._core = core

    def versions(self) -> dict[str, str]:
        """torch's and torch_neuronx's. Raises ConfigError where the SDK is missing."""
        sdk = self._sdk()
        return {"torch": torch.__version__.split("+")[0], "torch-neuronx": str(sdk.__version__)}

    def compile(self, graph: nn.Module, examples: Tensors, spec: CompileSpec) -> Compiled:
        """Trace and compile, without a device, for `spec.target`. Minutes for each bucket."""
        if spec.target not in TARGETS:
            raise ConfigError(f"neuron: the target must be one of {', '.join(TARGETS)}, not {spec.target!r}")
        sdk = self._sdk()
        arguments = ["--target", spec.target, *COMPILER_ARGS, *spec.compiler_args]
        traced = sdk.trace(graph, examples, compiler_args=arguments, inline_weights_to_neff=False, cpu_backend=True)
        return NeuronGraph(sdk, traced, self._core)

    def load(self, path: Path) -> Compiled:
        """A graph onto the core. The SDK must be imported first: it registers the classes that the file names."""
        sdk = self._sdk()
        try:
            with _without_deprecations():
                traced = torch.jit.load(str(path))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"neuron: {path.name} cannot be loaded onto a NeuronCore ({reason})") from None
        return NeuronGraph(sdk, traced, self._core)

    def _sdk(self) -> Any:
        if self._given is None:
            self._given = load_sdk()
        return self._given
