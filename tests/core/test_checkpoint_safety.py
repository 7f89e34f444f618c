"""Loading a checkpoint: whatever was not saved so is refused, and the message says what."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.checkpoint import load_checkpoint
from core.errors import CheckpointError
from core.manifest import MANIFEST
from tests.tiny_checkpoints import edit_json, edit_tensors, sign


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / target.name)


def circle(path: Path) -> None:
    """A link to itself."""
    shutil.rmtree(path)
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (circle, "is no folder"),
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


def shift_ids(tokenizer: dict[str, Any]) -> None:
    """Give all but the first tokens of a vocabulary an id that no table of embeddings has."""
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({token: index + 10**6 for token, index in vocabulary.items() if index >= 200})


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
        ("config.json", lambda c: c["compressor"].update(pointer_window=10**30), "compressor.pointer_window: .* 4096"),
        ("config.json", lambda c: c["compressor"].update(pointer_lead=10**30), "compressor.pointer_lead: .* 4096"),
        (
            "config.json",
            lambda c: c["compressor"].update(chunk_tokens=10**400),
            "compressor.chunk_tokens: must",
        ),
        (
            "compressor_base/config.json",
            lambda c: c.update(num_hidden_layers=10**6),
            "num_hidden_layers is 1000000",
        ),
        ("compressor_base/config.json", lambda c: c.update(hidden_size=10**6), "shape|cannot be built"),
        ("compressor_base/config.json", lambda c: c.update(hidden_size="wide"), "cannot be built"),
        ("compressor_base/config.json", lambda c: c.update(model_type="nothing"), "cannot be built"),
        ("compressor_base/tokenizer.json", shift_ids, "tokens that its model does not have"),
        ("golden.json", lambda c: c.update(extra=1), "extra: unknown key"),
        ("golden.json", lambda c: c.update(rate=5), r"golden\.json: rate"),
        ("golden.json", lambda c: c.update(query=" "), r"golden\.json: query"),
        (
            "golden.json",
            lambda c: c.update(query="the " * 9000),
            r"golden\.json: query: has 9000 tokens; the compressor reads at most",
        ),
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
