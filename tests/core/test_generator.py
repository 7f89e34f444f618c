"""The generator: splicing, loading, and merging adapters exactly as peft does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.base_models import BaseModel
from core.config import LoraConfig, PromptConfig
from core.decoding import generate
from core.errors import BaseModelError, CheckpointError
from core.generator import Generator, load_generator, merge_lora
from core.prompts import Block, PromptTemplate
from core.sampling import GenerationOptions
from core.tokenization import encode
from tests.tiny_checkpoints import edit_json

ALL = ["tiny_llama", "tiny_mistral", "tiny_qwen2", "tiny_qwen3"]
# peft still asks transformers by the property's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = LoraConfig(r=4, alpha=10, dropout=0.0)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Generator:
    return load_generator(BaseModel("tiny", folder, ""), dtype=dtype)


@pytest.fixture
def generator(tiny_llama: Path) -> Generator:
    return load(tiny_llama)


def test_splice_puts_each_embedding_in_its_place(generator: Generator) -> None:
    ids = torch.randint(5, 300, (2, 6))
    mask = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    memory = torch.rand(3, generator.hidden_size, requires_grad=True)
    by_hand = [
        torch.cat([generator.embed(ids[0, :1]), memory[:2], generator.embed(ids[0, 3:])]),
        torch.cat([generator.embed(ids[1, :4]), memory[2:], generator.embed(ids[1, 5:])]),
    ]
    spliced = generator.splice(ids, mask, memory)
    assert torch.equal(spliced, torch.stack(by_hand))
    weights = torch.rand_like(spliced)
    (spliced * weights).sum().backward()
    assert memory.grad is not None
    assert torch.equal(memory.grad, weights[mask])


def test_splice_casts_memory_to_the_models_type(tiny_llama: Path) -> None:
    generator = load(tiny_llama, torch.bfloat16)
    spliced = generator.splice(torch.ones(1, 2, dtype=torch.int64), torch.tensor([[True, False]]), torch.ones(1, 64))
    assert spliced.dtype == generator.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (3, 64), (2, 63), (2,)])
def test_splice_refuses_memory_that_does_not_fit(generator: Generator, shape: tuple[int, ...]) -> None:
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match=r"memory must be \(2, 64\)"):
        generator.splice(torch.ones(1, 3, dtype=torch.int64), mask, torch.zeros(shape))


def test_loads_frozen_in_eval_mode_with_every_way_to_end(generator: Generator) -> None:
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    end, other = generator.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])  # type: ignore[misc]
    assert generator.eos_ids == {end}
    generator.tokenizer.eos_token = "<|endoftext|>"
    assert Generator(generator.model, generator.tokenizer).eos_ids == {end, other}


def test_refuses_a_folder_without_safetensors(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="tiny cannot be loaded"):
        load(folder)


def granite(llama: Path, folder: Path, **settings: float) -> Path:
    """Granite is Llama with factors in four places, all 1 where the config does not say."""
    shutil.copytree(llama, folder)
    edit_json(folder / "config.json", lambda config: config.update(model_type="granite", **settings))
    return folder


def test_a_model_that_scales_its_logits_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    plain, scaled = granite(tiny_llama, tmp_path / "plain"), granite(tiny_llama, tmp_path / "scaled", logits_scaling=8)
    generator, ids = load(plain), torch.arange(20, 40)[None]
    hidden = generator.model.get_decoder()(ids).last_hidden_state[0]
    torch.testing.assert_close(generator.next_logits(hidden), generator.model(ids).logits[0])
    with pytest.raises(BaseModelError, match=r"tiny has logits_scaling 8 in config\.json"):
        load(scaled)


@pytest.mark.parametrize("name", ["logit_scale", "lm_head_multiplier", "final_logit_softcapping", "logits_soft_cap"])
def test_a_model_that_bends_its_logits_is_refused_by_the_name_of_the_setting(
    tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(BaseModelError, match=f"tiny has {name} 30"):
        load(granite(tiny_llama, tmp_path / "base", **{name: 30}))


def adapter(generator: Generator, tmp_path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """A random adapter as peft saves it, and the logits of the model that peft merges it into."""
    config = peft.LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear")
    adapted = peft.get_peft_model(generator.model, config)
    source = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=source) * 0.1
    adapted.save_pretrained(str(tmp_path))
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        logits: Tensor = merged(torch.arange(20)[None]).logits
    return load_file(tmp_path / "adapter_model.safetensors"), logits


@pytest.mark.parametrize("name", ALL)
def test_merged_adapter_equals_pefts(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    tensors, expected = adapter(load(folder), tmp_path)
    generator = load(folder)
    with torch.no_grad():
        before = generator.model(torch.arange(20)[None]).logits
        merge_lora(generator.model, tensors, LORA)
        after = generator.model(torch.arange(20)[None]).logits
    assert (before - expected).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def _drop(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


def _rename(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key.replace("layers.0", "layers.9")] = tensors.pop(key)


def _transpose(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].T.contiguous()


def _poison(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(_drop, "lacks 1 keys"), (_rename, "1 unknown keys"), (_transpose, "has shape"), (_poison, "not finite")],
)
def test_a_spoilt_adapter_is_refused_and_changes_nothing(
    generator: Generator,
    tmp_path: Path,
    tiny_llama: Path,
    spoil: Callable[[dict[str, Tensor], str], None],
    message: str,
) -> None:
    tensors, _ = adapter(load(tiny_llama), tmp_path)
    spoil(tensors, "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight")
    save_file(tensors, tmp_path / "spoilt.safetensors")
    before = {name: value.clone() for name, value in generator.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        merge_lora(generator.model, load_file(tmp_path / "spoilt.safetensors"), LORA)
    assert all(torch.equal(before[name], value) for name, value in generator.model.state_dict().items())


def test_an_adapter_for_layers_the_model_lacks_is_refused(generator: Generator) -> None:
    with pytest.raises(CheckpointError, match="no linear layer named"):
        merge_lora(generator.model, {}, LoraConfig(target_modules=("c_attn",)))


def test_smollm2_answers_from_its_background(smollm2: Path) -> None:
    generator = load(smollm2)
    texts = ["The capital of Freedonia is Zubrovka.", "The capital of Sylvania is Lutz."]
    blocks = [Block(text_ids=encode(generator.tokenizer, text).ids) for text in texts]
    template = PromptTemplate(generator.tokenizer, PromptConfig())
    prompts = [template.build(f"What is the capital of {land}?", blocks) for land in ("Freedonia", "Sylvania")]
    answers = generate(generator, prompts, [GenerationOptions(max_new_tokens=24)] * 2)
    assert "Zubrovka" in answers[0].text
    assert "Lutz" in answers[1].text
    assert [answer.finish_reason for answer in answers] == ["stop", "stop"]
