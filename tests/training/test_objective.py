"""The objective on tiny models: what reaches the loss, what is trained, and that neither splits nor padding count."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from core.compressors import Compressor
from core.generator import merge_lora
from core.model import build_model
from core.prompts import Content
from tests.tiny_training import gradients, make_config, make_examples, make_objective, make_rows
from training.adapters import adapter_state, compressor_state
from training.config import TrainConfig
from training.objective import Objective, Parts
from training.runtime import AccelerateRuntime
from training.step import train_step
from training.teacher_logits import TokenTargets
from training.trainee import build_trainee

ALL = {"answer": 1.0, "relevance": 0.5, "alignment": 0.3, "relevance_kind": "bce_listwise"}


@pytest.mark.parametrize("order", ["given", "relevance"])
def test_neither_micro_batches_nor_padding_change_gradients(
    tiny_llama: Path, tiny_bert: Path, order: Literal["given", "relevance"]
) -> None:
    data = {"passages": 0, "modes": {"compressed": 0.5, "hybrid": 0.3, "text": 0.2}}
    config = make_config(tiny_llama, tiny_bert, loss=ALL, data=data)
    prompt = replace(config.model.prompt, passage_order=order)
    config = replace(config, model=replace(config.model, prompt=prompt))
    objective, parameters = make_objective(config)
    examples = make_examples(objective, config, make_rows(8))
    results = []
    # One piece with as much padding as there can be; one example and one row at a time: none.
    for micro, row in ((10_000, 10_000), (1, 1), (300, 120)):
        objective.max_tokens = row
        split = replace(config, loop=replace(config.loop, micro_batch_tokens=micro))
        results.append(gradients(objective, parameters, examples, split))
    (whole, sums), *others = results
    assert sums["padded"] > sums["real"]
    assert results[1][1]["padded"] == results[1][1]["real"] == sums["real"]
    assert sum(gradient is not None for gradient in whole) > 20
    for split_gradients, split_sums in others:
        for name in ("sum_answer", "sum_relevance", "sum_alignment"):
            assert sums[name] > 0
            assert split_sums[name] == pytest.approx(sums[name], rel=1e-4)
        for one, other in zip(whole, split_gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.allclose(one, other, atol=2e-5, rtol=1e-3)


def test_only_answer_tokens_are_in_the_loss(tiny_llama: Path) -> None:
    """The loss is that of the answer's tokens under a plain forward pass over prompt and answer, and of no others."""
    config = make_config(tiny_llama, loss={"relevance": 0.0}, data={"modes": {"text": 1.0}})
    objective, _ = make_objective(config)
    examples = make_examples(objective, config, make_rows(3))
    parts = objective(examples)
    expected, count = 0.0, 0
    for example in examples:
        blocks = [
            Content(
                0, [token for row in example.rows if row.chunk.passage == index for token in row.chunk.generator_ids]
            )
            for index in range(len(example.request.passages))
        ]
        prompt = objective.model.template.layout(example.request.query, blocks).ids
        answer_ids = example.questions[0].answer_ids
        ids = torch.cat([prompt, torch.tensor(answer_ids)]).unsqueeze(0)
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        loss = objective.generator.model(input_ids=ids, labels=labels).loss
        expected += float(loss.detach()) * len(answer_ids)
        count += len(answer_ids)
    assert parts.counts == {"answer": count}
    assert parts.losses["answer"].item() == pytest.approx(expected, rel=1e-4)


def test_the_last_answer_token_changes_no_other_prediction(tiny_llama: Path) -> None:
    """Another last target changes the loss by that token's own log-probability: nothing reads what it predicts."""
    config = make_config(tiny_llama, loss={"relevance": 0.0})
    objective, _ = make_objective(config)
    example = make_examples(objective, config, make_rows(1))[0]
    (question,) = example.questions
    shorter = replace(question, answer_ids=question.answer_ids[:-1])
    other = replace(question, answer_ids=[*question.answer_ids[:-1], 42])
    base, one, two = (
        objective([replace(example, questions=[each])]).losses["answer"].item() for each in (shorter, question, other)
    )
    assert one != two
    assert one > base
    assert two > base


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not torch.equal(before[name], parameter)}


def one_update(config: TrainConfig) -> tuple[Objective, set[str], set[str]]:
    """One optimiser step; which parameters of compressor and generator it changed."""
    model, groups, _ = build_trainee(config, AccelerateRuntime())
    objective = Objective(model, config.loss, 256, config.optimizer.compressor_dropout).train()
    parts = (model.compressor, model.generator)
    before = [{name: p.detach().clone() for name, p in part.named_parameters()} for part in parts]
    train_step(objective, make_examples(objective, config, make_rows(4)), config, AccelerateRuntime())
    torch.optim.AdamW(groups).step()
    return objective, changed(before[0], model.compressor), changed(before[1], model.generator)


@pytest.mark.parametrize("readout", ["memory", "pooled", "pointer"])
@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_every_compressor_and_readout_trains(tiny_llama: Path, tiny_modernbert: Path, kind: str, readout: str) -> None:
    encoder = tiny_modernbert if kind == "encoder" else None
    loss = {"alignment": 0.3} if readout == "pointer" else {}
    config = make_config(tiny_llama, encoder, compressor={"readout": readout}, loss=loss)
    _, compressor, generator = one_update(config)
    assert "slots" in compressor
    assert "relevance.weight" in compressor
    assert any(name.startswith("backbone.layers.0") for name in compressor)
    assert any(name.startswith("readout.") for name in compressor) == (kind == "encoder" or readout == "pointer")
    assert generator
    assert all(".lora_" in name for name in generator)


FROZEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"compressor_lr": 0.0}, {}, "heads"),
    ({"heads_lr": 0.0}, {}, "backbone"),
    ({"generator_lr": 0.0}, {}, "no generator"),
    ({"train_embeddings": False}, {}, "no embeddings"),
    ({"compressor_lora": {"r": 2, "alpha": 4, "target_modules": ["query", "value"]}}, {}, "adapter"),
    ({}, {"answer": 0.0, "alignment": 1.0}, "no generator"),
]


@pytest.mark.parametrize(("optimizer", "loss", "case"), FROZEN)
def test_only_what_has_a_rate_changes(
    tiny_llama: Path, tiny_bert: Path, optimizer: dict[str, Any], loss: dict[str, Any], case: str
) -> None:
    rates = {"compressor_lr": 1e-3, "heads_lr": 1e-3, "generator_lr": 1e-3} | optimizer
    config = make_config(tiny_llama, tiny_bert, optimizer=rates, loss={"relevance": 0.5} | loss)
    _, compressor, generator = one_update(config)
    inside = {name for name in compressor if name.startswith("backbone.")}
    assert bool(inside) == (case != "heads")
    assert bool(compressor - inside) == (case != "backbone")
    assert bool(generator) == (case != "no generator")
    if case == "no embeddings":
        assert "backbone.embeddings.word_embeddings.weight" not in inside
        assert "backbone.encoder.layer.0.attention.self.query.weight" in inside
    if case == "adapter":
        assert all(".lora_" in name for name in inside)


def test_a_compressors_adapters_merge_into_what_is_saved(tiny_llama: Path) -> None:
    lora = {"r": 2, "alpha": 6, "dropout": 0.0, "target_modules": ["q_proj", "up_proj"]}
    config = make_config(tiny_llama, optimizer={"compressor_lora": lora})
    objective, _, _ = one_update(config)
    one_batch = make_examples(objective, config, make_rows(2))
    merged = build_model(config.model)
    state = compressor_state(objective.compressor, config.optimizer.compressor_lora)
    assert state.keys() == merged.compressor.state_dict().keys()
    assert not torch.equal(
        state["backbone.layers.0.self_attn.q_proj.weight"],
        merged.compressor.state_dict()["backbone.layers.0.self_attn.q_proj.weight"],
    )
    merged.compressor.load_state_dict(state)
    objective.eval()
    assert isinstance(merged.compressor, Compressor)
    trained = objective._compress(one_batch, Parts())
    again = Objective(merged, config.loss, 256).eval()._compress(one_batch, Parts())
    for one, other in zip(trained.memory, again.memory, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(trained.scores, again.scores, atol=1e-5)


def test_the_generators_adapter_merges_into_the_same_answers(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, loss={"relevance": 0.0})
    objective, _ = make_objective(config)
    examples = make_examples(objective, config, make_rows(2))
    plain = build_model(config.model)
    plain.compressor.load_state_dict(compressor_state(objective.compressor, None))
    untrained = Objective(plain, config.loss, 256).eval()(examples).losses["answer"].item()
    lora = config.model.generator.lora
    assert lora is not None
    merge_lora(plain.generator.model, adapter_state(objective.generator.model), lora)
    merged = Objective(plain, config.loss, 256).eval()(examples).losses["answer"].item()
    trained = objective(examples).losses["answer"].item()
    assert merged == pytest.approx(trained, rel=1e-5)
    assert untrained != pytest.approx(trained, rel=1e-4)


def test_kl_is_added_where_the_teacher_has_logits(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, loss={"relevance": 0.0, "kl": 0.5}, data={"logits": "logits"})
    objective, parameters = make_objective(config)
    examples = make_examples(objective, config, make_rows(3))
    vocabulary = objective.generator.model.config.vocab_size
    random = torch.Generator().manual_seed(0)
    (question,) = examples[1].questions
    count = len(question.answer_ids)
    logprobs, top = torch.randn(count, vocabulary, generator=random).log_softmax(-1).topk(4)
    targets = TokenTargets(torch.tensor(question.answer_ids), top, logprobs)
    examples[1] = replace(examples[1], questions=[replace(question, teacher=targets)])
    parts = objective(examples)
    assert parts.counts["kl"] == count
    alone = objective([examples[1]])
    assert alone.losses["kl"].item() == pytest.approx(parts.losses["kl"].item(), rel=1e-4)
    _, sums = gradients(objective, parameters, examples, config)
    assert sums["count_kl"] == count
    assert sums["sum_kl"] == pytest.approx(parts.losses["kl"].item(), rel=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tiny_llama: Path, tiny_bert: Path) -> None:
    found = []
    for checkpointing in (False, True):
        config = make_config(tiny_llama, tiny_bert, loop={"gradient_checkpointing": checkpointing})
        objective, parameters = make_objective(config)
        objective.dropout = False
        objective.train()
        for module in objective.generator.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the adapter's
        found.append(gradients(objective, parameters, make_examples(objective, config, make_rows(3)), config)[0])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, atol=1e-6)


def test_half_precision_leaves_rotary_frequencies_alone(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, loop={"precision": "bf16"})
    model, _, names = build_trainee(config, AccelerateRuntime())
    assert model.generator.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in model.generator.buffers() if buffer.is_floating_point())
    assert all(parameter.dtype == torch.float32 for parameter in names)
