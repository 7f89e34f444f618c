"""The graphs of a checkpoint: written, loaded, swapped, and refused where anything does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.accelerators import JitAccelerator, NeuronAccelerator, default_buckets
from core.accelerators.artifact import accelerate, write_graphs
from core.accelerators.base import Accelerator, CompileSpec
from core.accelerators.buckets import parse_buckets
from core.accelerators.graph import longest_row
from core.checkpoint import load_checkpoint, save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.errors import CheckpointError, ConfigError
from core.model import Model, build_model
from core.pipeline import compress, prepare
from tests.neuron_double import NeuronDouble
from tests.tiny_checkpoints import edit_json, edit_tensors, sign
from tests.tiny_pipeline import PASSAGES, QUERY


def build(generator: Path, seed: int = 1, layers: int = 1) -> Model:
    config = Config(
        compressor=CompressorConfig(n_layers=layers, chunk_tokens=32, query_tokens=64, rates=(8,)),
        generator=GeneratorConfig(base_model=str(generator)),
    )
    return build_model(config, seed=seed)


def save(model: Model, folder: Path, accelerator: Accelerator, **options: Any) -> Path:
    """A checkpoint with graphs, two buckets."""
    spec = CompileSpec("inf2") if accelerator.name == "neuron" else None

    def add(saved: Model, staging: Path) -> None:
        longest = longest_row(saved.compressor)
        buckets = parse_buckets(f"1x{longest},4x{longest}")
        dtype = options.get("dtype", torch.float32)
        reuse = options.get("reuse")
        write_graphs(saved, staging, accelerator, buckets, dtype=dtype, name=folder.name, spec=spec, reuse=reuse)

    save_checkpoint(model, folder, dtype=options.get("dtype", torch.float32), add=add)
    return folder


def memory(model: Model) -> torch.Tensor:
    [passages] = compress(model, [prepare(model, QUERY, PASSAGES)])
    return torch.cat([passage.memory for passage in passages])


@pytest.fixture(scope="module")
def traced(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for `jit`. Not to be changed."""
    return save(build(tiny_llama), tmp_path_factory.mktemp("traced") / "v1", JitAccelerator())


@pytest.fixture
def copied(traced: Path, tmp_path: Path) -> Path:
    return shutil.copytree(traced, tmp_path / "v1")


def test_a_checkpoint_with_graphs_answers_as_without(traced: Path) -> None:
    model = load_checkpoint(traced)
    expected = memory(model)
    accelerated = accelerate(model, traced, JitAccelerator())
    before = sum(accelerated.passes.values())
    model.accelerated = accelerated
    torch.testing.assert_close(memory(model), expected, atol=2e-5, rtol=1e-5)
    assert sum(accelerated.passes.values()) > before


def test_nothing_of_a_trace_is_stored(traced: Path) -> None:
    assert {path.name for path in (traced / "graphs").iterdir()} == {"graphs.json", "golden.safetensors"}
    record = json.loads((traced / "graphs" / "graphs.json").read_text())
    assert record["accelerator"] == "jit"
    assert record["versions"] == {}
    assert record["checkpoint"] == "v1"
    golden = load_file(traced / "graphs" / "golden.safetensors")
    assert {name.split(".")[0] for name in golden} == {f"{b['rows']}x{b['length']}" for b in record["buckets"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neuron_graphs_are_stored_without_weights_and_taken_over_by_a_swap(
    tiny_llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    double = NeuronDouble()
    accelerator = NeuronAccelerator(sdk=double)
    first = save(build(tiny_llama, seed=1), tmp_path / "v1", accelerator, dtype=dtype)
    assert len(double.compiled) == 2
    second = save(build(tiny_llama, seed=2), tmp_path / "v2", accelerator, dtype=dtype, reuse=first)
    assert len(double.compiled) == 2  # none for the second
    graphs = [sorted(path.name for path in (folder / "graphs").glob("*.neff.pt")) for folder in (first, second)]
    assert graphs[0] == graphs[1]
    assert len(graphs[0]) == 2
    for folder in (first, second):
        model = load_checkpoint(folder, dtype=dtype)
        expected = memory(model)
        model.accelerated = accelerate(model, folder, accelerator)
        atol, rtol = (2e-5, 1e-5) if dtype == torch.float32 else (0.1, 0.1)
        torch.testing.assert_close(memory(model), expected, atol=atol, rtol=rtol)
    assert len(double.compiled) == 2
    assert len(double.moved) == 4


def test_graphs_of_another_architecture_are_not_taken_over(tiny_llama: Path, tmp_path: Path, traced: Path) -> None:
    accelerator = NeuronAccelerator(sdk=NeuronDouble())
    first = save(build(tiny_llama), tmp_path / "v1", accelerator)
    with pytest.raises(CheckpointError, match="another architecture"):
        save(build(tiny_llama, layers=2), tmp_path / "v2", accelerator, reuse=first)
    with pytest.raises(CheckpointError, match="another accelerator"):
        save(build(tiny_llama), tmp_path / "v2", accelerator, reuse=traced)
    assert not (tmp_path / "v2").exists()


def test_without_graphs_there_is_nothing_to_run(tiny_llama: Path, tmp_path: Path) -> None:
    save_checkpoint(build(tiny_llama), tmp_path / "plain")
    model = load_checkpoint(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"has no graphs.*--target jit"):
        accelerate(model, tmp_path / "plain", JitAccelerator())


def test_the_wrong_accelerator_dtype_or_sdk_is_fatal(tiny_llama: Path, tmp_path: Path, traced: Path) -> None:
    with pytest.raises(CheckpointError, match="accelerator: were made for jit, and this is neuron"):
        accelerate(load_checkpoint(traced), traced, NeuronAccelerator(sdk=NeuronDouble()))
    with pytest.raises(CheckpointError, match=r"dtype: were made for torch.float32, and this is torch.bfloat16"):
        accelerate(load_checkpoint(traced, dtype=torch.bfloat16), traced, JitAccelerator())
    folder = save(build(tiny_llama), tmp_path / "v1", NeuronAccelerator(sdk=NeuronDouble()))
    newer = NeuronDouble()
    newer.__version__ = "2.9.0.2.16.1"  # of this one only
    with pytest.raises(CheckpointError, match=r"versions: were made for .*32035.*, and this is .*2\.16\.1"):
        accelerate(load_checkpoint(folder), folder, NeuronAccelerator(sdk=newer))


def spoil_weights(folder: Path) -> None:
    edit_tensors(folder / "compressor.safetensors", lambda tensors: {n: t * 1.5 for n, t in tensors.items()})


def change_golden(folder: Path) -> None:
    edit_tensors(
        folder / "graphs/golden.safetensors", lambda t: {n: v + 1 if n.endswith("ids") else v for n, v in t.items()}
    )


def drop_a_vector(folder: Path) -> None:
    edit_tensors(folder / "graphs/golden.safetensors", lambda tensors: dict(list(tensors.items())[1:]))


def shorten_buckets(folder: Path) -> None:
    edit_json(folder / "graphs/graphs.json", lambda record: record.update(buckets=[{"rows": 1, "length": 40}]))


def unknown_key(folder: Path) -> None:
    edit_json(folder / "graphs/graphs.json", lambda record: record.update(surprise=1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil_weights, "is off by"),
        (change_golden, "is off by"),
        (drop_a_vector, "lacks 1 tensors"),
        (shorten_buckets, "longest bucket 40|unknown tensors"),
        (unknown_key, "surprise: unknown key"),
    ],
)
def test_what_does_not_fit_is_fatal_even_where_the_manifest_agrees(
    copied: Path, change: Callable[[Path], None], reason: str
) -> None:
    change(copied)
    sign(copied)
    with pytest.raises((CheckpointError, ConfigError), match=reason):
        accelerate(load_checkpoint(copied, verify=False), copied, JitAccelerator())


def test_a_file_that_is_not_in_the_manifest_is_refused_before_it_is_read(copied: Path) -> None:
    (copied / "graphs" / "1x64.neff.pt").write_bytes(b"code")
    with pytest.raises(CheckpointError, match=r"graphs/1x64.neff.pt: is not listed"):
        load_checkpoint(copied)
    (copied / "graphs" / "1x64.neff.pt").rename(copied / "graphs" / "evil.pt")
    with pytest.raises(CheckpointError, match="pickled"):
        load_checkpoint(copied)


def test_a_folder_that_changed_since_it_was_loaded_is_refused(copied: Path) -> None:
    model = load_checkpoint(copied)
    change_golden(copied)
    with pytest.raises(CheckpointError, match=r"golden.safetensors: its sha256"):
        accelerate(model, copied, JitAccelerator())
    sign(copied)
    with pytest.raises(CheckpointError, match="was changed while it was loaded"):
        accelerate(model, copied, JitAccelerator())


def test_the_longest_row_has_a_default_bucket(tiny_llama: Path) -> None:
    longest = longest_row(build(tiny_llama).compressor)
    assert max(bucket.length for bucket in default_buckets(longest)) == longest
