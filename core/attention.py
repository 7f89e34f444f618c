"""The generator's attention while it answers, as transformers calls it by the name `GROUPED`. Knows no models."""

from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped_sdpa"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Fused attention: query (B, H, T, d), key and value (B, K, S, d), mask (B, 1, T, S) -> (B, T, H, d), None.

    Without a mask it is causal, and the last query is at the last key: S - T keys stand before the first query.

    What differs from transformers' `sdpa`: keys that heads share are not repeated, and keys before the first query cost
    no mask, with which the kernel computes both triangles. Of a decode step (T = 1) the heads that share keys are
    queries of one head: the kernel reads each key once for all of them, not once a head (six times faster on a CPU, and
    fused kernels of other devices take it beside a mask). With gradients, and for longer queries with a mask on other
    devices, whose fused kernels refuse shared keys beside one, it is transformers' own.
    """
    length, keys = query.shape[2], key.shape[2]
    if is_grad_enabled() or (attention_mask is not None and length > 1 and query.device.type != "cpu"):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return output, None
    if length == 1:
        # (B, H, 1, d) -> (B, K, H/K, d), as heads that share keys stand next to each other
        together = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        output = functional.scaled_dot_product_attention(together, key, value, attn_mask=attention_mask, scale=scaling)
        return output.reshape(query.shape[0], 1, query.shape[1], query.shape[3]), None  # (B, 1, H, d)
    causal = attention_mask is None
    if causal and keys > length:  # the kernel aligns the first query with the first key: queries nobody asks for
        query = functional.pad(query, (0, 0, keys - length, 0))  # (B, H, S, d)
    shared = query.shape[1] != key.shape[1]
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=shared
    )
    # (B, H, S, d) -> (B, H, T, d) -> (B, T, H, d)
    return output[:, :, -length:].transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
