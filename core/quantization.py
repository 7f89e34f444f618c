"""Linear layers in int8: weights once, activations as they come (dynamic quantisation, by torchao). Knows no folders.

Weights are symmetric by output channel, activations by token. Token embeddings, the vocabulary's head, norms, slots,
readout and relevance head stay as they are: they are small, or what is read from them is compared closely.
"""

import torch
from torch import nn

from core.errors import ConfigError
from core.golden_check import verify_golden
from core.model import Model

# Largest difference from the golden example's outputs. Measured with the demo checkpoint on a CPU: 0.05 in float32 and
# 0.07 in bfloat16, whose own tolerance is 0.1.
TOLERANCE = 0.25


def quantise(model: Model) -> None:
    """Turn the linear layers of `model`'s generator and compressor to int8, in place, and run its golden example again.

    Raises ConfigError where torchao is not installed, and CheckpointError where an output is off by over TOLERANCE.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise ConfigError("quantize: int8 needs torchao, which the extra `int8` brings") from None
    head = model.generator.model.get_output_embeddings()

    def chosen(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and module is not head

    # One token a step is the common case, and inductor's settings are the caller's.
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    with torch.no_grad():
        for network in (model.generator.model, model.compressor.backbone):
            quantize_(network, config, filter_fn=chosen)
    model.quantized = True
    if model.golden is not None:
        verify_golden(model, model.golden, TOLERANCE)
