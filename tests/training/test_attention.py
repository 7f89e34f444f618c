"""Attention for training on a CPU gives the numbers of the fused kernel, heads shared or not, padded or not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from training.attention import use_matrix_attention


def states_and_gradients(path: Path, matrix: bool, padded: bool) -> tuple[Tensor, Tensor]:
    """Hidden states of what is not padding, and the gradient of the input embeddings."""
    model = AutoModel.from_pretrained(path, attn_implementation="sdpa", dtype=torch.float32).eval()
    if matrix:
        use_matrix_attention(model)
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (3, 11))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 7:] = 0
        mask[2, 3:] = 0
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    states = model(inputs_embeds=embeddings, attention_mask=mask if padded else None).last_hidden_state
    real = states[mask.bool()]
    real.pow(3).sum().backward()
    assert embeddings.grad is not None
    return real.detach(), embeddings.grad


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert", "tiny_modernbert"])
def test_as_the_fused_kernel(kind: str, padded: bool, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    for ours, fused in zip(*(states_and_gradients(path, matrix, padded) for matrix in (True, False)), strict=True):
        scale = float(fused.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours / scale, fused / scale, rtol=0, atol=1e-5)


def test_dropout_of_attention_is_kept_where_a_model_has_it(tiny_bert: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    use_matrix_attention(model)
    ids = torch.arange(5, 15).unsqueeze(0)
    model.train()
    assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
    model.eval()
    assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
