"""Low-rank adapters while training, through peft; and the weights of a trained model as a checkpoint stores them."""

import re
from types import MethodType
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from core.base_models import first_line
from core.compressors import Compressor
from core.config import LoraConfig
from core.errors import CheckpointError, ConfigError
from core.generator import ADAPTER_PREFIX, last_names, linear_layers, name_targets, target_layers

ADAPTER = "default"
LORA_NAME = re.compile(rf"\.lora_([AB])\.{ADAPTER}\.weight$")


def add_lora(module: nn.Module, lora: LoraConfig, seed: int, key: str = "lora") -> list[nn.Parameter]:
    """Put fresh adapters on `module`'s linear layers, in place, and return their parameters (float32, trainable).

    `seed` determines them: every process of a run must begin with the same ones. The rest of `module` is frozen. A
    fresh adapter changes no output: its B is zero (arXiv 2106.09685 sec. 4.1). Raises ConfigError, which names `key`,
    where a layer that is asked for is none of the module's.
    """
    targets = _targets(module, lora, key)
    # Out of the model, where peft would also adapt what it takes for layers of that name, such as fused experts.
    layers = nn.ModuleList(targets.values())
    settings = PeftLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(map(str, range(len(layers))))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, layers, adapter_name=ADAPTER)
        except ValueError as error:
            raise ConfigError(f"{key}: {first_line(error)}") from None
    for path, layer in zip(targets, layers, strict=True):
        assert isinstance(layer, LoraLinear)  # what peft makes of every nn.Linear
        module.set_submodule(path, layer)
        if lora.dropout:
            # Autocast picks the type: peft would first copy every input to float32, a sixth of a step on a CPU.
            layer.cast_input_dtype_enabled = False
        else:
            # A method of this one layer, so that peft's names, and what is saved under them, stay.
            layer.forward = MethodType(_adapted_linear, layer)  # type: ignore[method-assign]
    parameters = []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(bool(LORA_NAME.search(name)))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameters.append(parameter)
    return parameters


def _targets(module: nn.Module, lora: LoraConfig, key: str) -> dict[str, nn.Linear]:
    """As `target_layers`; each name must be that of one layer at least."""
    known = last_names(linear_layers(module))
    unknown = sorted(set(name_targets(module, lora).target_modules or ()) - set(known))
    if unknown:
        raise ConfigError(
            f"{key}.target_modules: the model has no linear layer named {', '.join(unknown)}; "
            f"it has {', '.join(known) or 'none at all'} (null: all but the head)"
        )
    try:
        return target_layers(module, lora)
    except CheckpointError as error:
        raise ConfigError(f"{key}.target_modules: {error.message}") from None


class AdaptedLinear(Function):
    """x W' + scale * (x A') B' with the low-rank part added in place: no intermediate as large as the output.

    x (N, in), weight (out, in) frozen, down (r, in), up (out, r) -> (N, out), in the weight's type. Autograd over
    peft's own forward writes and reads three more tensors of the output's size a layer: a fifth of a step on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """Master weights `down` and `up` are used, and get gradients, in the weight's type and their own in turn."""
        low_down, low_up = down.to(weight.dtype), up.to(weight.dtype)
        low = x @ low_down.t()  # (N, r)
        output = x @ weight.t()  # (N, out)
        output.addmm_(low, low_up.t(), alpha=scale)
        ctx.save_for_backward(x, low, weight, low_down, low_up)
        ctx.scale, ctx.master = scale, down.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        """The gradients of x, down and up; the frozen weight gets none."""
        x, low, weight, down, up = ctx.saved_tensors
        grad_low = grad @ up  # (N, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight  # (N, in)
            grad_x.addmm_(grad_low, down, alpha=ctx.scale)
        grad_down = (grad_low.t() @ x).to(ctx.master) * ctx.scale
        grad_up = (grad.t() @ low).to(ctx.master) * ctx.scale
        return grad_x, None, grad_down, grad_up, None


def adapted_linear(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`AdaptedLinear` as a function."""
    output: Tensor = AdaptedLinear.apply(x, weight, down, up, scale)  # type: ignore[no-untyped-call]  # torch's own
    return output


def _adapted_linear(layer: LoraLinear, x: Tensor) -> Tensor:
    """The forward of a peft layer through `AdaptedLinear`: x (..., in) -> (..., out)."""
    base = cast("nn.Linear", layer.get_base_layer())
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
    scale = layer.scaling[ADAPTER]
    down, up = (side[ADAPTER].weight for side in (layer.lora_A, layer.lora_B))
    with torch.autocast(kind, enabled=False):
        flat = x.flatten(0, -2).to(dtype)  # (..., in) -> (N, in)
        output = adapted_linear(flat, base.weight.to(dtype), cast("Tensor", down), cast("Tensor", up), scale)
        output = output.unflatten(0, x.shape[:-1])  # (N, out) -> (..., out)
        bias: Tensor | None = base.bias
        return output if bias is None else torch.add(output, bias.to(dtype))


def whole_copy(value: Tensor) -> Tensor:
    """A copy on the CPU. Of a sharded value every process must ask for one; the first alone gets what is in it."""
    if not isinstance(value, DTensor):
        return value.detach().cpu().clone()
    with torch.no_grad():
        whole: Tensor = value.full_tensor()
    return whole.cpu().clone() if torch.distributed.get_rank() == 0 else whole.to("meta")


def adapted_names(module: nn.Module) -> list[str]:
    """The last names of the layers of `module` that have adapters, sorted."""
    return last_names(LORA_NAME.sub("", name) for name, _ in module.named_parameters() if LORA_NAME.search(name))


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """The adapters of `module` in peft's own naming (`base_model.model.<path>.lora_A.weight`), float32 on the CPU."""
    return {
        ADAPTER_PREFIX + LORA_NAME.sub(r".lora_\1.weight", name): whole_copy(parameter).float()
        for name, parameter in module.named_parameters()
        if LORA_NAME.search(name)
    }


@torch.no_grad()
def load_adapter(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Set the adapters of `module` from `adapter_state`'s form. Raises ConfigError, which names `source`."""
    own = {
        ADAPTER_PREFIX + LORA_NAME.sub(r".lora_\1.weight", name): parameter
        for name, parameter in module.named_parameters()
        if LORA_NAME.search(name)
    }
    if own.keys() != tensors.keys():
        theirs, asked = (", ".join(last_names(name.split(".lora_")[0] for name in each)) for each in (tensors, own))
        raise ConfigError(
            f"{source}: its adapter is on other layers ({theirs}) than model.generator.lora.target_modules "
            f"asks for ({asked})"
        )
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ConfigError(f"{source}: its adapter has another rank than model.generator.lora.r at {name}")
        parameter.copy_(tensors[name])


def compressor_state(compressor: Compressor, lora: LoraConfig | None) -> dict[str, Tensor]:
    """The compressor's weights, float32 on the CPU, adapters merged: what a checkpoint stores."""
    state = {name: whole_copy(value).float() for name, value in compressor.state_dict().items()}
    if lora is None:
        return state
    merged = {}
    for name, value in state.items():
        if LORA_NAME.search(name):
            continue
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            down, up = (state[f"{stem}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            value = value + lora.alpha / lora.r * (up @ down)
        merged[name.replace(".base_layer.", ".")] = value
    return merged
