"""What a measurement was made on: without it, a figure says nothing. Knows no results."""

import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from core.kv_slots import kv_shape
from core.model import Model

PACKAGES = ("scaledown", "torch", "transformers", "tokenizers", "numpy")
CPU_INFO, MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


@contextmanager
def short_collections() -> Iterator[None]:
    """Within, Python's garbage collector passes over what exists already: a million objects of libraries.

    Looking through them takes tenths of a second, and would fall into one measurement and not into the next.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory and number of threads; `load` is the mean of the minute before, which should be near 0."""
    return {
        "processor": _field(CPU_INFO, "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _field(MEMORY_INFO, "MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def describe_versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def describe_model(model: Model) -> dict[str, Any]:
    """The checkpoint's version and the sizes that its speed depends on."""
    compressor = model.config.compressor
    return {
        "checkpoint": model.name,
        "generator": model.base.name,
        "generator_parameters": _parameters(model.generator),
        "compressor": f"{compressor.kind} {compressor.base_model or f'{compressor.n_layers} layers'}",
        "compressor_parameters": _parameters(model.compressor),
        "readout": compressor.readout,
        "order": compressor.order,
        "rate": compressor.rates[0],
        "chunk_tokens": compressor.chunk_tokens,
        "query_tokens": compressor.query_tokens,
        "hybrid_top": model.config.prompt.hybrid_top,
        "max_tokens": model.generator.max_tokens,
        "dtype": model.number_format,
        "kv_bytes_per_token": _kv_bytes(model),
    }


def _kv_bytes(model: Model) -> int:
    """Of the keys and values of one position, in all layers of the generator."""
    config: Any = model.generator.model.config
    heads, head_dim = kv_shape(config)
    return 2 * int(config.num_hidden_layers) * heads * head_dim * model.generator.dtype.itemsize


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _field(path: Path, name: str) -> str:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""
