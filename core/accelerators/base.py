"""What an accelerator is: it compiles graphs of fixed shapes, one for each bucket, and runs them; of any module."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class CompileSpec:
    """How to compile.

    target          the hardware, such as `inf2`; empty where there is only one
    compiler_args   further arguments of the accelerator's compiler
    """

    target: str = ""
    compiler_args: tuple[str, ...] = ()


class Compiled(Protocol):
    """One compiled graph. Takes and returns CPU tensors of the shapes and types it was compiled for."""

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Run it."""

    def replace_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of `state`, named as the graph's own; nothing is compiled again."""

    def save(self, path: Path) -> None:
        """Write the graph without its weights; only of an accelerator that has a `suffix`."""


class Accelerator(Protocol):
    """A way to run graphs.

    name    what the settings and a checkpoint call it
    suffix  of a compiled graph's file; None: nothing is stored, and a graph is compiled where it is used
    """

    name: str
    suffix: str | None

    def versions(self) -> dict[str, str]:
        """What a stored graph depends on; where any of it differs, the graph is refused. Raises ConfigError."""

    def compile(self, graph: nn.Module, examples: Tensors, spec: CompileSpec) -> Compiled:
        """Compile `graph` for the shapes of `examples`. Raises ConfigError where this machine cannot."""

    def load(self, path: Path) -> Compiled:
        """What `Compiled.save` wrote. The file is code: its sha256 must have been checked. Raises ConfigError."""
