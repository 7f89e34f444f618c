"""Adapters while training compute what peft's own forward computes, with its gradients, in less memory."""

from collections.abc import Iterator

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import gradcheck

from core.config import LoraConfig
from training.adapters import adapted_linear, add_lora

WANTED = LoraConfig(r=2, alpha=4, dropout=0.0, target_modules=("first", "second"))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(x).relu())
        return hidden


def adapted_layers(module: nn.Module) -> Iterator[LoraLinear]:
    return (layer for layer in module.modules() if isinstance(layer, LoraLinear))


def run(own_forward: bool, dtype: torch.dtype, bf16: bool) -> list[Tensor]:
    """The output and all gradients, through our forward or peft's."""
    torch.manual_seed(0)
    module = TwoLayers().to(dtype)
    parameters = add_lora(module, WANTED, seed=0)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)
    if not own_forward:
        for layer in adapted_layers(module):
            del layer.forward
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output = module(x)
    output.float().pow(2).sum().backward()
    gradients = [tensor.grad for tensor in (x, *parameters)]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    return [output.detach().float(), *[gradient for gradient in gradients if gradient is not None]]


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_output_and_gradients_are_those_of_peft(dtype: torch.dtype, bf16: bool) -> None:
    for ours, pefts in zip(run(True, dtype, bf16), run(False, dtype, bf16), strict=True):
        scale = float(pefts.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours / scale, pefts / scale, rtol=0, atol=0.05 if bf16 else 1e-5)


def test_gradients_are_the_derivative() -> None:
    torch.manual_seed(0)
    x, down, up = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (2, 4), (3, 2)))
    weight = torch.randn(3, 4, dtype=torch.float64)
    assert gradcheck(lambda x, down, up: adapted_linear(x, weight, down, up, 0.7), (x, down, up))


def test_with_dropout_pefts_own_forward_runs() -> None:
    module = TwoLayers()
    add_lora(module, LoraConfig(r=2, alpha=4, dropout=0.5, target_modules=("first", "second")), seed=0)
    for layer in adapted_layers(module):
        assert "forward" not in vars(layer)
        nn.init.ones_(layer.get_parameter("lora_B.default.weight"))
    x = torch.ones(1, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
