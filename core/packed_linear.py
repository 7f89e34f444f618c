"""Linear layers whose weights lie as the CPU's kernels read them (oneDNN), packed once. For inference in bfloat16 only.

An ordinary layer is laid out anew by every call, which is most of what a decode step of few tokens pays: with packed
weights it reads them at the speed of memory. PyTorch packs weights the same way when it compiles frozen graphs.
"""

import torch
from torch import Tensor, nn

from core.model import Model

LAYER_ROWS, HEAD_ROWS = 2048, 16  # rows a layout is chosen for: a prompt's tokens, and one token of each sequence


class PackedLinear(nn.Module):
    """What `linear` computes, (..., in) -> (..., out) in bfloat16 on a CPU; takes over its weight."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return output


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed layers work here and pay: bfloat16 on a CPU that multiplies it."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode()
def pack_model(model: Model) -> None:
    """Put packed layers in place of the linear ones of generator and compressor; they are then for inference only.

    Where that neither works nor pays, nothing is changed.
    """
    if can_pack(model.device, model.generator.dtype):
        pack_network(model.generator.model, head=model.generator.model.get_output_embeddings())
        pack_network(model.compressor.backbone)


def pack_network(network: nn.Module, head: nn.Module | None = None) -> None:
    """Put packed layers in place of all linear ones inside `network`; `head` runs on one token of each sequence."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child, HEAD_ROWS if child is head else LAYER_ROWS))
