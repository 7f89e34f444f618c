"""The generator's two graphs through XLA on the CPU: the compiler front end that Neuron's SDK traces with.

Runs in an environment of its own: `make test-xla` (requirements/xla-cpu-test.txt). No Neuron compiler, no device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from core.accelerators import Bucket, EagerAccelerator, GeneratorBuckets, GeneratorGraphs, compile_generator
from core.accelerators.base import Tensors
from core.accelerators.buckets import decode_name, parse_buckets, prefill_name
from core.accelerators.generator_graph import (
    DecodeGraph,
    GeneratorGraph,
    PrefillGraph,
    decode_example,
    prefill_example,
)
from core.accelerators.generator_vectors import record_generator, verify_generator
from core.decoding import generate
from core.generator import Generator
from core.sampling import GenerationOptions
from core.tensor_files import write_tensors
from tests.tiny_generators import load_tiny, prompt_of, tiny_generator
from tests.xla.xla_graph import (
    XlaAccelerator,
    XlaGraph,
    compiles,
    dynamic_shapes,
    forget_metrics,
    hlo_of,
    host_operators,
    unread,
)

GREEDY = GenerationOptions(max_new_tokens=12)
# XLA keeps what it has compiled for as long as the process runs, so a test that counts needs shapes of its own.
BUCKETS = GeneratorBuckets(parse_buckets("1x64,1x256"), parse_buckets("3x96,3x256"))
BATCH_BUCKETS = GeneratorBuckets(parse_buckets("1x60,1x250"), parse_buckets("3x90,3x250"))


class Case(NamedTuple):
    """A graph to be compiled, and how its inputs for one bucket are made."""

    graph: type[GeneratorGraph]
    example: Callable[[Generator, Bucket], Tensors]
    bucket: Bucket


CASES = {prefill_name(bucket): Case(PrefillGraph, prefill_example, bucket) for bucket in BUCKETS.prefill}
CASES |= {decode_name(bucket): Case(DecodeGraph, decode_example, bucket) for bucket in BUCKETS.decode}
KINDS = (Case(PrefillGraph, prefill_example, Bucket(1, 32)), Case(DecodeGraph, decode_example, Bucket(2, 32)))


@pytest.fixture(scope="module", params=["tiny_llama", "qwen2_mixed"])
def generator(request: pytest.FixtureRequest) -> Generator:
    """One mask for all layers, and one for each kind of layer."""
    return tiny_generator(request.param, request.getfixturevalue)


def noise(generator: Generator, case: Case, seed: int) -> Tensors:
    """Inputs of `case`: noise also where there is padding, or nothing written yet, and other positions every time.

    Were the mask, or a position, lost on the way, noise would enter the numbers.
    """
    random = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(each.shape, generator=random)
        if each.is_floating_point()
        else torch.randint(case.bucket.length, each.shape, generator=random)
        for each in case.example(generator, case.bucket)
    )


def golden_errors(generator: Generator, graphs: GeneratorGraphs, folder: Path) -> dict[str, float]:
    """What loading a checkpoint does: each graph repeats its golden vectors, and is compiled by that."""
    write_tensors(folder / "golden.safetensors", record_generator(generator, BUCKETS), torch.float32)
    return verify_generator(graphs, folder / "golden.safetensors")


@pytest.mark.parametrize("case", KINDS, ids=["prefill", "decode"])
def test_the_logits_read_every_input_and_no_shape_is_dynamic(generator: Generator, case: Case) -> None:
    """Of the logits alone: that keys and values go out again would say nothing about who reads them."""
    inputs, outputs = XlaGraph(case.graph(generator)).record(*case.example(generator, case.bucket))
    assert unread(inputs, outputs[:1]) == []
    assert dynamic_shapes(hlo_of(outputs)) == []


def test_same_numbers_one_compile_a_bucket_and_no_operator_on_the_host(generator: Generator, tmp_path: Path) -> None:
    """Of logits, keys and values; once the golden vectors are repeated, nothing is compiled any more."""
    graphs = compile_generator(generator, XlaAccelerator(), BUCKETS)
    eager = compile_generator(generator, EagerAccelerator(), BUCKETS)
    forget_metrics()
    errors = golden_errors(generator, graphs, tmp_path)
    assert errors.keys() == set(BUCKETS.names)
    assert max(errors.values()) < 1e-5
    assert compiles() == len(BUCKETS.names)
    for name, case in CASES.items():
        for seed in range(3):
            inputs = noise(generator, case, seed)
            torch.testing.assert_close(graphs.run(name, *inputs), eager.run(name, *inputs), atol=1e-5, rtol=1e-5)
    assert compiles() == len(BUCKETS.names)
    assert host_operators() == []


def test_a_batch_writes_the_same_tokens_and_compiles_nothing_after_the_first(generator: Generator) -> None:
    """Seven prompts in three slots, short and long: they wait, join, leave and move; slots grow."""
    graphs = compile_generator(generator, XlaAccelerator(), BATCH_BUCKETS)
    forget_metrics()
    for first in (0, 7):
        prompts = [prompt_of(generator, first + i, blocks=2 * i) for i in range(7)]
        expected = generate(generator, prompts, [GREEDY] * 7)
        assert len({tuple(completion.token_ids) for completion in expected}) > 1
        assert generate(generator, prompts, [GREEDY] * 7, passes=graphs.passes()) == expected
        assert min(graphs.runs.values()) > 0
        assert compiles() == len(BATCH_BUCKETS.names)
    assert host_operators() == []


@pytest.mark.parametrize("case", KINDS, ids=["prefill", "decode"])
@torch.no_grad()
def test_a_swap_of_weights_compiles_nothing(tiny_llama: Path, case: Case) -> None:
    generator, other = load_tiny(tiny_llama), load_tiny(tiny_llama)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    inputs = noise(generator, case, seed=1)
    run = XlaGraph(case.graph(generator))
    first, *_ = run(*inputs)
    before = compiles()
    run.replace_weights(case.graph(other).state_dict())
    changed = run(*inputs)
    assert compiles() == before
    assert not torch.allclose(changed[0], first, atol=1e-2)
    torch.testing.assert_close(changed, case.graph(other)(*inputs), atol=1e-4, rtol=1e-4)
