"""Tensors to and from safetensors files, checked name by name. Knows neither models nor checkpoints."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import CheckpointError

STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}  # safetensors' names
DTypes = torch.dtype | Mapping[str, torch.dtype]  # of all tensors of a file, or of each by its name


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `module`'s state."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write `tensors` to `path`, floating-point ones as `dtype`, from any device. Raises CheckpointError."""
    stored = {
        name: value.detach().to(device="cpu", dtype=dtype if value.is_floating_point() else None).contiguous()
        for name, value in tensors.items()
    }
    try:
        save_file(stored, path)
        path.chmod(0o644)  # safetensors lets only the owner read; a service may run as another user
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: cannot be written ({error})") from None


def read_header(path: Path) -> dict[str, tuple[torch.Size, str]]:
    """Shape and stored type, by safetensors' name, of every tensor of `path`. Raises CheckpointError."""
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        return {name: (torch.Size(each.get_shape()), each.get_dtype()) for name, each in slices.items()}


def check_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: DTypes) -> None:
    """Check by the header of `path` alone that it holds exactly the tensors of `shapes`, stored as `dtype`.

    Takes no memory for a file that does not fit. Raises CheckpointError that names the tensor that is missing,
    unknown, or of the wrong shape or type.
    """
    header = read_header(path)
    missing, unknown = sorted(shapes.keys() - header.keys()), sorted(header.keys() - shapes.keys())
    if missing:
        raise CheckpointError(f"{path.name}: lacks {len(missing)} tensors, first {missing[0]}")
    if unknown:
        raise CheckpointError(f"{path.name}: has {len(unknown)} unknown tensors, first {unknown[0]}")
    for name, (shape, stored) in sorted(header.items()):
        if tuple(shape) != shapes[name]:
            raise CheckpointError(f"{path.name}: {name} has shape {tuple(shape)}, not {shapes[name]}")
        expected = STORED[dtype if isinstance(dtype, torch.dtype) else dtype[name]]
        if stored != expected:
            raise CheckpointError(f"{path.name}: {name} is stored as {stored}, not {expected}")


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: DTypes) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `path` one by one, after `check_tensors`. Raises CheckpointError as it does."""
    check_tensors(path, shapes, dtype)
    with _open(path) as file:
        for name in sorted(shapes):
            yield name, file.get_tensor(name)


@torch.no_grad()
def read_into(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Fill all of `module`'s state from `path`, converting to its own type. Raises CheckpointError as above."""
    state = module.state_dict()
    for name, value in read_tensors(path, shapes_of(module), dtype):
        state[name].copy_(value)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: is not a readable safetensors file ({error})") from None
