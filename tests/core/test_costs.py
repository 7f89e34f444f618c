"""Costs by stage: whatever grows is split between stages, and operations are counted on fused kernels too."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from core.attention import GROUPED
from core.costs import Stages, current_memory, flop_stages, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def test_stages_add_up_and_entering_the_running_one_changes_nothing() -> None:
    clock = iter([0.0, 1.0, 1.0, 5.0, 5.0, 5.5])
    stages = Stages(lambda: next(clock))
    for name in ("read", "write", "write", "read"):
        stages.enter(name)
    stages.end()
    stages.end()
    assert stages.values == {"read": 1.5, "write": 4.0}
    assert stages.total == 5.5


@pytest.mark.parametrize("attention", ["sdpa", GROUPED])
def test_operations_on_the_fused_kernel_equal_those_on_the_plain_one(tiny_llama: Path, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=attention)
    ids = torch.arange(20, 60).view(2, 20)
    with torch.inference_mode(), flop_stages() as stages:
        stages.enter("first")
        model(ids)
        stages.enter("second")
        model(ids[:1])
    model.set_attn_implementation("sdpa")
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as plain:
        model(ids)
    assert stages.values["first"] == plain.get_total_flops() > 0
    assert stages.values["second"] == plain.get_total_flops() / 2


def test_a_product_of_matrices_costs_two_operations_for_each_multiplication() -> None:
    with flop_stages() as stages:
        stages.enter("product")
        torch.ones(3, 5) @ torch.ones(5, 7)
    assert stages.values == {"product": 2 * 3 * 5 * 7}


def test_the_peak_of_memory_holds_what_was_taken_for_a_moment() -> None:
    size = 64 * 2**20
    reset_peak_memory(CPU)
    before = current_memory(CPU) or peak_memory(CPU)
    taken = torch.ones(size, dtype=torch.uint8)
    del taken
    assert peak_memory(CPU) >= before + size // 2
