"""Models from transformers' folders: all of one, or none and a message that says what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.checkpoint import load_checkpoint
from core.errors import BaseModelError
from core.model import build_model
from tests.memory import little_memory
from tests.tiny_checkpoints import edit_json, edit_tensors, make_config, sign


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def narrowed(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: tensors[name][:-1].clone()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("layers.1."), r"lack 9 tensors, first model\.layers\.1\.input_layernorm\.weight"),
        (narrowed("model.norm.weight"), r"model\.norm\.weight has shape \(63,\), not \(64,\)"),
    ],
)
def test_a_generator_with_weights_missing_is_refused(
    tiny_llama: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    edit_tensors(folder / "model.safetensors", change)
    with pytest.raises(BaseModelError, match=f"base cannot be loaded as a causal language model: .*{said}"):
        build_model(make_config(folder, None))


def test_an_encoder_needs_all_of_its_weights_but_a_sentence_head(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "base")
    edit_tensors(folder / "model.safetensors", without("pooler."))
    whole, headless = (build_model(make_config(tiny_llama, each)) for each in (tiny_bert, folder))
    for one, other in zip(whole.compressor.parameters(), headless.compressor.parameters(), strict=True):
        assert torch.equal(one, other)
    edit_tensors(folder / "model.safetensors", without("layer.1."))
    with pytest.raises(BaseModelError, match=r"base cannot be loaded as an encoder: .* first encoder\.layer\.1\."):
        build_model(make_config(tiny_llama, folder))


def setting(**changes: Any) -> Callable[[Path], None]:
    def change(config: dict[str, Any]) -> None:
        config.update(changes)
        config.pop("layer_types", None)  # of as many layers as there were

    return lambda path: edit_json(path, change)


@pytest.mark.parametrize(
    ("file", "spoil", "said"),
    [
        ("config.json", setting(intermediate_size=10**6), r"describes \d{9} weights, but model\.safetensors has \d{6}"),
        ("config.json", setting(num_hidden_layers=10**6), "num_hidden_layers is 1000000, but the weights are"),
        ("config.json", setting(num_labels=10**9), "generator/config.json: num_labels is 1000000000, over the limit"),
        ("config.json", setting(n_layer=10**9), "n_layer is 1000000000, but the weights are"),
        ("config.json", setting(model_type="gpt2", n_layer=10**9), "n_layer is 1000000000, but the weights are"),
        ("config.json", setting(attention_types=[[["global"], 10**9]]), "attention_types is 1000000000"),
        ("config.json", setting(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers is 1000000000"),
        ("config.json", lambda path: path.write_text('{"a":' * 10**5), "generator/config.json: is not JSON"),
        ("config.json", setting(vocab_size=7), r"embed_tokens\.weight has shape \(700, 64\), not \(7, 64\)"),
        ("config.json", setting(hidden_size="wide"), "generator/config.json: .*'hidden_size'"),
        ("config.json", setting(num_attention_heads=0), "generator/config.json: "),
        ("config.json", setting(model_type="nothing"), "generator/config.json: .*`nothing`"),
        ("tokenizer.json", lambda path: path.write_text('{"version": "1.0"}'), "generator: no usable tokenizer"),
        ("tokenizer.json", lambda path: path.write_text("[]"), "generator: no usable tokenizer"),
        ("tokenizer_config.json", setting(tokenizer_class=5), "generator: no usable tokenizer"),
        ("chat_template.jinja", lambda path: path.write_text("{% for"), "cannot be a generator: unexpected"),
        ("chat_template.jinja", lambda path: path.write_text("hello"), "chat template .* exactly once"),
        ("chat_template.jinja", lambda path: path.write_text("{{ raise_exception('no') }}"), "cannot be a generator"),
    ],
)
def test_a_merged_generator_that_does_not_fit_is_refused(
    merged: Path, tmp_path: Path, file: str, spoil: Callable[[Path], object], said: str
) -> None:
    folder = shutil.copytree(merged, tmp_path / "v1")
    spoil(folder / "generator" / file)
    sign(folder)
    with little_memory(), pytest.raises(BaseModelError, match=said) as caught:
        load_checkpoint(folder)
    assert str(folder) not in caught.value.message


@pytest.mark.parametrize("change", [{"num_labels": 10**9}, {"num_hidden_layers": 10**9}, {"layers": [10**9]}])
def test_a_base_model_of_unlikely_sizes_is_refused_before_it_takes_memory(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    llama, bert = (shutil.copytree(each, tmp_path / each.name) for each in (tiny_llama, tiny_bert))
    for folder in (llama, bert):
        setting(**change)(folder / "config.json")
    for config in (make_config(llama, None), make_config(tiny_llama, bert)):
        with little_memory(), pytest.raises(BaseModelError, match=f"config.json: {next(iter(change))} is 1000000000"):
            build_model(config)
