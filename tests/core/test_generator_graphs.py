"""The generator on graphs of fixed shapes: the same tokens as without, whatever joins, however padded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from core.accelerators import Bucket, EagerAccelerator, GeneratorBuckets, JitAccelerator, compile_generator
from core.accelerators.base import Accelerator
from core.accelerators.buckets import default_prefill, parse_buckets
from core.accelerators.generator_graph import (
    DecodeGraph,
    GeneratorGraph,
    PrefillGraph,
    decode_example,
    empty_cache,
    prefill_example,
)
from core.accelerators.generator_passes import GraphPasses
from core.attention import GROUPED
from core.config import PromptConfig
from core.decoding import DecodeBatch, generate
from core.errors import ConfigError, TooLargeError
from core.generator import Generator
from core.prompts import Block, PromptTemplate
from core.sampling import GenerationOptions
from core.tokenization import encode, load_tokenizer
from tests.tiny_generators import WINDOWED, load_tiny, prompt_of, tiny_generator

GREEDY = GenerationOptions(max_new_tokens=12)
SAMPLED = GenerationOptions(max_new_tokens=12, temperature=1.3, top_k=40, top_p=0.95, seed=11)
BUCKETS = GeneratorBuckets(parse_buckets("1x64,1x256"), parse_buckets("3x96,3x256"))


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen3", *WINDOWED])
def generator(request: pytest.FixtureRequest) -> Generator:
    return tiny_generator(request.param, request.getfixturevalue)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Generator:
    return load_tiny(tiny_llama)


@pytest.mark.parametrize("accelerator", [EagerAccelerator(), JitAccelerator()], ids=lambda each: each.name)
def test_the_same_tokens_as_without_graphs(generator: Generator, accelerator: Accelerator) -> None:
    prompts = [prompt_of(generator, seed, blocks=2 * seed) for seed in range(7)]
    options = [GREEDY, SAMPLED, GREEDY, GREEDY, SAMPLED, GREEDY, GREEDY]
    expected = generate(generator, prompts, options)
    graphs = compile_generator(generator, accelerator, BUCKETS)
    assert generate(generator, prompts, options, passes=graphs.passes()) == expected
    assert min(graphs.runs.values()) > 0  # short prompts and long ones, and slots that grew
    assert len({tuple(completion.token_ids) for completion in expected}) > 1


def test_numbers_that_overflow_stay_with_their_sequence(llama: Generator) -> None:
    graphs = compile_generator(llama, EagerAccelerator(), BUCKETS)
    long, short, damaged = prompt_of(llama, 2, blocks=12), prompt_of(llama, 1), prompt_of(llama, 9, blocks=9)
    damaged = replace(damaged, memory=torch.full_like(damaged.memory, torch.inf))
    batch = DecodeBatch(llama, 3, 256, passes=graphs.passes())
    batch.add([long, damaged], [GenerationOptions(max_new_tokens=30), GenerationOptions(max_new_tokens=2)])
    batch.step()
    batch.step()
    (after,) = batch.add([short], [GREEDY])
    drain(batch)
    assert after.token_ids == generate(llama, [short], [GREEDY])[0].token_ids


def drain(batch: DecodeBatch) -> None:
    while batch.live:
        batch.step()


def test_sequences_that_join_and_leave_change_no_answer(llama: Generator) -> None:
    """A prompt that was read waits in its slot while the others take a step: nothing may be written over it."""
    prompts = [prompt_of(llama, seed, blocks=seed) for seed in range(1, 6)]
    expected = [generate(llama, [prompt], [GREEDY])[0].token_ids for prompt in prompts]
    batch = DecodeBatch(llama, 8, 999, passes=compile_generator(llama, EagerAccelerator(), BUCKETS).passes())
    assert (batch.max_sequences, batch.max_tokens) == (3, 256)
    running = batch.add(prompts[:1], [GREEDY])
    batch.step()
    running += batch.add(prompts[1:3], [GREEDY] * 2)
    for _ in range(3):
        batch.step()
    batch.cancel(running[0])
    running += batch.add(prompts[3:4], [GREEDY])
    drain(batch)
    held = batch.kv_bytes
    running += batch.add(prompts[4:], [GREEDY])  # alone, and short
    assert batch.kv_bytes <= held
    drain(batch)
    assert running[0].token_ids == expected[0][:4]
    assert [sequence.token_ids for sequence in running[1:]] == expected[1:]


@torch.inference_mode()
def test_a_padded_prompt_is_an_unpadded_one(generator: Generator) -> None:
    prompt = prompt_of(generator, 3)
    exact, padded = Bucket(1, prompt.tokens), Bucket(1, 2 * prompt.tokens)
    graphs = compile_generator(
        generator, EagerAccelerator(), GeneratorBuckets((exact, padded), (Bucket(2, padded.length),))
    )
    logits, steps = [], []
    for bucket in (exact, padded):
        passes = GraphPasses(graphs)
        passes.reserve(2, padded.length, idle=True)
        logits.append(passes.read(1, prompt, bucket))
        steps.append(passes.decode(torch.tensor([5, 6]), torch.tensor([0, prompt.tokens]), prompt.tokens + 1)[1])
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(steps[0], steps[1])


def changed(graph: GeneratorGraph, inputs: tuple[Tensor, ...], index: int, change: Any) -> bool:
    other = list(inputs)
    other[index] = change(inputs[index].clone())
    return not torch.equal(graph(*inputs)[0], graph(*other)[0])


@torch.inference_mode()
def test_every_input_matters_and_nothing_behind_a_position_does(llama: Generator) -> None:
    prefill, decode = PrefillGraph(llama), DecodeGraph(llama)
    random = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=random) if tensor.is_floating_point() else tensor

    reading = tuple(map(noise, prefill_example(llama, Bucket(1, 16))))  # its last token stands at 8
    writing = tuple(map(noise, decode_example(llama, Bucket(3, 16))))  # at 0, 1 and 2
    assert changed(prefill, reading, 1, lambda last: last - 1)
    assert changed(prefill, reading, 0, lambda each: each.index_fill(1, torch.tensor([3]), 1.0))
    assert not changed(prefill, reading, 0, lambda each: each.index_fill(1, torch.tensor([9]), 1.0))
    for index in range(len(writing)):
        if index == 1:
            assert changed(decode, writing, index, lambda positions: positions + 1)
            continue
        assert changed(decode, writing, index, lambda each: each.index_fill(0, torch.tensor([2]), 1.0))
    for index in range(2, len(writing)):
        assert not changed(decode, writing, index, lambda each: each.index_fill(2, torch.tensor([3, 15]), 1.0))


@torch.inference_mode()
def test_a_step_writes_one_position_of_each_slot(llama: Generator) -> None:
    embeddings, positions, *cache = decode_example(llama, Bucket(3, 16))
    _, *written = DecodeGraph(llama)(embeddings + 1, positions, *cache)
    assert len(written) == len(cache) == 2 * llama.model.config.num_hidden_layers
    for tensor in written:
        places = [[int(place) for place in slot.abs().sum((0, 2)).nonzero()] for slot in tensor]
        assert places == [[0], [1], [2]]


def test_the_graphs_share_the_generators_weights_and_hold_no_table(llama: Generator) -> None:
    own = {parameter.data_ptr() for parameter in llama.parameters()}
    state = GeneratorGraph(llama).state_dict()
    assert {value.data_ptr() for value in state.values()} <= own
    assert not [name for name in state if "embed" in name]
    assert llama.model.config._attn_implementation == GROUPED
    assert len(empty_cache(llama, Bucket(1, 16))) == 8


def test_what_has_no_graph_is_refused(llama: Generator) -> None:
    passes = compile_generator(llama, EagerAccelerator(), BUCKETS).passes()
    with pytest.raises(TooLargeError, match="at most 255 fit"):
        DecodeBatch(llama, 1, 999, passes=passes).add([prompt_of(llama, 1, blocks=90)], [GREEDY])
    for prefill, decode, reason in (
        ("2x64", "3x64", "of 1 row"),
        ("1x64", "3x32,4x64", "same number of slots"),
        ("1x64", "3x128", "must be of 128 positions"),
        ("1x8,1x64", "3x64", "must be of 16 positions or more"),
        ("1x64,1x64", "3x64", "named twice"),
        ("1x9000", "3x9000", "8192 positions"),
    ):
        with pytest.raises(ConfigError, match=reason):
            compile_generator(
                llama, EagerAccelerator(), GeneratorBuckets(parse_buckets(prefill), parse_buckets(decode))
            )
    assert [bucket.length for bucket in default_prefill(1024)] == [128, 256, 512, 1024]


def test_frequencies_that_depend_on_positions_are_refused(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ConfigError, match="type dynamic"):
        GeneratorGraph(Generator(model, load_tokenizer(tiny_llama)))


def test_smollm2_writes_the_same_from_traces(smollm2: Path) -> None:
    generator = load_tiny(smollm2)
    text = "The capital of Freedonia is Zubrovka."
    template = PromptTemplate(generator.tokenizer, PromptConfig())
    memory = generator.embed(torch.tensor(encode(generator.tokenizer, "Lutz is a city in Sylvania.").ids))
    blocks = [Block(text_ids=encode(generator.tokenizer, text).ids), Block(memory=memory)]
    prompts = [template.build(f"What is the capital of {land}?", blocks) for land in ("Freedonia", "Sylvania")]
    expected = generate(generator, prompts, [GREEDY] * 2)
    assert "Zubrovka" in expected[0].text
    length = max(prompt.tokens for prompt in prompts)
    buckets = GeneratorBuckets((Bucket(1, length), Bucket(1, length + 16)), (Bucket(2, length + 16),))
    graphs = compile_generator(generator, JitAccelerator(), buckets)
    assert generate(generator, prompts, [GREEDY] * 2, passes=graphs.passes()) == expected
    longest = max(prompts, key=lambda prompt: prompt.tokens)
    with torch.inference_mode():
        passes = graphs.passes()
        passes.reserve(2, length + 16, idle=True)
        unpadded, padded = (passes.read(0, longest, bucket) for bucket in buckets.prefill)
    torch.testing.assert_close(unpadded, padded, atol=1e-3, rtol=1e-4)
