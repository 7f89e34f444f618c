"""A model made ready to be trained: adapters in place, parts frozen or not, parameters grouped by learning rate."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import ConfigError
from core.model import Model, build_model
from training.adapters import add_lora
from training.attention import use_matrix_attention
from training.config import OptimizerConfig, TrainConfig
from training.runtime import Runtime
from training.start import start_adapter_from, start_from


def build_trainee(config: TrainConfig, runtime: Runtime) -> tuple[Model, list[dict[str, Any]], dict[nn.Parameter, str]]:
    """The model with its adapters, AdamW's parameter groups, and a name for every trainable parameter.

    Weights that are trained are float32; the frozen generator is bfloat16 where that is what is computed in. Raises
    ConfigError where nothing would be trained, and what `build_model` and `start_from` raise.
    """
    model = build_model(config.model, device=runtime.device, dtype=torch.float32, seed=config.loop.seed)
    if runtime.computes_in_bfloat16(config.loop.precision):
        # Frozen: it needs no float32 master copy. Only weights: rotary frequencies are buffers and must stay float32.
        for parameter in model.generator.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if runtime.device.type == "cpu":
        for backbone in (model.generator.model, model.compressor.backbone):
            use_matrix_attention(backbone)
    model.generator.requires_grad_(False)
    wanted, seed = model.config.generator.lora, config.loop.seed
    lora = add_lora(model.generator.model, wanted, seed, "model.generator.lora") if wanted else []
    if config.start:
        start_from(model, Path(config.start), adapter=not config.start_adapter, say=runtime.rank == 0)
    if config.start_adapter:
        start_adapter_from(model, Path(config.start_adapter))
    groups = _parameter_groups(model, lora, config)
    if not groups:
        raise ConfigError("optimizer: every learning rate is 0, so nothing would be trained")
    groups = _sharded_groups(model, groups, runtime)
    if config.loop.gradient_checkpointing:
        for backbone in (model.generator.model, model.compressor.backbone):
            backbone.activation_checkpointing_enable()
    parts = (("compressor", model.compressor), ("generator", model.generator))
    names = {p: f"{part}.{name}" for part, module in parts for name, p in module.named_parameters() if p.requires_grad}
    return model, groups, names


def _parameter_groups(model: Model, lora: list[nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Freeze what has no learning rate; group the rest by rate, and by decay."""
    optimizer = config.optimizer
    backbone = model.compressor.backbone
    if optimizer.compressor_lora:
        add_lora(backbone, optimizer.compressor_lora, config.loop.seed, "optimizer.compressor_lora")
    elif not optimizer.train_embeddings:
        backbone.get_input_embeddings().requires_grad_(False)
    inside = set(backbone.parameters())
    heads = [parameter for parameter in model.compressor.parameters() if parameter not in inside]
    heads_lr = optimizer.compressor_lr if optimizer.heads_lr is None else optimizer.heads_lr
    generator_lr = optimizer.generator_lr if config.loss.needs_generator else 0.0
    rates = ((optimizer.compressor_lr, list(backbone.parameters())), (heads_lr, heads), (generator_lr, lora))
    return [group for rate, parameters in rates for group in _groups_of(parameters, rate, optimizer)]


def _sharded_groups(model: Model, groups: list[dict[str, Any]], runtime: Runtime) -> list[dict[str, Any]]:
    """Shard the model as `runtime` does; the same groups, of the parameters that stand in their places now."""
    modules = (model.compressor, model.generator)
    places = {old: (module, name) for module in modules for name, old in module.named_parameters()}
    runtime.shard(model)
    current = {(module, name): new for module in modules for name, new in module.named_parameters()}
    return [group | {"params": [current[places[parameter]] for parameter in group["params"]]} for group in groups]


def _groups_of(parameters: Iterable[nn.Parameter], rate: float, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of one learning rate: matrices with weight decay; biases, norms and other vectors without."""
    trainable = []
    for parameter in parameters:
        parameter.requires_grad_(parameter.requires_grad and rate > 0)
        if parameter.requires_grad:
            trainable.append(parameter)
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    kinds = ((matrices, optimizer.weight_decay), (vectors, 0.0))
    return [
        {"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay} for members, decay in kinds if members
    ]
