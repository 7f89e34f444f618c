"""Checkpoints: what is saved is what is loaded, and nothing else is."""

import gc
import hashlib
import json
import resource
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.answer import Answer, answer
from core.checkpoint import load_checkpoint, save_checkpoint
from core.config import GeneratorConfig
from core.errors import BaseModelError, CheckpointError
from core.generator import merge_lora
from core.golden import read_golden, write_golden
from core.golden_check import record_golden, verify_golden
from core.manifest import MANIFEST
from core.model import Model, build_model
from core.passages import Passage
from core.sampling import GenerationOptions
from tests.tiny_checkpoints import LORA, edit_json, edit_tensors, make_config, random_adapter

PASSAGES = [Passage("The Rhine is 1,230 kilometres long. " * 9, title="Rhine"), Passage("Bread is made of flour.")]


def ask(model: Model, mode: Any = "compressed") -> Answer:
    return answer(model, "How long is the Rhine?", PASSAGES, mode, options=GenerationOptions(max_new_tokens=8))


def assert_same(one: Answer, other: Answer) -> None:
    """Bit for bit: memory embeddings, scores and words."""
    assert one.text == other.text
    for a, b in zip(one.passages, other.passages, strict=True):
        assert torch.equal(a.memory, b.memory)
        assert [chunk.score for chunk in a.chunks] == [chunk.score for chunk in b.chunks]


def all_may_read(folder: Path) -> bool:
    """Whether every user may read every file."""
    return all(file.stat().st_mode & 0o444 == 0o444 for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("generator", "encoder"), [("tiny_mistral", None), ("tiny_qwen2", "tiny_modernbert"), ("tiny_llama", "tiny_bert")]
)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(
    request: pytest.FixtureRequest, tmp_path: Path, generator: str, encoder: str | None, dtype: torch.dtype
) -> None:
    encoder_folder = None if encoder is None else request.getfixturevalue(encoder)
    model = build_model(make_config(request.getfixturevalue(generator), encoder_folder), dtype=dtype)
    save_checkpoint(model, tmp_path / "v1", dtype=dtype)
    assert all_may_read(tmp_path / "v1")
    loaded = load_checkpoint(tmp_path / "v1", dtype=dtype)
    assert loaded.config == model.config
    assert_same(ask(loaded), ask(model))
    stored = load_file(tmp_path / "v1" / "compressor.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}


def test_rotary_frequencies_stay_float32(tmp_path: Path, tiny_llama: Path) -> None:
    model = build_model(make_config(tiny_llama, None), dtype=torch.bfloat16)
    frequencies = dict(model.compressor.named_buffers())["backbone.rotary_emb.inv_freq"]
    assert frequencies.dtype == torch.float32
    assert model.compressor.slots.dtype == torch.bfloat16


def test_the_adapter_is_merged_at_load(saved: Path, tiny_llama: Path, tiny_bert: Path) -> None:
    model = build_model(make_config(tiny_llama, tiny_bert, LORA))
    without = ask(model)
    merge_lora(model.generator.model, random_adapter(model), LORA)
    assert_same(ask(load_checkpoint(saved)), ask(model))
    assert ask(model).text != without.text


def test_a_merged_generator_needs_no_base_model(tmp_path: Path, saved: Path, tiny_llama: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    model = build_model(make_config(base, None, LORA))
    save_checkpoint(model, tmp_path / "merged", adapter=random_adapter(model), merge=True)
    assert all_may_read(tmp_path / "merged")
    merge_lora(model.generator.model, random_adapter(model), LORA)
    shutil.rmtree(base)
    loaded = load_checkpoint(tmp_path / "merged")
    assert loaded.config.generator == GeneratorConfig(base_model=str(base), merged=True)
    assert_same(ask(loaded), ask(model))
    save_checkpoint(loaded, tmp_path / "again")
    assert_same(ask(load_checkpoint(tmp_path / "again")), ask(model))


def test_serving_an_encoder_needs_only_the_generators_base(tmp_path: Path, tiny_llama: Path, tiny_bert: Path) -> None:
    encoder = shutil.copytree(tiny_bert, tmp_path / "encoder")
    model = build_model(make_config(tiny_llama, encoder))
    save_checkpoint(model, tmp_path / "v1")
    shutil.rmtree(encoder)
    loaded = load_checkpoint(tmp_path / "v1")
    assert_same(ask(loaded), ask(model))
    assert loaded.encoder_base is not None
    assert model.encoder_base is not None
    assert loaded.encoder_base.sha256 == model.encoder_base.sha256


def test_the_manifest_says_what_made_it(saved: Path, tiny_llama: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["training"] == {"steps": 7}
    assert manifest["generator"]["name"] == str(tiny_llama)
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {
        str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file() and path.name != MANIFEST
    }


def test_the_name_says_which_version(copied: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((copied / MANIFEST).read_bytes()).hexdigest()
    (tmp_path / "current").symlink_to(copied, target_is_directory=True)
    assert load_checkpoint(tmp_path / "current", verify=False).name == f"v1@{digest[:12]}"
    edit_json(copied / MANIFEST, lambda manifest: manifest["training"].update(steps=8))
    assert load_checkpoint(copied, verify=False).name not in (f"v1@{digest[:12]}", "untrained")


def test_the_base_model_may_be_elsewhere_but_not_another(saved: Path, tmp_path: Path, tiny_llama: Path) -> None:
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    assert load_checkpoint(saved, base_model=str(moved)).base.path == moved
    edit_tensors(moved / "model.safetensors", lambda state: {name: value + 1 for name, value in state.items()})
    with pytest.raises(CheckpointError, match=r"generator base model: the sha256 of .*moved"):
        load_checkpoint(saved, base_model=str(moved))
    with pytest.raises(BaseModelError, match="nowhere"):
        load_checkpoint(saved, base_model=str(tmp_path / "nowhere"))


# Saving: whole or not at all


def test_an_existing_folder_is_never_changed(copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(load_checkpoint(copied), copied)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow over `size` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path: Path, tiny_llama: Path, merge: bool) -> None:
    model = build_model(make_config(tiny_llama, None))
    save_checkpoint(model, tmp_path / "v1")
    # With `merge` the compressor's file has room, and the larger generator's has not.
    size = (tmp_path / "v1" / "compressor.safetensors").stat().st_size
    with largest_file(size if merge else size - 1), pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(model, tmp_path / "v2", merge=merge)
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]
    load_checkpoint(tmp_path / "v1")


def test_adapter_and_settings_go_together(tmp_path: Path, tiny_llama: Path) -> None:
    model = build_model(make_config(tiny_llama, None, LORA))
    with pytest.raises(CheckpointError, match=r"generator\.lora"):
        save_checkpoint(model, tmp_path / "v1")
    incomplete = dict(list(random_adapter(model).items())[1:])
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        save_checkpoint(model, tmp_path / "v1", adapter=incomplete)
    with pytest.raises(CheckpointError, match="float32 or bfloat16"):
        save_checkpoint(model, tmp_path / "v1", adapter=random_adapter(model), dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, tiny_llama: Path) -> None:
    model = build_model(make_config(tiny_llama, None))
    with torch.no_grad():
        model.compressor.slots[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(model, tmp_path / "v1")
    assert list(tmp_path.iterdir()) == []


# The golden example


def test_the_golden_example_repeats_exactly(saved: Path) -> None:
    model = load_checkpoint(saved, verify=False)
    check = verify_golden(model, read_golden(saved, model.generator.hidden_size))
    assert check.exact
    assert set(check.errors.values()) == {0.0}


def test_the_golden_example_allows_for_rounding_but_for_nothing_more(saved: Path, tmp_path: Path) -> None:
    model = load_checkpoint(saved, dtype=torch.bfloat16, verify=False)
    golden = read_golden(saved, model.generator.hidden_size)
    check = verify_golden(model, golden)
    assert not check.exact
    assert 0 < check.errors["memory"] < 0.05
    other = replace(golden, example=replace(golden.example, answer_ids=golden.example.answer_ids[::-1]))
    with pytest.raises(CheckpointError, match="logprobs is off"):
        verify_golden(model, other)


def test_a_golden_example_is_read_as_it_was_written(saved: Path, tmp_path: Path) -> None:
    model = load_checkpoint(saved)
    golden = record_golden(model)
    write_golden(tmp_path, golden)
    again = read_golden(tmp_path, model.generator.hidden_size)
    assert again.example == golden.example
    assert all(torch.equal(again.outputs[name], value) for name, value in golden.outputs.items())


def test_a_model_that_nobody_holds_is_gone_at_once(saved: Path) -> None:
    """The service freezes what the garbage collector looks at: an unloaded version must not need it."""
    model = load_checkpoint(saved)
    held = [weakref.ref(part) for part in (model, model.generator.model, model.compressor.backbone)]
    gc.disable()
    try:
        del model
        assert [part() for part in held] == [None, None, None]
    finally:
        gc.enable()
