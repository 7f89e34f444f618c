"""The number format is chosen by what the CPU says of itself."""

from pathlib import Path

import pytest
import torch

from core.compute_dtype import best_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["flags\t\t: fpu sse avx2 avx512f avx512_bf16"], torch.bfloat16),
        (["flags\t\t: fpu amx_tile amx_bf16"], torch.bfloat16),
        (["Features\t: fp asimd bf16 i8mm"], torch.bfloat16),
        (["flags\t\t: fpu sse avx2 avx512f"], torch.float32),
        (["flags\t\t: avx2 avx512_bf16", "flags\t\t: avx2"], torch.float32),  # cores that differ
        (["bugs\t\t: avx512_bf16"], torch.float32),
        ([], torch.float32),
    ],
)
def test_bfloat16_where_the_cpu_has_it(tmp_path: Path, lines: list[str], expected: torch.dtype) -> None:
    described = tmp_path / "cpuinfo"
    described.write_text("\n".join(["processor\t: 0", "model name\t: any", *lines]) + "\n")
    assert best_dtype(CPU, described) == expected


def test_a_system_that_does_not_say_gets_float32(tmp_path: Path) -> None:
    assert best_dtype(CPU, tmp_path / "missing") == torch.float32
