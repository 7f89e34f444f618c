"""A process keeps only the weights it computes with: a checkpoint is loaded and verified whole, then let go of in part.

So neither a service whose answers vLLM writes nor a compressor replica on Ray holds the generator's layers.
"""

import torch
from torch import Tensor, nn

from core.model import Model


def forget_weights(module: nn.Module, kept: Tensor | None = None) -> None:
    """Free a module's parameters, all but `kept`. Their device and dtype can still be asked for; it cannot be run."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter is not kept:
                empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                setattr(part, name, nn.Parameter(empty, requires_grad=False))


def keep_compressor(model: Model) -> None:
    """Leave what compression takes: the compressor, and the generator's input embeddings, which a pointer copies."""
    table = model.generator.model.get_input_embeddings().weight
    assert isinstance(table, Tensor)  # every causal model of transformers keeps one table
    forget_weights(model.generator, table)


def keep_generator(model: Model) -> None:
    """Leave the generator."""
    forget_weights(model.compressor)
