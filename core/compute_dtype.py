"""Which number format a device computes in fastest without losing what a model needs. Knows no models."""

from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
# Instructions that multiply in bfloat16 and add up in float32. A CPU without them would convert to float32 each time.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86: AVX-512 and AMX; ARM: Neon


def best_dtype(device: torch.device, cpu_info: Path = CPU_INFO) -> torch.dtype:
    """bfloat16 where `device` computes in it in hardware, else float32.

    `cpu_info` is Linux' description of the CPU; a system without one gets float32. Never float16: its range is too
    small for the activations of some models that were trained in bfloat16.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(_cpu_flags(cpu_info) & BFLOAT16_FLAGS)
    return torch.bfloat16 if native else torch.float32


def _cpu_flags(cpu_info: Path) -> set[str]:
    """Of all cores: what one of them lacks is left out, since work may land on any."""
    if not cpu_info.exists():
        return set()
    lines = (line.partition(":") for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines())
    flags = [set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")]  # x86, ARM
    return set.intersection(*flags) if flags else set()
