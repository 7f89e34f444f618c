"""The generator's graphs of a checkpoint: written, loaded, swapped, and refused where anything does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.accelerators import GeneratorBuckets, JitAccelerator, NeuronAccelerator
from core.accelerators.artifact import accelerate, write_graphs
from core.accelerators.base import Accelerator, CompileSpec
from core.accelerators.buckets import GOLDEN_TOKENS, parse_buckets
from core.accelerators.generator_artifact import accelerate_generator
from core.accelerators.graph import longest_row
from core.checkpoint import load_checkpoint, save_checkpoint
from core.decoding import generate
from core.errors import CheckpointError, ConfigError
from core.model import Model, build_model
from core.prompts import Block
from core.sampling import GenerationOptions
from tests.neuron_double import NeuronDouble
from tests.tiny_checkpoints import LORA, edit_json, edit_tensors, make_config, random_adapter, sign

BUCKETS = GeneratorBuckets(parse_buckets("1x96,1x192"), parse_buckets("2x96,2x192"))
NAMES = ["prefill-1x96", "prefill-1x192", "decode-2x96", "decode-2x192"]


def save(
    generator: Path,
    folder: Path,
    accelerator: Accelerator,
    *,
    adapted: bool = False,
    dtype: torch.dtype = torch.float32,
    reuse: Path | None = None,
    buckets: GeneratorBuckets | None = BUCKETS,
) -> Path:
    """A checkpoint with graphs of both; `adapted`: its generator has other weights than its base model."""
    model = build_model(make_config(generator, None, LORA if adapted else None))
    spec = CompileSpec("inf2") if accelerator.name == "neuron" else None

    def add(saved: Model, staging: Path) -> None:
        rows = parse_buckets(f"1x{longest_row(saved.compressor)}")
        write_graphs(
            saved,
            staging,
            accelerator,
            rows,
            dtype=dtype,
            name=folder.name,
            spec=spec,
            reuse=reuse,
            generator=None if reuse else buckets,
        )

    save_checkpoint(model, folder, adapter=random_adapter(model) if adapted else None, dtype=dtype, add=add)
    return folder


@pytest.fixture(scope="module")
def traced(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for `jit`. Not to be changed."""
    return save(tiny_llama, tmp_path_factory.mktemp("traced") / "v1", JitAccelerator())


@pytest.fixture
def copied(traced: Path, tmp_path: Path) -> Path:
    return shutil.copytree(traced, tmp_path / "v1")


def answers(model: Model, graphs: bool) -> list[list[int]]:
    prompts = [model.template.build(f"Which {n}?", [Block(text_ids=list(range(10, 10 + n)))]) for n in (3, 20, 40)]
    options = [GenerationOptions(max_new_tokens=8)] * 3
    passes = model.decode_passes()
    assert (passes is not None) == graphs
    return [completion.token_ids for completion in generate(model.generator, prompts, options, passes=passes)]


def test_a_checkpoint_with_the_generators_graphs_answers_as_without(traced: Path) -> None:
    model = load_checkpoint(traced)
    expected = answers(model, False)
    graphs = accelerate_generator(model, traced, JitAccelerator())
    assert graphs is not None
    model.generator_graphs = graphs.passes
    assert answers(model, True) == expected
    assert sorted(graphs.runs) == sorted(NAMES)
    assert {path.name for path in (traced / "graphs").iterdir()} == {
        "graphs.json",
        "golden.safetensors",
        "generator.safetensors",
    }
    golden = load_file(traced / "graphs" / "generator.safetensors")
    assert golden["prefill-1x96.tokens"].shape == (GOLDEN_TOKENS,)
    assert golden["prefill-1x96.ids"].shape == (72,)
    record = json.loads((traced / "graphs" / "graphs.json").read_text())
    assert record["generator"]["buckets"]["decode"][1] == {"rows": 2, "length": 192}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neuron_graphs_are_stored_without_weights_and_taken_over_by_a_swap(
    tiny_llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    double = NeuronDouble()
    accelerator = NeuronAccelerator(sdk=double)
    first = save(tiny_llama, tmp_path / "v1", accelerator, dtype=dtype)
    second = save(tiny_llama, tmp_path / "v2", accelerator, adapted=True, dtype=dtype, reuse=first)
    assert len(double.compiled) == 1 + len(NAMES)  # none for the second
    found = []
    for folder in (first, second):
        assert {f"{name}.neff.pt" for name in NAMES} < {path.name for path in (folder / "graphs").iterdir()}
        model = load_checkpoint(folder, dtype=dtype)
        expected = answers(model, False)
        graphs = accelerate_generator(model, folder, accelerator)
        assert graphs is not None
        model.generator_graphs = graphs.passes
        found.append(answers(model, True))
        if dtype == torch.float32:  # in 16 bits rounding may tip a close choice; the golden vectors allow for it
            assert found[-1] == expected
    assert found[0] != found[1]
    assert len(double.moved) == 2 * len(NAMES)


@pytest.mark.parametrize("listed", [True, False])
def test_a_stored_graph_that_is_missing_is_named(tiny_llama: Path, tmp_path: Path, listed: bool) -> None:
    accelerator = NeuronAccelerator(sdk=NeuronDouble())
    folder = save(tiny_llama, tmp_path / "v1", accelerator)
    model = load_checkpoint(folder)
    (folder / "graphs/decode-2x96.neff.pt").unlink()
    if not listed:
        sign(folder)
        model = load_checkpoint(folder)
    said = r"graphs/decode-2x96\.neff\.pt: is missing"
    for run in (accelerate, accelerate_generator):
        with pytest.raises(CheckpointError, match=said):
            run(model, folder, accelerator)
    with pytest.raises(CheckpointError, match=said):
        save(tiny_llama, tmp_path / "v2", accelerator, reuse=folder)


def test_a_checkpoint_may_have_the_compressors_graphs_only(tiny_llama: Path, tmp_path: Path) -> None:
    folder = save(tiny_llama, tmp_path / "v1", JitAccelerator(), buckets=None)
    assert accelerate_generator(load_checkpoint(folder), folder, JitAccelerator()) is None


def test_graphs_of_another_generator_are_not_taken_over(traced: Path, tiny_mistral: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another"):
        save(tiny_mistral, tmp_path / "v2", JitAccelerator(), reuse=traced)
    assert not (tmp_path / "v2").exists()


def test_the_wrong_accelerator_or_dtype_is_fatal(traced: Path) -> None:
    with pytest.raises(CheckpointError, match="accelerator: were made for jit, and this is neuron"):
        accelerate_generator(load_checkpoint(traced), traced, NeuronAccelerator(sdk=NeuronDouble()))
    with pytest.raises(CheckpointError, match="dtype: were made for"):
        accelerate_generator(load_checkpoint(traced, dtype=torch.bfloat16), traced, JitAccelerator())


def test_other_weights_than_the_recorded_ones_are_fatal(traced: Path) -> None:
    model = load_checkpoint(traced)
    with torch.no_grad():
        model.generator.model.get_decoder().layers[2].self_attn.v_proj.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="prefill-1x96 is off by"):
        accelerate_generator(model, traced, JitAccelerator())


def test_another_architecture_is_fatal(traced: Path) -> None:
    model = load_checkpoint(traced)
    model.generator.model.config.rms_norm_eps = 0.1
    with pytest.raises(CheckpointError, match="graphs: generator: were made for"):
        accelerate_generator(model, traced, JitAccelerator())


def change_prompt(folder: Path) -> None:
    edit_tensors(folder / "graphs/generator.safetensors", lambda t: {n: v + n.endswith("ids") for n, v in t.items()})


def change_step(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["prefill-1x96.logits"][2] *= 1.1  # of the third token, which a decode graph gives
        return tensors

    edit_tensors(folder / "graphs/generator.safetensors", change)


def change_token(folder: Path) -> None:
    edit_tensors(
        folder / "graphs/generator.safetensors",
        lambda tensors: {n: (v + 1) % 100 if n.endswith("tokens") else v for n, v in tensors.items()},
    )


def drop_a_vector(folder: Path) -> None:
    edit_tensors(folder / "graphs/generator.safetensors", lambda tensors: dict(list(tensors.items())[1:]))


def shorten_prompts(folder: Path) -> None:
    def change(record: dict[str, dict[str, dict[str, list[object]]]]) -> None:
        record["generator"]["buckets"]["prefill"].pop()

    edit_json(folder / "graphs/graphs.json", change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_prompt, "prefill-1x96 is off by"),
        (change_step, "decode-2x96 is off by"),
        (change_token, "are not those of its logits"),
        (drop_a_vector, "lacks 1 tensors"),
        (shorten_prompts, "must be of 192 positions|unknown tensors"),
    ],
)
def test_what_does_not_fit_is_fatal_even_where_the_manifest_agrees(
    copied: Path, change: Callable[[Path], None], reason: str
) -> None:
    change(copied)
    sign(copied)
    with pytest.raises((CheckpointError, ConfigError), match=reason):
        accelerate_generator(load_checkpoint(copied, verify=False), copied, JitAccelerator())


def test_a_file_that_changed_since_the_load_is_refused(copied: Path) -> None:
    model = load_checkpoint(copied)
    change_prompt(copied)
    with pytest.raises(CheckpointError, match=r"generator.safetensors: its sha256"):
        accelerate_generator(model, copied, JitAccelerator())
    (copied / "graphs" / "sample-1x64.neff.pt").write_bytes(b"code")
    with pytest.raises(CheckpointError, match="pickled"):
        load_checkpoint(copied)
