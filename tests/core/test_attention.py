"""The generator's attention against transformers' own, on a Llama whose heads share keys."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from core.attention import GROUPED, grouped_attention
from core.base_models import BaseModel
from core.generator import load_generator


def shared_heads(length: int, keys: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(length * 100 + keys)
    shapes = ((batch, 6, length, 8), (batch, 2, keys, 8), (batch, 2, keys, 8))
    query, key, value = (torch.randn(shape, generator=random) for shape in shapes)
    return query, key, value


def reference(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]  # what transformers' layers carry
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    mask = mask.expand(query.shape[0], 1, *mask.shape[-2:])
    return sdpa_attention_forward(module, query, key, value, mask)[0]


@pytest.mark.parametrize(("length", "keys"), [(5, 5), (5, 12), (1, 9), (40, 41)])
def test_without_a_mask_the_last_query_is_at_the_last_key(length: int, keys: int) -> None:
    query, key, value = shared_heads(length, keys)
    allowed = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    with torch.inference_mode():
        output, _ = grouped_attention(nn.Module(), query, key, value, None)
    assert output.shape == (2, length, 6, 8)
    assert torch.allclose(output, reference(query, key, value, allowed), atol=1e-6)


def test_a_mask_says_what_each_row_sees() -> None:
    query, key, value = shared_heads(1, 16, batch=3)
    allowed = torch.arange(16) < torch.tensor([3, 16, 9])[:, None, None, None]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        output, _ = grouped_attention(nn.Module(), query, key, value, mask)
    assert torch.allclose(output, reference(query, key, value, allowed), atol=1e-6)


def test_a_generator_uses_it_and_gradients_pass(tiny_llama: Path) -> None:
    generator = load_generator(BaseModel("tiny", tiny_llama, "0"))
    assert generator.model.config._attn_implementation == GROUPED
    ids = torch.arange(20, 60).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    with torch.inference_mode():
        fast = generator.model(ids, attention_mask=mask).logits
    embeddings = generator.embed(ids).requires_grad_()
    slow = generator.model(inputs_embeds=embeddings, attention_mask=mask).logits
    real = mask.bool()
    assert torch.allclose(fast[real], slow[real], atol=1e-5)
    slow[real].sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad[real].any()
