"""Checkpoints: what is saved is what is loaded, and nothing else is."""

import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.checkpoint import load_checkpoint, save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig, LoraConfig
from core.errors import BaseModelError, CheckpointError
from core.generator import adapter_shapes, merge_lora
from core.golden import read_golden, record_golden, verify_golden, write_golden
from core.manifest import MANIFEST
from core.model import Model, build_model
from core.passages import Passage
from core.pipeline import Answer, answer
from core.sampling import GenerationOptions

LORA = LoraConfig(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "down_proj"))
PASSAGES = [Passage("The Rhine is 1,230 kilometres long. " * 9, title="Rhine"), Passage("Bread is made of flour.")]


def make_config(generator: Path, encoder: Path | None, lora: LoraConfig | None = None) -> Config:
    """A pointer over an encoder, or the first two layers of the generator."""
    compressor = CompressorConfig(n_layers=2, chunk_tokens=64, rates=(16, 8))
    if encoder is not None:
        compressor = replace(compressor, kind="encoder", base_model=str(encoder), readout="pointer")
    return Config(compressor=compressor, generator=GeneratorConfig(base_model=str(generator), lora=lora))


def random_adapter(model: Model) -> dict[str, Tensor]:
    """Large enough to change the answer."""
    random = torch.Generator().manual_seed(5)
    shapes = adapter_shapes(model.generator.model, LORA)
    return {name: torch.randn(shape, generator=random) * 0.2 for name, shape in shapes.items()}


def ask(model: Model, mode: Any = "compressed") -> Answer:
    return answer(model, "How long is the Rhine?", PASSAGES, mode, options=GenerationOptions(max_new_tokens=8))


def assert_same(one: Answer, other: Answer) -> None:
    """Bit for bit: memory embeddings, scores and words."""
    assert one.text == other.text
    for a, b in zip(one.passages, other.passages, strict=True):
        assert torch.equal(a.memory, b.memory)
        assert [chunk.score for chunk in a.chunks] == [chunk.score for chunk in b.chunks]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_bert: Path) -> Path:
    """A checkpoint with everything that one can have: an encoder and an adapter. Not to be changed."""
    model = build_model(make_config(tiny_llama, tiny_bert, LORA))
    folder = tmp_path_factory.mktemp("saved") / "v1"
    save_checkpoint(model, folder, adapter=random_adapter(model), training={"steps": 7})
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "v1")


def sign(folder: Path) -> None:
    """Make the manifest fit what is in the folder, as one would who can write to it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    manifest["files"] = {
        str(path.relative_to(folder)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    save_file(dict(change(load_file(path))), path)


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


# Loading: nothing that was not saved


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / target.name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: (folder / MANIFEST).unlink(), r"manifest\.json is missing"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: is missing"),
        (lambda folder: (folder / "generator.safetensors").unlink(), r"generator\.safetensors: is missing"),
        (lambda folder: (folder / "compressor_base/tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda folder: (folder / "notes.txt").write_text("x"), r"notes\.txt: is not a file of a checkpoint"),
        (lambda folder: (folder / "code").mkdir(), "code: is not a file of a checkpoint"),
        (lambda folder: (folder / "generator").mkdir(), "generator/: is there"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin: may hold pickled"),
        (
            lambda folder: (folder / "compressor_base/x.PKL").write_bytes(b"x"),
            "compressor_base/x.PKL: may hold pickled",
        ),
        (lambda folder: link(folder / "golden.json"), r"golden\.json: is a symbolic link"),
        (lambda folder: (folder / "config.json").write_text(" " * (2 << 20)), "over the limit of 1048576"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"config\.json: has 2 bytes"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), r"manifest\.json: is not JSON"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), r"manifest\.json: is not JSON"),
        (lambda folder: edit_json(folder / MANIFEST, lambda m: m.update(extra=1)), "extra: unknown key"),
        (lambda folder: edit_json(folder / MANIFEST, lambda m: m.update(format_version=2)), "format_version"),
        (lambda folder: edit_json(folder / MANIFEST, lambda m: m.pop("dtype")), "dtype"),
    ],
)
def test_a_spoilt_folder_is_refused(copied: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(copied)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copied)


SLOTS = "slots"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(extra=1), "extra: unknown key"),
        ("config.json", lambda c: c["compressor"].update(chunk_tokens="many"), "compressor.chunk_tokens"),
        ("config.json", lambda c: c["compressor"].update(chunk_tokens=10**9, rates=[1]), "positions"),
        ("config.json", lambda c: c["compressor"].update(readout="memory", projection_dim=10**9), "tensors, first"),
        ("config.json", lambda c: c["compressor"].update(kind="n_layers", base_model=""), "compressor_base/: is there"),
        ("config.json", lambda c: c["generator"].update(lora=None), "generator.safetensors: must be there"),
        ("config.json", lambda c: c["generator"]["lora"].update(r=3), r"has shape \(2, 128\), not \(3, 128\)"),
        ("compressor_base/config.json", lambda c: c.update(hidden_size=10**6), "shape|cannot be built"),
        ("compressor_base/config.json", lambda c: c.update(model_type="nothing"), "cannot be built"),
        ("golden.json", lambda c: c.update(extra=1), "extra: unknown key"),
        ("golden.json", lambda c: c.update(rate=5), r"golden\.json: rate"),
        ("golden.json", lambda c: c.update(query=" "), r"golden\.json: query"),
        ("golden.json", lambda c: c.update(query="Another question?"), "golden example: memory is off by"),
        ("golden.json", lambda c: c.update(answer_ids=[10**6] * len(c["answer_ids"])), "does not have"),
        ("golden.json", lambda c: c.update(answer_ids=[1] * 10_000), "answer_ids"),
    ],
)
def test_what_is_signed_but_does_not_fit_is_refused(
    copied: Path, file: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_json(copied / file, change)
    sign(copied)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copied)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("compressor.safetensors", lambda t: t | {"extra": torch.zeros(1)}, "1 unknown tensors, first extra"),
        (
            "compressor.safetensors",
            lambda t: {n: v for n, v in t.items() if n != SLOTS},
            "lacks 1 tensors, first slots",
        ),
        ("compressor.safetensors", lambda t: t | {SLOTS: t[SLOTS][1:].clone()}, r"slots has shape \(8, 48\), not \(9"),
        ("compressor.safetensors", lambda t: t | {SLOTS: t[SLOTS].half()}, "slots is stored as F16, not F32"),
        ("compressor.safetensors", lambda t: t | {SLOTS: t[SLOTS].long()}, "slots is stored as I64, not F32"),
        ("compressor.safetensors", lambda t: t | {SLOTS: t[SLOTS].flip(0)}, "golden example: .* is off"),
        ("generator.safetensors", lambda t: {n: v * 2 for n, v in t.items()}, "golden example: logprobs is off"),
        ("generator.safetensors", lambda t: {n: v * float("nan") for n, v in t.items()}, "not finite"),
        ("golden.safetensors", lambda t: t | {"memory": t["memory"] + 1}, "golden example: memory is off"),
        ("golden.safetensors", lambda t: t | {"memory": t["memory"] * float("nan")}, "golden example: memory is off"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    copied: Path, file: str, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], message: str
) -> None:
    edit_tensors(copied / file, change)
    sign(copied)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copied)


def test_a_file_that_is_no_safetensors_file_is_refused(copied: Path) -> None:
    # A header that claims to be 2^62 bytes long.
    (copied / "compressor.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    sign(copied)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_checkpoint(copied)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_goes_unnoticed(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "v1", ignore_errors=True)
    copied = shutil.copytree(saved, tmp_path / "v1")
    files = sorted(path for path in copied.rglob("*") if path.is_file() and path.name != MANIFEST)
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name}: its sha256"):
        load_checkpoint(copied)


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
